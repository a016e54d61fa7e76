"""IDX files, the format of MNIST and Fashion-MNIST: arrays of unsigned bytes with a short header (volvelle.hub.idx)."""

from __future__ import annotations

import gzip
import os
import struct
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from volvelle.errors import VolvelleError
from volvelle.hub.idx import AXES, check_folder

FASHION_MNIST = (
    "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot",
)  # fmt: skip
"""Class names in the order of the labels."""


def is_idx_folder(path: str | os.PathLike[str]) -> bool:
    """Whether the folder holds a file called as IDX sets call theirs."""
    return any((Path(path) / f"{name}{end}").is_file() for name in AXES for end in ("", ".gz"))


def read_idx_folder(path: str | os.PathLike[str]) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """((images, labels) to train on, (images, labels) to test on): images uint8 (n, y, x), labels int64 (n).

    Raises VolvelleError that names a missing or damaged file, and images and labels of different number.
    """
    folder = Path(path)
    train_images, train_labels, test_images, test_labels = (read_idx(file) for file in check_folder(folder))
    for images, labels, name in ((train_images, train_labels, "train"), (test_images, test_labels, "t10k")):
        if len(images) != len(labels):
            raise VolvelleError(f"{folder}: {name} has {len(images):,} images and {len(labels):,} labels")
    return (train_images, train_labels.long()), (test_images, test_labels.long())


def read_idx(path: str | os.PathLike[str]) -> Tensor:
    """The array of one file, gzipped or plain, as uint8. Raises VolvelleError for anything else."""
    try:
        with gzip.open(path) if str(path).endswith(".gz") else open(path, "rb") as stream:
            content = stream.read()
    except (OSError, EOFError) as error:
        raise VolvelleError(f"{path}: cannot be read ({error})") from error
    axes = content[3] if len(content) > 3 else 0
    if content[:3] != bytes((0, 0, 8)) or len(content) < 4 + 4 * axes:
        raise VolvelleError(f"{path}: not an IDX file of unsigned bytes")
    shape = struct.unpack(f">{axes}i", content[4 : 4 + 4 * axes])
    values = np.frombuffer(content, dtype=np.uint8, offset=4 + 4 * axes)
    if min(shape, default=0) < 0 or values.size != int(np.prod(shape)):
        raise VolvelleError(f"{path}: the header promises {shape}, {values.size:,} bytes follow")
    return torch.from_numpy(values.reshape(shape).copy())
