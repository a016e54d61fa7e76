"""Codec: an image tokenizer, all that a prior needs to know of what turns pictures into codes and back."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor


class Codec(Protocol):
    """Pictures fp (b, c, y, x) in [-1, 1] to codes int64 (b, h, w) in 0 … vocabulary - 1, and back.

    y = factor h and x = factor w; any h and w will do, though the codec was trained on pictures of `size`.
    """

    @property
    def vocabulary(self) -> int:
        """How many codes there are."""
        ...

    @property
    def channels(self) -> int:
        """Channels of the pictures: 1 or 3."""
        ...

    @property
    def size(self) -> int:
        """The side in pixels of the pictures it was trained on."""
        ...

    @property
    def factor(self) -> int:
        """Pixels of a code's side."""
        ...

    def encode(self, pixels: Tensor) -> Tensor:
        """The codes of pictures whose sides are multiples of `factor`; without gradients."""
        ...

    def decode(self, codes: Tensor) -> Tensor:
        """The pictures of codes; without gradients."""
        ...
