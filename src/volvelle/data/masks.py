"""Folders of images with masks: which mask belongs to which image, what the classes are, and what is wrong.

Layouts, tried in this order; `split` stands for train, val and test:

    split/ + splitannot/                        CamVid as SegNet's authors gave it out
    JPEGImages/ + SegmentationClass/            VOC, its lists in ImageSets/Segmentation/split.txt
    images/[split/] + masks/[split/]            also labels, annotations, gt and the like; [split/]images/ + masks/
    [split/] with image and mask side by side   a.jpg + a.png, or a.png + a_mask.png (_label, _labels, _L, _gt)

A mask has its image's name, another ending, and perhaps one of these additions.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from PIL import Image

from volvelle.data.images import SUFFIXES, check_images, open_image, read_image, to_rgb
from volvelle.data.masks_labels import (
    CAMVID_COLOURS,
    CAMVID_GROUPS,
    CAMVID_NAMES,
    VOC_NAMES,
    VOID,
    Labels,
    read_table,
    stored_values,
)
from volvelle.data.text import OnBad
from volvelle.errors import UsageError, VolvelleError, did_you_mean

IMAGES = ("images", "image", "imgs", "img", "JPEGImages")
MASKS = ("masks", "mask", "labels", "label", "annotations", "annots", "gt", "SegmentationClass")
ADDITIONS = ("", "_mask", "_masks", "_label", "_labels", "_L", "_gt", "_labelIds", "_seg")
SPLITS = {"train": ("train", "training"), "val": ("val", "valid", "validation"), "test": ("test", "testing")}

Pair = tuple[Path, Path]


@dataclass(frozen=True)
class MaskFolder:
    """Images with masks of one split: `pairs` of files, `labels`, the pixels of each class, what was skipped.

    Item i is (upright RGB image, class numbers (y, x) uint8 with 255 for void).
    """

    folder: Path
    pairs: Sequence[Pair]
    labels: Labels
    counts: np.ndarray
    """(files, classes) int64: pixels of each class."""
    skipped: Sequence[str] = ()

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> tuple[Image.Image, np.ndarray]:
        image, mask = self.pairs[index]
        return read_image(image), read_mask(mask, self.labels)

    def __str__(self) -> str:
        more = f", {len(self.skipped)} left out" if self.skipped else ""
        return f"{self.folder}: {len(self):,} images with masks of {len(self.labels)} classes{more}"

    def source(self, index: int) -> str:
        """The image's path."""
        return str(self.pairs[index][0])

    def part(self, indices: Sequence[int]) -> MaskFolder:
        """Some of the files."""
        kept = list(indices)
        return replace(self, pairs=[self.pairs[i] for i in kept], counts=self.counts[kept], skipped=())

    @property
    def frequency(self) -> np.ndarray:
        """(classes,) fp64: the share of each class among all pixels that are not void."""
        total = self.counts.sum(0).astype(np.float64)
        return total / max(1.0, total.sum())


def read_mask(path: Path, labels: Labels) -> np.ndarray:
    """Class numbers (y, x) uint8 of a mask file; VolvelleError that names it and lists ids that are no class."""
    try:
        return labels.decode(stored_values(open_image(path), labels.by_colour))
    except VolvelleError as error:
        message = str(error)
        raise VolvelleError(message if str(path) in message else f"{path}: {message}", tip=error.tip) from error


def read_masks(
    folder: str | Path,
    *,
    split: str | None = None,
    labels: Labels | None = None,
    classes: Sequence[str] = (),
    void: Sequence[int] = (),
    on_bad: OnBad = "stop",
    progress: Callable[[int, int], None] | None = None,
) -> MaskFolder:
    """Find and check all images with masks of a folder, or of one split of it (train, val, test).

    Every file is decoded once: unreadable ones, masks of another size than their image, images without a mask, and ids
    that are no class are named with the reason; `on_bad="skip"` leaves them out. Classes are, in this order, those of
    `labels` (a trained model's), `classes`, classes.txt in the folder, the layout's (CamVid, VOC), or as many as the
    ids go. `void` are ids to leave out beside 255.

    Raises UsageError for a folder that is none, VolvelleError for one without pairs and for bad files.
    """
    root = Path(folder)
    layout, splits = find_pairs(root)
    if split is not None and split not in splits:
        found = ", ".join(name for name in splits if name) or "no parts"
        raise UsageError(f"{root}: has no {split} images with masks (found {found})")
    pairs, lonely = splits[split] if split is not None else _merged(splits)
    known = labels or _labels(root, layout, tuple(classes), tuple(void))
    scan = _Scan(dict(pairs), known, progress)
    files = [image for image, _ in pairs]
    good, skipped = check_images([*files, *lonely], on_bad=on_bad, source=root, look=scan)
    if known is None:
        known = _counted(np.sum([scan.values[image] for image in good], axis=0), tuple(void))
    table = known.table
    counts = np.zeros((len(good), len(known)), dtype=np.int64)
    for row, image in enumerate(good):
        np.add.at(counts[row], table[(use := _known(table))], scan.values[image][use])
    return MaskFolder(root, [(image, scan.masks[image]) for image in good], known, counts, skipped)


def find_pairs(root: Path) -> tuple[str, dict[str, tuple[list[Pair], list[Path]]]]:
    """(layout, split -> (pairs, images without a mask)); "" is the split of folders that have none."""
    if not root.is_dir():
        beside = [p.name for p in root.parent.iterdir() if p.is_dir()] if root.parent.is_dir() else []
        raise UsageError(f"{root}: no such folder", tip=did_you_mean(root.name, beside))
    for layout, find in (("camvid", _camvid), ("voc", _voc), ("folders", _folders), ("beside", _beside)):
        found = {name: both for name, both in find(root).items() if both[0]}
        if found:
            return layout, found
    raise VolvelleError(
        f"{root}: holds no images with masks",
        tip="wanted: images/ and masks/, or a mask a.png beside each a.jpg; docs/segmentation.md shows all layouts",
    )


class _Scan:
    """Looks at one image and its mask, and keeps how often each value occurs in the mask."""

    def __init__(self, masks: dict[Path, Path], labels: Labels | None, progress: Callable[[int, int], None] | None):
        self.masks, self.labels, self.progress = masks, labels, progress
        self.values: dict[Path, np.ndarray] = {}
        self.lock = threading.Lock()

    def __call__(self, image: Path) -> None:
        """Raise VolvelleError with what is wrong."""
        mask = self.masks.get(image)
        if mask is None:
            raise VolvelleError(f"{image}: has no mask")
        picture = to_rgb(open_image(image), source=str(image))
        try:
            values = stored_values(open_image(mask), self.labels.by_colour if self.labels else ())
            if values.shape[::-1] != picture.size:
                sizes = [f"{w} x {h}" for w, h in (values.shape[::-1], picture.size)]
                larger = "larger" if values.size > picture.width * picture.height else "of another size"
                raise VolvelleError(f"is {sizes[0]}, {larger} than its image, {sizes[1]}")
            if self.labels is not None:
                self.labels.decode(values)
        except VolvelleError as error:
            message = str(error)
            raise VolvelleError(message if str(mask) in message else f"its mask {mask}: {message}") from error
        counts = np.bincount(values.reshape(-1), minlength=256)
        with self.lock:
            self.values[image] = counts
            if self.progress:
                self.progress(len(self.values), len(self.masks))


def _known(table: np.ndarray) -> np.ndarray:
    """The file values that are classes."""
    return np.flatnonzero(table < 254)


def _labels(root: Path, layout: str, classes: tuple[str, ...], void: tuple[int, ...]) -> Labels | None:
    """The classes as they were named, or None when only the files can tell."""
    if classes:
        return Labels(classes, void=void)
    table = read_table(root)
    if table is not None:
        return replace(table, void=void)
    if layout == "camvid":
        by_colour = tuple(CAMVID_GROUPS.items())
        return Labels(CAMVID_NAMES, CAMVID_COLOURS, void=tuple({*void, len(CAMVID_NAMES)}), by_colour=by_colour)
    if layout == "voc":
        return Labels(VOC_NAMES, void=void)
    return None


def _counted(values: np.ndarray, void: tuple[int, ...]) -> Labels:
    """As many classes as the ids go; files of nothing but 0 and 255 have two."""
    present = np.flatnonzero(values).tolist()
    if set(present) <= {0, 255} and 255 in present and not void:
        return Labels(("background", "foreground"), binary=True)
    ids = [value for value in range(max((v for v in present if v != VOID), default=0) + 1) if value not in void]
    if not ids:
        raise VolvelleError("masks: every pixel is void, so there is nothing to learn")
    return Labels(tuple(f"class {value}" for value in ids), void=void)


def _merged(splits: dict[str, tuple[list[Pair], list[Path]]]) -> tuple[list[Pair], list[Path]]:
    return [pair for pairs, _ in splits.values() for pair in pairs], [p for _, alone in splits.values() for p in alone]


def _match(images: Sequence[Path], masks: Sequence[Path], root: Path, other: Path) -> tuple[list[Pair], list[Path]]:
    """Pairs by relative name, and the images that have no mask."""
    by_name = {mask.relative_to(other).with_suffix("").as_posix(): mask for mask in masks}
    pairs, alone = list[Pair](), list[Path]()
    for image in images:
        name = image.relative_to(root).with_suffix("").as_posix()
        found = next((by_name[name + end] for end in ADDITIONS if by_name.get(name + end, image) != image), None)
        if found is None:
            alone.append(image)
        else:
            pairs.append((image, found))
    return pairs, alone


def _files(folder: Path, *, deep: bool = True) -> list[Path]:
    found = folder.rglob("*") if deep else folder.glob("*")
    return sorted(p for p in found if p.suffix.lower() in SUFFIXES and not p.name.startswith(".") and p.is_file())


def _two(images: Path, masks: Path) -> tuple[list[Pair], list[Path]]:
    return _match(_files(images), _files(masks), images, masks)


def _camvid(root: Path) -> dict[str, tuple[list[Pair], list[Path]]]:
    return {
        name: _two(root / folder, root / f"{folder}annot")
        for name, folders in SPLITS.items()
        for folder in folders
        if (root / folder).is_dir() and (root / f"{folder}annot").is_dir()
    }


def _voc(root: Path) -> dict[str, tuple[list[Pair], list[Path]]]:
    images, masks, lists = root / "JPEGImages", root / "SegmentationClass", root / "ImageSets" / "Segmentation"
    if not (images.is_dir() and masks.is_dir() and lists.is_dir()):
        return {}
    by_name = {path.stem: path for path in _files(images)}
    found = {}
    for name in SPLITS:
        if (lists / f"{name}.txt").is_file():
            words = (lists / f"{name}.txt").read_text(encoding="utf-8").split()
            wanted = [by_name.get(word, images / f"{word}.jpg") for word in words]
            found[name] = _match(wanted, _files(masks), images, masks)
    return found


def _folders(root: Path) -> dict[str, tuple[list[Pair], list[Path]]]:
    found = {}
    both = [(root / a, root / b) for a in IMAGES for b in MASKS if (root / a).is_dir() and (root / b).is_dir()]
    for images, masks in both[:1]:
        for name, folders in SPLITS.items():
            for part in folders:
                if (images / part).is_dir() and (masks / part).is_dir():
                    found[name] = _two(images / part, masks / part)
        return found or {"": _two(images, masks)}
    for name, folders in SPLITS.items():
        for part in (root / folder for folder in folders):
            inner = [(part / a, part / b) for a in IMAGES for b in MASKS if (part / a).is_dir() and (part / b).is_dir()]
            if inner:
                found[name] = _two(*inner[0])
    return found


def _beside(root: Path) -> dict[str, tuple[list[Pair], list[Path]]]:
    found = {}
    for name, folders in SPLITS.items():
        for part in (root / folder for folder in folders):
            if part.is_dir():
                found[name] = _side_by_side(part)
    return found or {"": _side_by_side(root)}


def _side_by_side(folder: Path) -> tuple[list[Pair], list[Path]]:
    files = _files(folder)
    photographs = [p for p in files if p.suffix.lower() in (".jpg", ".jpeg", ".webp")]
    others = [p for p in files if p not in set(photographs)]
    if photographs:
        return _match(photographs, others, folder, folder)
    added = [p for p in others if any(end and p.stem.endswith(end) for end in ADDITIONS)]
    if not added:
        return [], []
    return _match([p for p in others if p not in set(added)], added, folder, folder)
