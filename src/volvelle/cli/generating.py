"""What `generate` and `eval` do with runs that draw pictures: `train prior` and `train gan`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from volvelle.cli.console import result, say
from volvelle.cli.drafts import DraftOptions, check_drafts, open_draft
from volvelle.cli.measured import figures
from volvelle.decode.options import Sampling
from volvelle.errors import UsageError
from volvelle.runs import RunFolder

if TYPE_CHECKING:
    from torch import Tensor

    from volvelle.data.text import OnBad
    from volvelle.systems.generation.prior import Prior, Shows

SIDE = 64
"""The side in pixels that a drawn picture has at least on its sheet."""


@dataclass(frozen=True, kw_only=True)
class PictureOptions:
    """What a run that draws pictures is asked for."""

    count: int = 16
    """Pictures: how many are drawn."""
    class_: str | None = None
    """Pictures: the class to draw, by name or number; left out, the classes in turn."""
    temperature: float | None = None
    """As sampling.temperature; for pictures 1 when left out."""
    size: tuple[int, int] = (0, 0)
    """Pictures of a prior: height and width in pixels; 0,0: as trained. Larger ones are drawn through a window."""
    begin: Path | None = None
    """Pictures of a prior: a picture whose beginning all of them share."""
    keep: float = 0.5
    """Pictures of a prior: how much of that picture, from the top, stays."""
    out: Path | None = None
    """Pictures: the file to write; a new one in the run's folder when left out."""

    def __post_init__(self) -> None:
        if self.count < 1:
            raise UsageError(f"count must be at least 1, got {self.count}")
        if not 0 <= self.keep < 1:
            raise UsageError(f"keep must be at least 0 and below 1, got {self.keep}")
        if len(self.size) != 2 or min(self.size) < 0 or (min(self.size) == 0) != (max(self.size) == 0):
            raise UsageError(f"size: wanted height,width in pixels, got {self.size}")


@dataclass(frozen=True, kw_only=True)
class Asked(DraftOptions, PictureOptions):
    """All that `generate` was asked of a run that draws pictures."""

    run: Path
    caption: str | None
    sampling: Sampling


def kind_of(path: str) -> str | None:
    """The kind of a run that draws pictures: prior or gan; None for all else."""
    folder = Path(path)
    kind = RunFolder.open(folder).manifest.get("kind") if (folder / "manifest.json").is_file() else None
    return kind if kind in DRAWING else None


def draw(kind: str, asked: Asked) -> int:
    """Draw the pictures, write them on one sheet, and say what they took."""
    from volvelle.data.pictures import to_bytes
    from volvelle.data.sheet import sheet
    from volvelle.files import atomic_path

    pixels, record = DRAWING[kind](asked)
    out = asked.out or _free(asked.run)
    with atomic_path(out) as temporary:
        sheet(to_bytes(pixels), least=SIDE).save(temporary, format="PNG")
    say(f"{len(pixels)} pictures of {pixels.shape[-2]} x {pixels.shape[-1]} pixels: {out}")
    result({"run": asked.run, "pictures": len(pixels), "out": out, **record})
    return 0


def _prior(asked: Asked) -> tuple[Tensor, dict[str, Any]]:
    """Pictures of a prior."""
    from dataclasses import replace
    from time import perf_counter

    from volvelle.cli.training import console
    from volvelle.decode.accept_exact import EXACT
    from volvelle.decode.accept_typical import Typical
    from volvelle.decode.images import draw_images
    from volvelle.systems.generation.prior import read_prior

    check_drafts(asked)
    prior = read_prior(asked.run)
    layout = prior.layout
    say(f"{asked.run}: {sum(p.numel() for p in prior.model.parameters()) / 1e6:.1f}M parameters over {layout.codes} "
        f"codes, {layout.rows} x {layout.columns} a picture; codec {prior.codec_path}")  # fmt: skip
    sampling = asked.sampling
    if asked.temperature is not None or sampling.greedy:
        sampling = replace(sampling, temperature=1.0 if asked.temperature is None else asked.temperature)
    began = perf_counter()
    with console() as observer:
        drawn = draw_images(
            prior,
            _shows(prior, asked),
            sampling=sampling,
            size=_grid(prior, asked.size),
            begins=_beginning(prior, asked),
            drafter=open_draft(asked, prior.model),
            acceptance=EXACT if asked.acceptance == "exact" else Typical(),
            exact=asked.exact,
            progress=lambda done, total: observer.work("pictures", done, total),
        )
    seconds = perf_counter() - began
    say(f"[{drawn.codes.numel():,} codes, {drawn.codes.numel() / seconds:,.0f} a second"
        + (f", {drawn.accepted_per_step:.2f} a step" if asked.draft else "") + "]")  # fmt: skip
    record = {"codes": drawn.codes.tolist(), "seconds": seconds, "accepted_per_step": drawn.accepted_per_step}
    return prior.pictures(drawn.codes), record


def _gan(asked: Asked) -> tuple[Tensor, dict[str, Any]]:
    """Pictures of a generator; the temperature is the deviation of its latent numbers."""
    import torch

    from volvelle.systems.modes import evaluating
    from volvelle.train.gan import open_run

    wrong = {"class": asked.class_, "prompt": asked.caption, "size": any(asked.size), "begin": asked.begin,
             "draft": asked.draft}  # fmt: skip
    for name, given in wrong.items():
        if given:
            raise UsageError(f"generate: {name}= is for pictures of a prior; a generator draws whatever it draws")
    model = open_run(asked.run)
    say(f"{asked.run}: a generator of {sum(p.numel() for p in model.generator.parameters()) / 1e6:.1f}M parameters")
    seed = asked.sampling.seed
    z = model.latents(asked.count, None if seed is None else torch.Generator().manual_seed(seed))
    with torch.no_grad(), evaluating(model):
        z = z * (1.0 if asked.temperature is None else asked.temperature)
        return torch.cat([model(part).float().cpu() for part in z.split(256)]), {}


DRAWING = {"prior": _prior, "gan": _gan}
"""Runs that draw pictures, and what draws them."""


def _shows(prior: Prior, asked: Asked) -> list[Shows]:
    """What each picture is to show. Raises UsageError for what this prior was not told of in training."""
    classes = prior.layout.classes
    if asked.caption is not None and asked.class_ is not None:
        raise UsageError("generate: a class and a caption; a picture shows one of them")
    if asked.caption is not None:
        if prior.words is None:
            ear = f"its {len(classes)} classes: class={classes[0]}" if classes else "nothing"
            raise UsageError(f"{asked.run}: was trained without captions", tip=f"it listens to {ear}")
        return [asked.caption] * asked.count
    if asked.class_ is not None:
        return [prior.layout.number(asked.class_)] * asked.count
    return [i % len(classes) for i in range(asked.count)] if classes else [None] * asked.count


def _grid(prior: Prior, size: tuple[int, int]) -> tuple[int, int] | None:
    """Rows and columns of codes for a size in pixels."""
    assert prior.codec is not None
    factor = prior.codec.factor
    if not any(size):
        return None
    if any(side % factor for side in size):
        raise UsageError(f"size={size[0]},{size[1]}: a code is {factor} x {factor} pixels", tip="take multiples of it")
    return size[0] // factor, size[1] // factor


def _beginning(prior: Prior, asked: Asked) -> Tensor | None:
    """The codes of the upper part of a given picture."""
    if asked.begin is None:
        return None
    from volvelle.data.images import read_image
    from volvelle.data.pictures import Framing, to_signed

    if any(asked.size):
        raise UsageError("generate: begin= goes with pictures of the trained size", tip="leave size= out")
    assert prior.codec is not None
    layout = prior.layout
    framing = Framing(layout.rows * prior.codec.factor, prior.codec.channels)  # pyright: ignore[reportArgumentType]
    codes = prior.codec.encode(to_signed(framing.middle(read_image(asked.begin)))[None].to(prior.model.device))
    return codes.flatten().cpu()[: round(asked.keep * layout.rows) * layout.columns]


def evaluate(
    path: str, data: str, *, judge: str | None, extractor: str | None, samples: int, batch: int, on_bad: OnBad
) -> int:
    """Measure a prior on pictures (their val or test part, when there is one), and print it.

    Distances are by the features of `extractor`; None: the judge's.
    """
    from volvelle.cli.training import console
    from volvelle.data.pictures import read_pictures
    from volvelle.systems.generation.extractor import open_extractor
    from volvelle.systems.generation.prior import read_prior
    from volvelle.train.classify import data_folder
    from volvelle.train.judge import open_judge
    from volvelle.train.prior_measure import measure_prior

    prior = read_prior(path)
    assert prior.codec is not None
    train, held = read_pictures(data_folder(data), on_bad=on_bad)
    pictures = held or train
    say(f"{data}: {pictures}")
    who = None if judge is None else open_judge(judge)
    if who is None and extractor is None:
        say("codes alone: judge=RUN of train classify says what drawn pictures show, extractor= how far they are off")
    by = extractor or judge
    with console() as observer:
        found = measure_prior(
            prior,
            pictures,
            extractor=None if by is None else open_extractor(by, size=prior.layout.rows * prior.codec.factor),
            judge=who,
            samples=samples,
            batch=batch,
            observer=observer,
        )
    figures(found.metrics)
    counts = {"pictures": len(pictures), "drawn": len(found.pictures)}
    result({"model": path, "data": data, "judge": judge, "extractor": by, **counts, **found.metrics})
    return 0


def _free(run: Path) -> Path:
    """A file of that run that is not there yet."""
    number = 1
    while (path := run / f"generated-{number}.png").exists():
        number += 1
    return path
