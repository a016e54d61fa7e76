"""`volvelle train gan data=…`: a generator of pictures against a critic."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from volvelle.errors import UsageError
from volvelle.systems.generation import gan_config as c
from volvelle.train.recipes.pictures import ViewOptions

LossName = Literal["minimax", "non-saturating", "hinge", "least-squares", "wasserstein"]
PenaltyName = Literal["auto", "none", "gradient", "one-sided", "r1", "clip"]


@dataclass(frozen=True, kw_only=True)
class GeneratorOptions:
    """Which generator, and its size."""

    kind: Literal["dcgan", "resnet"] = "dcgan"
    """dcgan: transposed convolutions; resnet: residual blocks behind upsampling."""
    width: int = 32
    """Channels at the finest map (dcgan), or everywhere (resnet)."""

    def build(self) -> c.Network:
        """The configuration that the words describe."""
        return c.DCGAN(self.width) if self.kind == "dcgan" else c.ResNet(self.width)


@dataclass(frozen=True, kw_only=True)
class CriticOptions:
    """Which critic, and its size; what a critic does not have is left alone."""

    kind: Literal["dcgan", "resnet", "orthogonal"] = "dcgan"
    """dcgan: strided convolutions; resnet; orthogonal: 1-Lipschitz by construction, for small pictures."""
    width: int = 32
    """dcgan, resnet: channels at the finest map, or everywhere."""
    norm: Literal["auto", "none", "batch", "layer", "spectral"] = "auto"
    """dcgan, resnet: auto: none where a penalty already holds the critic, else batch, and spectral for the Wasserstein
    loss, whose critic must be held."""
    widths: tuple[int, ...] = (256, 256)
    """orthogonal: features of its layers."""

    def build(self, norm: c.Norm) -> c.AnyCritic:
        """The configuration that the words describe."""
        if self.kind == "orthogonal":
            return c.Orthogonal(tuple(self.widths))
        return c.DCGAN(self.width, norm) if self.kind == "dcgan" else c.ResNet(self.width, norm)


@dataclass(frozen=True, kw_only=True)
class PenaltyOptions:
    """What holds the critic's slope while it learns."""

    kind: PenaltyName = "auto"
    """gradient: slopes of 1 between data and samples (WGAN-GP); one-sided: of at most 1 (WGAN-LP); r1: of 0 on data;
    clip: weights in a box (the first WGAN); auto: gradient for the Wasserstein loss, else none."""
    weight: float | None = None
    """gradient, one-sided: None is 10; r1: None is 1."""
    bound: float = 0.01
    """clip: the largest weight."""

    def __post_init__(self) -> None:
        if self.bound <= 0 or (self.weight is not None and self.weight <= 0):
            raise UsageError(f"penalty: weight and bound must be above 0, got {self.weight} and {self.bound}")


@dataclass(frozen=True, kw_only=True)
class TrainGAN(ViewOptions):
    """Train a generator of pictures against a critic, by the rules of one of five games."""

    held_out_size: int | None = 2000
    """The most held-out pictures, and as many samples, that the result is measured on; None: all."""
    channels: Literal[1, 3] | None = None
    """1: grey, 3: colour; None: as the data is."""

    latent: int = 64
    """Numbers that the generator draws a picture from."""
    generator: GeneratorOptions = field(default_factory=GeneratorOptions)
    """The generator: generator.kind=resnet generator.width=128."""
    critic: CriticOptions = field(default_factory=CriticOptions)
    """The critic (discriminator): critic.kind=orthogonal."""
    loss: LossName = "non-saturating"
    """The game: minimax, non-saturating (Goodfellow), hinge, least-squares, wasserstein."""
    penalty: PenaltyOptions = field(default_factory=PenaltyOptions)
    """What holds the critic: penalty.kind=r1 penalty.weight=1."""
    critic_steps: int | None = None
    """Updates of the critic for each of the generator; None: 5 for the Wasserstein loss, else 1."""

    epochs: float = 10.0
    """Passes of the first update of each step over the data, used when `steps` is absent; further ones draw anew."""
    batch: int = 64
    """Pictures in one micro-batch."""
    learning_rate: float = 5e-4
    """Peak learning rate of the generator."""
    critic_rate: float = 1.0
    """The critic's learning rate over the generator's."""
    betas: tuple[float, float] = (0.5, 0.99)
    """Adam's decays of both players."""
    schedule: Literal["cosine", "linear", "constant", "poly"] = "constant"
    """Shape of the learning rate after the warm-up."""
    warmup: float = 0.0
    """Warm-up: a share of all steps when below 1, else a number of steps."""
    clip: float | None = None
    """Largest gradient norm; None leaves gradients as they are."""
    average: float | None = 0.999
    """Decay of a moving average of the weights, used for evaluation and the result; None: no average."""
    evaluate_every: int | None = 500
    """Steps between two looks: a sheet of samples, exact W1 in pixels."""
    samples: int = 64
    """Samples on a sheet."""
    extractor: str = "efficientnet-lite0"
    """What gives the features of the Fréchet distance: a backbone, a run of train classify, or pixels."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("latent", "critic_steps", "samples"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UsageError(f"{name}: must be at least 1, got {value}")
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas) or self.critic_rate <= 0:
            given = f"{self.betas} and {self.critic_rate}"
            raise UsageError(f"betas, critic_rate: wanted two in [0, 1), and above 0, got {given}")
        sloped = self.penalty_kind in ("gradient", "one-sided", "r1")
        if sloped and self.norm == "batch" and self.critic.kind != "orthogonal":
            raise UsageError(
                f"penalty.kind={self.penalty_kind}: with batch normalisation a picture's score depends on the others, "
                "and has no slope of its own",
                tip="critic.norm=layer, or none",
            )
        self.config(self.size or 28, self.channels or 1)

    @property
    def penalty_kind(self) -> PenaltyName:
        """The penalty that "auto" stands for."""
        if self.penalty.kind != "auto":
            return self.penalty.kind
        held = self.critic.kind == "orthogonal" or self.critic.norm == "spectral"
        return "gradient" if self.loss == "wasserstein" and not held else "none"

    @property
    def norm(self) -> c.Norm:
        """The critic's norm that "auto" stands for."""
        if self.critic.norm != "auto":
            return self.critic.norm
        if self.penalty_kind != "none":
            return "none"
        return "spectral" if self.loss == "wasserstein" else "batch"

    @property
    def turns(self) -> int:
        """Updates of the critic for each of the generator."""
        return self.critic_steps or (5 if self.loss == "wasserstein" else 1)

    def config(self, size: int, channels: int) -> c.GANConfig:
        """The networks for pictures of this kind."""
        return c.GANConfig(size, channels, self.latent, self.generator.build(), self.critic.build(self.norm))
