"""report.html of a codec: figures, curves, reconstructions over time and at the end, how its codebook is used."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image

from volvelle.data.pictures import Framing, PictureSet, to_bytes, to_signed
from volvelle.data.sheet import sheet
from volvelle.data.text import spread
from volvelle.files import write_atomic
from volvelle.runs import RunFolder
from volvelle.systems.generation.perceptual import NAME
from volvelle.systems.generation.vqgan_model import VQGAN
from volvelle.systems.modes import evaluating
from volvelle.train.charts import Series, line_chart
from volvelle.train.loop import FitResult
from volvelle.train.picture_sets import PictureParts
from volvelle.train.report import Report, begun, ended, tiles_of_work, training_curves
from volvelle.train.segment_pictures import png
from volvelle.train.vqgan_measure import Measured

SAMPLES = "samples"
"""The folder of the sheets in a run's."""
SIDE, SHEETS = 56, 5
"""The least side of a picture on a sheet; sheets in the report, from the first to the last."""
NAMES = {
    "psnr": ("PSNR", "dB"),
    "ssim": ("SSIM", ""),
    "perceptual": (NAME, "less is better"),
    "used": ("codes in use", "of all, over the set"),
    "code_perplexity": ("as many as", "equally frequent codes"),
}


@dataclass(frozen=True)
class Page:
    """What the report shows: the codec, its pictures, figures at the end (None when interrupted) and before."""

    model: VQGAN
    parts: PictureParts
    found: Measured | None
    before: Mapping[str, float]
    samples: int


def write_report(run: RunFolder, result: FitResult, page: Page, *, subtitle: str, commands: Sequence[str]) -> Path:
    """Write report.html into the run folder."""
    report = begun(run, result, subtitle)
    figures = page.found.metrics if page.found else {}
    tiles = [(label, _shown(name, figures[name]), note) for name, (label, note) in NAMES.items() if name in figures]
    report.tiles([*tiles, *tiles_of_work(result)])
    if page.found:
        report.text(f"Measured on {len(page.parts.held):,} pictures: {page.parts.where}. Nothing was chosen by them.")
    records = run.metrics()
    training_curves(report.heading("Training"), records)
    for name, label in (("psnr", "dB"), ("used", "share of codes in use")):
        points = [(float(r["step"]), float(r[f"held_out_{name}"])) for r in records if f"held_out_{name}" in r]
        report.figure(line_chart([Series("held out", points, dots=True)], y_label=label))
    _add_sheets(report, run)
    if page.found:
        _add_codes(report, page.found)
    return ended(report, run, commands)


def keep_sheet(run: RunFolder, step: int, model: VQGAN, pictures: PictureSet, count: int) -> None:
    """Write samples/step-….png: pictures at even distances above what the codec makes of them."""
    folder = run.path / SAMPLES
    folder.mkdir(exist_ok=True)
    write_atomic(folder / f"step-{step:06d}.png", png(reconstructions(model, pictures, count)))


def framing_of(model: VQGAN) -> Framing:
    """The squares that a codec takes."""
    return Framing(model.size, 1 if model.channels == 1 else 3)


@torch.no_grad()
def reconstructions(model: VQGAN, pictures: PictureSet, count: int) -> Image.Image:
    """A sheet of pictures, and below them their reconstructions."""
    framing = framing_of(model)
    truth = torch.stack([framing.middle(pictures[i]) for i in spread(range(len(pictures)), count)])
    with evaluating(model):
        drawn = model.decode(model.encode(to_signed(truth).to(model.quant_conv.weight.device)))
    return sheet(torch.cat((truth, to_bytes(drawn).cpu())), columns=len(truth), least=SIDE)


def _add_sheets(report: Report, run: RunFolder) -> None:
    files = sorted((run.path / SAMPLES).glob("step-*.png"))
    if not files:
        return
    report.heading("Held-out pictures").text(
        "Above the picture, below what its codes show. All sheets are in samples/."
    )
    for file in dict.fromkeys([*spread(files, SHEETS - 1), files[-1]]):
        report.figure(file.read_bytes(), f"after {int(file.stem.partition('-')[2]):,} steps")


def _add_codes(report: Report, found: Measured) -> None:
    """How often each code occurs, the most frequent first."""
    shares = (found.counts.double() / found.counts.sum()).sort(descending=True).values.tolist()
    used = sum(share > 0 for share in shares)
    points = [(float(rank), share) for rank, share in enumerate(shares, 1) if share > 0]
    report.heading("Codebook").figure(
        line_chart([Series("share of all codes", points)], y_label="share", log_y=True),
        f"How often each code occurs, the most frequent first: {used:,} of {len(shares):,} occur.",
    )


def _shown(name: str, value: float) -> str:
    return f"{100 * value:.1f} %" if name == "used" else f"{value:.4g}"
