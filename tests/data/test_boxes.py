"""Pictures with boxes: every layout, and everything that can be wrong in them."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from PIL import Image

from volvelle.data.boxes import Boxes, BoxFolder, read_boxes, write_coco
from volvelle.data.boxes_anchors import best_overlap, suggest_anchors
from volvelle.data.boxes_augment import Fit
from volvelle.data.scenes import write_scenes
from volvelle.errors import UsageError, VolvelleError

CAT, DOG = ("cat", (2, 3, 10, 9)), ("dog", (5, 5, 20, 15))


def picture(path, size=(40, 30)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (10, 200, 30)).save(path)


def voc(path, *objects, size=(40, 30), difficult=(), filename="x.jpg"):
    """An XML file; an object is (name, box), its number in `difficult` marks it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = ["<annotation>", f"  <filename>{filename}</filename>"]
    lines += [f"  <size><width>{size[0]}</width><height>{size[1]}</height></size>"]
    for number, (name, box) in enumerate(objects):
        corners = "".join(f"<{tag}>{v}</{tag}>" for tag, v in zip(("xmin", "ymin", "xmax", "ymax"), box, strict=True))
        hard = f"<difficult>{int(number in difficult)}</difficult>"
        lines += ["  <object>", f"    <name>{name}</name>{hard}", f"    <bndbox>{corners}</bndbox>", "  </object>"]
    path.write_text("\n".join([*lines, "</annotation>"]))


def coco(path, images, notes, categories=((7, "dog"), (3, "cat"))):
    """A JSON file: (id, file name) of pictures of 40 x 30; (image, category, x y w h, crowd)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    document = {
        "images": [{"id": i, "file_name": name, "width": 40, "height": 30} for i, name in images],
        "categories": [{"id": i, "name": name} for i, name in categories],
        "annotations": [
            {"id": n, "image_id": i, "category_id": c, "bbox": list(box), "iscrowd": crowd}
            for n, (i, c, box, crowd) in enumerate(notes)
        ],
    }
    path.write_text(json.dumps(document))


def rows(folder, index=0):
    boxes = folder.boxes[index]
    return [
        (folder.classes[label], *map(float, box), bool(ignored))
        for label, box, ignored in zip(boxes.labels, boxes.corners, boxes.ignored, strict=True)
    ]


# Layouts.


def test_voc_with_lists(tmp_path):
    for name in ("a", "b", "c"):
        picture(tmp_path / "JPEGImages" / f"{name}.jpg")
        voc(tmp_path / "Annotations" / f"{name}.xml", CAT, DOG, difficult=(1,))
    voc(tmp_path / "Annotations" / "c.xml")
    lists = tmp_path / "ImageSets" / "Main"
    lists.mkdir(parents=True)
    (lists / "train.txt").write_text("b\nc.jpg 1\n\n")
    (lists / "val.txt").write_text("a -1\n")
    found = read_boxes(tmp_path)
    assert {name: [f.name for f in part.files] for name, part in found.items()} == {
        "train": ["b.jpg", "c.jpg"],
        "val": ["a.jpg"],
    }
    assert rows(found["val"]) == [("cat", 2, 3, 10, 9, False), ("dog", 5, 5, 20, 15, True)]
    assert rows(found["train"], 1) == []
    assert found["train"].counts == [1, 0]
    assert str(found["train"]).endswith("2 pictures with 1 boxes of 2 classes")
    image, boxes = found["train"][0]
    assert (image.size, len(boxes)) == ((40, 30), 2)
    assert boxes.areas.tolist() == [48, 150]


@pytest.mark.parametrize("split", ["", "train", "val"])
def test_voc_beside_the_pictures_and_in_folders(tmp_path, split):
    base = tmp_path / split
    picture(base / "a.jpg")
    voc(base / "a.xml", CAT)
    assert rows(read_boxes(tmp_path)[split]) == [("cat", 2, 3, 10, 9, False)]
    other = tmp_path / "other"
    picture(other / "images" / split / "deep" / "photo.png")
    voc(other / "annotations" / split / "deep" / "photo.xml", DOG)
    assert rows(read_boxes(other)[split]) == [("dog", 5, 5, 20, 15, False)]


def test_a_picture_called_otherwise_than_its_annotation(tmp_path):
    picture(tmp_path / "images" / "IMG_7.jpg")
    voc(tmp_path / "annotations" / "0001.xml", CAT, filename="IMG_7.jpg")
    assert rows(read_boxes(tmp_path)[""]) == [("cat", 2, 3, 10, 9, False)]
    lists = tmp_path / "ImageSets" / "Main"
    lists.mkdir(parents=True)
    (lists / "train.txt").write_text("0001\n")
    assert [f.name for f in read_boxes(tmp_path)["train"].files] == ["IMG_7.jpg"]


@pytest.mark.parametrize(
    ("file", "images"),
    [
        ("train.json", "images/train"),
        ("train.json", "images"),
        ("annotations/instances_train2017.json", "train2017"),
        ("annotations/instances_train2017.json", "images/train2017"),
        ("train/_annotations.coco.json", "train"),
    ],
)
def test_coco_finds_its_pictures(tmp_path, file, images):
    picture(tmp_path / images / "1.jpg")
    coco(tmp_path / file, [(5, "1.jpg")], [(5, 3, (2, 3, 8, 6), 0), (5, 7, (5.5, 5, 15, 10), 1)])
    (tmp_path / "notes.json").write_text("{}")
    found = read_boxes(tmp_path)["train"]
    assert found.classes == ("cat", "dog")  # by id
    assert rows(found) == [("cat", 2, 3, 10, 9, False), ("dog", 5.5, 5, 20.5, 15, True)]
    assert rows(read_boxes(tmp_path / file)[""]) == rows(found)


def test_coco_keeps_only_categories_with_boxes_and_the_areas_of_objects(tmp_path):
    picture(tmp_path / "1.jpg")
    coco(tmp_path / "train.json", [(1, "1.jpg")], [(1, 7, (0, 0, 4, 4), 0)], [(0, "animals"), (7, "dog"), (8, "cat")])
    document = json.loads((tmp_path / "train.json").read_text())
    document["annotations"][0]["area"] = 11.5
    (tmp_path / "train.json").write_text(json.dumps(document))
    found = read_boxes(tmp_path)["train"]
    assert found.classes == ("dog",)
    assert found.boxes[0].areas.tolist() == [11.5]
    assert read_boxes(tmp_path, classes=("cat", "dog"))["train"].boxes[0].labels.tolist() == [1]


def test_what_is_written_is_read_again(tmp_path):
    draw, files, boxes = torch.Generator().manual_seed(0), [], []
    for i, k in enumerate((3, 0, 5)):
        files.append(tmp_path / "pictures" / f"{i}.png")
        picture(files[-1])
        corners = torch.rand(k, 4, generator=draw) * 15
        corners[:, 2:] += corners[:, :2] + 1
        areas = torch.rand(k, generator=draw) + 1
        boxes.append(Boxes(corners, torch.arange(k) % 2, torch.arange(k) == 1, areas))
    folder = BoxFolder(tmp_path, files, boxes, [(40, 30)] * 3, ("cat", "dog"))
    again = read_boxes(write_coco(folder, tmp_path / "lists" / "train.json"))[""]
    assert [f.resolve() for f in again.files] == [f.resolve() for f in files]
    for mine, theirs in zip(boxes, again.boxes, strict=True):
        torch.testing.assert_close(mine.corners, theirs.corners)
        assert [x.tolist() for x in (mine.labels, mine.ignored, mine.areas)] == [
            x.tolist() for x in (theirs.labels, theirs.ignored, theirs.areas)
        ]


def test_scenes_have_boxes(tmp_path):
    write_scenes(tmp_path, train=3, val=2, size=64)
    found = read_boxes(tmp_path)
    assert [len(found[name]) for name in ("train", "val")] == [3, 2]
    image, boxes = found["train"][0]
    pixels = np.asarray(Image.open(tmp_path / "masks" / "train" / "00000.png"))
    for box, label in zip(boxes.corners.int().tolist(), boxes.labels.tolist(), strict=True):
        x1, y1, x2, y2 = box
        inside = pixels[y1:y2, x1:x2]
        garments = (tmp_path / "classes.txt").read_text().split("\n")
        assert (inside == garments.index(found["train"].classes[label])).any()
    assert image.size == (64, 64)


# What is wrong.


def test_boxes_are_mended_and_it_is_said(tmp_path):
    picture(tmp_path / "a.jpg")
    wrong = [("cat", (10, 9, 2, 3)), ("cat", (5, 5, 5, 9)), ("dog", (-20, 4, 60, 10)), ("dog", (50, 4, 60, 10))]
    voc(tmp_path / "a.xml", *wrong, ("cat", (0, 0, 40.5, 30)))
    found = read_boxes(tmp_path)[""]
    assert rows(found) == [
        ("cat", 2, 3, 10, 9, False),
        ("dog", 0, 4, 40, 10, False),
        ("cat", 0, 0, 40, 30, False),
    ]
    said = [remark.replace(str(tmp_path), "") for remark in found.remarks]
    assert said == [
        "/a.xml:4: cat 10,9,2,3: corners exchanged",
        "/a.xml:8: cat 5,5,5,9: has no area, left out",
        "/a.xml:12: dog -20,4,60,10: cut off at the edges of the picture, 40 x 30",
        "/a.xml:16: dog 50,4,60,10: cut off at the edges of the picture, 40 x 30",
        "/a.xml:16: dog 50,4,60,10: has no area, left out",
    ]


def test_bad_files_are_named_and_may_be_skipped(tmp_path):
    for name in ("good", "turned", "broken", "alone", "strange", "mute"):
        picture(tmp_path / "images" / f"{name}.png")
    xml = tmp_path / "annotations"
    for name in ("good", "missing", "broken"):
        voc(xml / f"{name}.xml", CAT, filename=f"{name}.png")
    voc(xml / "turned.xml", CAT, size=(30, 40))
    voc(xml / "strange.xml", ("cat", (1, 2, "wide", 9)))
    (xml / "mute.xml").write_text("<annotation>\n<object>\n</annotation>")
    whole = (tmp_path / "images" / "broken.png").read_bytes()
    (tmp_path / "images" / "broken.png").write_bytes(whole[:40])
    found = read_boxes(tmp_path, on_bad="skip")[""]
    assert [f.name for f in found.files] == ["good.png"]
    text = "\n".join(found.skipped)
    for words in (
        "alone.png: has no annotation",
        "broken.png: ",
        "missing.xml: its picture",
        "mute.xml:3: not XML (mismatched tag)",
        "strange.xml:6: <xmax> is 'wide', not a number",
        "turned.xml: is about a picture of 30 x 40, and this one is 40 x 30",
    ):
        assert words in text, words
    with pytest.raises(VolvelleError, match="6 bad lines"):
        read_boxes(tmp_path)


def test_unknown_classes_are_named(tmp_path):
    picture(tmp_path / "a.jpg")
    voc(tmp_path / "a.xml", CAT, ("dgo", (5, 5, 20, 15)))
    with pytest.raises(VolvelleError, match=r"a.xml:8: unknown class 'dgo' \(did you mean dog"):
        read_boxes(tmp_path, classes=("cat", "dog"))


def test_entities_are_not_read(tmp_path):
    picture(tmp_path / "a.jpg")
    text = '<!DOCTYPE a [<!ENTITY x SYSTEM "file:///etc/passwd">]><annotation><filename>&x;</filename></annotation>'
    (tmp_path / "a.xml").write_text(text)
    with pytest.raises(VolvelleError, match=r"a.xml:1: declares the entity 'x'"):
        read_boxes(tmp_path)


def test_bad_json_is_named(tmp_path):
    picture(tmp_path / "1.jpg")
    file = tmp_path / "train.json"
    for notes, message in (
        ([(9, 3, (1, 1, 2, 2), 0)], r"annotations\[0\]: image_id 9 is no picture of the file"),
        ([(1, 3, (1, 1, 2, 2), 0), (1, 4, (1, 1, 2, 2), 0)], r"annotations\[1\]: category_id 4 is no category"),
        ([(1, 3, (1, 1, 2), 0)], r"bbox: four numbers x, y, width, height are wanted, got \[1, 1, 2\]"),
        ([(1, 3, (1, 1, 2, "3"), 0)], "bbox: four numbers"),
    ):
        coco(file, [(1, "1.jpg")], [*notes, (1, 7, (1, 1, 5, 5), 0)])
        with pytest.raises(VolvelleError, match=message):
            read_boxes(tmp_path)
        found = read_boxes(tmp_path, on_bad="skip")["train"]
        assert "dog" in [row[0] for row in rows(found)]
        assert len(found.skipped) == 1
    coco(file, [(1, "1.jpg"), (1, "2.jpg")], [])
    with pytest.raises(VolvelleError, match=r"images\[1\]: id 1 is taken by 1.jpg"):
        read_boxes(tmp_path)
    coco(file, [(1, "elsewhere/1.jpg")], [])
    with pytest.raises(VolvelleError, match=r"its picture elsewhere/1.jpg is in none of"):
        read_boxes(tmp_path)
    file.write_text('{"images": [],\n "annotations": [}')
    with pytest.raises(VolvelleError, match=r"train.json:2: not JSON"):
        read_boxes(file)
    file.write_text("[]")
    with pytest.raises(VolvelleError, match="it has no list images, annotations, categories"):
        read_boxes(file)


def test_paths_that_hold_nothing(tmp_path):
    with pytest.raises(VolvelleError, match="holds no pictures with boxes"):
        read_boxes(tmp_path)
    with pytest.raises(UsageError, match="no such folder"):
        read_boxes(tmp_path / "x")
    (tmp_path / "a.txt").write_text("")
    with pytest.raises(UsageError, match="a JSON file of COCO's, is wanted"):
        read_boxes(tmp_path / "a.txt")
    picture(tmp_path / "b.jpg")
    voc(tmp_path / "b.xml")
    with pytest.raises(VolvelleError, match="no picture has a box"):
        read_boxes(tmp_path)


@pytest.mark.shared_data
def test_bccd_as_it_lies_there(shared_data):
    found = read_boxes(shared_data / "bccd")
    assert {name: len(part) for name, part in found.items()} == {"train": 205, "val": 87}
    train = found["train"]
    assert train.classes == ("Platelets", "RBC", "WBC")
    remarks = [remark for part in found.values() for remark in part.remarks]
    assert [remark.split("/")[-1] for remark in remarks] == [
        "BloodImage_00343.xml:50: RBC 181,329,181,329: has no area, left out",
        "BloodImage_00338.xml:158: RBC 504,337,504,337: has no area, left out",
    ]
    # 30 shapes of platelets, red and white cells: small ones for platelets, and a good fit for all.
    anchors = suggest_anchors(train, Fit(320), 11)
    assert len(anchors) == 11
    assert 14 < float(anchors[0].prod().sqrt()) < 22
    assert best_overlap(train, Fit(320), anchors) > 0.85
