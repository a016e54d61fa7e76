"""Random views of pictures, and IDX files."""

from __future__ import annotations

import gzip
import random
import struct

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from volvelle.data.augment import View, crop_box, vary_colour
from volvelle.data.idx import FASHION_MNIST, read_idx, read_idx_folder
from volvelle.data.images_labelled import read_labelled
from volvelle.data.images_prepare import Preprocessing
from volvelle.errors import UsageError, VolvelleError

PICTURE = Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 60, 3), np.uint8))


@given(st.integers(1, 300), st.integers(1, 300), st.floats(0.05, 1), st.integers(0, 999))
@settings(max_examples=150, deadline=None)
def test_crops_lie_inside_and_have_their_share(width, height, share, seed):
    left, top, right, bottom = crop_box((width, height), (share, share), random.Random(seed))
    assert 0 <= left < right <= width
    assert 0 <= top < bottom <= height
    assert (right - left) * (bottom - top) == pytest.approx(share * width * height, rel=1e-6)


def test_a_view_depends_on_the_generator_alone():
    view, how = View(), Preprocessing(16)
    one, again, other = (view(PICTURE, how, random.Random(seed)) for seed in (1, 1, 2))
    assert (one.dtype, one.shape) == (torch.uint8, (3, 16, 16))
    assert torch.equal(one, again)
    assert not torch.equal(one, other)


def test_a_view_of_everything_is_the_picture_or_its_mirror_image():
    how = Preprocessing(40)
    plain = View(area=(1.0, 1.0), mirror=0.0, colour=0.0)(PICTURE, how, random.Random(0))
    mirrored = View(area=(1.0, 1.0), mirror=1.0, colour=0.0)(PICTURE, how, random.Random(0))
    assert torch.equal(plain.flip(2), mirrored)
    assert np.array_equal(
        plain.permute(1, 2, 0).numpy(), np.asarray(PICTURE.resize((40, 40), Image.Resampling.BICUBIC))
    )


def test_colours_vary_and_grey_stays_grey():
    grey = Image.new("L", (4, 4), 120).convert("RGB")
    found = np.asarray(vary_colour(grey, 0.5, random.Random(3))).astype(int)
    assert (found[..., 0] == found[..., 2]).all()
    assert vary_colour(PICTURE, 0.0, random.Random(0)) is PICTURE


@pytest.mark.parametrize("wrong", [{"area": (0.0, 1.0)}, {"area": (0.9, 0.5)}, {"mirror": 1.5}, {"colour": 1.0}])
def test_views_that_cannot_be(wrong):
    with pytest.raises(ValueError, match="View"):
        View(**wrong)


def write_idx(path, values: np.ndarray) -> None:
    header = bytes((0, 0, 8, values.ndim)) + struct.pack(f">{values.ndim}i", *values.shape)
    with gzip.open(path, "wb") if path.suffix == ".gz" else open(path, "wb") as stream:
        stream.write(header + values.astype(np.uint8).tobytes())


def idx_folder(folder):
    folder.mkdir()
    draw = np.random.default_rng(0)
    write_idx(folder / "train-images-idx3-ubyte.gz", draw.integers(0, 255, (20, 6, 5)))
    write_idx(folder / "train-labels-idx1-ubyte", np.arange(20) % 10)
    write_idx(folder / "t10k-images-idx3-ubyte", draw.integers(0, 255, (10, 6, 5)))
    write_idx(folder / "t10k-labels-idx1-ubyte.gz", np.arange(10))
    return folder


def test_idx_folders(tmp_path):
    (images, labels), (others, truth) = read_idx_folder(idx_folder(tmp_path / "fashion"))
    assert (images.shape, images.dtype, labels.dtype) == ((20, 6, 5), torch.uint8, torch.int64)
    assert truth.tolist() == list(range(10))
    train, held = read_labelled(tmp_path / "fashion")
    assert held is not None
    assert train.classes == FASHION_MNIST
    assert np.array_equal(np.asarray(held[3][0]), others[3].numpy())
    assert held.source(3) == f"{tmp_path / 'fashion'}/t10k[3]"
    with pytest.raises(UsageError, match="10 classes, where 2 are wanted"):
        read_labelled(tmp_path / "fashion", classes=("a", "b"))
    write_idx(tmp_path / "fashion" / "t10k-labels-idx1-ubyte.gz", np.arange(9))
    with pytest.raises(VolvelleError, match="10 images and 9 labels"):
        read_idx_folder(tmp_path / "fashion")


def test_damaged_idx_files(tmp_path):
    for name, content in (("short", b"\0\0\x08\x01\0\0\0\x05ab"), ("kind", b"\0\0\x0d\x01\0\0\0\x01aaaa"), ("no", b"")):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(VolvelleError, match=name):
            read_idx(tmp_path / name)
    (tmp_path / "cut.gz").write_bytes(gzip.compress(bytes(999))[:10])
    with pytest.raises(VolvelleError, match="cut"):
        read_idx(tmp_path / "cut.gz")
