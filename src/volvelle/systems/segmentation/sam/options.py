"""What `everything` asks for, as frozen data without torch."""

from __future__ import annotations

from dataclasses import dataclass

from volvelle.errors import UsageError


@dataclass(frozen=True)
class EverythingOptions:
    """A grid of points as prompts, crops of the picture, and what makes a mask good enough.

    The defaults are those of the authors' generator. Kirillov et al. 2023, "Segment Anything", appendix B.
    """

    points: int = 32
    """Points along a side of the grid, over the whole picture."""
    iou: float = 0.88
    """A mask's own estimate of its IoU must be above this; 0: any."""
    stability: float = 0.95
    """The IoU of the masks at the thresholds + offset and - offset must reach this; 0: any."""
    offset: float = 1.0
    """How far the threshold of the logits is moved for that."""
    nms: float = 0.7
    """Of masks whose boxes overlap by more than this IoU, the one with the best estimate stays."""
    crop_layers: int = 0
    """Layers of crops that are looked at besides: layer i has 2^i x 2^i crops, which overlap."""
    crop_overlap: float = 512 / 1500
    """How much crops of the first layer overlap, as a share of the picture's shorter side; later layers less."""
    crop_nms: float = 0.7
    """The same limit between crops, where masks of smaller crops stay."""
    crop_shrink: int = 1
    """The grid of layer i has `points` / this^i points along a side."""
    least: int = 0
    """Holes and islands of fewer pixels are filled and dropped; 0: none."""

    def __post_init__(self) -> None:
        for name in ("iou", "stability", "nms", "crop_nms"):
            if not 0 <= getattr(self, name) <= 1:
                raise UsageError(f"{name}: must lie in [0, 1], got {getattr(self, name)}")
        if not 0 <= self.crop_overlap < 1:
            raise UsageError(f"crop_overlap: must lie in [0, 1), got {self.crop_overlap}")
        if not self.offset >= 0:
            raise UsageError(f"offset: must be 0 or more, got {self.offset}")
        for name, lowest in (("points", 1), ("crop_layers", 0), ("crop_shrink", 1), ("least", 0)):
            if getattr(self, name) < lowest:
                raise UsageError(f"{name}: must be {lowest} or more, got {getattr(self, name)}")
        if self.points < self.crop_shrink**self.crop_layers:
            raise UsageError(
                f"crop_shrink: {self.crop_shrink}^{self.crop_layers} leaves no point of {self.points} in the last layer"
            )
