"""The models that Vision asks: runs of `train promptable` and `train detect`, opened when they are first asked for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from volvelle.cli.detecting import KIND as DETECT
from volvelle.cli.detecting import open_detector, trusted_score
from volvelle.cli.prompting import KIND as PROMPTABLE
from volvelle.cli.prompting import open_promptable
from volvelle.runs import scan
from volvelle.serve.errors import Refused
from volvelle.serve.vision import Finder, Recent, Segmenter
from volvelle.systems.detection.load import is_detector
from volvelle.systems.segmentation.sam.load import is_sam
from volvelle.systems.segmentation.sam.promptable import Promptable

KEPT = 2
"""Models of a kind that stay open."""
SMALL: dict[str, tuple[str, ...]] = {
    PROMPTABLE: (
        "train",
        "promptable",
        "steps=700",
        "size=128",
        "crop=128,128",
        "batch=2",
        "prompts=4",
        "refined=2",
        "rounds=2",
    ),
    DETECT: (
        "train",
        "detect",
        "model=thundernet-efficientnet-lite0",
        "weights=imagenet",
        "steps=500",
        "size=128",
        "upside_down=0",
        "average=0.99",
    ),
}
"""The trainings that the room offers where there is no model of a kind: on two idle cores of an AMD EPYC 107 s to a
mean IoU of .62 after one click on held-out scenes, and 87 s to a mAP at IoU .5 of .69."""


@dataclass(frozen=True)
class Kind:
    """One kind of model: whether a run has its weights, and how it is opened."""

    trained: Callable[[Path], bool]
    opened: Callable[[Path], Any]


def _segmenter(run: Path) -> Segmenter:
    return Segmenter(Promptable(open_promptable(run).eval()))


def _finder(run: Path) -> Finder:
    model, fit = open_detector(run)
    return Finder(model.eval(), fit, trusted_score(run))


KINDS = {PROMPTABLE: Kind(is_sam, _segmenter), DETECT: Kind(is_detector, _finder)}


class Models:
    """The runs in the folder `runs` that can be asked, by name; used from one thread."""

    def __init__(self, runs: Path):
        self.runs = runs
        self._open = {kind: Recent(KEPT) for kind in KINDS}

    def names(self, kind: str) -> list[str]:
        """The runs of a kind that have weights, newest first."""
        runs = [run for run in scan(self.runs) if run.manifest.get("kind") == kind]
        return [run.path.name for run in reversed(runs) if KINDS[kind].trained(run.path / "weights")]

    def get(self, kind: str, name: str) -> Any:
        """The Segmenter or the Finder of that run. Raises Refused for a name that is not in the list."""
        if name not in self.names(kind):
            raise Refused(404, f"there is no run of train {kind} called {name!r} with weights", param="run")
        path = self.runs / name
        return self._open[kind].get(name, lambda: KINDS[kind].opened(path))
