"""A judge of drawn pictures: a classifier that says what each shows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from volvelle.data.images import to_image
from volvelle.data.pictures import to_bytes
from volvelle.errors import UsageError, VolvelleError
from volvelle.systems.backbone.model import Backbone
from volvelle.systems.modes import evaluating
from volvelle.train.classify import open_run

TOGETHER = 100


class Judge:
    """A classifier, and the name that figures of its making carry."""

    def __init__(self, model: Backbone, name: str):
        self.model, self.name = model, name

    @torch.no_grad()
    def look(self, pictures: Tensor, progress: Callable[[int, int], None] | None = None) -> Tensor:
        """The likeliest class of each picture, int64 (n,), of pictures (n, 1 or 3, y, x) in [-1, 1]."""
        how, answers = self.model.preprocessing, list[Tensor]()
        device = next(self.model.parameters()).device
        with evaluating(self.model):
            for part in to_bytes(pictures).split(TOGETHER):
                ready = torch.stack([how.prepare(to_image(picture)) for picture in part])
                answers.append(self.model(how.normalise(ready.to(device))).argmax(1).cpu())
                if progress is not None:
                    progress(sum(map(len, answers)), len(pictures))
        return torch.cat(answers)

    def numbers(self, classes: Sequence[str]) -> list[int]:
        """Its own number of each of these classes. Raises VolvelleError for one that it does not know."""
        names = [name.lower() for name in self.model.classes]
        missing = [name for name in classes if name.lower() not in names]
        if missing:
            raise VolvelleError(f"judge {self.name}: does not know the class {missing[0]}")
        return [names.index(name.lower()) for name in classes]

    def recognised(self, answers: Tensor, asked: Sequence[int], classes: Sequence[str]) -> float:
        """The share of `answers` that are the class asked for, a number in `classes`."""
        wanted = torch.tensor(self.numbers(classes))[list(asked)]
        return float((answers == wanted).double().mean())


def open_judge(path: str | Path) -> Judge:
    """The classifier of a finished run of train classify. Raises UsageError for what is no run."""
    folder = Path(path)
    if not (folder / "manifest.json").is_file():
        raise UsageError(f"judge={path}: not a run", tip="volvelle train classify data=… makes one")
    return Judge(open_run(folder), folder.resolve().name)
