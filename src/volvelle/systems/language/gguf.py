"""Read a language model from a GGUF file: configuration, weights and tokenizer, in Hugging Face's names and layout.

Weights are dequantised one at a time, when asked for, so that memory holds the model and one tensor more. llama.cpp
stores the q and k rows of Llama models in the interleaved rotary layout; they are put back here, exactly.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from volvelle.systems.language.gguf_families import Placed, change_rows, family_of, place
from volvelle.systems.language.gguf_file import Blocks, GGUFFile
from volvelle.systems.language.gguf_tokenizer import read_tokenizer, special_tokens

if TYPE_CHECKING:
    from volvelle.systems.language.tokenizer import TextTokenizer


class GGUFTensors(Mapping[str, Tensor]):
    """Hugging Face name -> tensor, dequantised anew at every access (nothing is kept); `heads` are those of q and k."""

    def __init__(self, file: GGUFFile, placed: Mapping[str, Placed], heads: tuple[int, int], dtype: torch.dtype | None):
        self._file, self._placed, self.heads, self._dtype = file, placed, heads, dtype

    def __getitem__(self, name: str) -> Tensor:
        where = self._placed[name]
        return change_rows(self._file.read(where.theirs, self._dtype), where.change, *self.heads)

    def __iter__(self) -> Iterator[str]:
        return iter(self._placed)

    def __len__(self) -> int:
        return len(self._placed)

    def where(self, name: str) -> Placed:
        """The tensor's name in the file, and the change between the stored rows and Hugging Face's."""
        return self._placed[name]


class GGUF:
    """An opened model: `config` as in config.json, `tensors` (Hugging Face name -> tensor), `tokenizer`."""

    def __init__(self, file: GGUFFile, dtype: torch.dtype | None = None):
        self._file = file
        self._tokenizer: TextTokenizer | None = None
        name, family = family_of(file)
        self.architecture = name
        sizes = family.sizes(file)
        self.tensors = GGUFTensors(file, place(file, family, sizes), (sizes["heads"], sizes["kv_heads"]), dtype)
        self.config = family.config(file, sizes) | self._shared_config(sizes["v"])

    @property
    def path(self) -> Path:
        """The file."""
        return self._file.path

    @property
    def tokenizer(self) -> TextTokenizer:
        """The tokenizer in the file's metadata, built at first use. Raises VolvelleError when it is unknown."""
        if self._tokenizer is None:
            self._tokenizer = read_tokenizer(self._file, self.architecture)
        return self._tokenizer

    def blocks(self, name: str) -> Blocks:
        """The stored bytes of a tensor given by its Hugging Face name, for an exact import of a quantised grid.

        Rows are in the order of the file: for q and k of Llama models `tensors.where(name).change` says which
        permutation `tensors[name]` applies on top.
        """
        return self._file.blocks(self.tensors.where(name).theirs)

    def _shared_config(self, vocabulary: int) -> dict[str, Any]:
        tokens = special_tokens(self._file, vocabulary)
        eos = list(tokens.eos)
        return {
            "vocab_size": vocabulary,
            # The converter writes the output projection only when it is not the embedding matrix.
            "tie_word_embeddings": "lm_head.weight" not in self.tensors,
            "bos_token_id": tokens.bos,
            "eos_token_id": eos if len(eos) > 1 else next(iter(eos), None),
            "pad_token_id": tokens.pad,
        }


def read_gguf(path: str | Path, dtype: torch.dtype | None = None) -> GGUF:
    """Open a GGUF model (Llama, Qwen2 or GPT-2; Q4_0 to Q8_0, K-quants, F16, BF16, F32).

    Tensors come as `dtype` (None: float32). Raises VolvelleError that names the file and what is wrong with it:
    missing, empty, of another format, truncated, damaged, of an unknown architecture or quantisation.
    """
    return GGUF(GGUFFile(path), dtype)
