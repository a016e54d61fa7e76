"""Drafters, policies and models for tests of decoding with drafts."""

from __future__ import annotations

import random

import torch

from volvelle.decode.contract import Draft, Drafter, Drafting
from volvelle.systems.language import config as c
from volvelle.systems.language.decoder import Decoder
from volvelle.systems.language.encoder_decoder import EncoderDecoder
from volvelle.systems.language.encoder_decoder_config import EncoderDecoderConfig, Stack

V = 61
TREE = (-1, -1, 1, 0, 1, 2)
"""Two guesses, two behind the second of them, one behind the first, and one more behind a path."""


def decoder(seed=0, depth=2, **changes):
    """A random decoder whose answers vary, in fp64, where there are no near ties."""
    options = {
        "vocabulary": V, "width": 24, "depth": depth, "heads": 4, "context": 64, "norm": c.RMSNorm(),
        "mlp": c.GatedMLP(40), "position": c.Rope(), "kv_heads": 2,
        "head": c.Head(tied=False),
    }  # fmt: skip
    torch.manual_seed(seed)
    return lively(Decoder(c.LanguageConfig("volvelle", **{**options, **changes})))


def bart(seed=0, depth=2):
    """A random encoder-decoder in fp64."""
    side = Stack(depth=depth, heads=4, mlp=c.MLP(40, "gelu"))
    torch.manual_seed(seed)
    config = EncoderDecoderConfig(
        "bart", vocabulary=V, width=24, encoder=side, decoder=side, context=64, start=2, head=c.Head(tied=False)
    )
    model = lively(EncoderDecoder(config), 0.15)
    with torch.no_grad():  # else every answer is one word over and over
        for weight in (model.model.shared.weight, model.model.decoder.embed_positions.weight, model.lm_head.weight):
            weight.normal_()
    return model


def lively(model, std=0.4):
    model = model.double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=std)
    return model


def late(answers, place=5):
    """A token that some answer holds at `place` or soon after for the first time, and no answer much before."""
    firsts = {}
    for answer in answers:
        for at, token in enumerate(answer):
            firsts.setdefault(token, []).append((at, answer.index(token)))
    found = {token: min(first for _, first in places) for token, places in firsts.items()}
    return next(token for token, first in sorted(found.items(), key=lambda item: item[1]) if first >= place)


class Guessing(Drafter, Drafting):
    """Drafts what `answers` say, each token spoiled with probability 1 - `right`; a chain, or `TREE`."""

    def __init__(self, answers, *, right=0.7, tree=False, k=5, seed=0):
        self.answers, self.right, self.tree = answers, right, tree
        self.width = len(TREE) if tree else k
        self.random = random.Random(seed)
        self.seen = []

    @property
    def depth(self):
        return 3 if self.tree else self.width

    def begin(self, writer, requests, room):
        self.room = room
        return self

    def propose(self, requests, seen, k):
        self.seen.append((seen, [request.finish for request in requests], [list(r.tokens) for r in requests]))
        rows = []
        for request, answer in zip(requests, self.answers, strict=True):
            at = len(request.tokens)
            true = [*answer[at:], *[3] * 8]
            guesses = [t if self.random.random() < self.right else (t + 1) % V for t in true[:8]]
            if self.tree:  # nodes 1, 2 and 5 are the good path
                guesses = [(guesses[0] + 7) % V, guesses[0], guesses[1], 9, (guesses[1] + 5) % V, guesses[2]]
            rows.append(guesses[: min(k, self.width)])
        if self.random.random() < 0.2:
            rows[self.random.randrange(len(rows))][1:] = [-1] * (len(rows[0]) - 1)
        k = len(rows[0])
        return Draft(torch.tensor(rows), TREE[:k] if self.tree else None)


class Sometimes:
    """A policy that asks for any number of tokens, often none."""

    def __init__(self, seed=0):
        self.random = random.Random(seed)
        self.told = []

    def begin(self):
        return self

    def choose(self, limit, length):
        return self.random.choice([0, limit, limit, self.random.randint(0, limit)])

    def observe(self, length, draft, *, step_seconds, draft_seconds=0.0):
        self.told.append((length, draft))
