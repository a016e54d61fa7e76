"""From examples to token ids with a loss mask: what the model reads, and which of it the model is to learn to write."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from volvelle.data.text import Bad, Corpus, Example, OnBad
from volvelle.errors import VolvelleError

IGNORE = -100
"""Target of a position that is not learnt, as in torch's cross entropy."""


class Tokenizer(Protocol):
    """What encoding asks of a tokenizer; `volvelle.systems.language.tokenizer.TextTokenizer` is one."""

    @property
    def eos_ids(self) -> Sequence[int]:
        """Tokens that end a text."""
        ...

    @property
    def chat_template(self) -> str | None:
        """The template behind `chat`, or None."""
        ...

    def encode(self, text: str, *, special: bool = False) -> list[int]:
        """Token ids; `special` reads control tokens that the text spells."""
        ...

    def encode_prompt(self, text: str) -> list[int]:
        """Token ids with what the model expects before a text."""
        ...

    def chat(self, messages: Any, *, add_generation_prompt: bool = True) -> str:
        """A conversation as one text."""
        ...

    def chat_ids(self, messages: Any, *, add_generation_prompt: bool = True) -> list[int]:
        """A conversation as token ids."""
        ...


class Encoded(NamedTuple):
    """Token ids, and for each whether the model learns to write it."""

    ids: list[int]
    learn: list[bool]


def prompt_ids(tokenizer: Tokenizer, example: Example) -> list[int]:
    """The tokens a completion follows; the same in training and when generating."""
    if example.messages is not None:
        _needs_template(tokenizer, example)
        return tokenizer.chat_ids(list(example.messages[:-1]), add_generation_prompt=True)
    # A text needs something to follow: without any prompt that is the end of the text before.
    return tokenizer.encode_prompt(example.prompt) or list(tokenizer.eos_ids[:1])


def encode(tokenizer: Tokenizer, example: Example, alternative: int = 0) -> Encoded:
    """Prompt, completion and end token; only the last two are learnt. In a conversation, every assistant turn is.

    Prompt and completion are encoded apart, so that the boundary lies where it lies when generating.
    """
    if example.messages is not None:
        return _conversation(tokenizer, example)
    before = prompt_ids(tokenizer, example)
    after = [*tokenizer.encode(example.completions[alternative]), *tokenizer.eos_ids[:1]]
    return Encoded(before + after, [False] * len(before) + [True] * len(after))


def _needs_template(tokenizer: Tokenizer, example: Example) -> None:
    if tokenizer.chat_template is None:
        raise VolvelleError(
            f"{example.source}: a conversation, but this model has no chat template",
            tip='write it as text with prompt="{{ messages[0].content }}" completion="{{ messages[1].content }}"',
        )


def _conversation(tokenizer: Tokenizer, example: Example) -> Encoded:
    _needs_template(tokenizer, example)
    messages = list(example.messages or ())
    ids: list[int] = []
    learn: list[bool] = []
    for i, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        read = tokenizer.chat_ids(messages[:i], add_generation_prompt=True)
        if read[: len(ids)] != ids:
            raise VolvelleError(
                f"{example.source}: the chat template rewrites earlier turns, so turn {i + 1} cannot be learnt apart",
                tip="keep one answer of the assistant in each conversation",
            )
        write = _answer(tokenizer, messages[: i + 1], read)
        ends = [k for k, token in enumerate(write) if token in tokenizer.eos_ids]
        # Nothing is generated after the end token, so what the template puts there is not learnt.
        written = ends[-1] + 1 if ends else len(write)
        learn += [False] * (len(read) - len(ids)) + [True] * written + [False] * (len(write) - written)
        ids = read + write
    return Encoded(ids, learn)


def _answer(tokenizer: Tokenizer, messages: list[Mapping[str, str]], read: list[int]) -> list[int]:
    """The tokens of the last message, and what the template puts after it, behind the prompt `read`."""
    whole = tokenizer.chat_ids(messages, add_generation_prompt=False)
    if whole[: len(read)] == read:
        return whole[len(read) :]
    # A token lies across the border between prompt and answer (two line breaks in one token). When generating, the
    # prompt ends at the border, so the answer is encoded apart here too.
    before = tokenizer.chat(messages[:-1], add_generation_prompt=True)
    after, content = tokenizer.chat(messages, add_generation_prompt=False), messages[-1]["content"]
    rest = after[len(before) :]
    if not after.startswith(before) or not rest.startswith(content):
        raise VolvelleError(
            "the chat template does not put an answer behind the prompt it makes for generating",
            tip="name the fields with prompt= and completion= templates instead",
        )
    return tokenizer.encode(content) + tokenizer.encode(rest[len(content) :], special=True)


class TokenDataset:
    """Encoded examples, each alternative completion a sample of its own; flat storage, 5 bytes a token.

    Item i is (ids int64 (n,), learn bool (n,)); `source(i)` is its file and line, `lengths` the numbers of tokens,
    `skipped` what was left out and why.
    """

    def __init__(self, encoded: Sequence[Encoded], sources: Sequence[str], skipped: Sequence[str] = ()):
        self.lengths = [len(sample.ids) for sample in encoded]
        self.sources, self.skipped = list(sources), list(skipped)
        self._ids = torch.tensor([i for sample in encoded for i in sample.ids], dtype=torch.int32)
        self._learn = torch.tensor([flag for sample in encoded for flag in sample.learn], dtype=torch.bool)
        self._ends = torch.tensor([0, *self.lengths]).cumsum(0).tolist()

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        part = slice(self._ends[index], self._ends[index + 1])
        return self._ids[part].long(), self._learn[part]

    def source(self, index: int) -> str:
        """File and line of a sample."""
        return self.sources[index]

    @property
    def tokens(self) -> int:
        """All tokens."""
        return self._ends[-1]

    @property
    def learnt(self) -> int:
        """Tokens that are learnt."""
        return int(self._learn.sum())


def encode_corpus(corpus: Corpus, tokenizer: Tokenizer, *, context: int, on_bad: OnBad = "stop") -> TokenDataset:
    """Encode every completion of every example. One longer than `context` tokens is bad: it is never cut in silence."""
    bad = Bad(corpus.path, on_bad)
    samples: list[Encoded] = []
    sources: list[str] = []
    for example in corpus.examples:
        for alternative in range(len(example.completions)):
            sample = encode(tokenizer, example, alternative)
            if len(sample.ids) > context:
                bad.add(example.source, f"{len(sample.ids):,} tokens, more than the context of {context:,}")
                continue
            samples.append(sample)
            sources.append(example.source)
    return TokenDataset(samples, sources, bad.finish(len(samples)))


def collate(items: Sequence[tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
    """Pad to the longest on the right: ids, mask and targets, each (b, n).

    `targets[t]` is the token to be written after position t, or -100 where nothing is learnt. `mask` is True on real
    tokens.
    """
    longest = max(len(ids) for ids, _ in items)
    ids = torch.zeros(len(items), longest, dtype=torch.long)
    mask = torch.zeros(len(items), longest, dtype=torch.bool)
    targets = torch.full((len(items), longest), IGNORE)
    for row, (sample, learn) in enumerate(items):
        n = len(sample)
        ids[row, :n], mask[row, :n] = sample, True
        targets[row, : n - 1] = shifted(sample, learn)
    return {"ids": ids, "mask": mask, "targets": targets}


def shifted(ids: Tensor, learn: Tensor) -> Tensor:
    """Targets of the n - 1 positions that have a next token: that token, or -100 where it is not learnt."""
    return torch.where(learn[1:], ids[1:], IGNORE)


class Layout(NamedTuple):
    """How a model wants its examples: `encode(corpus, tokenizer, context=, on_bad=)`, and `collate` of a batch."""

    encode: Callable[..., TokenDataset]
    collate: Callable[[Any], dict[str, Tensor]]


ONE_TEXT = Layout(encode_corpus, collate)
"""A decoder's: prompt and completion are one text."""


def batch_tokens(batch: Mapping[str, Tensor]) -> int:
    """Real tokens in a batch, those of sources included."""
    mask, read = batch.get("mask"), batch.get("source_mask")
    count = batch["ids"].numel() if mask is None or mask.ndim != 2 else int((mask > 0).sum())
    return count if read is None else count + int(read.sum())
