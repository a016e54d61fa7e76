"""VQGAN as an objective of two phases: the codec, and the discriminator that learns what gives its pictures away.

Esser et al. 2021, section 3.1. With L_rec the loss of pixels and the perceptual distance, the codec minimises

    L_rec + L_codebook + r λ L_adv,   λ = w |∇ L_rec| / (|∇ L_adv| + 1e-4)     (equation 7)

where gradients are those of the decoder's last convolution, and r rises from 0 to 1 once the discriminator has learnt
alone for a while. Before that nothing of it is computed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.grad import conv2d_weight

from volvelle.data.pictures import to_signed
from volvelle.parts.adversarial.losses import GanLoss, gan_loss
from volvelle.systems.generation.perceptual import Perceptual
from volvelle.systems.generation.vqgan_model import VQGAN
from volvelle.train.phase import Loss, Objective, OptimizerFactory, Phase, adamw, trainable
from volvelle.train.recipes.vqgan import TrainVQGAN
from volvelle.train.schedule import schedule

LARGEST = 1e4
"""Of λ, where the adversary's gradient is next to nothing."""


class VQGANObjective(Objective):
    """Train a codec on batches of {images uint8 (b, c, y, x)}, with a discriminator and a perceptual distance or not.

    `look(step)` gives what evaluations measure.
    """

    best = ("psnr", "max")

    def __init__(
        self,
        model: VQGAN,
        options: TrainVQGAN,
        *,
        discriminator: nn.Module | None = None,
        perceptual: Perceptual | None = None,
        look: Callable[[int], Mapping[str, float]] | None = None,
    ):
        model.decoding  # noqa: B018  # says so where there is nothing to train
        self.model, self.options, self.look = model, options, look
        self.discriminator, self.perceptual = discriminator, perceptual
        self.step, self.moments = 0, (0, 0, 0)
        self._made: list[tuple[Tensor, Tensor]] = []

    def modules(self) -> Mapping[str, nn.Module]:
        """The codec, and what judges it."""
        judges = {"discriminator": self.discriminator, "perceptual": self.perceptual}
        return {"model": self.model, **{name: module for name, module in judges.items() if module is not None}}

    def phases(self, steps: int) -> Sequence[Phase]:
        """The codec, then from some step on the discriminator."""
        options = self.options
        self.moments = options.adversary.moments(steps)
        rate = schedule(options.schedule, steps, options.warmup)
        codec = Phase(
            "codec", trainable(self.model), self.loss, self._adam(1.0), rate, clip=options.clip, after=self._moved
        )
        if self.discriminator is None:
            return [codec]
        taught, start = self._adam(options.adversary.rate), self.moments[0]
        later = schedule(options.schedule, max(1, steps - start))
        weights = trainable(self.discriminator)
        return [codec, Phase("discriminator", weights, self.judge, taught, later, start=start, clip=options.clip)]

    def loss(self, batch: Mapping[str, Tensor]) -> Loss:
        """The codec's loss."""
        pixels = to_signed(batch["images"])
        made = self.model(pixels)
        drawn = made.pixels.float()
        if self.discriminator is not None:
            self._made.append((batch["images"], drawn.detach()))
        quantized = made.quantized.loss.float()
        metrics: dict[str, Tensor | float] = {"codebook": quantized.detach()}
        if not self.heard:
            judged = self._judged(pixels, drawn, metrics)
            return Loss(judged + quantized, metrics, weight=len(pixels))
        # The losses of the picture stop at the picture: their gradients there are computed once, weighed against each
        # other, and go on through the decoder as one.
        leaf = drawn.detach().requires_grad_()
        with torch.enable_grad():
            judged = self._judged(pixels, leaf, metrics)
            fooled = gan_loss(self._discriminate(leaf), True, self._game, for_="generator")
        ours, theirs = gradient_at(judged, leaf), gradient_at(fooled, leaf)
        balance = balance_of(made.features, self.model.decoding.conv_out, ours, theirs)
        weight = self.options.adversary.weight * self.ramp * balance
        metrics |= {"adversary": fooled.detach(), "adversary_weight": weight}
        value = (judged + weight * fooled).detach()
        value = value + ((drawn - drawn.detach()) * (ours + weight * theirs)).sum()  # a zero with the gradient wanted
        return Loss(value + quantized, metrics, weight=len(pixels))

    def judge(self, batch: Mapping[str, Tensor]) -> Loss:
        """The discriminator's loss on pictures and on what the codec made of them in this step."""
        images = batch["images"]
        real = to_signed(images)
        made = next((drawn for seen, drawn in self._made if seen is images), None)
        if made is None:
            with torch.no_grad():
                made = self.model(real).pixels.float()
        on_real, on_made = self._discriminate(real), self._discriminate(made)
        value = (gan_loss(on_real, True, self._game) + gan_loss(on_made, False, self._game)) / 2
        metrics = {"on_real": on_real.detach().float().mean(), "on_made": on_made.detach().float().mean()}
        return Loss(value, metrics, weight=len(images))

    @property
    def heard(self) -> bool:
        """Whether the discriminator has a say in this step."""
        return self.discriminator is not None and self.step >= self.moments[1]

    @property
    def ramp(self) -> float:
        """How much of its weight the discriminator has in this step, from 0 to 1."""
        _, begin, whole = self.moments
        return min(1.0, (self.step - begin + 1) / max(1, whole - begin))

    def units(self, batch: Any) -> tuple[float, str]:
        """Pictures."""
        return float(len(batch["images"])), "images"

    def evaluate(self) -> Mapping[str, float]:
        """What `look` sees at this step."""
        return {} if self.look is None else self.look(self.step)

    def after_step(self, step: int) -> None:
        """Count, and let go of the step's pictures."""
        self.step = step + 1
        self._made.clear()

    def state_dict(self) -> dict[str, Any]:
        """The step."""
        return {"step": self.step}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Undo `state_dict`."""
        self.step = state["step"]

    @property
    def _game(self) -> GanLoss:
        return self.options.adversary.loss

    def _discriminate(self, pixels: Tensor) -> Tensor:
        assert self.discriminator is not None
        return self.discriminator(pixels)

    def _judged(self, pixels: Tensor, drawn: Tensor, metrics: dict[str, Tensor | float]) -> Tensor:
        """The loss of a reconstruction without the adversary."""
        value = (F.l1_loss if self.options.loss.pixels == "l1" else F.mse_loss)(drawn, pixels)
        metrics["pixels"] = value.detach()
        if self.perceptual is not None:
            distance = self.perceptual(drawn, pixels).mean()
            metrics["perceptual"] = distance.detach()
            value = value + self.options.loss.perceptual * distance
        return value

    def _moved(self) -> None:
        update = getattr(self.model.quantize, "update", None)
        if update is not None:
            update()

    def _adam(self, share: float) -> OptimizerFactory:
        first, second = self.options.betas
        return adamw(self.options, share=lambda name: share, betas=(first, second))


def gradient_at(value: Tensor, leaf: Tensor) -> Tensor:
    """The gradient of a mean over pictures, fp32, at pixels `leaf`.

    Each pixel's is about one over their number, too little for fp16 on the way through a network under autocast; so
    the loss is scaled by a power of two, which changes nothing else, before it goes back.
    """
    scale = 2.0 ** math.floor(math.log2(leaf.numel()))
    (found,) = torch.autograd.grad(value * scale, leaf)
    return found.float() / scale


def balance_of(features: Tensor, last: nn.Conv2d, ours: Tensor, theirs: Tensor) -> Tensor:
    """How much larger one loss's gradient of the last convolution's weights is than another's (equation 7 without w).

    `features` (b, c, y, x) are what the convolution mapped; `ours` and `theirs` the gradients at its result. In fp32.
    """
    with torch.autocast(features.device.type, enabled=False), torch.no_grad():
        seen = features.detach().float()
        padding = last.kernel_size[0] // 2
        sizes = [
            conv2d_weight(seen, last.weight.shape, gradient, padding=padding).norm() for gradient in (ours, theirs)
        ]
    return (sizes[0] / (sizes[1] + 1e-4)).clamp(0, LARGEST)
