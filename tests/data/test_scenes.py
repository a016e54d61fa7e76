"""Scenes: what they say of themselves is what they show."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from volvelle.data.masks import read_masks
from volvelle.data.scenes import CLASSES, LEAST_VISIBLE, Scenes, write_scenes
from volvelle.errors import UsageError


@pytest.fixture
def garments(monkeypatch):
    """Stand-ins for Fashion-MNIST: a disc of each class, so that nothing is fetched."""
    y, x = np.mgrid[:28, :28]
    disc = (((x - 14) ** 2 + (y - 14) ** 2) < 120) * 200
    images = torch.from_numpy(np.stack([disc] * 20).astype(np.uint8))
    found = images, torch.arange(20) % 10
    monkeypatch.setattr("volvelle.data.scenes.fetch", lambda name: name)
    monkeypatch.setattr("volvelle.data.scenes.read_idx_folder", lambda folder: (found, found))


def test_boxes_masks_and_captions_agree(garments):
    scenes = Scenes(12, size=96, seed=1)
    counts = set()
    for index in range(12):
        scene = scenes.scene(index)
        counts.add(len(scene.garments))
        assert scene.image.shape == (96, 96, 3)
        assert set(np.unique(scene.instances)) == set(range(len(scene.garments) + 1))
        for number, garment in enumerate(scene.garments, 1):
            seen = scene.instances == number
            assert (scene.mask[seen] == garment.label).all()
            rows, columns = np.nonzero(seen)
            assert garment.box == (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)
            assert garment.area == seen.sum()
            assert garment.colour in scene.caption
            assert CLASSES[garment.label] in scene.caption
        assert (scene.mask == 0).sum() == (scene.instances == 0).sum()
        assert scene.ground in scene.caption
    assert counts <= {1, 2, 3, 4}
    assert len(counts) > 1


def test_a_scene_depends_on_seed_part_and_number_alone(garments):
    def image(seed=0, part="train", index=3, count=5):
        return Scenes(count, size=64, seed=seed, part=part).scene(index).image

    assert (image() == image(count=9)).all()
    assert (image() != image(seed=1)).any()
    assert (image() != image(part="val")).any()
    assert (image() != image(index=2)).any()


def test_garments_stay_visible(garments):
    scenes = Scenes(20, size=64, garments=(4, 4))
    for index in range(20):
        found = scenes.scene(index).garments
        whole = [a for a in found if (a.box[2] - a.box[0]) * (a.box[3] - a.box[1])]
        assert len(whole) == len(found)
        # A disc fills π/4 of its box; what is left of it is not less than the promised share of that.
        assert all(g.area > 0.5 * LEAST_VISIBLE * (g.box[2] - g.box[0]) * (g.box[3] - g.box[1]) for g in found)


def test_written_scenes_are_a_data_set(garments, tmp_path):
    folder = write_scenes(tmp_path / "s", train=4, val=2, size=64)
    assert {part: len(read_masks(folder, split=part)) for part in ("train", "val")} == {"train": 4, "val": 2}
    found = read_masks(folder, split="val")
    assert found.labels.names == CLASSES
    boxes = json.loads((folder / "val.json").read_text())
    assert len(boxes["images"]) == 2
    assert all(note["bbox"][2] > 0 and 1 <= note["category_id"] <= 10 for note in boxes["annotations"])
    captions = [json.loads(line) for line in (folder / "captions.jsonl").read_text().splitlines()]
    assert len(captions) == 6
    assert (folder / captions[0]["image"]).is_file()


def test_bad_numbers(garments):
    with pytest.raises(UsageError, match="size >= 32"):
        Scenes(1, size=8)
    with pytest.raises(IndexError, match="there are 1"):
        Scenes(1).scene(1)


def test_sides_say_how_large_a_garment_is(garments):
    for sides in ((0.25, 0.25), (0.75, 0.75)):
        scenes = Scenes(12, size=64, garments=(1, 1), sides=sides)
        found = [garment.box for i in range(12) for garment in scenes.scene(i).garments]
        longest = [max(x2 - x1, y2 - y1) for x1, y1, x2, y2 in found]
        assert max(longest) <= 64 * sides[0] < 2 * max(longest)
    with pytest.raises(UsageError, match="least first"):
        Scenes(1, sides=(0.5, 0.25))
