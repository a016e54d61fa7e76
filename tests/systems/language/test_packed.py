"""Packed rows by the numbers of their texts: each text as if it stood alone, and no mask of all pairs."""

from __future__ import annotations

import pytest
import torch
from tests.parts.attention.test_tiled import Largest, set_side
from tests.systems.language.test_decoder import GPT2, LLAMA, ROFORMER, build, some_ids
from tests.systems.language.test_positions import EVERY, model_of

from volvelle.adapt import PromptTuning, apply
from volvelle.systems.language.components import places, written_out
from volvelle.systems.language.projections import fuse_projections
from volvelle.train.mtp import further_targets

TEXTS = torch.tensor([[1, 1, 1, 1, 2, 2, 3, 3, 3], [1, 1, 2, 2, 2, 2, 2, 0, 0]])


def alone(model, ids, documents):
    """The logits of every text by itself, put together again."""
    rows = []
    for row, numbers in zip(ids, documents, strict=True):
        parts = [row[numbers == number] for number in numbers.unique_consecutive()]
        rows.append(torch.cat([model(part[None]).logits[0] for part in parts]))
    return torch.stack(rows)


@EVERY
@torch.no_grad()
def test_packed_equals_separate_with_every_encoding(name):
    model, ids = model_of(name), some_ids(2, 9)
    expected = alone(model, ids, TEXTS)
    torch.testing.assert_close(model(ids, mask=TEXTS).logits, expected, rtol=0, atol=1e-10)
    given = places(TEXTS)
    torch.testing.assert_close(model(ids, mask=TEXTS, positions=given).logits, expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("config", [LLAMA, GPT2, ROFORMER], ids=lambda config: config.family)
@pytest.mark.parametrize("side", [None, 4])
def test_gradients_are_those_of_the_written_mask(config, side, monkeypatch):
    """In small calls, which the fused kernel serves, and in tiles."""
    if side is not None:
        set_side(monkeypatch, side)
        monkeypatch.setattr("volvelle.parts.attention.sdpa.SMALL", 0)
    model, ids = build(config).double(), some_ids(2, 9)
    found = []
    for mask in (TEXTS, written_out(TEXTS, config.causal)):
        loss = model(ids, mask=mask, positions=places(TEXTS)).logits.square().mean()
        found.append(torch.autograd.grad(loss, list(model.parameters()), allow_unused=True))
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)


@torch.no_grad()
def test_a_fused_model_a_cache_and_keys_that_come_before_give_the_same():
    model, ids = build().double(), some_ids(2, 9)
    expected = model(ids, mask=TEXTS).logits
    cache = model.new_cache(2, 16)
    torch.testing.assert_close(model(ids, mask=TEXTS, cache=cache).logits, expected, rtol=0, atol=1e-12)
    assert fuse_projections(model)
    torch.testing.assert_close(model(ids, mask=TEXTS).logits, expected, rtol=0, atol=1e-12)
    apply(model, PromptTuning(length=3, init="random"))
    torch.testing.assert_close(
        model(ids, mask=TEXTS).logits, model(ids, mask=written_out(TEXTS, True)).logits, rtol=0, atol=1e-12
    )


def test_no_mask_of_all_pairs_is_made():
    n = 600
    model, ids = build(), some_ids(1, n)
    documents = torch.arange(n)[None] // 50 + 1
    with Largest() as watch:
        model.hidden(ids, mask=documents).sum().backward()
    assert watch.numbers < n * n
    with Largest() as watch:
        model.hidden(ids, mask=written_out(documents, True)).sum().backward()
    assert watch.numbers >= n * n  # the watch sees what it is there to see


def test_checkpointing_changes_nothing():
    model, ids = build().double(), some_ids(2, 9)
    found = []
    for model.gradient_checkpointing in (False, True):
        loss = model(ids, mask=TEXTS).logits.square().mean()
        found.append(torch.autograd.grad(loss, list(model.parameters())))
    for ours, theirs in zip(*found, strict=True):
        assert torch.equal(ours, theirs)


def test_places_count_from_the_beginning_of_each_text():
    assert places(TEXTS).tolist() == [[0, 1, 2, 3, 0, 1, 0, 1, 2], [0, 1, 0, 1, 2, 3, 4, 0, 1]]


@pytest.mark.parametrize("k", [1, 2, 5, 9])
def test_tokens_further_on_are_learnt_inside_a_text_only(k):
    targets = torch.arange(18).view(2, 9) + 1
    by_number, by_mask = (
        further_targets({"targets": targets, "mask": m}, k) for m in (TEXTS, written_out(TEXTS, True))
    )
    real = TEXTS > 0  # a written mask lets padding see padding
    assert torch.equal(by_number[real], by_mask[real])
    assert (by_number[~real] == -100).all()
