"""What a network expects of its pictures, as plain facts, and the two steps that follow from them.

`prepare` resizes the shorter side to size / crop, cuts out the middle, and gives bytes; `normalise` turns a batch of
bytes into numbers, on whatever device the batch is.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor

Interpolation = Literal["nearest", "bilinear", "bicubic"]
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class Preprocessing:
    """Side of the square input in pixels, mean and deviation of its channels in [0, 1], interpolation, and `crop`.

    `crop` is the share of the resized shorter side that is kept: 0.875 resizes to 256 for an input of 224.

    >>> Preprocessing(224).resized
    256
    """

    size: int = 224
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD
    interpolation: Interpolation = "bicubic"
    crop: float = 0.875

    def __post_init__(self) -> None:
        if self.size < 1 or not 0 < self.crop <= 1 or min(self.std) <= 0:
            raise ValueError(f"Preprocessing: size >= 1, crop in (0, 1] and std > 0 are wanted, got {self}")

    @property
    def resized(self) -> int:
        """Pixels of the shorter side before the middle is cut out."""
        return int(self.size / self.crop)

    def prepare(self, image: Image) -> Tensor:
        """The picture's middle as uint8 (3, size, size)."""
        from volvelle.data.images import to_rgb, to_tensor

        width, height = image.size
        shorter = min(width, height)
        wide, high = (max(self.size, int(side * self.resized / shorter)) for side in (width, height))
        scaled = to_rgb(image).resize((wide, high), self.resampling)
        left, top = round((wide - self.size) / 2), round((high - self.size) / 2)
        return to_tensor(scaled.crop((left, top, left + self.size, top + self.size)))

    def normalise(self, pixels: Tensor) -> Tensor:
        """uint8 (…, 3, y, x) to fp32: (pixels / 255 - mean) / std."""
        mean, std = (pixels.new_tensor(v, dtype=_float()).view(3, 1, 1) for v in (self.mean, self.std))
        return pixels.to(_float()).div_(255).sub_(mean).div_(std)

    @property
    def resampling(self) -> Any:
        """Pillow's filter of that name; smaller pictures are averaged, not sampled."""
        from PIL.Image import Resampling

        return {"nearest": Resampling.NEAREST, "bilinear": Resampling.BILINEAR, "bicubic": Resampling.BICUBIC}[
            self.interpolation
        ]


def _float() -> Any:
    import torch

    return torch.float32
