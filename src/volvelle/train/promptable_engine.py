"""The data engine of Segment Anything: a model and a human make the masks that the next model is trained on.

Three steps, after Kirillov et al. 2023, section 4. Assisted: a human clicks, the model answers, the human keeps what is
right. Semi-automatic: the model proposes what it is sure of, the human drops what is wrong and adds what is missing.
Automatic: the model alone, by a grid of points; what is sure and stable stays. Each leaves one JSON file of COCO's,
which `train promptable data=FILE.json` reads; a file that is there already is added to, picture by picture, and keeps
all else that it holds.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from volvelle.data.boxes_coco import read_coco
from volvelle.data.coco_masks import MaskedObject, coco_masks_document
from volvelle.data.masks_labels import voc_colour
from volvelle.data.promptable_clicks import Click
from volvelle.data.run_lengths import RunLengths
from volvelle.errors import UsageError
from volvelle.files import write_atomic
from volvelle.systems.segmentation.sam.embedding import Embedding
from volvelle.systems.segmentation.sam.everything import everything
from volvelle.systems.segmentation.sam.options import EverythingOptions
from volvelle.systems.segmentation.sam.promptable import Promptable
from volvelle.train.promptable_pictures import veiled, with_clicks

SHOWN = 1 << 22
"""Pixels of the largest preview; of larger pictures every second, third … pixel is drawn."""
Box = tuple[float, float, float, float]


@dataclass(frozen=True)
class Answer:
    """What the model says to the clicks so far: a mask (y, x), its estimated IoU, and the logits for the next ask."""

    mask: np.ndarray
    iou: float
    logits: torch.Tensor


@dataclass
class Session:
    """One picture that a human and a model go through: objects that are kept, and the one that is being clicked."""

    prompted: Promptable
    image: Image.Image
    kept: list[MaskedObject] = field(default_factory=list)
    clicks: list[Click] = field(default_factory=list)
    box: Box | None = None
    answers: list[Answer] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.embedding = self.prompted.embed(self.image)

    @property
    def answer(self) -> Answer | None:
        """The newest answer."""
        return self.answers[-1] if self.answers else None

    def click(self, x: int, y: int, label: int = 1) -> Answer:
        """One more click, for the object (1) or against it (0). UsageError outside the picture."""
        if not (0 <= x < self.image.width and 0 <= y < self.image.height):
            raise UsageError(f"{x},{y}: outside the picture, which is {self.image.width} x {self.image.height}")
        self.clicks.append(Click(x, y, label))
        return self._ask()

    def draw(self, box: Box) -> Answer:
        """A box around a new object. UsageError for one without an area in the picture."""
        x1, y1, x2, y2 = box
        if not (0 <= x1 < x2 <= self.image.width and 0 <= y1 < y2 <= self.image.height):
            raise UsageError(f"box {x1:g},{y1:g},{x2:g},{y2:g}: x1 < x2 and y1 < y2 inside the picture are wanted")
        self.forget()
        self.box = box
        return self._ask()

    def undo(self) -> Answer | None:
        """Take back the last click, or the box, and give the answer before."""
        if not self.answers:
            raise UsageError("undo: nothing was clicked")
        self.answers.pop()
        if self.clicks:
            self.clicks.pop()
        else:
            self.box = None
        return self.answer

    def forget(self) -> None:
        """Leave the object that is being clicked."""
        self.clicks, self.box, self.answers = [], None, []

    def keep(self, name: str = "object") -> MaskedObject:
        """Keep the answer as an object of that name and begin a new one. UsageError where there is none."""
        if self.answer is None or not self.answer.mask.any():
            raise UsageError("keep: there is no mask yet", tip="click first: 120,80")
        facts: dict[str, Any] = {"predicted_iou": round(self.answer.iou, 4)}
        if self.clicks:
            facts |= {"point_coords": [[c.x, c.y] for c in self.clicks], "point_labels": [c.label for c in self.clicks]}
        if self.box is not None:
            x1, y1, x2, y2 = self.box
            facts["asked_box"] = [x1, y1, x2 - x1, y2 - y1]
        one = MaskedObject(RunLengths.of(self.answer.mask), name, facts=facts)
        self.kept.append(one)
        self.forget()
        return one

    def drop(self, number: int) -> None:
        """Take away the kept object of that number, counted from 1."""
        if not 1 <= number <= len(self.kept):
            raise UsageError(f"drop {number}: there are {len(self.kept)} kept objects")
        del self.kept[number - 1]

    def picture(self) -> Image.Image:
        """The picture with what is kept, in colours, and the newest answer with its clicks; `SHOWN` pixels at most."""
        step = math.ceil(math.sqrt(self.image.width * self.image.height / SHOWN))
        shown = self.image.reduce(step)
        for number, one in enumerate(self.kept, 1):
            shown = veiled(shown, one.mask.thinned(step), voc_colour(number % 20 + 1), 0.3)
        if self.answer is not None:
            mask = self.answer.mask
            shown = veiled(shown, mask if step == 1 else RunLengths.of(mask).thinned(step))
        return with_clicks(shown, [Click(c.x // step, c.y // step, c.label) for c in self.clicks])

    def _ask(self) -> Answer:
        single = len(self.clicks) == 1 and self.box is None
        points = torch.tensor([[click[:2] for click in self.clicks]], dtype=torch.float32) if self.clicks else None
        labels = torch.tensor([[click.label for click in self.clicks]]) if self.clicks else None
        boxes = torch.tensor([self.box]) if self.box else None
        before = self.answer.logits if self.answer else None
        found = self.prompted.predict(
            self.embedding, points=points, labels=labels, boxes=boxes, masks=before, multimask=single
        )
        rank = int(found.iou[0].argmax())
        answer = Answer(found.masks[0, rank].cpu().numpy(), float(found.iou[0, rank]), found.logits[:, rank].float())
        self.answers.append(answer)
        return answer


class Collection:
    """The objects of many pictures, in a JSON file of COCO's that is written after each picture.

    Of a file that is there only the annotations of the picture at hand are replaced. All else stays as it stands:
    other pictures' annotations with their facts, boxes without masks, categories, numbers, and lists that we do not
    know. `entries` are the file's records of its pictures.
    """

    def __init__(self, file: Path):
        self.file = file
        self.document: dict[str, Any] = {"images": [], "annotations": [], "categories": []}
        self.root: Path | None = file.parent
        places = list[Path]()
        if file.exists():
            places = [note.image for note in read_coco(file).notes]
            self.document = json.loads(file.read_text(encoding="utf-8"))
            self.root = _root(file, places, self.document["images"])
        self.entries = {place.resolve(): entry for place, entry in zip(places, self.document["images"], strict=True)}

    def __contains__(self, image: Path) -> bool:
        return image.resolve() in self.entries

    def __len__(self) -> int:
        return len(self.document["annotations"])

    def add(self, image: Path, size: tuple[int, int], objects: Sequence[MaskedObject]) -> None:
        """Put a picture's objects in, in place of those it had, and write the file."""
        entry = self._entry(image.resolve(), size)
        kept = [note for note in self.document["annotations"] if _of(note, "image_id") != entry["id"]]
        names = tuple(dict.fromkeys(one.name for one in objects))
        numbers = self._categories(names)
        made = coco_masks_document([("", size)], [objects], names)["annotations"]
        first = _unused(kept)
        for note, one in zip(made, objects, strict=True):
            note |= {"id": first + note["id"] - 1, "image_id": entry["id"], "category_id": numbers[one.name]}
        self.document["annotations"] = kept + made
        write_atomic(self.file, json.dumps(self.document))

    def _entry(self, image: Path, size: tuple[int, int]) -> dict[str, Any]:
        """The file's record of a picture, a new one where it has none."""
        if image not in self.entries:
            # Readers look for all pictures of a file from one folder, so a new one is named from there too.
            name = image if self.root is None else Path(os.path.relpath(image, self.root.resolve()))
            self.entries[image] = {"id": _unused(self.document["images"]), "file_name": name.as_posix()}
            self.document["images"].append(self.entries[image])
        self.entries[image] |= {"width": size[0], "height": size[1]}
        return self.entries[image]

    def _categories(self, names: Sequence[str]) -> dict[str, Any]:
        """The numbers of these classes, of new ones behind those of the file."""
        listed = self.document["categories"]
        for name in names or (() if listed else ("object",)):
            if not any(one["name"] == name for one in listed):
                listed.append({"id": _unused(listed), "name": name})
        return {one["name"]: one["id"] for one in reversed(listed)}


def _root(file: Path, places: Sequence[Path], entries: Sequence[dict[str, Any]]) -> Path | None:
    """The folder that a file's names of pictures begin in; None where they are whole paths."""
    if not places:
        return file.parent
    name = Path(entries[0]["file_name"])
    return None if name.is_absolute() else places[0].parents[len(name.parts) - 1]


def _of(entry: Any, name: str) -> Any:
    return entry.get(name) if isinstance(entry, dict) else None


def _unused(entries: Sequence[Any]) -> int:
    """A number above all that are taken."""
    taken = [number for entry in entries if isinstance(number := _of(entry, "id"), int)]
    return max(taken, default=0) + 1


def propose(prompted: Promptable, image: Image.Image | Embedding, options: EverythingOptions) -> list[MaskedObject]:
    """What the model finds by itself, as far as it is sure of it and it is stable."""
    return [one.annotated() for one in everything(prompted, image, options=options).masks]
