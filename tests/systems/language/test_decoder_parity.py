"""The Decoder computes what transformers computes, on the same random weights, for every family it covers."""

from __future__ import annotations

import pytest
import torch
from tests.systems.language.peer_models import CAUSAL, PEERS, VOCABULARY, as_ours, make_peer, peer_logits

from volvelle.systems.language.key_maps import KEY_MAPS
from volvelle.systems.language.projections import fuse_projections

pytest.importorskip("transformers")
pytestmark = pytest.mark.peer

TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-9}
DTYPES = [torch.float32, torch.float64]


def some_ids(batch: int, length: int) -> torch.Tensor:
    return torch.randint(3, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(length))


def padding(batch: int, length: int, side: str) -> torch.Tensor:
    """True = real: rows of different lengths, padded on one side; the first row is whole."""
    lengths = torch.tensor([max(1, length - (3 * row) % length) for row in range(batch)])
    slots = torch.arange(length)
    return slots < lengths[:, None] if side == "right" else slots >= length - lengths[:, None]


def assert_close(ours, theirs, dtype, where=...):
    assert ours.dtype == theirs.dtype == dtype
    assert theirs.abs().max() > 0.1
    torch.testing.assert_close(ours[where], theirs[where], rtol=0, atol=TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", PEERS)
@torch.no_grad()
def test_logits_equal_the_peers(name, dtype):
    peer = make_peer(name, dtype)
    ours = as_ours(peer)
    for length in (1, 7, 513):
        ids = some_ids(2, length)
        assert_close(ours(ids).logits, peer_logits(peer, ids, torch.ones_like(ids)), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", PEERS)
@torch.no_grad()
def test_logits_equal_the_peers_with_padding(name, side, dtype):
    peer = make_peer(name, dtype)
    ours, ids, mask = as_ours(peer), some_ids(3, 11), padding(3, 11, side)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    theirs = peer_logits(peer, ids, mask, positions)
    # A turned value depends on absolute slots, which is what RoFormer counts.
    given = torch.arange(11) if name == "roformer-value" else None
    assert_close(ours(ids, mask=mask, positions=given).logits, theirs, dtype, mask)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("side", [None, "left"])
@pytest.mark.parametrize("name", CAUSAL)
@torch.no_grad()
def test_cache_gives_the_peers_logits_at_every_step(name, side, dtype):
    peer = make_peer(name, dtype)
    ours = as_ours(peer)
    fuse_projections(ours)
    batch, prompt, total = 3, 7, 12
    ids = some_ids(batch, total)
    mask = torch.ones(batch, total, dtype=torch.bool)
    if side == "left":
        mask[:, :prompt] = padding(batch, prompt, "left")
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    theirs = peer_logits(peer, ids, mask, positions)
    slots = torch.arange(total) if name == "roformer-value" else positions
    cache = ours.new_cache(batch, total)
    steps = [(0, prompt), *((at, at + 1) for at in range(prompt, total - 2)), (total - 2, total)]
    for start, end in steps:
        out = ours(
            ids[:, start:end],
            mask=mask[:, start:end] if start == 0 and side else None,
            positions=slots[..., start:end] if name == "roformer-value" else None,
            cache=cache,
        )
        cache.commit()
        assert_close(out.logits, theirs[:, start:end], dtype, mask[:, start:end])


@pytest.mark.parametrize("name", ["llama", "roformer-causal"])
@torch.no_grad()
def test_cache_gives_the_peers_logits_after_a_long_prompt(name):
    peer = make_peer(name)
    ours, ids = as_ours(peer), some_ids(2, 515)
    theirs = peer_logits(peer, ids, torch.ones_like(ids))
    cache = ours.new_cache(2, 515)
    for start, end in ((0, 513), (513, 514), (514, 515)):
        assert_close(ours(ids[:, start:end], cache=cache).logits, theirs[:, start:end], torch.float32)
        cache.commit()


@pytest.mark.parametrize("name", PEERS)
def test_gradients_equal_the_peers(name):
    peer = make_peer(name, torch.float64)
    ours, ids = as_ours(peer), some_ids(2, 9)
    mask = padding(2, 9, "right")
    weight = torch.randn(2, 9, VOCABULARY, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    weight = weight * mask[..., None]
    (peer_logits(peer, ids, mask) * weight).sum().backward()
    (ours(ids, mask=mask).logits * weight).sum().backward()
    gradients = {key: parameter.grad for key, parameter in ours.named_parameters()}
    theirs = dict(peer.named_parameters())
    bindings = KEY_MAPS[ours.config.family].bind({key: tuple(grad.shape) for key, grad in gradients.items()})
    for binding in bindings:
        expected = theirs[binding.theirs].grad
        torch.testing.assert_close(binding.join(gradients), expected, rtol=1e-9, atol=1e-9, msg=binding.theirs)


@pytest.mark.parametrize(
    "scaling",
    [
        {"rope_type": "linear", "factor": 4.0},
        {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
        {"rope_type": "yarn", "factor": 4.0, "beta_fast": 16.0},
        {"rope_type": "dynamic", "factor": 2.0},
        {"rope_type": "longrope", "factor": 8.0, "short_factor": [1.0] * 6, "long_factor": [1.5, 2, 3, 4, 5, 6]},
    ],
    ids=lambda scaling: scaling["rope_type"],
)
@torch.no_grad()
def test_rope_scalings_equal_the_peers(scaling):
    if scaling["rope_type"] in {"llama3", "yarn", "longrope"}:
        scaling = scaling | {"original_max_position_embeddings": 32}
    peer = make_peer("llama", rope_parameters={"rope_theta": 1e4, **scaling}, max_position_embeddings=64)
    ours = as_ours(peer)
    for length in (20, 100):
        ids = some_ids(2, length)
        assert_close(ours(ids).logits, peer_logits(peer, ids, torch.ones_like(ids)), torch.float32)


@torch.no_grad()
def test_token_types_equal_the_peers():
    peer = make_peer("roformer-masked")
    ours, ids = as_ours(peer), some_ids(2, 6)
    segments = torch.tensor([[0, 0, 1, 1, 1, 1], [0, 1, 1, 0, 0, 1]])
    theirs = peer(ids, attention_mask=torch.ones_like(ids), token_type_ids=segments).logits
    assert_close(ours(ids, segments=segments).logits, theirs, torch.float32)


@torch.no_grad()
def test_bf16_is_as_near_to_fp32_as_the_peers_bf16():
    peer, ids = make_peer("smollm2"), some_ids(2, 33)
    mask = torch.ones_like(ids)
    exact = peer_logits(peer, ids, mask)
    ours = as_ours(peer, torch.bfloat16)
    theirs = (peer_logits(peer.bfloat16(), ids, mask).float() - exact).square().mean()
    assert (ours(ids).logits.float() - exact).square().mean() < 1.2 * theirs


@torch.no_grad()
def test_greedy_tokens_equal_the_peers():
    peer, ids = make_peer("smollm2"), some_ids(1, 5)
    theirs = peer.generate(ids, max_new_tokens=40, do_sample=False, eos_token_id=None)
    ours, cache, tokens = as_ours(peer), None, ids
    fuse_projections(ours)
    cache = ours.new_cache(1, 45)
    while tokens.shape[1] < 45:
        out = ours(tokens[:, cache.length :], cache=cache)
        cache.commit()
        tokens = torch.cat((tokens, out.logits[:, -1:].argmax(-1)), dim=1)
    assert tokens.tolist() == theirs.tolist()
