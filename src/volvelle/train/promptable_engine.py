"""The data engine of Segment Anything: a model and a human make the masks that the next model is trained on.

Three steps, after Kirillov et al. 2023, section 4. Assisted: a human clicks, the model answers, the human keeps what is
right. Semi-automatic: the model proposes what it is sure of, the human drops what is wrong and adds what is missing.
Automatic: the model alone, by a grid of points; what is sure and stable stays. Each leaves one JSON file of COCO's,
which `train promptable data=FILE.json` reads; a file that is there already is added to, picture by picture.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from volvelle.data.coco_masks import MaskedObject, read_coco_masks, write_coco_masks
from volvelle.data.masks_labels import voc_colour
from volvelle.data.promptable_clicks import Click
from volvelle.data.run_lengths import RunLengths
from volvelle.errors import UsageError
from volvelle.systems.segmentation.sam.everything import everything
from volvelle.systems.segmentation.sam.options import EverythingOptions
from volvelle.systems.segmentation.sam.promptable import Promptable
from volvelle.train.promptable_pictures import veiled, with_clicks

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
        facts = {"predicted_iou": round(self.answer.iou, 4), "point_coords": [[c.x, c.y] for c in self.clicks]}
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
        """The picture with what is kept, in colours, and the newest answer with its clicks."""
        shown = self.image
        for number, one in enumerate(self.kept, 1):
            shown = veiled(shown, one.mask.mask(), voc_colour(number % 20 + 1), 0.3)
        if self.answer is not None:
            shown = veiled(shown, self.answer.mask)
        return with_clicks(shown, self.clicks)

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
    """The objects of many pictures, written to a JSON file of COCO's after each picture."""

    def __init__(self, file: Path):
        self.file = file
        self.entries: dict[Path, tuple[tuple[int, int], list[MaskedObject]]] = {}
        if file.exists():
            for image, size, objects in read_coco_masks(file):
                self.entries[image.resolve()] = (size, objects)

    def __contains__(self, image: Path) -> bool:
        return image.resolve() in self.entries

    def __len__(self) -> int:
        return sum(len(objects) for _, objects in self.entries.values())

    def add(self, image: Path, size: tuple[int, int], objects: Sequence[MaskedObject]) -> None:
        """Put a picture's objects in, in place of those it had, and write the file."""
        self.entries[image.resolve()] = (size, list(objects))
        base = self.file.parent.resolve()
        base.mkdir(parents=True, exist_ok=True)
        images = [(Path(os.path.relpath(path, base)).as_posix(), size) for path, (size, _) in self.entries.items()]
        kept = [objects for _, objects in self.entries.values()]
        names = tuple(dict.fromkeys(one.name for some in kept for one in some)) or ("object",)
        write_coco_masks(self.file, images, kept, names)


def propose(prompted: Promptable, image: Image.Image, options: EverythingOptions) -> list[MaskedObject]:
    """What the model finds by itself, as far as it is sure of it and it is stable."""
    return [one.annotated() for one in everything(prompted, image, options=options).masks]
