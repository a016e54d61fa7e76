"""Boxes in COCO's JSON: one file a split, read and written.

    {"images": [{"id", "file_name", "width", "height"}], "categories": [{"id", "name"}],
     "annotations": [{"id", "image_id", "category_id", "bbox": [x, y, width, height], "area", "iscrowd"}]}

Crowds are read as ignored objects.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from volvelle.data.boxes_notes import Note, Notes, Object
from volvelle.errors import VolvelleError, did_you_mean

LISTS = ("images", "annotations", "categories")


def is_coco(path: Path) -> bool:
    """Whether a JSON file speaks of all three lists; it is not parsed for that."""
    try:
        content = path.read_text(encoding="utf-8")
    except (OSError, ValueError):
        return False
    return all(f'"{name}"' in content for name in LISTS)


def read_coco(path: Path, *, outlines: bool = False) -> Notes:
    """What a file says of its pictures. Raises VolvelleError for one that is not COCO's, or whose pictures are nowhere.

    Entries are named as FILE: annotations[17]. With `outlines` objects keep their `segmentation` as it stands there,
    which takes more memory than all else in the file.
    """
    content = _content(path)
    names, images, problems = dict[int, str](), dict[Any, dict[str, Any]](), list[tuple[str, str]]()
    for number, entry in enumerate(content["categories"]):
        if not isinstance(entry, dict) or "id" not in entry or not isinstance(entry.get("name"), str):
            raise VolvelleError(f"{path}: categories[{number}]: wants id and name, got {_short(entry)}")
        names[entry["id"]] = entry["name"]
    for number, entry in enumerate(content["images"]):
        if not isinstance(entry, dict) or "id" not in entry or not isinstance(entry.get("file_name"), str):
            raise VolvelleError(f"{path}: images[{number}]: wants id and file_name, got {_short(entry)}")
        if entry["id"] in images:
            raise VolvelleError(
                f"{path}: images[{number}]: id {entry['id']} is taken by {images[entry['id']]['file_name']}"
            )
        images[entry["id"]] = entry
    objects: dict[Any, list[Object]] = {key: [] for key in images}
    for number, entry in enumerate(content["annotations"]):
        where = f"{path}: annotations[{number}]"
        try:
            key = _image_of(entry, images)
            outline = entry.get("segmentation") if outlines else None
            objects[key].append(_object(entry, names, where, outline))
        except VolvelleError as error:
            problems.append((where, str(error)))
    root = _root(path, [entry["file_name"] for entry in images.values()])
    notes = [
        Note(root / entry["file_name"], f"{path}: images[{number}]", tuple(objects[key]), _size(entry))
        for number, (key, entry) in enumerate(images.items())
    ]
    return Notes(notes, tuple(names[key] for key in sorted(names, key=str if _mixed(names) else None)), tuple(problems))


def coco_document(
    images: Iterable[tuple[str, tuple[int, int]]], objects: Iterable[Sequence[Object]], classes: Sequence[str]
) -> dict[str, Any]:
    """COCO's three lists: `images` are (file name, (width, height)), `objects` those of each, categories count from 1.

    >>> cat = Object("cat", (1, 2, 4, 4), "", area=5)
    >>> document = coco_document([("a.png", (8, 6))], [[cat]], ["dog", "cat"])
    >>> document["annotations"][0]["bbox"], document["annotations"][0]["category_id"]
    ([1, 2, 3, 2], 2)
    """
    listed, notes = list[dict[str, Any]](), list[dict[str, Any]]()
    numbers = {name: number for number, name in enumerate(classes, 1)}
    for image, ((name, (width, height)), inside) in enumerate(zip(images, objects, strict=True), 1):
        listed.append({"id": image, "file_name": name, "width": width, "height": height})
        for one in inside:
            x1, y1, x2, y2 = one.box
            wide, high = x2 - x1, y2 - y1
            notes.append(
                {
                    "id": len(notes) + 1,
                    "image_id": image,
                    "category_id": numbers[one.name],
                    "bbox": [x1, y1, wide, high],
                    "area": wide * high if one.area is None else one.area,
                    "iscrowd": int(one.ignored),
                }
            )
    categories = [{"id": number, "name": name} for name, number in numbers.items()]
    return {"images": listed, "annotations": notes, "categories": categories}


def _content(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise VolvelleError(f"{path}: no such file", tip=did_you_mean(path.name, _beside(path))) from None
    except json.JSONDecodeError as error:
        raise VolvelleError(f"{path}:{error.lineno}: not JSON ({error.msg})") from error
    except (OSError, UnicodeDecodeError) as error:
        raise VolvelleError(f"{path}: cannot be read ({error})") from error
    missing = [name for name in LISTS if not isinstance(content, dict) or not isinstance(content.get(name), list)]
    if missing:
        raise VolvelleError(f"{path}: not COCO's format: it has no list {', '.join(missing)}")
    return content


def _image_of(entry: Any, images: dict[Any, Any]) -> Any:
    if not isinstance(entry, dict):
        raise VolvelleError(f"an object with bbox is wanted, got {_short(entry)}")
    key = entry.get("image_id")
    if key not in images:
        raise VolvelleError(f"image_id {key!r} is no picture of the file")
    return key


def _object(entry: dict[str, Any], names: dict[int, str], where: str, outline: Any) -> Object:
    box, category = entry.get("bbox"), entry.get("category_id")
    if category not in names:
        raise VolvelleError(f"category_id {category!r} is no category of the file")
    if not isinstance(box, list) or len(box) != 4 or not all(_is_number(value) for value in box):
        raise VolvelleError(f"bbox: four numbers x, y, width, height are wanted, got {_short(box)}")
    x, y, width, height = map(float, box)
    corners = (x, y, x + width, y + height)
    return Object(names[category], corners, where, bool(entry.get("iscrowd")), _positive(entry.get("area")), outline)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _positive(value: Any) -> float | None:
    return float(value) if _is_number(value) and value > 0 else None


def _size(entry: dict[str, Any]) -> tuple[int, int] | None:
    width, height = _positive(entry.get("width")), _positive(entry.get("height"))
    return None if width is None or height is None else (int(width), int(height))


def _root(path: Path, files: Sequence[str]) -> Path:
    """The folder that the file names begin in: the first of the usual places where one of the first ten is."""
    # instances_train2017.json in annotations/ belongs to ../train2017, train.json to images/train.
    words = dict.fromkeys((path.stem, path.stem.rpartition("_")[2], ""))
    bases = [base / images for base in (path.parent, path.parent.parent) for images in ("", "images")]
    places = [base / word for base in bases for word in words]
    found = next((place for place in places if any((place / name).is_file() for name in files[:10])), None)
    if found is None and files:
        looked = ", ".join(dict.fromkeys(str(place) for place in places))
        raise VolvelleError(f"{path}: its picture {files[0]} is in none of {looked}")
    return found or path.parent


def _mixed(names: dict[Any, str]) -> bool:
    return not all(isinstance(key, int) for key in names)


def _beside(path: Path) -> list[str]:
    return [p.name for p in path.parent.glob("*.json")] if path.parent.is_dir() else []


def _short(value: Any) -> str:
    text = json.dumps(value, default=str)
    return text if len(text) <= 60 else f"{text[:57]}…"
