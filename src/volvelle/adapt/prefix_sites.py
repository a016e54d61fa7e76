"""Prefixes of an encoder-decoder: before the answer, before the source as the decoder looks at it, and as it is read.

Li & Liang 2021, section 4.2, put a prefix before the source and one before the answer; in terms of keys and values
these are three, for an encoder-decoder has three kinds of attention.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from volvelle.errors import VolvelleError
from volvelle.parts.lowrank.prefix import PrefixStates
from volvelle.systems.language.encoder_decoder import EncoderDecoder
from volvelle.systems.language.preface import Site

SITES: tuple[Site, ...] = ("decoder", "cross", "encoder")


class SitedPrefix(nn.Module):
    """A prefix for each kind of attention that has one."""

    def __init__(self, prefixes: dict[Site, PrefixStates]):
        super().__init__()
        self.sites = nn.ModuleDict({str(site): prefix for site, prefix in prefixes.items()})

    @property
    def length(self) -> int:
        """The number of keys before an answer."""
        return self._get("decoder").length if "decoder" in self.sites else 0

    def states(self, model: nn.Module, site: Site) -> Tensor | None:
        """Keys and values (layers, 2, 1, h, l, d) for one kind of attention, or None."""
        return self._get(site)() if site in self.sites else None

    def flat(self) -> dict[str, Tensor]:
        """What is stored, by site."""
        return {site: self._get(site).flat() for site in self.sites}

    def _get(self, site: str) -> Any:
        return self.sites[site]


def stacks(model: EncoderDecoder) -> dict[Site, tuple[int, int, int]]:
    """Layers, heads and features a head of each kind of attention."""
    config = model.config
    sides: dict[Site, Any] = {"decoder": config.decoder, "cross": config.decoder, "encoder": config.encoder}
    return {site: (side.depth, side.heads, config.width // side.heads) for site, side in sides.items()}


def from_peft(table: Tensor, model: EncoderDecoder) -> Tensor:
    """The decoder's prefix (l, 2 · depth · width) from a file of PEFT's for the same model.

    PEFT (0.21) doubles the layers of the table and cuts them in fours, of which a decoder's layer takes the first two:
    layer i gets the keys and values of the table's layer 2 i mod its layers. The others never act.
    """
    depth, heads, width = stacks(model)["decoder"]
    if table.shape[1] % (2 * heads * width):
        raise VolvelleError(f"a prefix for {heads} heads of {width} cannot have {table.shape[1]} features a row")
    given = table.unflatten(1, (-1, 2, heads * width))
    index = torch.arange(depth) * 2 % given.shape[1]
    return given[:, index].flatten(1)
