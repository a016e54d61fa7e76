"""A decoder with the matrices of its blocks in 4 or 8 bits: for use, not for training.

A matrix that a GGUF file holds on a grid of these bits is taken over exactly; any other is rounded to the nearest
points of one, which loses something, and is counted. The output projection takes 8 bits (or its own grid in the file):
a wrong number there is a wrong word. The token embedding stays a table in the model's dtype, of which a step reads a
few rows; so a tied output projection is a second matrix.

Bytes a weight: 0.625 in 4 bits, 1.06 in 8, 2 in bf16.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Literal, NamedTuple

from torch import nn

from volvelle.errors import VolvelleError
from volvelle.parts.quantization.grid import GROUP, Grid, quantize_weight
from volvelle.parts.quantization.int4 import Int4Linear
from volvelle.parts.quantization.int8 import Int8Linear
from volvelle.parts.quantization.tiles import OUTPUTS
from volvelle.parts.quantization.weight_only import WeightOnlyLinear
from volvelle.systems.language.decoder import Decoder
from volvelle.systems.language.gguf_grids import grid_of

if TYPE_CHECKING:
    from volvelle.systems.language.gguf import GGUF
    from volvelle.systems.language.models import LanguageModel

Bits = Literal["int4", "int8"]
_LAYERS: dict[int, type[WeightOnlyLinear]] = {4: Int4Linear, 8: Int8Linear}
log = logging.getLogger("volvelle.quantized")


class Quantized(NamedTuple):
    """How many matrices were taken over exactly, how many were rounded, and how many stayed as they were."""

    exact: int
    rounded: int
    kept: int


def quantize_model(model: LanguageModel, precision: Bits, file: GGUF | None = None) -> Quantized:
    """Put the linear layers of a decoder's blocks, and its output projection, into 4 or 8 bits, in place.

    `file` is the GGUF file that the model was read from, whose own grids are kept: exactly, where they have these bits.
    Raises VolvelleError for an encoder-decoder and for a model with adapters.
    """
    if not isinstance(model, Decoder):
        raise VolvelleError(
            f"precision={precision}: an encoder-decoder has no layers in {precision[3:]} bits", tip="precision=bf16"
        )
    bits, counts = int(precision[3:]), {"exact": 0, "rounded": 0, "kept": 0}
    modules = [(f"model.layers.{name}", module) for name, module in model.model.layers.named_modules()]
    for name, layer in modules:
        if isinstance(layer, nn.Linear):
            if type(layer) is not nn.Linear:
                raise VolvelleError(
                    f"precision={precision}: {name} holds an adapter",
                    tip="merge the adapters first: adapt.merge(model)",
                )
            _replace(model, name, layer, bits, None if file is None else grid_of(file, f"{name}.weight"), counts)
    table = "lm_head.weight" if not model.config.head.tied else "model.embed_tokens.weight"
    _replace(model, "lm_head", model.lm_head, 8, None if file is None else grid_of(file, table), counts)
    model.requires_grad_(False)
    done = Quantized(**counts)
    log.log(
        logging.WARNING if done.rounded else logging.INFO,
        "%s: %d matrices are the file's own, %d were rounded (lossy), %d do not divide into groups and stayed",
        *(precision, *done),
    )
    return done


def _replace(model: Decoder, name: str, layer: nn.Linear, bits: int, grid: Grid | None, counts: dict[str, int]) -> None:
    if layer.out_features % OUTPUTS or layer.in_features % GROUP:
        counts["kept"] += 1
        return
    # The head's own grid is kept whatever its bits; a block's, when it is not coarser than what was asked for.
    own = None if grid is None else 4 if grid.offset is not None else 8
    if own is None or (own == 8 and bits == 4):
        grid, own = quantize_weight(layer.weight, bits), bits
        counts["rounded"] += 1
    else:
        counts["exact"] += 1
    assert grid is not None
    model.set_submodule(name, _LAYERS[own](grid, layer.bias))
