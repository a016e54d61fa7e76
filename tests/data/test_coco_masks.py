"""COCO's JSON with masks: written, read, read by pycocotools, and what is wrong in it named."""

from __future__ import annotations

import contextlib
import io
import json

import numpy as np
import pytest
from PIL import Image

from volvelle.data.boxes import read_boxes
from volvelle.data.coco_masks import MaskedObject, read_coco_masks, read_segmentation, write_coco_masks
from volvelle.data.run_lengths import RunLengths
from volvelle.errors import VolvelleError

SIZE = (30, 40)


def objects(seed=0, count=3):
    draw = np.random.default_rng(seed)
    return [
        MaskedObject(
            RunLengths.of(draw.random(SIZE) < 0.3), name, facts={"predicted_iou": 0.5, "point_coords": [[1, 2]]}
        )
        for name in ["cat", "dog", "cat"][:count]
    ]


@pytest.fixture
def folder(tmp_path):
    for name in ("a.png", "b.png"):
        Image.new("RGB", SIZE[::-1]).save(tmp_path / name)
    images = [(name, SIZE[::-1]) for name in ("a.png", "b.png")]
    write_coco_masks(tmp_path / "notes.json", images, [objects(), objects(1, 1)], ["cat", "dog"])
    return tmp_path


def test_what_is_written_is_read(folder):
    (a, size, first), (_, _, second) = read_coco_masks(folder / "notes.json")
    assert (a, size) == (folder / "a.png", SIZE[::-1])
    for found, wanted in ((first, objects()), (second, objects(1, 1))):
        assert [(one.mask, one.name) for one in found] == [(one.mask, one.name) for one in wanted]
    assert json.loads((folder / "notes.json").read_text())["annotations"][0]["predicted_iou"] == 0.5


def test_a_detector_reads_its_boxes(folder):
    boxes = read_boxes(folder)[""]
    assert boxes.classes == ("cat", "dog")
    assert [tuple(box) for box in boxes.boxes[0].corners.tolist()] == [one.mask.box for one in objects()]


@pytest.mark.peer
def test_pycocotools_reads_it(folder):
    coco = pytest.importorskip("pycocotools.coco")
    with contextlib.redirect_stdout(io.StringIO()):
        peer = coco.COCO(str(folder / "notes.json"))
    found = [peer.annToMask(note) for note in peer.loadAnns(peer.getAnnIds(imgIds=[1]))]
    assert all(np.array_equal(mask, one.mask.mask()) for mask, one in zip(found, objects(), strict=True))


def test_polygons_alone_and_in_lists():
    square = [2, 3, 8, 3, 8, 9, 2, 9]
    assert read_segmentation(square, SIZE) == read_segmentation([square], SIZE)
    assert read_segmentation([square, [20, 3, 22, 3, 22, 5, 20, 5]], SIZE).area == 36 + 4


@pytest.mark.parametrize(
    ("segmentation", "told"),
    [
        ("text", "polygons or run lengths are wanted"),
        ([[1, 2, 3]], "three points"),
        ({"size": [3, 4], "counts": [12]}, "of 4 x 3 pixels, in a picture of 40 x 30"),
        ({"size": [30, 40], "counts": [12]}, "add up"),
    ],
)
def test_a_bad_one_is_named_with_its_place(folder, segmentation, told):
    document = json.loads((folder / "notes.json").read_text())
    document["annotations"][2]["segmentation"] = segmentation
    (folder / "notes.json").write_text(json.dumps(document))
    with pytest.raises(VolvelleError, match=rf"annotations\[2\]: .*{told}"):
        read_coco_masks(folder / "notes.json")


def test_an_object_without_a_mask_is_left_out(folder):
    document = json.loads((folder / "notes.json").read_text())
    del document["annotations"][0]["segmentation"]
    (folder / "notes.json").write_text(json.dumps(document))
    assert [one.name for one in read_coco_masks(folder / "notes.json")[0][2]] == ["dog", "cat"]
