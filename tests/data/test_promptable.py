"""Pictures with masks of objects: every layout read, pieces and lists of masks, crops, simulated prompts."""

from __future__ import annotations

import json
import random

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import ndimage

from volvelle.data.coco_masks import MaskedObject, write_coco_masks
from volvelle.data.masks_augment import Augmentation
from volvelle.data.promptable import holds_masks, read_objects
from volvelle.data.promptable_clicks import Click, anywhere, box_around, first_click, middle, next_click
from volvelle.data.promptable_objects import Listed, Pieces, choose
from volvelle.data.promptable_views import ObjectViews, collate_objects
from volvelle.data.run_lengths import RunLengths
from volvelle.errors import UsageError, VolvelleError


def scene(draw, size=(40, 56)):
    """A picture and its classes: two squares of class 1, one of class 2, a void corner."""
    classes = np.zeros(size, dtype=np.uint8)
    classes[4:14, 4:14] = 1
    classes[4:12, 30:40] = 1
    classes[20:36, 10:30] = 2
    classes[-6:, -6:] = 255
    colours = np.array([[20, 20, 20], [200, 40, 40], [40, 200, 40]] + [[0, 0, 0]] * 253, dtype=np.uint8)
    noise = draw.integers(0, 20, (*size, 3), dtype=np.uint8)
    return Image.fromarray(colours[classes] + noise), classes


@pytest.fixture
def maps(tmp_path):
    """Class maps in train and val."""
    draw = np.random.default_rng(0)
    for part, count in (("train", 3), ("val", 2)):
        for i in range(count):
            image, classes = scene(draw)
            for kind, picture in (("images", image), ("masks", Image.fromarray(classes))):
                (tmp_path / kind / part).mkdir(parents=True, exist_ok=True)
                picture.save(tmp_path / kind / part / f"{i}.png")
    (tmp_path / "classes.txt").write_text("background\nsquare\nslab\n")
    return tmp_path


def masks_of(objects):
    return [objects.mask(i) for i in range(len(objects))]


def test_pieces_are_those_of_scipy_class_by_class():
    draw = np.random.default_rng(1)
    classes = draw.integers(0, 3, (30, 41), dtype=np.uint8)
    classes[draw.random(classes.shape) < 0.1] = 255
    pieces = Pieces(classes, least=5, grounds={0})
    wanted = []
    for label in (1, 2):
        numbers, count = ndimage.label(classes == label)
        wanted += [(label, numbers == i) for i in range(1, count + 1) if (numbers == i).sum() >= 5]
    assert pieces.labels == [label for label, _ in wanted]
    for (_, mask), found in zip(wanted, masks_of(pieces), strict=True):
        np.testing.assert_array_equal(found, mask)
    np.testing.assert_array_equal(pieces.void(), classes == 255)
    assert len(Pieces(np.full((4, 4), 255, dtype=np.uint8))) == 0


def test_class_maps(maps):
    splits = read_objects(maps, least=100)
    assert {name: len(part) for name, part in splits.items()} == {"train": 3, "val": 2}
    image, objects = splits["val"][1]
    assert image.size == (56, 40)
    # The squares have 100 and 80 pixels, the slab 320; the ground is none.
    assert [splits["val"].classes[label] for label in objects.labels] == ["square", "slab"]
    assert [int(mask.sum()) for mask in masks_of(objects)] == [100, 320]
    assert objects.void().sum() == 36
    assert len(splits["val"].part([1])) == 1
    assert (list(splits["train"].counts), list(splits["val"].part([1]).counts)) == ([2, 2, 2], [2])
    assert "3 pictures with masks of 6 objects of 3 classes" in str(splits["train"])
    assert holds_masks(maps)


def test_numbers_of_objects(tmp_path):
    for kind in ("images", "masks"):
        (tmp_path / kind).mkdir()
    numbers = np.zeros((20, 30), dtype=np.uint16)
    numbers[2:8, 2:8], numbers[2:8, 20:26], numbers[12:18, 4:10] = 700, 700, 3
    Image.fromarray(numbers).save(tmp_path / "masks" / "a.png")
    Image.new("RGB", (30, 20)).save(tmp_path / "images" / "a.png")
    colours = np.zeros((20, 30, 3), dtype=np.uint8)
    colours[2:8, 2:8] = (255, 255, 255)
    colours[10:14, 2:8] = (255, 0, 0)
    Image.fromarray(colours).save(tmp_path / "masks" / "b.png")
    Image.new("RGB", (30, 20)).save(tmp_path / "images" / "b.png")
    wide, coloured = (objects for _, objects in read_objects(tmp_path, numbers="objects")[""])
    assert sorted(int(mask.sum()) for mask in masks_of(wide)) == [36, 72]  # one object in two places
    assert sorted(int(mask.sum()) for mask in masks_of(coloured)) == [24, 36]
    assert not coloured.void().any()
    Image.fromarray(np.full((20, 30), 255, dtype=np.uint8)).save(tmp_path / "masks" / "a.png")
    assert read_objects(tmp_path, numbers="objects")[""][0][1].void().all()


def test_black_and_white_masks_are_of_one_object(tmp_path):
    """As editors write them, in each mode that they write; 255 is no void there."""
    for kind in ("images", "masks"):
        (tmp_path / kind).mkdir()
    white = np.zeros((20, 30), dtype=np.uint8)
    white[2:8, 2:8] = 255
    for name, mode in (("a", "L"), ("b", "LA"), ("c", "RGBA"), ("d", "1"), ("e", "P")):
        Image.fromarray(white).convert(mode).save(tmp_path / "masks" / f"{name}.png")
        Image.new("RGB", (30, 20)).save(tmp_path / "images" / f"{name}.png")
    found = read_objects(tmp_path, numbers="objects")[""]
    assert list(found.counts) == [1] * 5
    for _, objects in found:
        assert objects.mask(0).sum() == 36
        assert not objects.void().any()
    grey = np.where(white, 255, 0).astype(np.uint8)
    grey[10:14, 10:14] = 7
    Image.fromarray(grey).convert("LA").save(tmp_path / "masks" / "b.png")
    _, objects = read_objects(tmp_path, numbers="objects")[""][1]
    assert [int(mask.sum()) for mask in masks_of(objects)] == [16]
    assert objects.void().sum() == 36


@pytest.mark.parametrize("empty", ["[]", "[ [ ] ]", "{}", "null", '""'])
def test_annotations_without_a_mask_are_boxes(tmp_path, empty):
    Image.new("RGB", (8, 6)).save(tmp_path / "a.png")
    note = {"id": 1, "image_id": 1, "category_id": 1, "bbox": [1, 1, 4, 4], "segmentation": "HERE"}
    lists = {"images": [{"id": 1, "file_name": "a.png"}], "categories": [{"id": 1, "name": "cat"}]}
    text = json.dumps({**lists, "annotations": [note]}, indent=1)
    file = tmp_path / "train.json"
    file.write_text(text.replace('"HERE"', empty))
    assert not holds_masks(file)
    assert not holds_masks(tmp_path)
    for filled in ("[[0, 0, 4, 0, 4, 4]]", "[ -1, 0, 4, 0, 4, 4]", '{ "size": [6, 8], "counts": [48]}'):
        file.write_text(text.replace('"HERE"', filled))
        assert holds_masks(file)
        assert holds_masks(tmp_path)


def test_a_split_without_an_object_is_an_error(maps):
    with pytest.raises(VolvelleError, match=r"not one object of 400 pixels or more in 3 pictures") as caught:
        read_objects(maps, least=400)
    assert all(word in caught.value.tip for word in ("least=1", "255", "numbers=objects"))


def test_coco_and_crowds(tmp_path):
    draw = np.random.default_rng(0)
    image, classes = scene(draw)
    image.save(tmp_path / "a.png")
    square, crowd = RunLengths.of(classes == 1), RunLengths.of(classes == 2)
    objects = [MaskedObject(square, "square"), MaskedObject(crowd, "slab", ignored=True)]
    write_coco_masks(tmp_path / "train.json", [("a.png", image.size)], [objects], ("square", "slab"))
    for path, split in ((tmp_path, "train"), (tmp_path / "train.json", "")):
        _, found = read_objects(path)[split][0]
        np.testing.assert_array_equal(found.mask(0), classes == 1)
        np.testing.assert_array_equal(found.void(), classes == 2)
        assert len(found) == 1
    with pytest.raises(VolvelleError, match=rf"\(train\): not one object of {square.area + 1} pixels or more in 1 pic"):
        read_objects(tmp_path, least=square.area + 1)
    document = json.loads((tmp_path / "train.json").read_text())
    document["annotations"][0]["segmentation"]["counts"] = "99"
    (tmp_path / "train.json").write_text(json.dumps(document))
    with pytest.raises(VolvelleError, match=r"annotations\[0\]"):
        read_objects(tmp_path)


def test_files_of_sa_1b(tmp_path):
    draw = np.random.default_rng(0)
    for i in range(2):
        image, classes = scene(draw)
        image.save(tmp_path / f"sa_{i}.jpg")
        notes = [
            {"segmentation": RunLengths.of(classes == label).to_coco(), "predicted_iou": 0.9, "stability_score": 0.97}
            for label in (1, 2)
        ]
        facts = {"image_id": i, "width": 56, "height": 40, "file_name": f"sa_{i}.jpg"}
        (tmp_path / f"sa_{i}.json").write_text(json.dumps({"image": facts, "annotations": notes}))
    folder = read_objects(tmp_path)[""]
    assert len(folder) == 2
    np.testing.assert_array_equal(folder[1][1].mask(1), classes == 2)
    facts["width"] = 57
    (tmp_path / "sa_1.json").write_text(json.dumps({"image": facts, "annotations": notes}))
    with pytest.raises(VolvelleError, match="sa_1"):
        read_objects(tmp_path)
    assert len(read_objects(tmp_path, on_bad="skip")[""]) == 1


def test_files_of_sa_1b_in_parts(tmp_path):
    for part in ("sa_000000", "sa_000001"):
        (tmp_path / part).mkdir()
        Image.new("RGB", (8, 6)).save(tmp_path / part / f"{part}.jpg")
        note = {"segmentation": RunLengths.of(np.eye(6, 8, dtype=bool)).to_coco()}
        content = {"image": {"width": 8, "height": 6}, "annotations": [note]}
        (tmp_path / part / f"{part}.json").write_text(json.dumps(content))
    assert holds_masks(tmp_path)
    assert [file.name for file in read_objects(tmp_path)[""].files] == ["sa_000000.jpg", "sa_000001.jpg"]
    (tmp_path / "train").mkdir()
    for part in ("sa_000000", "sa_000001"):
        (tmp_path / part).rename(tmp_path / "train" / part)
    assert len(read_objects(tmp_path)["train"]) == 2


def test_what_is_wrong_is_named(maps, tmp_path_factory):
    empty = tmp_path_factory.mktemp("empty")
    assert not holds_masks(empty)
    with pytest.raises(VolvelleError, match="holds no pictures with masks of objects"):
        read_objects(empty)
    with pytest.raises(UsageError, match="no such folder"):
        read_objects(empty / "nowhere")
    with pytest.raises(UsageError, match="a JSON file"):
        read_objects(maps / "classes.txt")
    Image.new("L", (9, 9)).save(maps / "masks" / "train" / "1.png")
    with pytest.raises(VolvelleError, match=r"1\.png"):
        read_objects(maps)
    with pytest.raises(VolvelleError, match="9 x 9"):
        read_objects(maps, numbers="objects")


def test_the_middle_is_farthest_from_all_outside():
    draw = np.random.default_rng(3)
    for _ in range(20):
        region = ndimage.binary_opening(draw.random((17, 23)) < 0.8)
        found = middle(region)
        if not region.any():
            assert found is None
            continue
        x, y, depth = found
        outside = np.argwhere(~np.pad(region, 1)) - 1
        nearest = [np.hypot(*(outside - (row, column)).T).min() for row, column in np.argwhere(region)]
        assert region[y, x]
        assert depth == pytest.approx(max(nearest))
    thin = np.zeros((200, 200), dtype=bool)
    thin[:, 3] = True  # missed by every second column
    assert thin[middle(thin, 64)[1], 3]
    assert middle(thin, 64)[0] == 3


def test_clicks_fall_where_the_answer_is_wrong():
    truth = np.zeros((20, 30), dtype=bool)
    truth[2:18, 2:12] = True
    seen = truth.copy()
    seen[2:18, 9:12] = False  # a strip is missed
    seen[5:14, 20:29] = True  # more is too much
    assert next_click(seen, truth) == Click(24, 9, 0)
    known = np.ones_like(truth)
    known[:, 18:] = False
    assert next_click(seen, truth, known) == Click(10, 3, 1)
    assert next_click(truth, truth) is None
    generator = random.Random(0)
    clicks = [next_click(seen, truth, generator=generator) for _ in range(200)]
    assert all((seen ^ truth)[c.y, c.x] and truth[c.y, c.x] == bool(c.label) for c in clicks)
    assert 0.2 < sum(c.label for c in clicks) / 200 < 0.55  # 48 of 129 wrong pixels were missed
    assert next_click(truth, truth, generator=generator) is None


def test_first_clicks_and_boxes_belong_to_the_object():
    mask = np.zeros((40, 60), dtype=bool)
    mask[10:30, 15:20] = mask[25:30, 15:50] = True
    generator = random.Random(1)
    for central in (0.0, 0.5, 1.0):
        for _ in range(30):
            click = first_click(mask, generator, central)
            assert mask[click.y, click.x]
            assert click.label == 1
    assert {anywhere(mask, generator) for _ in range(3000)} == {(x, y) for y, x in np.argwhere(mask)}
    assert box_around(mask) == (15, 10, 50, 30)
    drawn = [box_around(mask, generator) for _ in range(200)]
    assert all(0 <= x1 < x2 <= 60 and 0 <= y1 < y2 <= 40 for x1, y1, x2, y2 in drawn)
    assert np.std([box[0] for box in drawn]) == pytest.approx(3.5, rel=0.3)  # a tenth of 35


def test_crops_show_the_same_objects_in_both_kinds():
    draw = np.random.default_rng(2)
    image, classes = scene(draw)
    augmentation = Augmentation((32, 32), (0.8, 1.6), 0.5, 0.2)
    listed = Listed([RunLengths.of(classes == 2)], [2], classes == 255)
    pieces = Pieces(classes, 1, {0, 1})
    for seed in range(12):
        window = augmentation.window(image, random.Random(seed))
        one, other = listed.seen(window, 1), pieces.seen(window, 1)
        inside = [one.mask(i) for i in range(len(one)) if one.mask(i).any()]
        assert len(inside) == len(other)
        for mask, same in zip(inside, masks_of(other), strict=True):
            np.testing.assert_array_equal(mask, same)
        np.testing.assert_array_equal(one.void(), other.void())


def test_views_and_batches(maps):
    folder = read_objects(maps, least=50)["train"]
    views = ObjectViews(folder, Augmentation((32, 48), (0.5, 1.5)), side=56, prompts=5, least=50)
    found = [views.draw(i % 3, random.Random(i)) for i in range(12)]
    for view in found:
        for mask, (x, y), (x1, y1, x2, y2) in zip(view.masks, view.points, view.boxes, strict=True):
            assert mask[int(y), int(x)] == 1
            assert 0 <= x1 < x2 <= 48
            assert 0 <= y1 < y2 <= 32
            assert not (mask.bool() & ~view.known.bool()).any()
            assert len(view.classes[mask.bool()].unique()) == 1
        assert torch.equal(view.classes != 255, view.known.bool())
    assert all(len(view.masks) in (0, 5) for view in found)
    nothing = found[0]._replace(**{name: getattr(found[0], name)[:0] for name in ("masks", "points", "boxes")})
    batch = collate_objects([found[0], nothing])
    assert batch["masks"].shape == (2, 5, 32, 48)
    assert batch["there"].tolist() == [[True] * 5, [False] * 5]
    assert torch.equal(batch["classes"][0], found[0].classes)
    assert collate_objects([nothing])["there"].tolist() == [[False]]
    again = views.draw(0, random.Random(0))
    assert all((a == b).all() for a, b in zip(again, found[0], strict=True))


def test_no_object_is_drawn_twice_before_all_were():
    numbers = np.zeros((12, 30), dtype=np.uint8)
    for i in range(5):
        numbers[2:6, 6 * i : 6 * i + 4] = i + 1
    pieces = Pieces(numbers, 4, {0})
    drawn = choose(pieces, 7, 4, random.Random(0))
    assert len(np.unique(drawn[:5].reshape(5, -1), axis=0)) == 5
    np.testing.assert_array_equal(drawn[5:], drawn[:2])
    assert choose(pieces, 3, 17, random.Random(0)).shape == (0, 12, 30)
