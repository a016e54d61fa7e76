"""Pictures as codes on disk: an image tokenizer reads every picture once, and a language model trains on what it wrote.

A file holds, for n texts, `codes` (n, places) and `prompts` (their lengths and ids one behind another) as a safetensors
file; its metadata says what they were made of, so that codes of another codec or other pictures are not mistaken for
them.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from volvelle.data.loader import Loader
from volvelle.data.pictures import Framing, Middles, PictureSet, Views, collate_pictures, to_signed
from volvelle.data.tokens import IGNORE, shifted
from volvelle.errors import VolvelleError
from volvelle.files import atomic_path

TOGETHER = 64
"""Pictures encoded at once."""


class CodedPictures:
    """Texts of a prior: the ids before a picture's codes, which are read, and the codes, which are learnt.

    Item i is (ids int64 (n,), learn bool (n,)); `codes` int64 (pictures, places).
    """

    def __init__(self, codes: Tensor, prompts: Sequence[Sequence[int]]):
        if codes.ndim != 2 or len(codes) != len(prompts):
            raise ValueError(f"CodedPictures: {len(prompts)} prompts for codes of shape {tuple(codes.shape)}")
        self._codes, self.prompts = codes.int(), [list(prompt) for prompt in prompts]
        self.lengths = [len(prompt) + codes.shape[1] for prompt in self.prompts]

    def __len__(self) -> int:
        return len(self.prompts)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        prompt, codes = torch.tensor(self.prompts[index]), self._codes[index].long()
        return torch.cat((prompt, codes)), torch.arange(len(prompt) + len(codes)) >= len(prompt)

    @property
    def codes(self) -> Tensor:
        """All codes, int64 (pictures, places)."""
        return self._codes.long()

    def codes_of(self, index: int) -> Tensor:
        """The codes of one picture, int64 (places,)."""
        return self._codes[index].long()

    @property
    def tokens(self) -> int:
        """All tokens."""
        return sum(self.lengths)

    def source(self, index: int) -> str:
        """Which picture, for messages."""
        return f"picture {index}"

    def part(self, indices: Sequence[int]) -> CodedPictures:
        """Some of the texts."""
        return CodedPictures(self._codes[list(indices)], [self.prompts[i] for i in indices])


class Untold:
    """The same texts with a share of the prompts replaced by `unknown`, drawn anew in every epoch."""

    def __init__(self, texts: CodedPictures, unknown: Sequence[int], share: float):
        self.texts, self.unknown, self.share, self.lengths = texts, list(unknown), share, texts.lengths

    def __len__(self) -> int:
        return len(self.texts)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.texts[index]

    def draw(self, index: int, generator: random.Random) -> tuple[Tensor, Tensor]:
        """Text `index`, its chance taken from the generator."""
        if generator.random() >= self.share:
            return self.texts[index]
        return CodedPictures(self.texts.codes_of(index)[None], [self.unknown])[0]

    def source(self, index: int) -> str:
        """Which picture, for messages."""
        return self.texts.source(index)


def collate_codes(items: Sequence[tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
    """Pad to the longest on the right: ids and targets (b, n). In causal order nobody looks at the padding: no mask."""
    longest = max(len(ids) for ids, _ in items)
    ids = torch.zeros(len(items), longest, dtype=torch.long)
    targets = torch.full((len(items), longest), IGNORE)
    for row, (sample, learn) in enumerate(items):
        ids[row, : len(sample)], targets[row, : len(sample) - 1] = sample, shifted(sample, learn)
    return {"ids": ids, "targets": targets}


def encode_pictures(
    pictures: PictureSet,
    framing: Framing,
    encode: Callable[[Tensor], Tensor],
    *,
    views: int = 1,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> Tensor:
    """The codes int64 (views x pictures, places) of every picture's middle, or of so many random views of it.

    `encode` maps pixels (b, c, y, x) in [-1, 1] to codes (b, h, w). Views of picture i lie at i, i + pictures, …
    """
    dataset = (Middles if views == 1 and framing.zoom == (1.0, 1.0) and not framing.mirror else Views)(
        pictures, framing
    )
    loader = Loader(dataset, TOGETHER, seed=seed, collate=collate_pictures, shuffle=False)
    found, total = [], views * len(pictures)
    for _ in range(views):
        for batch in loader:
            found.append(encode(to_signed(batch.value["images"])).flatten(1).cpu())
            if progress is not None:
                progress(sum(map(len, found)), total)
    return torch.cat(found)


def write_codes(path: Path, texts: CodedPictures, facts: Mapping[str, Any]) -> None:
    """Write texts, and what they were made of."""
    path.parent.mkdir(parents=True, exist_ok=True)
    tensors = {
        "codes": texts.codes.int(),
        "lengths": torch.tensor([len(prompt) for prompt in texts.prompts], dtype=torch.int32),
        "prompts": torch.tensor([i for prompt in texts.prompts for i in prompt], dtype=torch.int32),
    }
    with atomic_path(path) as temporary:
        save_file(tensors, temporary, metadata={"facts": _line(facts)})


def read_codes(path: Path, facts: Mapping[str, Any]) -> CodedPictures | None:
    """The texts of a file that was made of just this; None where it is not there or of something else.

    Raises VolvelleError for a file that is damaged.
    """
    if not path.is_file():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            if (file.metadata() or {}).get("facts") != _line(facts):
                return None
            codes, lengths, prompts = (file.get_tensor(name) for name in ("codes", "lengths", "prompts"))
    except SafetensorError as error:
        raise VolvelleError(f"{path}: damaged ({error})", tip="delete it, and the codes are made anew") from error
    return CodedPictures(codes, [part.tolist() for part in prompts.split(lengths.tolist())])


def _line(facts: Mapping[str, Any]) -> str:
    return json.dumps(facts, sort_keys=True)
