"""Folders of images with masks: every layout, every kind of mask file, and every way in which they are wrong."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from PIL import Image

from volvelle.data.images import to_tensor
from volvelle.data.loader import Loader
from volvelle.data.masks import find_pairs, read_mask, read_masks
from volvelle.data.masks_augment import Augmentation, Augmented, Whole, collate_masks, split_in_runs
from volvelle.data.masks_labels import VOID, Labels, read_table, stored_values, voc_colour
from volvelle.errors import UsageError, VolvelleError

IDS = np.array([[0, 1, 2, 255], [2, 1, 0, 0], [1, 1, 2, 2]], dtype=np.uint8)


def picture(path, size=(4, 3), mode="RGB"):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (10, 200, 30)).convert(mode).save(path)


def mask(path, ids=IDS, mode="L"):
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(ids)
    if mode == "P":
        image.putpalette([channel for number in range(256) for channel in voc_colour(number)])
    image.save(path)


def names(folder, split=None):
    return [(a.name, b.name) for a, b in read_masks(folder, split=split).pairs]


def test_layout_of_folders(tmp_path):
    for name in ("b.jpg", "a.png", "deep/c.jpeg"):
        picture(tmp_path / "images" / name)
        mask(tmp_path / "masks" / name.replace(".jpg", ".png").replace(".jpeg", "_mask.png"))
    found = read_masks(tmp_path)
    assert [a.name for a, _ in found.pairs] == ["a.png", "b.jpg", "c.jpeg"]
    assert found.labels.names == ("class 0", "class 1", "class 2")
    assert found.counts.tolist() == [[3, 4, 4]] * 3
    assert found.frequency == pytest.approx(np.array([3, 4, 4]) / 11)
    image, ids = found[0]
    assert image.mode == "RGB"
    assert ids.tolist() == IDS.tolist()


@pytest.mark.parametrize("nested", ["images/train", "train/images"])
def test_layout_of_folders_with_parts(tmp_path, nested):
    for part in ("train", "val"):
        picture(tmp_path / nested.replace("train", part) / f"{part}.jpg")
        mask(tmp_path / nested.replace("train", part).replace("images", "masks") / f"{part}.png")
    assert names(tmp_path, "train") == [("train.jpg", "train.png")]
    assert names(tmp_path, "val") == [("val.jpg", "val.png")]
    assert len(read_masks(tmp_path)) == 2
    with pytest.raises(UsageError, match=r"no test images with masks \(found train, val\)"):
        read_masks(tmp_path, split="test")


def test_layout_side_by_side(tmp_path):
    picture(tmp_path / "a.jpg")
    mask(tmp_path / "a.png")
    assert names(tmp_path) == [("a.jpg", "a.png")]
    picture(tmp_path / "other" / "x.png")
    mask(tmp_path / "other" / "x_L.png")
    assert names(tmp_path / "other") == [("x.png", "x_L.png")]


def test_layout_of_camvid_has_its_names_and_its_void(tmp_path):
    picture(tmp_path / "train" / "a.png")
    mask(tmp_path / "trainannot" / "a.png", np.array([[0, 10, 11, 3]] * 3, dtype=np.uint8))
    found = read_masks(tmp_path, split="train")
    assert found.labels.names[10] == "bicyclist"
    assert found[0][1][0].tolist() == [0, 10, VOID, 3]
    assert int(found.counts.sum()) == 9


def test_layout_of_voc_follows_its_lists(tmp_path):
    for name in ("one", "two", "three"):
        picture(tmp_path / "JPEGImages" / f"{name}.jpg")
        mask(tmp_path / "SegmentationClass" / f"{name}.png", mode="P")
    lists = tmp_path / "ImageSets" / "Segmentation"
    lists.mkdir(parents=True)
    (lists / "train.txt").write_text("two\n")
    (lists / "val.txt").write_text("one\nthree\n")
    assert names(tmp_path, "train") == [("two.jpg", "two.png")]
    found = read_masks(tmp_path, split="val")
    assert len(found.labels) == 21
    assert found[0][1].tolist() == IDS.tolist()


@pytest.mark.parametrize("mode", ["L", "P", "1", "I;16", "RGB grey", "RGB voc", "RGB camvid", "RGBA grey", "LA"])
def test_every_kind_of_mask_file_gives_its_numbers(tmp_path, mode):
    ids = np.array([[0, 1, 1], [1, 0, 0]], dtype=np.uint8)
    path = tmp_path / "m.png"
    if mode in ("L", "P"):
        mask(path, ids, mode)
    elif mode == "1":
        Image.fromarray(ids * 255).convert("1", dither=Image.Dither.NONE).save(path)
    elif mode == "I;16":
        Image.fromarray(ids.astype(np.uint16)).save(path)
    elif mode == "LA":
        Image.fromarray(ids).convert("LA").save(path)
    elif mode.endswith("grey"):
        Image.fromarray(ids).convert(mode.split()[0]).save(path)
    else:
        # Sky and a wall, which is of the group of buildings; background and bicycle.
        table = [(128, 128, 128), (64, 192, 0)] if mode.endswith("camvid") else [voc_colour(0), voc_colour(2)]
        Image.fromarray(np.array(table, dtype=np.uint8)[ids]).save(path)
        ids = ids * (2 if mode.endswith("voc") else 1)
    assert read_mask(path, Labels(("a", "b", "c", "d"))).tolist() == ids.tolist()


def test_void_values_leave_no_gap():
    labels = Labels(("a", "b", "c"), void=(0, 2))
    assert labels.decode(np.array([[0, 1, 2, 3, 4, 255]])).tolist() == [[255, 0, 255, 1, 2, 255]]
    assert Labels.from_json(labels.to_json()) == labels


def test_masks_of_0_and_255_are_two_classes(tmp_path):
    picture(tmp_path / "images" / "a.png")
    mask(tmp_path / "masks" / "a.png", np.array([[0, 255, 255, 0]] * 3, dtype=np.uint8))
    found = read_masks(tmp_path)
    assert found.labels.names == ("background", "foreground")
    assert found[0][1][0].tolist() == [0, 1, 1, 0]
    assert found.counts.tolist() == [[6, 6]]


def test_classes_txt_names_and_colours(tmp_path):
    picture(tmp_path / "images" / "a.png")
    colours = np.array([[[1, 2, 3], [4, 5, 6], [0, 0, 0], [4, 5, 6]]] * 3, dtype=np.uint8)
    mask(tmp_path / "masks" / "a.png", colours)
    (tmp_path / "classes.txt").write_text("# colours\nred rock 1 2 3\nVoid 0 0 0\n4 5 6 sand\n")
    found = read_masks(tmp_path)
    assert found.labels.names == ("red rock", "sand")
    assert found.labels.colour(1) == (4, 5, 6)
    assert found[0][1][0].tolist() == [0, 1, 255, 1]
    (tmp_path / "classes.txt").write_text("a\nb 1 2 3\n")
    with pytest.raises(VolvelleError, match=r"classes.txt:2: wanted a name"):
        read_table(tmp_path)


def test_unknown_ids_of_a_palette_png_are_listed(tmp_path):
    for name in ("a", "b"):
        picture(tmp_path / "images" / f"{name}.png")
    mask(tmp_path / "masks" / "a.png")
    mask(tmp_path / "masks" / "b.png", np.array([[0, 7, 9, 7]] * 3, dtype=np.uint8), "P")
    with pytest.raises(VolvelleError, match=r"b.png: has ids that are no class: 7, 9 .classes are 0 … 2"):
        read_masks(tmp_path, classes=("x", "y", "z"))
    found = read_masks(tmp_path, classes=("x", "y", "z"), on_bad="skip")
    assert len(found) == 1
    assert "7, 9" in found.skipped[0]


def test_unknown_colours_are_listed(tmp_path):
    with pytest.raises(VolvelleError, match=r"1 colours that are no class: \(1, 2, 3\)"):
        stored_values(Image.new("RGB", (2, 2), (1, 2, 3)))
    both = np.array([[[128, 128, 128], [128, 0, 0]]], dtype=np.uint8)
    with pytest.raises(VolvelleError, match=r"VOC's and CamVid's alike: \(128, 0, 0\), \(128, 128, 128\)"):
        stored_values(Image.fromarray(both))


def test_bad_files_are_named_and_may_be_skipped(tmp_path):
    for name in ("good", "small", "broken", "alone"):
        picture(tmp_path / "images" / f"{name}.png")
    mask(tmp_path / "masks" / "good.png")
    mask(tmp_path / "masks" / "small.png", np.zeros((9, 8), dtype=np.uint8))
    mask(tmp_path / "masks" / "broken.png")
    broken = tmp_path / "images" / "broken.png"
    broken.write_bytes(broken.read_bytes()[:40])
    with pytest.raises(VolvelleError, match="3 bad lines") as error:
        read_masks(tmp_path)
    text = str(error.value)
    assert "alone.png: has no mask" in text
    assert "is 8 x 9, larger than its image, 4 x 3" in text
    assert "broken.png" in text
    found = read_masks(tmp_path, on_bad="skip")
    assert [a.name for a, _ in found.pairs] == ["good.png"]
    assert len(found.skipped) == 3


def test_images_of_mixed_sizes_and_modes(tmp_path):
    sizes = {"L": (4, 3), "RGBA": (7, 5), "I;16": (5, 5)}
    for mode, (wide, high) in sizes.items():
        picture(tmp_path / "images" / f"{mode[0]}.png", (wide, high), "L" if mode == "I;16" else mode)
        mask(tmp_path / "masks" / f"{mode[0]}.png", np.zeros((high, wide), dtype=np.uint8))
    Image.fromarray(np.full((5, 5), 40_000, dtype=np.uint16)).save(tmp_path / "images" / "I.png")
    whole = Whole(read_masks(tmp_path))
    assert [tuple(pixels.shape) for pixels, _ in (whole[i] for i in range(3))] == [(3, 5, 5), (3, 3, 4), (3, 5, 7)]
    crops = Augmented(whole.folder, Augmentation((32, 40)))
    batch = collate_masks([crops[i] for i in range(3)])
    assert batch["images"].shape == (3, 3, 32, 40)
    assert batch["masks"].shape == (3, 32, 40)


def test_a_folder_without_pairs_says_what_is_wanted(tmp_path):
    with pytest.raises(VolvelleError, match="holds no images with masks"):
        find_pairs(tmp_path)
    with pytest.raises(UsageError, match="no such folder"):
        find_pairs(tmp_path / "x")


def gradient(wide=64, high=48):
    """A picture whose red and green say where a pixel is, and a mask that says the same: column / 4."""
    x, y = np.meshgrid(np.arange(wide), np.arange(high))
    image = np.stack([4 * x, 5 * y, np.full_like(x, 128)], -1).astype(np.uint8)
    return Image.fromarray(image), (x // 4).astype(np.uint8)


@pytest.mark.parametrize("seed", range(8))
def test_image_and_mask_move_together(seed):
    image, ids = gradient()
    augment = Augmentation((40, 56), scale=(0.5, 2.0), colour=0.0)
    pixels, labels = augment(image, ids, random.Random(seed))
    assert pixels.shape == (3, 40, 56)
    known = labels != VOID
    assert known.any()
    seen = pixels[0].float() / 16  # the column / 4 that the picture says
    assert float((seen - labels.float())[known].abs().max()) <= 1.3
    assert bool((pixels[:, ~known] == 124).all())


def test_a_crop_may_be_larger_than_the_image_and_scale_one_copies_it():
    image, ids = gradient(20, 10)
    pixels, labels = Augmentation((16, 30), scale=(1, 1), mirror=0, colour=0)(image, ids, random.Random(0))
    assert int((labels != VOID).sum()) == 200
    assert torch.equal(pixels[:, labels != VOID].flatten(), to_tensor(image).flatten())
    mirrored, _ = Augmentation((10, 20), scale=(1, 1), mirror=1, colour=0)(image, ids, random.Random(0))
    assert torch.equal(mirrored, to_tensor(image).flip(-1))


def test_a_sample_depends_on_seed_epoch_and_number_alone(tmp_path):
    for i in range(6):
        picture(tmp_path / "images" / f"{i}.png", (50, 40))
        mask(tmp_path / "masks" / f"{i}.png", np.full((40, 50), i % 3, dtype=np.uint8))
    dataset = Augmented(read_masks(tmp_path), Augmentation((32, 32)))

    def epochs(**options):
        loader = Loader(dataset, 2, seed=3, collate=collate_masks, **options)
        try:
            return [[batch.value["images"].clone() for batch in loader] for _ in range(2)]
        finally:
            loader.close()

    plain = epochs()
    threads = epochs(num_workers=2)
    assert all(
        torch.equal(a, b) for one, two in zip(plain, threads, strict=True) for a, b in zip(one, two, strict=True)
    )
    assert not torch.equal(plain[0][0], plain[1][0])


def test_runs_of_neighbours_are_held_out():
    kept, held = split_in_runs(100, 0.16, seed=1, run=4)
    assert sorted(kept + held) == list(range(100))
    assert len(held) == 16
    beginnings = [i for i in held if i - 1 not in held]
    assert len(beginnings) <= 4
    assert split_in_runs(100, 0.16, seed=1, run=4) == (kept, held) != split_in_runs(100, 0.16, seed=2, run=4)
    assert [len(part) for part in split_in_runs(2, 0.01, seed=0)] == [1, 1]
    with pytest.raises(ValueError, match="at least 2 samples, got 1"):
        split_in_runs(1, 0.5, seed=0)


@pytest.mark.shared_data
def test_camvid_as_it_lies_there(shared_data):
    splits = find_pairs(shared_data / "camvid")[1]
    assert {name: len(pairs) for name, (pairs, alone) in splits.items() if not alone} == {"train": 367, "val": 101}
