"""A decoder whose layers attend linearly: a state of fixed size in the place of the cache, and nobody above notices.

What cache, padding, trees, packing and files must not change is tested with all encodings in test_positions.py.
"""

from __future__ import annotations

import dataclasses

import pytest
import torch
from tests.decode.test_generate import Oracle, greedy_accept
from tests.systems.language.test_decoder import LLAMA, build, some_ids

from volvelle.decode import generate, generate_batch
from volvelle.decode.loop import Help, begin
from volvelle.decode.options import Sampling
from volvelle.decode.request import Limits, Request
from volvelle.errors import VolvelleError
from volvelle.parts.attention.cache import KVCache
from volvelle.parts.attention.state_cache import StateCache
from volvelle.systems.language import config as c
from volvelle.systems.language.huggingface import write_folder
from volvelle.systems.language.projections import fuse_projections

LINEAR = dataclasses.replace(LLAMA, family="volvelle", attention=c.LinearAttention(chunk=4), context=128)
PROMPTS = [[5, 17, 33, 2, 9, 40, 11], [3], [60, 1, 1, 8]]


def model_of(config=LINEAR, dtype=torch.float64):
    return build(config).to(dtype)


@torch.no_grad()
def by_full_forwards(model, prompt, n):
    """Greedy decoding with no memory at all."""
    ids = list(prompt)
    for _ in range(n):
        ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    return ids[len(prompt) :]


def test_generate_equals_full_forwards_for_one_prompt_and_for_ragged_batches():
    model = model_of()
    expected = [by_full_forwards(model, prompt, 25) for prompt in PROMPTS]
    assert len({tuple(tokens) for tokens in expected}) == 3
    alone = [generate(model, prompt, max_tokens=25, eos_ids=()).tokens for prompt in PROMPTS]
    together = [answer.tokens for answer in generate_batch(model, PROMPTS, max_tokens=25, eos_ids=())]
    assert alone == expected
    assert together == expected


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_generate_in_other_dtypes(dtype):
    model = model_of(dtype=dtype)
    assert len(generate(model, PROMPTS[0], max_tokens=10, eos_ids=()).tokens) == 10
    assert len(generate_batch(model, PROMPTS, max_tokens=10)) == 3
    assert model.new_cache(2, 8).state(0).s.dtype == torch.float32


@pytest.mark.parametrize("tree", [False, True])
@pytest.mark.parametrize("width", [1, 4])
def test_the_loop_carries_drafts_and_does_not_know_which_cache_it_has(tree, width):
    """Chains and trees, rows that accept different numbers, rows that have finished."""
    config = dataclasses.replace(LINEAR, vocabulary=96)
    model = model_of(config)
    plain = generate_batch(model, PROMPTS, max_tokens=30, eos_ids=[47])
    answers = [generate(model, prompt, max_tokens=40, eos_ids=()).tokens for prompt in PROMPTS]
    requests = [Request(model, prompt, Sampling(), Limits(30, (), (47,))) for prompt in PROMPTS]
    for _ in begin(model, requests, help=Help(Oracle(answers, width, tree), greedy_accept)):
        pass
    assert [request.tokens for request in requests] == [answer.tokens for answer in plain]
    if width > 1:
        assert max(request.steps for request in requests) < 30


@torch.no_grad()
def test_the_memory_is_the_same_after_any_number_of_tokens():
    model, ids = model_of(), some_ids(2, 60)
    cache = model.new_cache(2, 100)
    assert isinstance(cache, StateCache)
    numbers = 2 * 2 * LINEAR.kv_heads * LINEAR.head_width * (LINEAR.head_width + 1)  # layers, rows
    assert cache.numbers == numbers
    for part in ids.split([1, 50, 9], 1):
        step = model(part, cache=cache).logits
        cache.commit()
        assert cache.numbers == numbers
    torch.testing.assert_close(step, model(ids).logits[:, -9:], rtol=0, atol=1e-10)


@torch.no_grad()
def test_going_back_is_exact():
    model, ids = model_of(), some_ids(2, 20)
    cache = model.new_cache(2, 40)
    model(ids[:, :9], cache=cache)
    cache.commit()
    here = cache.snapshot()
    first = model(ids[:, 9:], cache=cache).logits
    cache.commit()
    cache.restore(here)
    assert torch.equal(model(ids[:, 9:], cache=cache).logits, first)


@torch.no_grad()
def test_a_committed_path_equals_having_fed_only_that_path():
    """States after a path of a tree and after its tokens alone, row by row, ragged."""
    model, ids = model_of(), some_ids(2, 6)
    mask = torch.tensor([[True] * 6, [False] * 2 + [True] * 4])
    cache = model.new_cache(2, 40)
    model(ids, mask=mask, cache=cache)
    cache.commit()
    tree = torch.tensor([[1, 0, 0, 0], [1, 1, 0, 0], [1, 0, 1, 0], [1, 0, 1, 1]], dtype=torch.bool)
    drafted = torch.tensor([[7, 8, 9, 10], [11, 12, 13, 14]])
    model(drafted, mask=tree.expand(2, 4, 4), cache=cache)
    cache.commit(torch.tensor([[0, 2, 3], [0, 1, -1]]))
    for row, (prompt, path) in enumerate(((ids[:1], [7, 9, 10]), (ids[1:, 2:], [11, 12]))):
        alone = model.new_cache(1, 40)
        model(prompt, cache=alone)
        alone.commit()
        model(torch.tensor([path]), cache=alone)
        alone.commit()
        assert int(cache.lengths[row]) == int(alone.lengths[0])
        for layer in range(2):
            for ours, theirs in zip(cache.state(layer), alone.state(layer), strict=True):
                torch.testing.assert_close(ours[row], theirs[0], rtol=0, atol=1e-12)


def test_right_padding_and_packing_train_as_separate_texts_do():
    """Losses of a padded batch, and of a packed row, have the gradients of the texts alone."""
    ids, lengths = some_ids(1, 9)[0], (4, 5)
    parts = ids.split(lengths)

    def gradients(loss_of):
        model = model_of().train()
        loss_of(model).backward()
        return [parameter.grad for parameter in model.parameters()]

    def alone(model):
        return sum(model(part[None]).logits.logsumexp(-1).sum() for part in parts)

    def padded(model):
        rows = torch.zeros(2, 5, dtype=torch.long)
        mask = torch.arange(5) < torch.tensor(lengths)[:, None]
        rows[mask] = ids
        return model(rows, mask=mask).logits.logsumexp(-1)[mask].sum()

    owner = torch.tensor([[1] * 4 + [2] * 5])

    def packed(model):
        return model(ids[None], mask=owner).logits.logsumexp(-1).sum()

    def packed_by_a_mask_of_pairs(model):
        mask = (owner[:, :, None] == owner[:, None]).tril()
        return model(ids[None], mask=mask).logits.logsumexp(-1).sum()

    expected = gradients(alone)
    for other in (padded, packed, packed_by_a_mask_of_pairs):
        for ours, theirs in zip(gradients(other), expected, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)


def test_gradient_checkpointing_and_compiling_change_nothing():
    ids, found = some_ids(), []
    for recompute in (False, True):
        model = model_of().train()
        model.gradient_checkpointing = recompute
        model(ids).logits.square().mean().backward()
        found.append([parameter.grad for parameter in model.parameters()])
    assert all(torch.equal(plain, again) for plain, again in zip(*found, strict=True))
    torch.compiler.reset()
    model = model_of().eval()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(ids).logits, model(ids).logits, rtol=0, atol=1e-12)


@torch.no_grad()
def test_both_directions_and_autocast():
    model, ids = model_of(dataclasses.replace(LINEAR, causal=False)), some_ids(2, 7)
    changed = ids.clone()
    changed[:, -1] = (changed[:, -1] + 1) % 61
    assert not torch.allclose(model(ids).logits[:, 0], model(changed).logits[:, 0])
    mask = torch.ones(2, 7, dtype=torch.bool)
    mask[:, -1] = False
    hidden = model(ids, mask=mask).logits[:, 0]
    torch.testing.assert_close(hidden, model(ids[:, :-1]).logits[:, 0], rtol=0, atol=1e-12)
    single = model_of(dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = single(ids).logits
    torch.testing.assert_close(mixed.float(), single(ids).logits, rtol=0.1, atol=0.1)


@torch.no_grad()
def test_positions_far_out_are_as_exact_in_bf16_as_near_ones():
    """The features are turned in fp32 by angles taken in fp64, so bf16 weights do not know how far out they are."""
    half = model_of().to(torch.bfloat16)
    exact, ids = model_of().to(torch.bfloat16).double(), some_ids(2, 12)
    errors = []
    for start in (0, 1_000_000):
        at = torch.arange(start, start + 12)
        errors.append((half(ids, positions=at).logits.double() - exact(ids, positions=at).logits).abs().max())
    assert errors[1] <= 2 * errors[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_joined_projections_change_nothing(dtype):
    model, ids = model_of(dtype=dtype), some_ids()
    mask = torch.ones(2, 9, dtype=torch.bool)
    mask[1, :4] = False
    tolerance = {"rtol": 1e-5, "atol": 1e-5} if dtype is torch.float32 else {"rtol": 0.05, "atol": 0.05}
    found = []
    for fused in (False, True):
        assert fuse_projections(model) == 4 if fused else not model.model.straight
        cache, parts = model.new_cache(2, 12), []
        for part, real in zip(ids.split([6, 1, 2], 1), mask.split([6, 1, 2], 1), strict=True):
            parts.append(model(part, mask=real, cache=cache).logits)
            cache.commit()
        alone = model.new_cache(1, 12)
        single = model(ids[:1, :1], cache=alone).logits
        found.append([torch.cat(parts, 1)[mask], single, model(ids, mask=mask).logits[mask]])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(other, one, **tolerance)


def test_what_does_not_fit_is_named(tmp_path):
    with pytest.raises(ValueError, match="T5 adds to attention scores, and linear attention has none"):
        dataclasses.replace(LINEAR, position=c.T5())
    with pytest.raises(ValueError, match=r"no weights to drop, got dropout\.attention = 0\.1"):
        dataclasses.replace(LINEAR, dropout=c.Dropout(attention=0.1))
    with pytest.raises(VolvelleError, match="cannot hold this model: attention = LinearAttention"):
        write_folder(build(dataclasses.replace(LINEAR, family="llama")), tmp_path)
    model, plain, ids = model_of(), build(LLAMA).double(), some_ids()
    with pytest.raises(VolvelleError, match="does not decode with a KVCache"), torch.no_grad():
        model(ids, cache=KVCache.allocate(2, 2, 2, 16, 6, torch.float64))
    with pytest.raises(VolvelleError, match="does not decode with a StateCache"), torch.no_grad():
        plain(ids, cache=model.new_cache(2, 16))
    with pytest.raises(VolvelleError, match="no keys can come before a text"), torch.no_grad():
        model.states_of(model.model.embed_tokens(ids))
