"""`volvelle train vqgan data=…`: an image codec, pictures to codes and back."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from volvelle.errors import UsageError
from volvelle.systems.generation.config import Codebook, VQGANConfig
from volvelle.train.recipes.pictures import ViewOptions

GRID = 16
"""Codes along a side that a picture has at most, unless multipliers say otherwise."""
SIDE = 64
"""Side in pixels of pictures that are larger, unless asked otherwise."""
MULTIPLIERS = {4: (1, 2, 4), 8: (1, 2, 4, 4), 16: (1, 1, 2, 4, 4)}
"""Pixels a code -> widths of the levels."""


@dataclass(frozen=True, kw_only=True)
class CodecShape:
    """The size of the codec."""

    width: int = 16
    """Channels at the pictures' own size."""
    multipliers: tuple[int, ...] = ()
    """Channels of each level over width; one level more halves the grid. Empty: as many as make a grid of at most 16 x
    16 codes, and at least 4 pixels a code."""
    depth: int = 1
    """Residual blocks of a level; the decoder has one more."""
    attention: tuple[int, ...] = ()
    """Levels that attend after every block, 0 being the pictures' own size; the middle always attends."""
    latent: int = 64
    """Channels that the encoder ends in."""
    code_width: int = 32
    """Numbers of a code's vector."""
    codes: int = 512
    """Vectors in the codebook."""
    codebook: Codebook = "means"
    """means: running means of what codes stand for, dead ones begin anew; loss: learnt by gradients (taming's)."""
    beta: float = 0.25
    """Weight of the commitment loss."""
    groups: int = 8
    """Groups of the norms; 32 is what taming's and transformers' formats can say."""

    def build(self, channels: int, size: int) -> VQGANConfig:
        """The configuration for pictures of so many channels and pixels."""
        return VQGANConfig(
            "vqgan",
            channels,
            size,
            self.width,
            self.levels(size),
            self.depth,
            self.attention,
            self.latent,
            self.code_width,
            self.codes,
            self.codebook,
            self.beta,
            groups=self.groups,
        )

    def levels(self, size: int) -> tuple[int, ...]:
        """The multipliers for pictures of that side."""
        if self.multipliers:
            return self.multipliers
        factor = next((factor for factor in MULTIPLIERS if size <= GRID * factor), 16)
        return MULTIPLIERS[factor]


@dataclass(frozen=True, kw_only=True)
class LossOptions:
    """What a reconstruction is judged by."""

    pixels: Literal["l1", "l2"] = "l2"
    """l1: mean absolute difference, as in taming's code; l2: mean squared."""
    perceptual: float = 0.05
    """Weight of the perceptual distance on EfficientNet-Lite0's features; 0: none, and its weights are not fetched."""
    least: int = 32
    """Side in pixels to which the perceptual distance enlarges smaller pictures."""

    def __post_init__(self) -> None:
        if self.perceptual < 0 or self.least < 1:
            raise UsageError(f"loss: perceptual >= 0 and least >= 1 are wanted, got {self.perceptual} and {self.least}")


@dataclass(frozen=True, kw_only=True)
class AdversaryOptions:
    """The patch discriminator, and when it has a say."""

    weight: float = 0.1
    """Its weight beside the other losses, whose gradients it is brought level with first; 0: no adversary, a VQ-VAE."""
    loss: Literal["hinge", "non-saturating", "least-squares"] = "hinge"
    """The game that the two play."""
    begin: float = 0.6
    """When the codec begins to hear it: a share of all steps when below 1, else a step."""
    warmup: float = 0.05
    """For how long before that it learns alone: a share of all steps when below 1, else a number of steps."""
    ramp: float = 0.1
    """How long its weight rises from nothing: a share of all steps when below 1, else a number of steps."""
    width: int = 32
    """Channels of its first layer."""
    layers: int = 2
    """Layers that double the channels: 1 judges patches of 16 x 16 pixels, 2 of 34 x 34, 3 of 70 x 70."""
    rate: float = 1.0
    """Its learning rate over the codec's."""

    def __post_init__(self) -> None:
        if min(self.weight, self.begin, self.warmup, self.ramp) < 0 or min(self.width, self.layers) < 1:
            raise UsageError("adversary: weight, begin, warmup and ramp >= 0, width and layers >= 1 are wanted")
        if self.rate <= 0:
            raise UsageError(f"adversary: rate must be above 0, got {self.rate}")

    def moments(self, steps: int) -> tuple[int, int, int]:
        """The steps at which the discriminator begins to learn, the codec to hear it, and its weight is whole.

        >>> AdversaryOptions(begin=0.5, warmup=0.1, ramp=20).moments(100)
        (40, 50, 70)
        """

        def count(value: float) -> int:
            return round(value * steps) if value < 1 else int(value)

        begin = count(self.begin)
        return max(0, begin - count(self.warmup)), begin, begin + count(self.ramp)


@dataclass(frozen=True, kw_only=True)
class TrainVQGAN(ViewOptions):
    """Train an image codec: pictures become a small grid of codes, and codes become pictures again."""

    held_out_size: int | None = 512
    start: str | None = None
    """A codec to begin with: a run, or any checkpoint that load_vqgan opens; None: from scratch, as model= says."""
    size: int | None = None
    """Side of the pictures in pixels; None: that of the data up to 64, made a multiple of the pixels a code."""
    channels: Literal[1, 3] | None = None
    """1: grey, 3: colour; None: as the data is."""

    model: CodecShape = field(default_factory=CodecShape)
    """The size of the codec: model.width=64 model.codes=1024."""
    loss: LossOptions = field(default_factory=LossOptions)
    """What a reconstruction is judged by: loss.perceptual=1."""
    adversary: AdversaryOptions = field(default_factory=AdversaryOptions)
    """The discriminator: adversary.weight=0.5; 0 trains a VQ-VAE."""

    epochs: float = 1.0
    """Passes over the data, used when `steps` is absent."""
    batch: int = 32
    """Pictures in one micro-batch."""
    learning_rate: float = 2e-3
    """Peak learning rate of the codec, reached after the warm-up."""
    betas: tuple[float, float] = (0.9, 0.99)
    """Adam's decays of both players; taming's are 0.5,0.9."""
    weight_decay: float = 0.0
    """AdamW's decoupled decay, on matrices only."""
    evaluate_every: int | None = 300
    """Steps between two evaluations; None: at the start and the end."""
    samples: int = 10
    """Held-out pictures that the report shows with their reconstructions."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.samples < 1:
            raise UsageError(f"samples: must be at least 1, got {self.samples}")
        if len(self.betas) != 2 or not 0 <= min(self.betas) <= max(self.betas) < 1:
            raise UsageError(f"betas: wanted two numbers from 0 to below 1, got {self.betas}")
        if self.size is not None:
            self.model.build(self.channels or 3, self.size)  # says what does not fit before anything is read
