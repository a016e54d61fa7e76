"""`volvelle train classify data=…`: an image classifier on folders of pictures."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from volvelle.errors import UsageError
from volvelle.systems.backbone.names import find_config
from volvelle.train.recipes.pictures import PictureOptions


@dataclass(frozen=True, kw_only=True)
class TrainClassify(PictureOptions):
    """Train an image classifier on a folder with a folder for each class, from known weights or from scratch."""

    data: str
    """A folder with a folder of pictures for each class (or train/ and val/ of such), an IDX folder, fashion-mnist."""
    held_out_share: float = 0.1
    """The share of each class set aside where there is nothing else to measure on."""

    backbone: str = "efficientnet-lite0"
    """The network: efficientnet-b0 … b7 and lite0 … lite4, mobilenet-v2, resnet-18, snet49, …"""
    weights: str = "imagenet"
    """What it begins with: imagenet, a file or folder, or none."""
    freeze: Literal["none", "norms", "backbone"] = "none"
    """norms: their running statistics stay; backbone: only the last layer learns."""
    size: int | None = None
    """Side of the pictures in pixels; None: the network's own, or 64 for pictures that are smaller than that."""

    area: tuple[float, float] = (0.5, 1.0)
    """Least and largest share of a picture's area that a training crop shows."""
    mirror: float = 0.5
    """Share of mirrored crops."""
    colour: float = 0.2
    """Brightness, contrast and saturation are multiplied by 1 ± this."""
    smoothing: float = 0.1
    """Share of each label that is spread over all classes (Szegedy et al. 2016, section 7)."""
    backbone_rate: float = 0.3
    """The learning rate of what has known weights, as a share of the last layer's."""

    epochs: float = 10.0
    """Passes over the data, used when `steps` is absent."""
    batch: int = 32
    """Pictures in one micro-batch."""
    learning_rate: float = 1e-3
    """Peak learning rate of the last layer, reached after the warm-up."""
    weight_decay: float = 0.01
    """AdamW's decoupled decay, on matrices only."""
    average: float | None = 0.99
    """Decay of a moving average of the weights, used for evaluation and the result; None: no average."""
    evaluate_every: int | None = 200
    """Steps between two evaluations; None: at the start and the end."""
    samples: int = 12
    """Of the worst misses, how many the report shows."""

    def __post_init__(self) -> None:
        super().__post_init__()
        find_config(self.backbone)
        if len(self.area) != 2 or not 0 < self.area[0] <= self.area[1] <= 1:
            raise UsageError(f"area: wanted least,largest above 0 and up to 1, got {self.area}")
        for name, high in (("colour", 0.99), ("smoothing", 0.99), ("backbone_rate", 1)):
            if not 0 <= getattr(self, name) <= high:
                raise UsageError(f"{name}: must lie between 0 and {high}, got {getattr(self, name)}")
        if self.samples < 0:
            raise UsageError(f"samples: must not be negative, got {self.samples}")
        if self.freeze == "backbone" and self.weights == "none":
            raise UsageError("freeze=backbone: with weights=none nothing known would be kept", tip="freeze=none")
