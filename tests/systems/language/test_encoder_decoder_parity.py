"""The EncoderDecoder computes what transformers' BartForConditionalGeneration computes, on the same random weights."""

from __future__ import annotations

import pytest
import torch
from tests.systems.language.bart_peers import VARIANTS, as_ours, make_bart, padding, some_ids

from volvelle.data.pairs import collate_pairs
from volvelle.parts.attention.cache import KVCache
from volvelle.systems.language import encoder_decoder, encoder_decoder_blocks
from volvelle.train.language import completion_loss

pytest.importorskip("transformers")
pytestmark = pytest.mark.peer

TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-9}
DTYPES = [torch.float32, torch.float64]


def assert_close(ours, theirs, dtype, where=...):
    assert ours.dtype == theirs.dtype == dtype
    assert theirs.abs().max() > 0.1
    torch.testing.assert_close(ours[where], theirs[where], rtol=0, atol=TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", VARIANTS)
@torch.no_grad()
def test_logits_equal_the_peers(name, dtype):
    peer = make_bart(name, dtype)
    ours = as_ours(peer)
    for m, n in ((1, 1), (9, 4), (5, 64)):
        source, ids = some_ids(2, m), some_ids(2, n, seed=1)
        assert_close(ours(ids, source=source).logits, peer(source, decoder_input_ids=ids).logits, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_logits_equal_the_peers_with_padding(side, dtype):
    peer = make_bart(dtype=dtype)
    ours, source, ids = as_ours(peer), some_ids(4, 11), some_ids(4, 7, seed=1)
    source_mask, mask = padding(4, 11, side), padding(4, 7, "right")
    theirs = peer(
        source, attention_mask=source_mask.long(), decoder_input_ids=ids, decoder_attention_mask=mask.long()
    ).logits
    # transformers counts slots, which differ from real tokens where padding is on the left.
    read = ours.read(source, mask=source_mask, positions=torch.arange(11))
    assert_close(ours(ids, source=read, mask=mask).logits, theirs, dtype, mask)
    if side == "right":
        assert_close(ours(ids, source=source, source_mask=source_mask, mask=mask).logits, theirs, dtype, mask)


@pytest.mark.parametrize("dtype", DTYPES)
@torch.no_grad()
def test_the_loss_equals_the_peers(dtype):
    peer = make_bart(dtype=dtype)
    items = []
    for row, (m, n) in enumerate(((9, 5), (4, 8), (11, 1))):
        ids = torch.cat((some_ids(1, m, seed=row)[0], some_ids(1, n, seed=9 + row)[0]))
        items.append((ids, torch.arange(m + n) >= m))
    batch = collate_pairs(items, start=peer.config.decoder_start_token_id)
    labels = batch["targets"]
    theirs = peer(batch["source"], attention_mask=batch["source_mask"].long(), labels=labels).loss
    ours = completion_loss(as_ours(peer), batch)
    assert ours.weight == 5 + 8 + 1
    torch.testing.assert_close(ours.value, theirs, rtol=0, atol=1e-5 if dtype == torch.float32 else 1e-9)


def test_the_fused_loss_is_taken_only_where_nothing_is_added_to_the_logits():
    peer = make_bart(dtype=torch.float64)
    biased, plain = as_ours(peer), as_ours(peer)
    plain.final_logits_bias.zero_()
    assert not biased.plain_head
    assert plain.plain_head
    batch = collate_pairs([(some_ids(1, 9)[0], torch.arange(9) >= 4)], start=2)
    for model in (biased, plain):
        logits = model(batch["ids"], source=batch["source"]).logits
        expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch["targets"].flatten())
        torch.testing.assert_close(completion_loss(model, batch).value, expected, rtol=1e-9, atol=0)


@pytest.mark.parametrize("dtype", DTYPES)
@torch.no_grad()
def test_cache_gives_the_peers_logits_at_every_step(dtype):
    peer = make_bart("lopsided", dtype)
    ours, source, ids = as_ours(peer), some_ids(3, 10), some_ids(3, 12, seed=1)
    source_mask = padding(3, 10, "right")
    theirs = peer(source, attention_mask=source_mask.long(), decoder_input_ids=ids).logits
    cache, read = ours.new_cache(3, 12), ours.read(source, mask=source_mask, keep=True)
    for start, end in ((0, 1), (1, 2), (2, 7), (7, 8), (8, 12)):
        assert_close(ours(ids[:, start:end], source=read, cache=cache).logits, theirs[:, start:end], dtype)
        cache.commit()


@pytest.mark.parametrize("name", VARIANTS)
def test_gradients_equal_the_peers(name):
    peer = make_bart(name, torch.float64)
    ours, source, ids = as_ours(peer), some_ids(3, 9), some_ids(3, 6, seed=1)
    source_mask, mask = padding(3, 9, "right"), padding(3, 6, "right")
    weight = torch.randn(3, 6, 97, dtype=torch.float64, generator=torch.Generator().manual_seed(3)) * mask[..., None]
    (peer(source, attention_mask=source_mask.long(), decoder_input_ids=ids).logits * weight).sum().backward()
    (ours(ids, source=source, source_mask=source_mask, mask=mask).logits * weight).sum().backward()
    theirs = dict(peer.named_parameters())
    found = dict(ours.named_parameters())
    assert found.keys() == theirs.keys(), "the names are transformers' own"
    for key, parameter in found.items():
        torch.testing.assert_close(parameter.grad, theirs[key].grad, rtol=1e-9, atol=1e-9, msg=key)


@torch.no_grad()
def test_bf16_is_as_near_to_fp32_as_the_peers_bf16():
    peer, source, ids = make_bart(), some_ids(4, 33), some_ids(4, 20, seed=1)
    exact = peer(source, decoder_input_ids=ids).logits
    ours = as_ours(peer, torch.bfloat16)(ids, source=source).logits.float()
    theirs = peer.bfloat16()(source, decoder_input_ids=ids).logits.float()
    assert (ours - exact).square().mean() < 1.2 * (theirs - exact).square().mean()


def unscaled(patch):
    patch.setattr(encoder_decoder.Sides, "words", lambda self, ids: self.shared(ids))


def no_offset(patch):
    patch.setattr(encoder_decoder, "OFFSET", 0)


def unmasked_source(patch):
    patch.setattr(encoder_decoder, "Source", lambda states, mask, **_: encoder_decoder_blocks.Source(states, None))


def unmasked_encoder(patch):
    step = encoder_decoder.Step
    patch.setattr(encoder_decoder, "Step", lambda rotation, mask, *rest: step(rotation, None, *rest))


def sees_the_future(patch):
    plain = encoder_decoder_blocks.MultiHead.attend
    patch.setattr(
        encoder_decoder_blocks.MultiHead,
        "attend",
        lambda self, q, k, v, mask, causal: plain(self, q, k, v, mask, False),
    )


def no_bias(patch):
    patch.setattr(encoder_decoder.EncoderDecoder, "logits", lambda self, hidden: self.lm_head(hidden))


def norm_first(patch):
    def forward(self, x, step):
        return self.feed(self.added(x, self.self_attn(self.self_attn_layer_norm(x), step)))

    patch.setattr(encoder_decoder_blocks.EncoderBlock, "forward", forward)


def no_source(patch):
    patch.setattr(encoder_decoder_blocks.SourceAttention, "forward", lambda self, x, source: x * 0)


def keys_for_values(patch):
    plain = encoder_decoder_blocks.MultiHead.keys_values
    patch.setattr(encoder_decoder_blocks.MultiHead, "keys_values", lambda self, x: plain(self, x)[::-1])


@pytest.mark.parametrize(
    "mutate",
    [
        None, unscaled, no_offset, unmasked_source, unmasked_encoder, sees_the_future, no_bias, norm_first, no_source,
        keys_for_values,
    ],
)  # fmt: skip
@torch.no_grad()
def test_mutants_differ_from_the_peer(monkeypatch, mutate):
    peer, source, ids = make_bart("scaled"), some_ids(3, 9), some_ids(3, 6, seed=1)
    mask = padding(3, 9, "right")
    theirs = peer(source, attention_mask=mask.long(), decoder_input_ids=ids).logits
    ours = as_ours(peer)
    if mutate is None:
        assert_close(ours(ids, source=source, source_mask=mask).logits, theirs, torch.float32)
        return
    mutate(monkeypatch)
    found = ours(ids, source=source, source_mask=mask).logits
    assert (found - theirs).abs().max() > 1e-3


@torch.no_grad()
def test_a_cache_that_forgets_the_position_differs_from_the_peer(monkeypatch):
    peer, source, ids = make_bart(), some_ids(2, 9), some_ids(2, 4, seed=1)
    theirs, ours = peer(source, decoder_input_ids=ids).logits, as_ours(peer)
    monkeypatch.setattr(KVCache, "_positions", lambda self, n, tree: torch.arange(n)[None])
    cache = ours.new_cache(2, 4)
    for at in range(4):
        found = ours(ids[:, at : at + 1], source=source, cache=cache).logits
        cache.commit()
    assert (found - theirs[:, 3:]).abs().max() > 1e-3
