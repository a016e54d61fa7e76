"""Prefixes of an encoder-decoder: three kinds of attention, each against keys put there by hand; PEFT as the peer."""

from __future__ import annotations

import copy

import pytest
import torch
from tests.adapt.prefix_models import shake

from volvelle import adapt
from volvelle.adapt.prefix_methods import PrefixTuning, PromptTuning
from volvelle.errors import VolvelleError
from volvelle.systems.language.config import MLP, SpecialTokens
from volvelle.systems.language.encoder_decoder import EncoderDecoder
from volvelle.systems.language.encoder_decoder_config import EncoderDecoderConfig, Stack
from volvelle.systems.language.huggingface import read_folder

SOURCE = torch.arange(18).view(2, 9) * 7 % 40 + 3
REAL = torch.tensor([[True] * 9, [True] * 6 + [False] * 3])
IDS = torch.arange(10).view(2, 5) * 3 % 40 + 3
SITES = ("decoder", "cross", "encoder")


def build(dtype=torch.float64, **changes):
    torch.manual_seed(0)
    side = Stack(depth=2, heads=4, mlp=MLP(24, "gelu"))
    sizes = {"vocabulary": 47, "width": 16, "encoder": side, "decoder": Stack(3, 2, side.mlp), "context": 24}
    special = SpecialTokens(bos=0, eos=(2,), pad=1)
    model = EncoderDecoder(EncoderDecoderConfig("bart", **{**sizes, **changes}, start=2, special=special))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(8.0 if parameter.ndim > 1 else 1.0)
    return model.to(dtype).eval()


def tuned(sites=None, hidden=5, length=3, **options):
    model = build(**options)
    shake(adapt.apply(model, PrefixTuning(length, hidden=hidden, sites=sites)))
    return model


def logits(model, ids=IDS, source=SOURCE, **more):
    return model(ids, source=source, source_mask=REAL, **more).logits


@torch.no_grad()
@pytest.mark.parametrize("site", SITES)
def test_each_site_against_keys_put_there_by_hand(site):
    model, plain = tuned((site,)), build()
    states = model.before.at["default"].states(model, site)
    blocks = plain.model.encoder.layers if site == "encoder" else plain.model.decoder.layers
    for layer, block in enumerate(blocks):
        own = block.encoder_attn if site == "cross" else block.self_attn
        keys, values = (part.expand(2, -1, -1, -1) for part in states[layer])
        made, attend = own.keys_values, own.attend

        def more(x, made=made, keys=keys, values=values):
            k, v = made(x)
            return torch.cat((keys, k), 2), torch.cat((values, v), 2)

        def seen(q, k, v, mask, causal, attend=attend):
            n, m = q.shape[2], k.shape[2]
            allowed = torch.ones(1, 1, n, m - 3, dtype=torch.bool) if mask is None else mask
            allowed = allowed.tril() if causal else allowed
            return attend(q, k, v, torch.nn.functional.pad(allowed, (3, 0), value=True), False)

        own.keys_values, own.attend = more, seen
    positions = torch.arange(5) + (3 if site == "decoder" else 0)
    expected = logits(plain, positions=positions)
    torch.testing.assert_close(logits(model), expected, rtol=1e-10, atol=1e-10)
    assert not torch.allclose(expected, logits(build(), positions=positions))


def test_only_the_prefixes_are_trained_and_stored_apart():
    model = build()
    adapted = adapt.apply(model, PrefixTuning(3, hidden=5))
    shake(adapted, 0.01)
    logits(model).square().sum().backward()
    with_gradient = {key for key, p in model.named_parameters() if p.grad is not None and bool(p.grad.any())}
    assert with_gradient == set(adapted.trainable)
    assert len(with_gradient) == 3 * 5
    widths = {site: model.before.at["default"].states(model, site).shape for site in SITES}
    assert widths == {"decoder": (3, 2, 1, 2, 3, 8), "cross": (3, 2, 1, 2, 3, 8), "encoder": (2, 2, 1, 4, 3, 4)}


@pytest.mark.parametrize("sites", [None, ("cross",), ("decoder",)])
@torch.no_grad()
def test_cached_steps_equal_one_pass(sites):
    model = tuned(sites)
    expected = logits(model)
    source = model.read(SOURCE, mask=REAL, keep=True)
    cache = model.new_cache(2, 5)
    parts = []
    for part in IDS.split((2, 1, 2), 1):
        parts.append(model(part, source=source, cache=cache).logits)
        cache.commit()
    torch.testing.assert_close(torch.cat(parts, 1), expected, rtol=1e-10, atol=1e-10)
    beams = IDS.repeat_interleave(2, 0)
    shared = model(beams, source=source, cache=model.new_cache(4, 5)).logits
    torch.testing.assert_close(shared[::2], expected, rtol=1e-10, atol=1e-10)


def test_padded_sources_are_the_sources():
    model = tuned()
    alone = model(IDS[1:], source=SOURCE[1:, :6]).logits
    torch.testing.assert_close(logits(model)[1:], alone, rtol=1e-10, atol=1e-10)


def test_recomputed_layers_give_the_same_gradients():
    model = tuned()
    gradients = []
    for switch in (False, True):
        model.gradient_checkpointing = switch
        model.zero_grad()
        logits(model).square().sum().backward()
        gradients.append([p.grad.clone() for p in adapt.adapted(model).trainable.values()])
    for one, two in zip(*gradients, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-10, atol=1e-10)


def test_rows_of_different_prefixes():
    model = build()
    for key, method in {"a": PrefixTuning(4), "b": PrefixTuning(2, sites=("cross", "decoder"))}.items():
        shake(adapt.apply(model, method, name=key))
    for rows in (["a", "b"], ["b", None], [None, "a"]):
        expected = []
        for row, key in enumerate(rows):
            with adapt.using(model, key):
                one = slice(row, row + 1)
                expected.append(model(IDS[one], source=SOURCE[one], source_mask=REAL[one]).logits)
        with adapt.using(model, rows):
            torch.testing.assert_close(logits(model), torch.cat(expected), rtol=1e-10, atol=1e-10)


def test_training_begins_at_the_activations_of_words():
    model = build()
    words = torch.tensor([[3, 4, 5]])
    states = model.states_of(words)
    recorded = []
    handles = [
        block.self_attn.k_proj.register_forward_hook(lambda _, __, out: recorded.append(out))
        for side in (model.model.encoder, model.model.decoder)
        for block in side.layers
    ]
    model(words, source=words)
    for handle in handles:
        handle.remove()
    for layer in range(2):
        torch.testing.assert_close(states["encoder"][layer, 0].transpose(1, 2).flatten(2), recorded[layer])
    for layer in range(3):
        torch.testing.assert_close(states["decoder"][layer, 0].transpose(1, 2).flatten(2), recorded[2 + layer])
    adapt.apply(model, PrefixTuning(3, hidden=4), generator=torch.Generator().manual_seed(1))
    ids = torch.randint(47, (1, 3), generator=torch.Generator().manual_seed(1))
    expected = build().states_of(ids)
    for site in SITES:
        torch.testing.assert_close(model.before.at["default"].states(model, site), expected[site])


@pytest.mark.parametrize("sites", [None, ("cross",)])
def test_round_trip(tmp_path, sites):
    model = tuned(sites)
    adapt.save(model, tmp_path)
    other = build()
    adapt.load(other, tmp_path)
    assert torch.equal(logits(other), logits(model))
    twin = copy.deepcopy(other)
    adapt.remove(other)
    assert torch.equal(logits(other), logits(build()))
    assert torch.equal(logits(twin), logits(model))
    with pytest.raises(VolvelleError, match="another base model"):
        adapt.load(build(decoder=Stack(3, 4, MLP(24, "gelu")), width=24), tmp_path)


@pytest.mark.peer
@pytest.mark.parametrize("layers", [2, 3, 4])
@torch.no_grad()
def test_pefts_files_mean_what_they_mean_there(tmp_path, layers):
    """PEFT's cross-attention prefixes are discarded, and layers of the table are shared: so they act there."""
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    config = transformers.BartConfig(
        vocab_size=47, d_model=16, encoder_layers=layers, decoder_layers=layers, encoder_attention_heads=4,
        decoder_attention_heads=4, encoder_ffn_dim=24, decoder_ffn_dim=24, max_position_embeddings=24, init_std=0.2,
    )  # fmt: skip
    torch.manual_seed(0)
    base = transformers.BartForConditionalGeneration(config).eval()
    base.save_pretrained(tmp_path / "base")
    theirs = peft.get_peft_model(base, peft.PrefixTuningConfig(task_type="SEQ_2_SEQ_LM", num_virtual_tokens=4)).eval()
    theirs.save_pretrained(tmp_path / "adapter")
    expected = theirs(input_ids=SOURCE, attention_mask=REAL.long(), decoder_input_ids=IDS).logits
    ours = read_folder(tmp_path / "base")
    adapt.load(ours, tmp_path / "adapter")
    torch.testing.assert_close(logits(ours), expected, rtol=1e-5, atol=1e-5)


def test_what_does_not_fit_is_named(tmp_path):
    with pytest.raises(VolvelleError, match="an encoder-decoder takes prefixes only"):
        adapt.apply(build(), PromptTuning(3))
    with pytest.raises(VolvelleError, match="24 positions leave no room for an answer"):
        adapt.apply(build(), PrefixTuning(24))
    model = tuned(length=20)
    with pytest.raises(VolvelleError, match="answer of 5 tokens: the model's context is 4"):
        logits(model)
