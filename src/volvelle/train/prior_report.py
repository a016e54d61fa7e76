"""report.html of a prior: held-out nats a code, curves, sheets of samples over time, what the codec keeps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from volvelle.data.codes import CodedPictures
from volvelle.data.pictures import Framing, PictureSet, to_bytes
from volvelle.data.sheet import sheet
from volvelle.data.text import spread
from volvelle.runs import RunFolder
from volvelle.systems.generation.prior import Prior
from volvelle.train.loop import FitResult
from volvelle.train.prior_objective import SAMPLES, SIDE
from volvelle.train.report import Report, begun, ended, tiles_of_work, training_curves
from volvelle.train.segment_pictures import png

SHEETS, SHOWN = 5, 8
"""Sheets in the report, from the first to the last; held-out pictures beside what their codes show."""


@dataclass(frozen=True)
class Page:
    """What the report shows: the prior, the held-out pictures and their codes, figures before and after."""

    prior: Prior
    held: PictureSet
    texts: CodedPictures
    before: Mapping[str, float]
    after: Mapping[str, float]


def write_report(run: RunFolder, result: FitResult, page: Page, *, subtitle: str, commands: Sequence[str]) -> Path:
    """Write report.html into the run folder."""
    report = begun(run, result, subtitle)
    found = page.after or page.before
    tiles = [
        (label, f"{found[name]:.4g}", f"before: {page.before[name]:.4g}" if page.after and name in page.before else "")
        for name, label in (("loss", "nats a code"), ("perplexity", "as good as a guess among"))
        if name in found
    ]
    report.tiles([*tiles, *tiles_of_work(result)])
    training_curves(report.heading("Training"), run.metrics())
    _add_sheets(report, run)
    _add_codec(report, page)
    return ended(report, run, commands)


def _add_sheets(report: Report, run: RunFolder) -> None:
    """Sheets of samples over time."""
    files = sorted((run.path / SAMPLES).glob("step-*.png"))
    if not files:
        return
    report.heading("What it draws").text(
        "The same random numbers at every moment, at temperature 1. All sheets are in samples/."
    )
    for file in dict.fromkeys([*spread(files, SHEETS - 1), files[-1]]):
        report.figure(file.read_bytes(), f"after {int(file.stem.partition('-')[2]):,} steps")


def _add_codec(report: Report, page: Page) -> None:
    """Held-out pictures over what is left of them in codes: no sample can be better than that."""
    layout, count = page.prior.layout, min(SHOWN, len(page.held))
    assert page.prior.codec is not None
    framing = Framing(layout.rows * page.prior.codec.factor, page.prior.codec.channels)  # type: ignore[arg-type]
    chosen = spread(range(len(page.held)), count)
    truth = torch.stack([framing.middle(page.held[i]) for i in chosen])
    codes = torch.stack([page.texts.codes_of(i) for i in chosen]).reshape(-1, layout.rows, layout.columns)
    both = torch.cat((truth, to_bytes(page.prior.pictures(codes))))
    report.heading("What the codes keep").figure(
        png(sheet(both, columns=count, least=SIDE)), "Held-out pictures, and what their codes show."
    )
