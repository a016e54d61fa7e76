"""Options that recipes on pictures share: of those without masks and boxes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from volvelle.errors import UsageError
from volvelle.train.options import FitOptions


@dataclass(frozen=True, kw_only=True)
class PictureOptions(FitOptions):
    """Where the pictures are, how many are held out, and what a training view may be."""

    data: str
    """A folder of pictures (docs/generation.md: layouts), an IDX folder, fashion-mnist, or scenes."""
    held_out: str | None = None
    """A folder of the same kind to measure on; when absent, the val or test part of `data`, or a share of it."""
    held_out_share: float = 0.1
    """The share of the pictures set aside where there is nothing else to measure on."""
    held_out_size: int | None = None
    """The most held-out pictures that evaluations during the run look at; None: all. The last one looks at all."""
    on_bad: Literal["stop", "skip"] = "stop"
    """What to do with files that cannot be read."""
    size: int | None = None
    """Side of the pictures in pixels; None: that of the data, up to 64."""
    mirror: float = 0.0
    """Share of mirrored views."""
    device: str | None = None
    """Where to train: cpu, cuda, cuda:1; None: a CUDA device when there is one."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("held_out_size", "size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UsageError(f"{name}: must be at least 1, got {value}")
        if not 0 < self.held_out_share < 1:
            raise UsageError(f"held_out_share: must lie between 0 and 1, got {self.held_out_share}")
        if not 0 <= self.mirror <= 1:
            raise UsageError(f"mirror: must lie between 0 and 1, got {self.mirror}")


@dataclass(frozen=True, kw_only=True)
class ViewOptions(PictureOptions):
    """Pictures of which a view shows a square."""

    zoom: tuple[float, float] = (1.0, 1.0)
    """Least and greatest side of a training view, as a share of the picture's shorter side; below 1, a crop."""
    scenes: int = 10000
    """How many scenes data=scenes draws to train on."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.zoom) != 2 or not 0 < self.zoom[0] <= self.zoom[1] <= 1:
            raise UsageError(f"zoom: wanted least,greatest above 0 and up to 1, got {self.zoom}")
        if self.scenes < 1:
            raise UsageError(f"scenes: must be at least 1, got {self.scenes}")
