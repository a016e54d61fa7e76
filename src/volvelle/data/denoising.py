"""Denoising, what BART is pretrained by: texts with gaps, to be written out whole.

Lewis et al. 2020, "BART: Denoising Sequence-to-Sequence Pre-training", section 2.2, text infilling: spans of tokens
whose lengths are drawn from a Poisson distribution (λ = 3) are each replaced by one mask, spans of none too. Whoever
fills the gaps learns to copy what stands around them, and that from every token of a text, where a summary teaches a
dozen.

    p = f / (m (1 - f) + f (1 - e^-m))

is how likely a span begins at a token that is looked at, so that the share f of all tokens is masked, in spans of m on
average.
"""

from __future__ import annotations

import math
from functools import partial

import numpy as np

from volvelle.data.text import Corpus, OnBad
from volvelle.data.tokens import Encoded, Layout, TokenDataset, Tokenizer

SHARE, SPAN = 0.3, 3.0
"""f and m of the paper."""


def denoised(layout: Layout, *, mask: int, copies: float, seed: int) -> Layout:
    """The layout of pairs with gapped sources as further samples: `copies` for each pair, whose answer is the source.

    Each of them is drawn from the seed and its number alone. `mask` is the token that stands for a gap.
    """
    return Layout(partial(_encode, layout, mask, copies, seed), layout.collate)


def infilled(tokens: list[int], mask: int, draw: np.random.Generator) -> list[int]:
    """The tokens with gaps; the first and the last one stay, for a text stands between them.

    >>> infilled([0, 5, 6, 7, 8, 9, 2], 4, np.random.default_rng(3))
    [0, 4, 8, 9, 2]
    """
    begins = SHARE / (SPAN * (1 - SHARE) + SHARE * (1 - math.exp(-SPAN)))
    found, inner, at = tokens[:1], tokens[1:-1], 0
    while at < len(inner):
        if draw.random() < begins:
            if found[-1] != mask:
                found.append(mask)
            span = int(draw.poisson(SPAN))
            if span:
                at += span
                continue
        found.append(inner[at])
        at += 1
    return found + tokens[1:][-1:]


def _encode(
    layout: Layout, mask: int, copies: float, seed: int, corpus: Corpus, tokenizer: Tokenizer, *, context: int,
    on_bad: OnBad = "stop",
) -> TokenDataset:  # fmt: skip
    """What `layout` encodes, and the gapped texts behind it."""
    found = layout.encode(corpus, tokenizer, context=context, on_bad=on_bad)
    pairs = [found[index] for index in range(len(found))]
    samples = [Encoded(ids.tolist(), learn.tolist()) for ids, learn in pairs]
    sources = list(found.sources)
    for number in range(round(copies * len(pairs))):
        ids, learn = pairs[number % len(pairs)]
        whole = ids[~learn].tolist()
        gapped = infilled(whole, mask, np.random.default_rng((seed, number)))
        samples.append(Encoded(gapped + whole, [False] * len(gapped) + [True] * len(whole)))
        sources.append(found.sources[number % len(pairs)])
    return TokenDataset(samples, sources, found.skipped)
