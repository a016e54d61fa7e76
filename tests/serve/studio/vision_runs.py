"""Run folders of vision models with random weights, as `train promptable` and `train detect` leave them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

from volvelle.runs import RunFolder
from volvelle.systems import sam
from volvelle.systems.detection.load import detector, write_detector
from volvelle.systems.detection.names import named
from volvelle.systems.segmentation.sam.load import write_sam


def write_runs(root: Path) -> None:
    """Leave root/clicks and root/boxes."""
    torch.manual_seed(0)
    run = RunFolder.create("clicks", root=root, kind="promptable", config={"size": 64})
    write_sam(sam("lite0", size=64).eval(), run.path / "weights")
    run.update_manifest(status="finished")
    run = RunFolder.create("boxes", root=root, kind="detect", config={"size": 64, "stretch": True})
    model = detector(replace(named("thundernet-snet49", ("disc", "box")), size=64)).eval()
    write_detector(model, run.path / "weights")
    run.update_manifest(status="finished", trusted=0.0)
