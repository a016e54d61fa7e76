"""Whether what drafts for a model fits it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn

from volvelle.errors import VolvelleError
from volvelle.systems.language.decoder import Decoder

if TYPE_CHECKING:
    from volvelle.decode.contract import Writer


def check_vocabulary(what: str, largest: int, vocabulary: int) -> None:
    """Raise VolvelleError where a text's `largest` token is none of the model's; `what` names the drafter."""
    if largest >= vocabulary:
        raise VolvelleError(
            f"{what}: token {largest} of a text is outside the model's vocabulary of {vocabulary}",
            tip="make the texts with the model's own tokenizer",
        )


def check_fit(what: str, module: nn.Module, writer: Writer, width: int) -> Decoder:
    """The writer, which must be a decoder with states of `width` that the module can read.

    Raises VolvelleError where it is none, or is of another width, dtype or device; `what` names drafter and module.
    """
    if not isinstance(writer, Decoder):
        raise VolvelleError(f"{what} are for a decoder, not for an encoder-decoder")
    first = next(module.parameters())
    for name, theirs, ours in (
        ("width", width, writer.config.width),
        ("dtype", first.dtype, writer.dtype),
        ("device", first.device, writer.device),
    ):
        if theirs != ours:
            raise VolvelleError(
                f"{what} are of {name} {theirs}, the model of {ours}",
                tip="open them for this model: open_drafter(folder, model)",
            )
    return writer
