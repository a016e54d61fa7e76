"""VQGAN: detail that a loss of pixels gives away, and drawing in codes instead of pixels."""

from __future__ import annotations

import copy
import time
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from volvelle.claims.claim import Budget, Claim, Finding, Measurement, Paper, at_least, at_most

if TYPE_CHECKING:
    from torch import Tensor

    from volvelle.data.pictures import PictureSet
    from volvelle.systems.generation.codec import Codec
    from volvelle.systems.generation.perceptual import Perceptual
    from volvelle.systems.generation.vqgan_model import VQGAN
    from volvelle.train.recipes.vqgan import TrainVQGAN

CLAIM = Claim(
    title="VQGAN: compress, then draw",
    family="generation",
    paper=Paper(
        "Esser et al.",
        2021,
        "Taming Transformers for High-Resolution Image Synthesis",
        "sections 3.1 and 4.4",
        "https://arxiv.org/abs/2012.09841",
    ),
    sentence="we use a discriminator and perceptual loss to keep good perceptual quality at increased compression "
    "rate; compared with the same transformer on pixels, codes give better FID and 14.08 times faster sampling",
    measured_by="one codec on Fashion-MNIST, trained on by squared differences alone and, for as many steps, with the "
    "perceptual distance and the adversary: how much of the pictures' finest detail (energy of the Laplacian) their "
    "reconstructions have, perceptual distance, PSNR; full: the same small decoder trained for equal time on codes and "
    "on pixels of 16 greys: Fréchet distance of samples, time of a sample",
    summary="An image codec whose reconstructions are judged by features and by an adversary, so that few codes are "
    "enough; a language model then draws in codes, which is far cheaper than in pixels.",
    summary_zh="以感知损失与对抗损失训练图像编解码器，少量编码即可保留细节；再用语言模型生成编码，远比逐像素生成省力。",
    seconds={"quick": 60, "full": 900},
    parts=("functional.vector_quantize", "nn.EMAVectorQuantizer", "functional.gan_loss"),
    recipe="volvelle train vqgan data=fashion-mnist",
)

GREYS = 16
"""Of the pixels that the other decoder draws."""
SHOWN = 500


def measure(budget: Budget) -> Measurement:
    """Two codecs from one beginning; full: two priors too."""
    import torch

    from volvelle.claims.garments import two_threads
    from volvelle.data.pictures import read_pictures
    from volvelle.errors import VolvelleError
    from volvelle.hub import fetch
    from volvelle.systems.generation.perceptual import Perceptual

    first, then, batch = (110, 50, 16) if budget == "quick" else (700, 300, 32)
    try:
        train, test = read_pictures(fetch("fashion-mnist"))
        judge = Perceptual(least=32)
    except VolvelleError as error:
        return Measurement(unmeasurable=f"the pictures or EfficientNet-Lite0 cannot be had: {error}")
    assert test is not None
    with two_threads():
        plain, judged = codecs(train, judge, first, then, batch)
        shown = test.part(range(0, len(test), len(test) // SHOWN))
        findings = _detail(plain, judged, shown, judge)
        if budget == "full":
            findings += _drawing(judged, train, shown, seconds=110.0)
    setting = {
        "pictures": f"Fashion-MNIST, {len(shown)} of its test part measured", "codes": "7 x 7 of 256",
        "steps together": first, "steps apart": then, "batch": batch, "dtype": "fp32", "torch": torch.__version__,
    }  # fmt: skip
    return Measurement(findings, setting=setting)


def codecs(train: PictureSet, judge: Perceptual, first: int, then: int, batch: int) -> tuple[VQGAN, VQGAN]:
    """A codec trained by pixels, trained on in two ways: by pixels, and with the distance and the adversary."""
    import torch

    from volvelle.data.pictures import Framing, Views, collate_pictures
    from volvelle.systems.generation.load import vqgan
    from volvelle.train.observer import Observer
    from volvelle.train.recipes.vqgan import AdversaryOptions, CodecShape, LossOptions, TrainVQGAN
    from volvelle.train.sets import drawn_in_batches
    from volvelle.train.vqgan import begin_codebook

    torch.manual_seed(0)
    quiet = {"adversary": AdversaryOptions(weight=0.0), "loss": LossOptions(perceptual=0.0)}
    recipe = TrainVQGAN(data="fashion-mnist", steps=first, batch=batch, warmup=0.02, **quiet)
    model = vqgan(CodecShape(codes=256).build(1, 28))
    loader = drawn_in_batches(recipe, Views(train, Framing(28, 1)), collate_pictures)
    begin_codebook(model, loader, 0, Observer())
    _fit(model, recipe, loader, None)
    later = replace(recipe, steps=then, seed=1, learning_rate=1e-3)
    plain, judged = copy.deepcopy(model), model
    _fit(plain, later, loader, None)
    adversary = AdversaryOptions(weight=0.3, begin=0.2, warmup=0.2, ramp=0.2)
    _fit(judged, replace(later, adversary=adversary, loss=LossOptions(perceptual=0.5)), loader, judge)
    return plain, judged


def _fit(model: VQGAN, recipe: TrainVQGAN, loader: Any, judge: Perceptual | None) -> None:
    from volvelle.systems.generation.discriminator import PatchDiscriminator
    from volvelle.train.loop import fit
    from volvelle.train.observer import Quiet
    from volvelle.train.vqgan_objective import VQGANObjective

    other = PatchDiscriminator(1, width=32, layers=2) if recipe.adversary.weight else None
    fit(VQGANObjective(model, recipe, discriminator=other, perceptual=judge), loader, options=recipe, observer=Quiet())


def _detail(plain: VQGAN, judged: VQGAN, shown: PictureSet, judge: Perceptual) -> list[Finding]:
    """Figures of both codecs, and which of them kept more."""
    from volvelle.train.vqgan_measure import measure as measured

    found = [measured(model, shown, perceptual=judge).metrics for model in (plain, judged)]
    kept = [detail_kept(model, shown) for model in (plain, judged)]
    return [
        at_least("finest detail kept, all three losses over squared differences", kept[1] / kept[0], 1.0, "x"),
        at_most(
            "perceptual distance (EfficientNet-Lite0), all three losses over squared differences",
            found[1]["perceptual"] / found[0]["perceptual"], 1.0, "x",
        ),
        *(
            Finding(f"{name}: {what}", value, unit)
            for name, own, share in zip(("squared differences", "all three losses"), found, kept, strict=True)
            for what, value, unit in (
                ("finest detail kept", 100 * share, "%"), ("PSNR", own["psnr"], "dB"),
                ("perceptual distance", own["perceptual"], ""), ("codes in use", 100 * own["used"], "%"),
            )
        ),
    ]  # fmt: skip


def detail_kept(codec: Codec, shown: PictureSet) -> float:
    """Energy of the Laplacian of reconstructions over that of the pictures."""
    import torch

    pixels = _pixels(shown)
    drawn = torch.cat([codec.decode(codec.encode(part)) for part in pixels.split(64)])
    return float(_laplacian(drawn).square().mean() / _laplacian(pixels).square().mean())


def _laplacian(x: Tensor) -> Tensor:
    import torch
    from torch.nn import functional as F

    return F.conv2d(x, torch.tensor([[[[0.0, 1, 0], [1, -4, 1], [0, 1, 0]]]]))


def _pixels(shown: PictureSet) -> Tensor:
    import torch

    from volvelle.data.pictures import Framing, to_signed

    framing = Framing(28, 1)
    return to_signed(torch.stack([framing.middle(shown[i]) for i in range(len(shown))]))


class Greys:
    """Pixels as codes: a codec that compresses nothing."""

    vocabulary, channels, size, factor = GREYS, 1, 28, 1

    def encode(self, pixels: Tensor) -> Tensor:
        """The nearest of 16 greys."""
        return ((pixels[:, 0] + 1) / 2 * (GREYS - 1)).round().long()

    def decode(self, codes: Tensor) -> Tensor:
        """The greys."""
        return (codes[:, None].float() / (GREYS - 1)) * 2 - 1


def _drawing(codec: Codec, train: PictureSet, shown: PictureSet, *, seconds: float) -> list[Finding]:
    """The same decoder on codes and on pixels, each for so many seconds: distances of samples, time of one."""
    real = _pixels(shown)
    results = {name: _drawn(one, train, seconds, real) for name, one in (("codes", codec), ("pixels", Greys()))}
    (near, short, steps), (far, long, their_steps) = results["codes"], results["pixels"]
    return [
        at_most("FD-pixels-8 of samples after equal time, codes over pixels", near / far, 1.0, "x"),
        at_least("time of a sample, pixels over codes", long / short, 14.08, "x"),
        Finding("FD-pixels-8, codes", near),
        Finding("FD-pixels-8, pixels", far),
        Finding("steps in that time, codes over pixels", steps / their_steps, "x"),
    ]


def _drawn(codec: Codec, train: PictureSet, seconds: float, real: Tensor) -> tuple[float, float, int]:
    """Distance of samples to pictures, seconds a sample, and the steps of training that the time was enough for."""
    import torch

    from volvelle.decode.images import draw_images
    from volvelle.decode.options import Sampling
    from volvelle.systems.generation.extractor import open_extractor
    from volvelle.systems.generation.layout import Layout
    from volvelle.systems.generation.prior import Prior
    from volvelle.train.prior import build_model
    from volvelle.train.recipes.language import ModelShape
    from volvelle.train.recipes.prior import TrainPrior
    from volvelle.train.samples_measure import compared, features_of

    torch.manual_seed(0)
    side = codec.size // codec.factor
    layout = Layout(codec.vocabulary, side, side)
    recipe = TrainPrior(data="fashion-mnist", model=ModelShape(width=96, depth=4, heads=4))
    prior = Prior(build_model(recipe, layout), layout, codec=codec)
    pixels = _pixels(train.part(range(0, len(train), 15)))
    codes = torch.cat([codec.encode(part).flatten(1) for part in pixels.split(64)])
    steps = _taught(prior, codes, layout.prompt(None), seconds)
    count = 100
    began = time.perf_counter()
    drawn = draw_images(prior, [None] * count, sampling=Sampling(temperature=1.0, seed=0), batch=50)
    each = (time.perf_counter() - began) / count
    extractor = open_extractor("pixels", size=28)
    fake, true = (features_of(x, extractor) for x in (prior.pictures(drawn.codes), real))
    return compared(true, fake, None, extractor.name)[f"FD-{extractor.name}"], each, steps


def _taught(prior: Any, codes: Tensor, prompt: list[int], seconds: float) -> int:
    """Train the prior's decoder for so many seconds; the steps it took."""
    import torch
    from torch.nn import functional as F

    model = prior.model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.05)
    draw, lead = torch.Generator().manual_seed(0), torch.tensor(prompt)
    end, steps = time.perf_counter() + seconds, 0
    while time.perf_counter() < end:
        rows = codes[torch.randint(len(codes), (16,), generator=draw)]
        ids = torch.cat((lead.expand(len(rows), -1), rows), 1)
        logits = model(ids[:, :-1]).logits[:, len(lead) - 1 :, : prior.layout.codes]
        optimizer.zero_grad()
        F.cross_entropy(logits.flatten(0, 1), rows.flatten()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        steps += 1
    model.eval()
    return steps
