"""What a prior's pictures are worth: nats a held-out code, what a judge sees in them, how far they are from real ones.

No sample can be better than the codec: held-out pictures that went through it stand beside the samples.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from volvelle.data.codes import CodedPictures, encode_pictures
from volvelle.data.pictures import Framing, PictureSet, to_signed
from volvelle.data.text import spread
from volvelle.decode.images import draw_images
from volvelle.decode.options import Sampling
from volvelle.systems.generation.extractor import Extractor
from volvelle.systems.generation.prior import Prior
from volvelle.train.judge import Judge
from volvelle.train.language import held_out_loss
from volvelle.train.observer import Observer
from volvelle.train.prior_data import Reading, held_loader
from volvelle.train.samples_measure import compared, features_of

DRAWN = Sampling(temperature=1.0, seed=0)


@dataclass(frozen=True)
class Measured:
    """Figures by name, and the pictures drawn for them, fp32 (n, c, y, x) in [-1, 1]."""

    metrics: dict[str, float]
    pictures: Tensor


def measure_prior(
    prior: Prior,
    pictures: PictureSet,
    *,
    extractor: Extractor | None = None,
    judge: Judge | None = None,
    samples: int = 500,
    sampling: Sampling = DRAWN,
    batch: int = 64,
    observer: Observer | None = None,
) -> Measured:
    """Measure on `pictures` that were not trained on.

    `loss` and `perplexity` are a code's; `loss untold` is the loss where nothing is said of the pictures, and `loss
    mistold` where each is said to show what one of them, drawn at random, shows. With an extractor or a judge `samples`
    pictures are drawn, each told what one of the given ones shows (its class or its caption). The extractor's figures
    are those of `compared`; its floor is the distance of one half of the given pictures to the other, "codec" that of
    the given ones behind the codec. The judge's are `recognised`, the share it takes for the class asked for, and
    `recognised codec` and `recognised real`, the same of the given pictures behind the codec and as they are.
    """
    observer, layout, codec = observer or Observer(), prior.layout, prior.codec
    assert codec is not None
    framing = Framing(layout.rows * codec.factor, codec.channels)  # pyright: ignore[reportArgumentType]
    how = Reading(codec, Path(prior.codec_path or "."), layout, framing, prior.words)
    codes = encode_pictures(pictures, framing, how.encode, progress=_work(observer, "encoding"))
    metrics = _losses(prior, codes, how.prompts(pictures), batch)
    if extractor is None and judge is None:
        return Measured(metrics, torch.zeros(0, codec.channels, framing.size, framing.size))
    chosen = spread(range(len(pictures)), min(samples, max(1, len(pictures) // 2)))
    asked = [pictures.label(i) for i in chosen]
    shows = asked if layout.classes else [pictures.caption(i) if layout.words else None for i in chosen]
    drawn = draw_images(prior, shows, sampling=sampling, progress=_work(observer, "drawing"))
    made = prior.pictures(drawn.codes)
    kept = prior.pictures(codes[chosen].reshape(-1, layout.rows, layout.columns))
    left = [i for i in range(len(pictures)) if i not in {*chosen}]
    sides = (chosen, spread(left, len(chosen)) or chosen)
    real, other = (torch.stack([to_signed(framing.middle(pictures[i])) for i in side]) for side in sides)
    if judge is not None and layout.classes:
        for name, shown in (("recognised", made), ("recognised codec", kept), ("recognised real", real)):
            answers = judge.look(shown, _work(observer, f"judging ({name})"))
            metrics[name] = judge.recognised(answers, asked, pictures.classes)
    if extractor is not None:
        floor, truth, fake, behind = (features_of(shown, extractor) for shown in (other, real, made, kept))
        metrics |= compared(truth, fake, floor, extractor.name)
        distance = compared(floor, behind, None, extractor.name)
        metrics |= {f"{name} codec": value for name, value in distance.items() if name.startswith("FD")}
    return Measured(metrics, made)


def _losses(prior: Prior, codes: Tensor, prompts: list[list[int]], batch: int) -> dict[str, float]:
    """The loss with what is said of the pictures, without it, and with what is said of others."""
    metrics = held_out_loss(prior.model, held_loader(CodedPictures(codes, prompts), batch))
    swapped = torch.randperm(len(prompts), generator=torch.Generator().manual_seed(0)).tolist()
    others = {"untold": [prior.layout.prompt()] * len(prompts), "mistold": [prompts[i] for i in swapped]}
    for name, said in others.items() if prior.layout.said else ():
        metrics[f"loss {name}"] = held_out_loss(prior.model, held_loader(CodedPictures(codes, said), batch))["loss"]
    return metrics


def _work(observer: Observer, label: str) -> Callable[[int, int], None]:
    return lambda done, total: observer.work(label, done, total)
