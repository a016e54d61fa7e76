"""Filling fixed lengths: plain text cut into windows, and short examples placed side by side in one row."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from volvelle.data.tokens import IGNORE, TokenDataset, Tokenizer, shifted
from volvelle.errors import VolvelleError


class Windows:
    """Plain text as windows of `length` tokens, in which every token but the first is a target exactly once.

    Documents are joined by the end token. The last window ends with the text and overlaps the one before it, where its
    targets are left out. Item i is (ids, targets), int64 of shape (length,); a text shorter than a window gives one
    shorter item.
    """

    def __init__(self, tokens: Tensor, length: int):
        if length < 1:
            raise ValueError(f"Windows: length must be at least 1, got {length}")
        if len(tokens) < 2:
            raise VolvelleError(f"the text has {len(tokens)} tokens; at least 2 are needed to learn from")
        self._tokens, self.length = tokens, min(length, len(tokens) - 1)

    @classmethod
    def of(cls, documents: Sequence[str], tokenizer: Tokenizer, length: int) -> Windows:
        """Encode documents and join them, each followed by the end token."""
        return cls(tokens_of(documents, tokenizer), length)

    def __len__(self) -> int:
        return (len(self._tokens) - 2) // self.length + 1

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        start = index * self.length
        late = min(start, len(self._tokens) - 1 - self.length)
        ids = self._tokens[late : late + self.length].long()
        targets = self._tokens[late + 1 : late + 1 + self.length].to(torch.long, copy=True)  # written to below
        if late < start:
            targets[: start - late] = IGNORE
        return ids, targets

    def source(self, index: int) -> str:
        """Which tokens of the text a window covers."""
        start = index * self.length
        return f"tokens {start:,} to {min(start + self.length, len(self._tokens)):,}"

    @property
    def tokens(self) -> int:
        """All tokens."""
        return len(self._tokens)

    @property
    def learnt(self) -> int:
        """Tokens that are learnt."""
        return len(self._tokens) - 1


def tokens_of(documents: Sequence[str], tokenizer: Tokenizer) -> Tensor:
    """Documents as one int32 tensor of tokens, each followed by the end token (when the tokenizer has one)."""
    ids: list[int] = []
    for text in documents:
        ids += tokenizer.encode_prompt(text)
        if not ids or ids[-1] not in tokenizer.eos_ids:
            ids += tokenizer.eos_ids[:1]
    return torch.tensor(ids, dtype=torch.int32)


def collate_windows(items: Sequence[tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
    """Stack windows, all of one length: ids and targets (b, n)."""
    ids, targets = zip(*items, strict=True)
    return {"ids": torch.stack(ids), "targets": torch.stack(targets)}


class PackedExamples:
    """Examples side by side in rows of at most `length` tokens, each seeing only itself.

    Longest first into the first row with room (first-fit decreasing). Item i is the list of its examples.
    """

    def __init__(self, dataset: TokenDataset, length: int):
        self.dataset, self.length = dataset, length
        self.rows: list[list[int]] = []
        room: list[int] = []
        # Rows with less room than the shortest example can take nothing more and are not looked at again; nor are
        # all but the newest rows, whose room the shortest remaining examples share.
        shortest = min(dataset.lengths)
        open_rows: list[int] = []
        for i in sorted(range(len(dataset)), key=lambda i: -dataset.lengths[i]):
            need = dataset.lengths[i]
            row = next((r for r in open_rows[-256:] if room[r] >= need), None)
            if row is None:
                row = len(self.rows)
                self.rows.append([])
                room.append(length)
                open_rows.append(row)
            self.rows[row].append(i)
            room[row] -= need
            if room[row] < shortest:
                open_rows.remove(row)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> list[tuple[Tensor, Tensor]]:
        return [self.dataset[i] for i in self.rows[index]]

    def source(self, index: int) -> str:
        """The examples of a row."""
        return " + ".join(self.dataset.source(i) for i in self.rows[index])


def collate_packed(items: Sequence[Sequence[tuple[Tensor, Tensor]]]) -> dict[str, Any]:
    """Rows of examples as ids, positions, targets and mask, all (b, n).

    The mask numbers the examples of a row from 1 on; each sees itself only. Padding is 0 and sees itself, so that no
    token sees nothing. Positions begin at 0 in each example.
    """
    longest = max(sum(len(ids) for ids, _ in row) for row in items)
    b = len(items)
    ids, positions = torch.zeros(b, longest, dtype=torch.long), torch.zeros(b, longest, dtype=torch.long)
    targets = torch.full((b, longest), IGNORE)
    owner = torch.zeros(b, longest, dtype=torch.long)
    for row, examples in enumerate(items):
        at = 0
        for number, (sample, learn) in enumerate(examples, 1):
            n = len(sample)
            part = slice(at, at + n)
            ids[row, part], positions[row, part], owner[row, part] = sample, torch.arange(n), number
            targets[row, at : at + n - 1] = shifted(sample, learn)
            at += n
    return {"ids": ids, "positions": positions, "mask": owner, "targets": targets}
