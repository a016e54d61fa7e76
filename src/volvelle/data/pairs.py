"""Examples for an encoder-decoder: the prompt is its source, the completion the answer that it learns to write."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from volvelle.data.text import Bad, Corpus, Example, OnBad
from volvelle.data.tokens import IGNORE, Encoded, Layout, TokenDataset, Tokenizer, prompt_ids
from volvelle.errors import VolvelleError


def pairs(start: int) -> Layout:
    """The layout for a model whose answers begin with the token `start`."""
    return Layout(encode_pairs, partial(collate_pairs, start=start))


def encode_pairs(corpus: Corpus, tokenizer: Tokenizer, *, context: int, on_bad: OnBad = "stop") -> TokenDataset:
    """Encode every completion of every example behind its prompt; what is learnt is the answer.

    Source and answer may have `context` tokens each; a longer one is bad, for nothing is cut in silence. Raises
    VolvelleError for plain text and conversations, which have no source.
    """
    if corpus.documents:
        raise VolvelleError(
            f"{corpus.path}: plain text, but an encoder-decoder learns to answer prompts",
            tip="a .jsonl file with prompt and completion, or lines of prompt || completion",
        )
    bad = Bad(corpus.path, on_bad)
    samples: list[Encoded] = []
    sources: list[str] = []
    for example in corpus.examples:
        for alternative in range(len(example.completions)):
            source, answer = _encode(tokenizer, example, alternative)
            longest = max(len(source), len(answer))
            if longest > context:
                bad.add(example.source, f"{longest:,} tokens, more than the context of {context:,}")
                continue
            samples.append(Encoded(source + answer, [False] * len(source) + [True] * len(answer)))
            sources.append(example.source)
    return TokenDataset(samples, sources, bad.finish(len(samples)))


def collate_pairs(items: Sequence[tuple[Tensor, Tensor]], *, start: int) -> dict[str, Tensor]:
    """Pad to the longest on the right: source and source_mask (b, m); ids, mask and targets (b, n).

    `ids` are the answer behind `start`, without its last token: what the model reads to write `targets`, which are
    -100 where nothing is learnt. Masks are True on real tokens.
    """
    source, source_mask = _padded([ids[~learn] for ids, learn in items])
    targets, mask = _padded([ids[learn] for ids, learn in items])
    ids = targets.roll(1, 1)
    ids[:, 0] = start
    return {
        "source": source,
        "source_mask": source_mask,
        "ids": ids.masked_fill(~mask, 0),
        "mask": mask,
        "targets": targets.masked_fill(~mask, IGNORE),
    }


def _encode(tokenizer: Tokenizer, example: Example, alternative: int) -> tuple[list[int], list[int]]:
    if example.messages is not None:
        raise VolvelleError(
            f"{example.source}: a conversation, but an encoder-decoder learns to answer prompts",
            tip='name the fields: prompt="{{ messages[0].content }}" completion="{{ messages[1].content }}"',
        )
    # The tokens that BART has around a text stand around its answers too.
    answer = tokenizer.encode_prompt(example.completions[alternative])
    if not answer or answer[-1] not in tokenizer.eos_ids:
        answer = [*answer, *tokenizer.eos_ids[:1]]
    return prompt_ids(tokenizer, example), answer


def _padded(rows: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    mask = torch.arange(max(map(len, rows))) < torch.tensor([[len(row)] for row in rows])
    ids = torch.zeros(mask.shape, dtype=torch.long)
    ids[mask] = torch.cat(list(rows))
    return ids, mask
