"""A prior's objective: language modelling over codes, and at every evaluation a sheet of pictures that it draws."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from volvelle.data.loader import Loader
from volvelle.data.pictures import to_bytes
from volvelle.data.sheet import sheet
from volvelle.decode.images import draw_images
from volvelle.decode.options import Sampling
from volvelle.files import atomic_path
from volvelle.systems.generation.prior import Prior, Shows
from volvelle.systems.language.projections import unfuse_projections
from volvelle.train.language import LanguageObjective
from volvelle.train.options import FitOptions

SAMPLES, SIDE = "samples", 56
"""The folder of sheets in a run's, and the side in pixels that their pictures have at least."""


class PriorObjective(LanguageObjective):
    """Train the prior's decoder on texts of codes.

    Held-out `loss` is in nats a code. `shows` are what the pictures of the sheets show; the sheet of step s is
    samples/step-s.png in `folder`, always drawn with the same random numbers, so that sheets differ by training alone.
    """

    def __init__(self, prior: Prior, options: FitOptions, *, held_out: Loader, shows: Sequence[Shows], folder: Path):
        super().__init__(prior.model, options, held_out=held_out)
        self.prior, self.shows, self.folder, self.step = prior, list(shows), folder, 0

    def after_step(self, step: int) -> None:
        """Count the steps, which name the sheets."""
        self.step = step + 1

    def evaluate(self) -> Mapping[str, float]:
        """The held-out loss; a sheet is drawn besides."""
        found = super().evaluate()
        if self.shows:
            self.draw()
        return found

    def draw(self) -> Path:
        """Draw the sheet of this step."""
        drawn = draw_images(self.prior, self.shows, sampling=Sampling(temperature=1.0, seed=self.options.seed))
        unfuse_projections(self.prior.model)  # training goes on with every layer's own weights
        path = self.folder / SAMPLES / f"step-{self.step:06d}.png"
        path.parent.mkdir(exist_ok=True)
        with atomic_path(path) as temporary:
            sheet(to_bytes(self.prior.pictures(drawn.codes)), columns=8, least=SIDE).save(temporary, format="PNG")
        return path

    def state_dict(self) -> dict[str, Any]:
        """The step."""
        return {"step": self.step}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Undo `state_dict`."""
        self.step = state["step"]


def spread_shows(prior: Prior, count: int, captions: Sequence[str] = ()) -> list[Shows]:
    """What `count` pictures are to show: the classes in turn, captions spread over those known, or anything."""
    if prior.layout.classes:
        return [i % len(prior.layout.classes) for i in range(count)]
    if prior.words is not None and captions:
        return [captions[i * len(captions) // count] for i in range(count)]
    return [None] * count
