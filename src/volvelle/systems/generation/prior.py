"""A prior over codes (van den Oord et al. 2017; Esser et al. 2021, section 3.2): a language model that writes pictures.

It is a decoder like any other: a folder of weights in Llama's layout, which transformers opens too, with two things
beside it: prior.json says how a picture becomes a text, words/ holds the tokenizer of captions.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from volvelle.errors import UsageError, VolvelleError
from volvelle.files import read_json, write_atomic
from volvelle.systems.generation.layout import Layout
from volvelle.systems.language.decoder import Decoder
from volvelle.systems.language.huggingface import read_folder, write_folder
from volvelle.systems.language.tokenizer import TextTokenizer

if TYPE_CHECKING:
    from volvelle.systems.generation.codec import Codec

FILE, WORDS = "prior.json", "words"

Shows = int | str | None
"""What a picture is to show: a class's number, a caption, or anything."""


@dataclass
class Prior:
    """A decoder that writes codes, how its texts are laid out, the tokenizer of captions, and what draws the codes."""

    model: Decoder
    layout: Layout
    words: TextTokenizer | None = None
    codec: Codec | None = None
    codec_path: str | None = None

    def __post_init__(self) -> None:
        self.model.written = self.layout.codes

    def prompt(self, shows: Shows = None) -> list[int]:
        """The ids before the codes. Raises UsageError for a caption or a class that the prior has no ear for."""
        if isinstance(shows, str):
            if self.words is None:
                raise UsageError("a caption: this prior was trained without", tip="leave it out")
            return self.layout.prompt(self.words.encode(shows))
        if shows is not None and not self.layout.classes:
            raise UsageError("a class: this prior was trained without", tip="leave it out")
        return self.layout.prompt(shows)

    @torch.no_grad()
    def pictures(self, codes: Tensor, *, batch: int = 64) -> Tensor:
        """What codes (n, rows, columns) look like: fp32 (n, c, y, x) in [-1, 1]. Raises VolvelleError without codec."""
        if self.codec is None:
            raise VolvelleError("this prior was opened without its codec", tip="read_prior(path, codec=…)")
        return torch.cat([self.codec.decode(part).float().cpu() for part in codes.split(batch)])


def write_prior(prior: Prior, folder: str | os.PathLike[str]) -> None:
    """Write weights, layout and tokenizer; prior.json last, so that a folder with it is complete."""
    where = Path(folder)
    write_folder(prior.model, where)
    if prior.words is not None:
        (where / WORDS).mkdir(exist_ok=True)
        prior.words.save(where / WORDS)
    facts = {"layout": prior.layout.to_dict(), "codec": prior.codec_path}
    write_atomic(where / FILE, json.dumps(facts, indent=2) + "\n")


def is_prior(path: str | os.PathLike[str]) -> bool:
    """Whether the path is a run of `train prior`, or its folder of weights."""
    return find_prior(path) is not None


def find_prior(path: str | os.PathLike[str]) -> Path | None:
    """The folder with prior.json: the path itself or weights/ in it; None where there is none."""
    return next((f for f in (Path(path), Path(path) / "weights") if (f / FILE).is_file()), None)


def read_prior(
    path: str | os.PathLike[str],
    *,
    codec: Codec | str | os.PathLike[str] | None = None,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
) -> Prior:
    """Open a run of `train prior` or its weights; without `codec` the one that it was trained with, by its path.

    Raises VolvelleError where the folder holds no prior, or its codec is gone or has other codes.
    """
    folder = find_prior(path)
    if folder is None:
        tip = f"volvelle resume {path}" if (Path(path) / "manifest.json").is_file() else "volvelle train prior data=…"
        raise VolvelleError(f"{path}: holds no prior ({FILE})", tip=tip)
    facts = read_json(folder / FILE)
    layout = Layout.from_dict(facts["layout"])
    model = read_folder(folder, dtype=dtype, device=device)
    if not isinstance(model, Decoder) or model.config.vocabulary != layout.vocabulary:
        raise VolvelleError(f"{folder}: the model's vocabulary is not that of its {FILE}")
    words = TextTokenizer.from_folder(folder / WORDS) if layout.words else None
    found, where = _codec(codec, facts.get("codec"), folder, device)
    if found.vocabulary != layout.codes:
        raise VolvelleError(f"{where}: a codec of {found.vocabulary} codes, the prior writes {layout.codes}")
    return Prior(model, layout, words, found, where)


def _codec(
    given: Codec | str | os.PathLike[str] | None, known: str | None, folder: Path, device: torch.device | str | None
) -> tuple[Codec, str | None]:
    """The codec that is given, or the one named in the folder, and its path."""
    if given is not None and not isinstance(given, str | os.PathLike):
        return given, known
    path = given or known
    if path is None:
        raise VolvelleError(f"{folder}: does not say which codec its codes are of", tip="name it with codec=")
    if given is None and Path(path).is_absolute() and not Path(path).exists():
        # a folder of runs that was moved as a whole
        beside = [parent / Path(path).name for parent in folder.resolve().parents[:3]]
        path = next((p for p in beside if p.exists()), path)
        if not Path(path).exists():
            raise VolvelleError(f"{folder}: its codec {path} is gone", tip="say where it is with codec=")
    from volvelle.systems.generation.load import open_codec

    return open_codec(path, device=device), str(path)
