"""Crowds: what is drawn is what the mask says, the same each time, and of many looks."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from volvelle.data import crowds as crowds_module
from volvelle.data.boxes import read_boxes
from volvelle.data.crowds import COUNT, INSIDE, UNCOVERED, Crowds, write_crowds
from volvelle.data.promptable import read_objects


@pytest.fixture
def garments(monkeypatch):
    """Stand-ins for Fashion-MNIST: bars in the training part, discs in the other, so that nothing is fetched."""
    y, x = np.mgrid[:28, :28]
    bar, disc = (abs(x - 14) < 6) * 200, (((x - 14) ** 2 + (y - 14) ** 2) < 120) * 200
    parts = [(torch.from_numpy(np.stack([one] * 4).astype(np.uint8)), torch.arange(4)) for one in (bar, disc)]
    monkeypatch.setattr(crowds_module, "fetch", lambda name: name)
    monkeypatch.setattr(crowds_module, "read_idx_folder", lambda folder: tuple(parts))


def test_a_crowd_depends_on_seed_part_and_number_alone(garments):
    image, objects = Crowds(3, size=96, seed=1).crowd(2)
    again = Crowds(5, size=96, seed=1).crowd(2)
    assert (image == again[0]).all()
    assert (objects == again[1]).all()
    for other in (Crowds(3, size=96, seed=2), Crowds(3, size=96, seed=1, part="val")):
        assert (image != other.crowd(2)[0]).any()
    with pytest.raises(IndexError, match="crowd 3: there are 3"):
        Crowds(3).crowd(3)


def test_objects_are_numbered_and_stay_visible(garments, monkeypatch):
    """Of each object what later ones leave is half of what lay in the picture, or more."""
    laid = []
    lay = crowds_module._lay

    def spied(draw, image, objects, left, shape, paint):
        done = lay(draw, image, objects, left, shape, paint)
        if done:
            laid.append((int((objects == len(left)).sum()), int(shape.sum())))
        return done

    monkeypatch.setattr(crowds_module, "_lay", spied)
    counts, overlapping, cut = set(), 0, 0
    for index in range(12):
        laid.clear()
        image, objects = Crowds(12, size=128).crowd(index)
        assert image.shape == (128, 128, 3)
        assert image.dtype == objects.dtype == np.uint8
        numbers, pixels = np.unique(objects[objects > 0], return_counts=True)
        assert numbers.tolist() == list(range(1, len(laid) + 1))
        for (first, whole), now in zip(laid, pixels.tolist(), strict=True):
            assert now >= UNCOVERED * first
            assert first >= INSIDE * whole
            overlapping, cut = overlapping + (now < first), cut + (first < whole)
        counts.add(len(laid))
    assert len(counts) > 3
    assert max(counts) <= COUNT[1]
    assert overlapping > 5, "crowds lie over each other"
    assert cut > 5, "and over the border"


def test_objects_of_most_crowds_have_nearly_one_colour(garments, monkeypatch):
    """Three of four; and in the picture an object is another colour than the ground beside it."""
    looks = []
    look = crowds_module._look
    monkeypatch.setattr(crowds_module, "_look", lambda *given: looks.append(look(*given)) or looks[-1])
    crowds = Crowds(60, size=64)
    contrast = []
    for index in range(60):
        image, objects = crowds.crowd(index)
        ground = image[objects == 0].mean(0)
        contrast += [abs(image[objects == i].mean(0) - ground).max() for i in range(1, int(objects.max()) + 1)]
    alike = [one for one in looks if one.deviation is not None]
    assert 36 <= len(alike) <= 54
    draw = np.random.default_rng(0)
    paints = np.stack([alike[0].paint(draw) for _ in range(200)])
    assert paints.std(0) == pytest.approx([10] * 3, rel=0.2)
    assert {one.shapes for one in looks} == {0.0, 0.5, 1.0}
    assert np.median(contrast) > 25


def test_smooth_shapes_are_one_piece_and_filled():
    """Seen from the middle an outline is one number for each direction: no ray leaves the shape and enters it again."""
    look = crowds_module._look(np.random.default_rng(3), np.full(3, 90.0))
    for seed in range(20):
        shape, paint = crowds_module._smooth(np.random.default_rng(seed), 41, look)
        assert paint.shape == (41, 41, 3)
        assert 0.1 < shape.mean() < 0.9
        for angle in np.linspace(0, 2 * np.pi, 16):
            steps = np.arange(0, 20)
            ray = shape[
                (20 + steps * np.sin(angle)).round().astype(int), (20 + steps * np.cos(angle)).round().astype(int)
            ]
            assert (np.diff(ray.astype(int)) <= 0).sum() == len(ray) - 1, "once outside, always outside"
            assert ray[0]


def test_written_crowds_are_a_data_set(garments, tmp_path):
    seen = []
    folder = write_crowds(
        tmp_path / "c", train=3, val=2, size=64, progress=lambda done, total: seen.append((done, total))
    )
    assert seen == [(i, 5) for i in range(1, 6)]
    for part, count in (("train", 3), ("val", 2)):
        crowds = Crowds(count, size=64, part=part)
        for index in range(count):
            image, objects = crowds.crowd(index)
            for kind, pixels in (("images", image), ("masks", objects)):
                assert (np.asarray(Image.open(folder / kind / part / f"{index:05d}.png")) == pixels).all()
    found = read_objects(folder, numbers="objects", least=20)
    assert {part: len(pictures) for part, pictures in found.items()} == {"train": 3, "val": 2}
    boxes = read_boxes(folder)
    assert {part: len(pictures) for part, pictures in boxes.items()} == {"train": 3, "val": 2}
    for part, pictures in boxes.items():
        assert pictures.classes == ("object",)
        for index, there in enumerate(pictures.boxes):
            _, objects = Crowds(len(pictures), size=64, part=part).crowd(index)
            assert len(there.corners) == objects.max()
            for number, (x1, y1, x2, y2) in enumerate(there.corners.int().tolist(), 1):
                rows, columns = np.nonzero(objects == number)
                assert (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1) == (x1, y1, x2, y2)
                assert there.areas[number - 1] == len(rows)
