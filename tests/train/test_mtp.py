"""Training several tokens at once: losses against loops, one head at a time, ragged and packed rows, runs."""

from __future__ import annotations

import dataclasses
import functools
import math

import pytest
import torch
from tests.systems.language.mtp_oracle import ORACLES
from tests.systems.language.test_decoder import LLAMA
from tests.systems.language.test_mtp import pair
from torch.func import functional_call

from volvelle.data.loader import Loader
from volvelle.data.packing import PackedExamples, Windows, collate_packed, collate_windows
from volvelle.data.tokens import IGNORE, Encoded, TokenDataset, collate
from volvelle.systems.language import config as c
from volvelle.systems.language.mtp import KINDS, MultiToken
from volvelle.train import mtp as module
from volvelle.train.loop import fit
from volvelle.train.mtp import MultiTokenObjective, further_targets, held_out_tokens, multi_token_loss, token_rows
from volvelle.train.observer import Quiet
from volvelle.train.options import FitOptions

DEPTHS = 2
LENGTHS = (7, 3, 2, 9, 4)


def texts(seed=0, lengths=LENGTHS):
    """Ragged texts; of each a beginning of its own length is not to be learnt."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for i, n in enumerate(lengths):
        ids = torch.randint(0, 61, (n,), generator=generator).tolist()
        learn = [j >= i % 3 for j in range(n)]
        learn[-1] = learn[-1] and i != 2
        found.append(Encoded(ids, learn))
    return found


def dataset(encoded):
    return TokenDataset(encoded, [f"text {i}" for i in range(len(encoded))])


def batch_of(kind, encoded=None):
    encoded = encoded or texts()
    data = dataset(encoded)
    if kind == "padded":
        return collate([data[i] for i in range(len(data))])
    packed = PackedExamples(data, 12)
    return collate_packed([packed[i] for i in range(len(packed))])


def naive(kind, model, mtp, encoded, weight):
    """The loss and each depth's mean, text by text and position by position."""
    sums, counts = [0.0] * (1 + mtp.depths), [0] * (1 + mtp.depths)
    for ids, learn in encoded:
        logits = ORACLES[kind](model, mtp, torch.tensor(ids))
        for k in range(1 + mtp.depths):
            for i in range(len(ids)):
                t = i + k + 1
                if t < len(ids) and learn[t]:
                    sums[k] += float(logits[k][i].logsumexp(0) - logits[k][i, ids[t]])
                    counts[k] += 1
    n = counts[0]
    total = sums[0] / n + weight / mtp.depths * sum(s / n for s in sums[1:])
    return total, [s / max(count, 1) for s, count in zip(sums, counts, strict=True)], counts


@pytest.mark.parametrize("rows", ["padded", "packed"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_loss_is_the_papers_on_ragged_texts(kind, rows):
    model, mtp = pair(kind, depths=DEPTHS)
    batch, encoded = batch_of(rows), texts()
    total, each, counts = naive(kind, model, mtp, encoded, 0.7)
    found = multi_token_loss(MultiToken(model, mtp), batch, 0.7)
    assert found.value.item() == pytest.approx(total, rel=1e-12)
    assert found.weight == counts[0]
    assert list(found.metrics) == ["next_token_loss", "token_2_loss", "token_3_loss"]
    assert [float(value) for value in found.metrics.values()] == pytest.approx(each, rel=1e-12)


def mutants():
    def by_one(batch, k):
        return further_targets(batch, k + 1 if k else 0)

    def across_borders(batch, k):
        return further_targets({"targets": batch["targets"]}, k)

    def not_to_be_learnt(batch, k):
        return further_targets(batch | {"targets": torch.where(batch["targets"] == IGNORE, 0, batch["targets"])}, k)

    return {f.__name__: f for f in (by_one, across_borders, not_to_be_learnt)}


@pytest.mark.parametrize("name", mutants())
def test_mutants_are_caught(name, monkeypatch):
    """Targets shifted by one, into the next text of a packed row, or of the prompt."""
    model, mtp = pair("sequential", depths=DEPTHS)
    total, _, _ = naive("sequential", model, mtp, texts(), 0.7)
    monkeypatch.setattr(module, "further_targets", mutants()[name])
    found = multi_token_loss(MultiToken(model, mtp), batch_of("packed"), 0.7).value.item()
    assert abs(found - total) > 1e-3


@pytest.mark.parametrize("kind", ["padded", "packed"])
def test_targets_one_by_one(kind):
    batch = batch_of(kind)
    for k in range(5):
        learnt = further_targets(batch, k)
        count = sum(learn[i + k + 1] for ids, learn in texts() for i in range(len(ids) - k - 1))
        assert int((learnt != IGNORE).sum()) == count
        for row, column in (learnt != IGNORE).nonzero().tolist():
            assert learnt[row, column] == batch["ids"][row, column + k + 1]
    assert bool((further_targets(batch, 50) == IGNORE).all())


def test_windows_overlap_without_counting_twice():
    tokens = torch.randint(0, 61, (23,), generator=torch.Generator().manual_seed(3))
    before = tokens.clone()
    windows = Windows(tokens, 8)
    batch = collate_windows([windows[i] for i in range(len(windows))])
    assert int((batch["targets"] != IGNORE).sum()) == 22
    # The third window overlaps the second by two targets; each window ends k positions early.
    assert [int((further_targets(batch, k) != IGNORE).sum()) for k in (1, 2)] == [7 + 7 + 6, 6 + 6 + 6]
    assert torch.equal(tokens, before), "leaving targets out does not write into the text"


def gradients(both, batch, frugal):
    both.zero_grad()
    loss = multi_token_loss(both, batch, 1.3, frugal=frugal)
    loss.value.backward()
    return loss, {name: p.grad.clone() for name, p in both.named_parameters()}


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("head", [c.Head(), c.Head(tied=False), c.Head(tied=False, bias=True)])
def test_one_head_at_a_time_gives_the_gradients_of_all_at_once(head, checkpointing):
    model, mtp = pair("parallel", dataclasses.replace(LLAMA, family="volvelle", head=head), DEPTHS)
    model.gradient_checkpointing = checkpointing
    both, batch = MultiToken(model, mtp), batch_of("packed")
    plain, wanted = gradients(both, batch, frugal=False)
    ours, found = gradients(both, batch, frugal=True)
    assert torch.equal(ours.value, plain.value)
    assert {k: float(v) for k, v in ours.metrics.items()} == {k: float(v) for k, v in plain.metrics.items()}
    for name, gradient in wanted.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-11, atol=1e-13, msg=name)


@pytest.mark.parametrize("kind", KINDS)
def test_under_autocast_both_ways_are_close(kind):
    model, mtp = pair(kind, depths=DEPTHS)
    both, batch = MultiToken(model.float(), mtp.float()), batch_of("padded")
    _, exact = gradients(both, batch, frugal=False)
    for frugal in (False, True):
        with torch.autocast("cpu", torch.bfloat16):
            loss = multi_token_loss(both, batch, 1.3, frugal=frugal)
            streams = both.states(batch["ids"], mask=batch["mask"])
        assert {state.dtype for state in streams} == {torch.float32}
        both.zero_grad()
        loss.value.backward()
        flat = torch.cat([p.grad.reshape(-1) for p in both.parameters()])
        wanted = torch.cat([g.reshape(-1) for g in exact.values()])
        assert (flat - wanted).norm() / wanted.norm() < 0.03


def alive(both, batch, frugal):
    """The most bytes that tensors of forward and backward take at once."""
    both.zero_grad()
    with torch.profiler.profile(profile_memory=True, activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        multi_token_loss(both, batch, 1.0, frugal=frugal).value.backward()
    live = peak = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            live += event.nbytes()
            peak = max(peak, live)
    return peak


def test_what_only_one_head_keeps_is_alive_at_a_time():
    """Each further head adds its weights' gradients; without the care it adds its activations and logits too."""
    ids = torch.randint(0, 61, (8, 64), generator=torch.Generator().manual_seed(0))
    batch = {"ids": ids, "targets": ids.roll(-1, 1)}
    config = dataclasses.replace(LLAMA, context=64, depth=2, mlp=c.GatedMLP(96))

    def growth(frugal):
        peaks = {}
        for depths in (1, 5):
            model, mtp = pair("parallel", config, depths)
            both = MultiToken(model.float(), mtp.float())
            extra = sum(p.numel() for p in mtp.parameters()) * 4
            peaks[depths] = alive(both, batch, frugal) - 2 * extra  # once summed, once as the parameters' own
        return (peaks[5] - peaks[1]) / 4

    activations = 8 * 64 * 4 * (10 * 24 + 4 * 96)  # of a block, roughly
    assert growth(frugal=False) > 0.7 * activations
    assert growth(frugal=True) < 0.1 * activations


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_the_differences(kind):
    small = dataclasses.replace(
        LLAMA, vocabulary=7, width=4, heads=2, kv_heads=1, embedding_width=4, head_width=2, mlp=c.GatedMLP(3)
    )
    model, mtp = pair(kind, small, 2)
    both = MultiToken(model, mtp)
    encoded = [Encoded([i % 7 for i in ids], learn) for ids, learn in texts(lengths=(4, 2, 3))]
    batch = batch_of("packed", encoded)
    names = [name for name, _ in both.named_parameters()]
    inputs = tuple(p.detach().clone().requires_grad_() for p in both.parameters())

    class Whole(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.both = both

        def forward(self):
            return multi_token_loss(self.both, batch, 0.9).value

    def value(*tensors):
        given = {f"both.{name}": tensor for name, tensor in zip(names, tensors, strict=True)}
        return functional_call(Whole(), given, (), tie_weights=True)

    assert torch.autograd.gradcheck(value, inputs, eps=1e-6, atol=1e-6, rtol=1e-4, fast_mode=True)


@pytest.mark.parametrize("kind", KINDS)
def test_unequal_micro_batches_are_one_batch(kind):
    """The weighted mean that the loop takes over micro-batches is the loss of all texts together, and its gradient."""
    model, mtp = pair(kind, depths=DEPTHS)
    both, encoded = MultiToken(model, mtp), texts()
    whole, wanted = gradients(both, batch_of("padded"), frugal=True)
    sums, total, count = {name: torch.zeros_like(g) for name, g in wanted.items()}, 0.0, 0.0
    for part in (encoded[:1], encoded[1:3], encoded[3:]):
        loss, found = gradients(both, batch_of("padded", part), frugal=True)
        total, count = total + loss.value.item() * loss.weight, count + loss.weight
        for name, gradient in found.items():
            sums[name] += gradient * loss.weight
    assert total / count == pytest.approx(whole.value.item(), rel=1e-12)
    for name, gradient in wanted.items():
        torch.testing.assert_close(sums[name] / count, gradient, rtol=1e-9, atol=1e-12, msg=name)


def test_a_batch_in_which_nothing_is_learnt_weighs_nothing():
    model, mtp = pair("parallel", depths=1)
    ids = torch.zeros(2, 5, dtype=torch.long)
    loss = multi_token_loss(MultiToken(model, mtp), {"ids": ids, "targets": torch.full_like(ids, IGNORE)}, 1.0)
    loss.value.backward()
    assert (loss.value.item(), loss.weight) == (0.0, 0)


def test_held_out_figures_are_means_over_all_tokens():
    model, mtp = pair("sequential", depths=DEPTHS)
    both, encoded = MultiToken(model, mtp), texts()
    data = dataset(encoded)
    found = held_out_tokens(both, Loader(data, 2, seed=0, collate=collate, shuffle=False, lengths=data.lengths))
    _, each, _ = naive("sequential", model, mtp, encoded, 1.0)
    names = ["loss", "token_2_loss", "token_3_loss"]
    assert [found[name] for name in names] == pytest.approx(each, rel=1e-6)
    assert found["perplexity"] == pytest.approx(math.exp(each[0]))
    hits = tried = 0
    for ids, learn in encoded:
        logits = ORACLES["sequential"](model, mtp, torch.tensor(ids))
        for i in range(len(ids) - 2):
            if learn[i + 2]:
                hits, tried = hits + (int(logits[1][i].argmax()) == ids[i + 2]), tried + 1
    assert found["token_2_accuracy"] == pytest.approx(hits / tried)
    rows = token_rows({}, found)
    assert [row[0] for row in rows] == ["next", "1 after the next", "2 after the next"]
    assert token_rows({"loss": 1.0}, {"loss": 0.5, "perplexity": 2.0}) == []


@functools.cache
def counting():
    """Windows of a text in which every token is the one before it plus 1 or 2: the next is a coin, the one after 3."""
    generator = torch.Generator().manual_seed(0)
    steps = torch.randint(1, 3, (2000,), generator=generator)
    steps[1::2] = 3 - steps[0::2]
    return Windows((steps.cumsum(0) % 61).to(torch.int32), 16)


@pytest.mark.parametrize("kind", KINDS)
def test_training_learns_every_token(kind):
    torch.manual_seed(0)
    config = dataclasses.replace(LLAMA, init_std=0.02)
    from volvelle.systems.language.decoder import Decoder

    both = MultiToken(Decoder(config), KINDS[kind](config, 1))
    options = FitOptions(steps=40, batch=8, learning_rate=2e-2, checkpoint_every=None)
    held = Loader(counting(), 16, seed=0, collate=collate_windows, shuffle=False)
    objective = MultiTokenObjective(both, options, weight=1.0, held_out=held)
    data = Loader(counting(), options.batch, seed=1, collate=collate_windows)
    result = fit(objective, data, options=options, observer=Quiet())
    assert set(result.metrics) >= {"loss", "next_token_loss", "token_2_loss"}
    assert result.held_out["loss"] < 0.5 * math.log(61)
    assert result.held_out["token_2_loss"] < 0.5 * math.log(61)


@pytest.mark.parametrize("kind", KINDS)
def test_modules_learn_beside_a_frozen_decoder(kind):
    model, mtp = pair(kind, depths=DEPTHS)
    model.requires_grad_(False)
    both, batch = MultiToken(model, mtp), batch_of("padded")
    found = {}
    for frugal in (False, True):
        both.zero_grad()
        multi_token_loss(both, batch, 1.0, frugal=frugal).value.backward()
        assert all(p.grad is None for p in model.parameters())
        found[frugal] = torch.cat([p.grad.reshape(-1) for p in mtp.parameters()])
    assert found[True].abs().max() > 1e-3
    torch.testing.assert_close(found[True], found[False], rtol=1e-11, atol=1e-13)
