"""Pictures of two shapes with their classes, and a small training on them, which the tests of clicks share."""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image

from volvelle.runs import RunFolder
from volvelle.systems.segmentation.sam.load import sam
from volvelle.train.options import to_dict
from volvelle.train.recipes.promptable import TrainPromptable


def write(folder, part, count, seed):
    """Pictures of two bright shapes on a dark ground, with their classes."""
    draw = np.random.default_rng(seed)
    for kind in ("images", "masks"):
        (folder / kind / part).mkdir(parents=True)
    for i in range(count):
        classes = np.zeros((48, 64), dtype=np.uint8)
        for label, left in ((1, 2), (2, 34)):
            high, wide = draw.integers(14, 28, 2)
            top, begin = draw.integers(0, 48 - high), left + draw.integers(0, 30 - wide)
            classes[top : top + high, begin : begin + wide] = label
        classes[:3, :3] = 255
        colours = np.array([[30, 30, 30], [220, 60, 60], [60, 200, 240]] + [[0, 0, 0]] * 253)
        pixels = (colours[classes] + draw.integers(0, 15, (48, 64, 3))).astype(np.uint8)
        Image.fromarray(pixels).save(folder / "images" / part / f"{i}.png")
        Image.fromarray(classes).save(folder / "masks" / part / f"{i}.png")


def shapes(folder):
    """Eight such pictures to train on, two to measure on."""
    write(folder, "train", 8, 0)
    write(folder, "val", 2, 1)
    (folder / "classes.txt").write_text("background\nred\nblue\n")
    return folder


def random_sam():
    """A small model with random weights."""
    torch.manual_seed(0)
    return sam("lite0", size=64)


def recipe(data, **more):
    options = {
        "data": str(data), "least": 60, "weights": "none", "size": 64, "crop": (48, 64), "steps": 2, "batch": 2,
        "prompts": 2, "refined": 1, "rounds": 2, "precision": "fp32", "warmup": 1.0, "selection_share": 0.2,
        "average": None, "evaluate_every": 1, "checkpoint_every": 1, "keep_last": 9, "samples": 1, "clicks": (1, 3),
    }  # fmt: skip
    return TrainPromptable(**{**options, **more})


def run_of(tmp_path, name, options):
    return RunFolder.create(name, root=tmp_path, kind="promptable", config=to_dict(options))
