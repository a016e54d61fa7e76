"""Prefix and prompt tuning on our decoders: what comes before a text acts as keys before it, however it is run."""

from __future__ import annotations

import copy

import pytest
import torch
from tests.adapt.prefix_models import POSITIONS, decoder, shake

from volvelle import adapt
from volvelle.adapt import LoRA
from volvelle.adapt.prefix import _words
from volvelle.adapt.prefix_methods import PrefixTuning, PromptTuning
from volvelle.decode import generate, generate_batch
from volvelle.errors import UsageError, VolvelleError
from volvelle.parts.attention.before import Before
from volvelle.systems.language import config as c
from volvelle.systems.language.decoder import Decoder
from volvelle.systems.language.projections import fuse_projections

IDS = torch.arange(14).view(2, 7) * 5 % 37
METHODS = (PrefixTuning(3, hidden=6), PrefixTuning(3, hidden=None, init="random"), PromptTuning(3))


def seeded(seed=5):
    return torch.Generator().manual_seed(seed)


def tuned(method=METHODS[0], position=POSITIONS[0], **options):
    model = decoder(position, **options)
    shake(adapt.apply(model, method, generator=seeded()))
    return model


def name(value):
    return type(value).__name__ if not isinstance(value, PrefixTuning) else f"prefix-{value.hidden}-{value.init}"


@pytest.mark.parametrize("position", POSITIONS, ids=name)
@pytest.mark.parametrize("method", [PrefixTuning(3, hidden=6), PromptTuning(3)], ids=name)
def test_training_begins_at_real_words_before_the_text(method, position):
    model = decoder(position)
    words = _words(model, method, seeded())
    expected = model(torch.cat((words.expand(2, -1), IDS), 1)).logits[:, 3:]
    adapt.apply(model, method, generator=seeded())
    torch.testing.assert_close(model(IDS).logits, expected, rtol=1e-9, atol=1e-9)


def _text_begins_at_zero(patch):
    begin = Before.begin
    patch.setattr(
        Before, "begin", lambda self, n, **kind: (s := begin(self, n, **kind))._replace(positions=s.positions - 3)
    )


def _hidden_from_the_text(patch):
    begin = Before.begin

    def mutant(self, n, **kind):
        step = begin(self, n, **kind)
        step.mask[..., :3] = False
        return step

    patch.setattr(Before, "begin", mutant)


def _keys_for_values(patch):
    append = Before.append
    patch.setattr(Before, "append", lambda self, layer, k, v: append(self, layer, v, k)[::-1])


def _of_the_layer_above(patch):
    append = Before.append
    patch.setattr(Before, "append", lambda self, layer, k, v: append(self, (layer + 1) % 2, k, v))


@pytest.mark.parametrize(
    "mutate", [None, _text_begins_at_zero, _hidden_from_the_text, _keys_for_values, _of_the_layer_above]
)
def test_mutants_are_caught(monkeypatch, mutate):
    method, model = PrefixTuning(3, hidden=6), decoder()
    words = _words(model, method, seeded())
    expected = model(torch.cat((words.expand(2, -1), IDS), 1)).logits[:, 3:]
    adapt.apply(model, method, generator=seeded())
    if mutate is not None:
        mutate(monkeypatch)
    assert torch.allclose(model(IDS).logits, expected, rtol=1e-4, atol=1e-4) == (mutate is None)


@pytest.mark.parametrize("method", METHODS, ids=name)
def test_only_the_preface_is_trained(method):
    model = decoder()
    adapted = adapt.apply(model, method)
    shake(adapted, 0.01)
    model(IDS).logits.square().sum().backward()
    with_gradient = {key for key, p in model.named_parameters() if p.grad is not None}
    parts = ["table"]
    if isinstance(method, PrefixTuning) and method.hidden:
        parts += ["first.weight", "first.bias", "second.weight", "second.bias"]
    assert with_gradient == set(adapted.trainable) == {f"before.at.default.{part}" for part in parts}
    assert all(bool(p.grad.any()) for p in adapted.trainable.values())


@pytest.mark.parametrize("position", POSITIONS, ids=name)
@pytest.mark.parametrize("method", METHODS, ids=name)
@torch.no_grad()
def test_cached_steps_equal_one_pass(method, position):
    model = tuned(method, position)
    expected = model(IDS).logits
    cache = model.new_cache(2, 7)
    parts = []
    for part in IDS.split((3, 1, 3), dim=1):
        parts.append(model(part, cache=cache).logits)
        cache.commit()
    torch.testing.assert_close(torch.cat(parts, 1), expected, rtol=1e-9, atol=1e-9)
    cache.reset()
    torch.testing.assert_close(model(IDS, cache=cache).logits, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("position", POSITIONS, ids=name)
@pytest.mark.parametrize("cached", [False, True])
@torch.no_grad()
def test_padding_changes_nothing(position, cached):
    model = tuned(position=position)
    left = torch.tensor([[False, False, True, True, True, True, True], [True] * 7])
    padded = torch.where(left, IDS, 9)
    for mask, ids in ((left, padded), (left.flip(1), padded.flip(1))):
        cache = model.new_cache(2, 7) if cached else None
        logits = model(ids, mask=mask, cache=cache).logits
        for row in range(2):
            alone = model(ids[row][mask[row]][None]).logits[0]
            torch.testing.assert_close(logits[row][mask[row]], alone, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("position", POSITIONS, ids=name)
@pytest.mark.parametrize("method", METHODS, ids=name)
def test_every_packed_segment_sees_it(method, position):
    model = tuned(method, position)
    ids = torch.cat((IDS[0, :4], IDS[1, :3]))[None]
    owner = torch.tensor([0, 0, 0, 0, 1, 1, 1])
    mask = ((owner[:, None] == owner) & torch.ones(7, 7, dtype=torch.bool).tril())[None]
    positions = torch.tensor([[0, 1, 2, 3, 0, 1, 2]])
    logits = model(ids, mask=mask, positions=positions).logits[0]
    expected = torch.cat([model(IDS[:1, :4]).logits[0], model(IDS[1:, :3]).logits[0]])
    torch.testing.assert_close(logits, expected, rtol=1e-9, atol=1e-9)
    numbered = model(ids, mask=owner[None]).logits[0]
    torch.testing.assert_close(numbered, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("method", METHODS, ids=name)
@torch.no_grad()
def test_a_token_tree_sees_it_and_an_accepted_path_stays(method):
    model = tuned(method)
    cache = model.new_cache(2, 12)
    model(IDS[:, :3], cache=cache)
    cache.commit()
    tree = torch.tensor([[1, 0, 0, 0], [1, 1, 0, 0], [1, 0, 1, 0], [1, 0, 1, 1]], dtype=torch.bool)
    logits = model(IDS[:, 3:], mask=tree.expand(2, -1, -1), cache=cache).logits
    for path in ([0, 1], [0, 2, 3]):
        alone = model(torch.cat((IDS[:, :3], IDS[:, 3:][:, path]), 1)).logits[:, 3:]
        torch.testing.assert_close(logits[:, path], alone, rtol=1e-9, atol=1e-9)
    cache.commit(torch.tensor([[0, 2, 3], [0, 1, -1]]))
    after = model(IDS[:, :1], cache=cache).logits[:, 0]
    kept = [torch.cat((IDS[0, :3], IDS[0, [3, 5, 6]], IDS[0, :1])), torch.cat((IDS[1, :3], IDS[1, 3:5], IDS[1, :1]))]
    expected = torch.stack([model(row[None]).logits[0, -1] for row in kept])
    torch.testing.assert_close(after, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("method", METHODS, ids=name)
@pytest.mark.parametrize("position", [POSITIONS[0], c.T5(8, 16)], ids=name)
def test_recomputed_layers_give_the_same_gradients(method, position):
    model = tuned(method, position)
    gradients = []
    for switch in (False, True):
        model.gradient_checkpointing = switch
        model.zero_grad()
        model(IDS).logits.square().sum().backward()
        gradients.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    assert len(gradients[0]) >= 1
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("method", METHODS, ids=name)
def test_gradients_in_double(method):
    model = tuned(method, depth=2)
    adapted = adapt.adapted(model)
    names = list(adapted.trainable)

    def loss(*values):
        return torch.func.functional_call(model, dict(zip(names, values, strict=True)), (IDS[:, :3],)).logits[..., :3]

    assert torch.autograd.gradcheck(loss, tuple(adapted.trainable.values()), fast_mode=True)


@torch.no_grad()
def test_greedy_answers_are_those_of_whole_passes():
    model = tuned()
    prompts = [IDS[0, :5].tolist(), IDS[1, :2].tolist(), IDS[1, :7].tolist()]
    answers = []
    for prompt in prompts:
        text = list(prompt)
        for _ in range(6):
            text.append(int(model(torch.tensor([text])).logits[0, -1].argmax()))
        answers.append(text[len(prompt) :])
    assert [generate(model, prompt, max_tokens=6).tokens for prompt in prompts] == answers
    assert [answer.tokens for answer in generate_batch(model, prompts, max_tokens=6)] == answers
    with adapt.disabled(model):
        assert [generate(model, prompt, max_tokens=6).tokens for prompt in prompts] != answers


@torch.no_grad()
def test_the_straight_path_sees_it():
    model = tuned()
    expected = model(IDS).logits
    assert fuse_projections(model) > 0
    torch.testing.assert_close(model(IDS).logits, expected, rtol=1e-9, atol=1e-9)
    assert model.model.straight is not None


def test_rows_of_different_adapters():
    model = decoder()
    methods = {"long": PrefixTuning(5, hidden=6), "short": PrefixTuning(2, hidden=None), "asked": PromptTuning(3)}
    for key, method in {**methods, "low": LoRA(rank=2)}.items():
        shake(adapt.apply(model, method, name=key))
    rows = ["short", "low", None, "long", "asked", "short"]
    ids = torch.cat((IDS, IDS.flip(1), IDS + 3)) % 37
    mask = torch.ones(6, 7, dtype=torch.bool)
    mask[[0, 3, 5], :2] = False
    expected = []
    for row, key in enumerate(rows):
        with adapt.using(model, key):
            expected.append(model(ids[row][mask[row]][None]).logits[0])
    with adapt.using(model, rows):
        logits = model(ids, mask=mask).logits
        cache = model.new_cache(6, 7)
        with torch.no_grad():
            cached = model(ids, mask=mask, cache=cache).logits
        explicit = model(ids, mask=mask, positions=(mask.cumsum(1) - 1).clamp(min=0)).logits
        with pytest.raises(VolvelleError, match="6 rows were named, but what comes before the text got a batch of 2"):
            model(IDS)
    for row in range(6):
        for ours in (logits, cached, explicit):
            torch.testing.assert_close(ours[row][mask[row]], expected[row], rtol=1e-9, atol=1e-9)


def test_it_leaves_no_trace():
    model = decoder()
    before, keys = model(IDS).logits, list(model.state_dict())
    adapted = adapt.apply(model, METHODS[0])
    shake(adapted)
    with adapt.disabled(model):
        assert torch.equal(model(IDS).logits, before)
    assert model.room == 29
    with pytest.raises(VolvelleError, match=r"merge: before\.at\.default: it adds keys and values before the text"):
        adapt.merge(model)
    adapt.remove(model)
    assert torch.equal(model(IDS).logits, before)
    assert list(model.state_dict()) == keys
    assert model.before is None
    assert all(p.requires_grad for p in model.parameters())
    assert model.room == 32


def test_a_copy_is_independent():
    model = tuned(PromptTuning(3))
    twin = copy.deepcopy(model)
    expected = model(IDS).logits
    with torch.no_grad():
        for parameter in adapt.adapted(twin).trainable.values():
            parameter.zero_()
    assert torch.equal(model(IDS).logits, expected)
    assert not torch.allclose(twin(IDS).logits, expected)
    with adapt.disabled(twin):
        assert not torch.equal(model(IDS).logits, twin(IDS).logits)
    assert torch.equal(model(IDS).logits, expected)


@pytest.mark.parametrize("method", METHODS, ids=name)
def test_half_precision_models_train_fp32(method):
    model = decoder(dtype=torch.bfloat16)
    adapted = adapt.apply(model, method)
    assert {p.dtype for p in adapted.trainable.values()} == {torch.float32}
    logits = model(IDS).logits
    assert logits.dtype == torch.bfloat16
    logits.float().square().sum().backward()
    assert all(p.grad is not None for p in adapted.trainable.values())
    with torch.no_grad():
        assert model(IDS, cache=model.new_cache(2, 7)).logits.dtype == torch.bfloat16


def test_what_is_stored_of_a_prefix_on_smollm2_is_below_half_a_percent():
    smollm2 = c.LanguageConfig(
        "llama", 49152, 576, 30, 9, 2048, kv_heads=3, norm=c.RMSNorm(), mlp=c.GatedMLP(1536), position=c.Rope()
    )
    with torch.device("meta"):
        model = Decoder(smollm2)
    base = sum(p.numel() for p in model.parameters())
    adapted = adapt.apply(model, PrefixTuning(init="random"))
    stored = model.before.at["default"].stored
    assert (stored, stored / base < 0.005) == (10 * 30 * 2 * 3 * 64, True)
    assert adapted.trainable_count == 10 * 192 + (192 + 1) * 512 + (512 + 1) * 11520


def test_words_come_from_a_text():
    class Tokenizer:
        def encode(self, text):
            return [len(word) for word in text.split()]

    model = decoder()
    model.tokenizer = Tokenizer()
    assert _words(model, PromptTuning(5, text="a bb ccc"), None).tolist() == [1, 2, 3, 1, 2]
    assert _words(model, PromptTuning(2, text="a bb ccc"), None).tolist() == [1, 2]
    adapt.apply(model, PromptTuning(5, text="a bb ccc"))
    table = model.before.at["default"].table
    assert torch.equal(table, model.model.embed_tokens.weight[[1, 2, 3, 1, 2]])


def test_what_does_not_fit_is_named():
    with pytest.raises(UsageError, match="prefix tuning: length must be at least 1, got 0"):
        PrefixTuning(0)
    with pytest.raises(UsageError, match="needs words in it and init=words"):
        PromptTuning(text="  ")
    with pytest.raises(UsageError, match="needs words in it and init=words"):
        PrefixTuning(text="so", init="random")
    with pytest.raises(VolvelleError, match="needs a model with a tokenizer"):
        adapt.apply(decoder(), PrefixTuning(text="so"))
    with pytest.raises(VolvelleError, match="32 positions leave no room in a context of 32"):
        adapt.apply(decoder(), PrefixTuning(32))
    with pytest.raises(VolvelleError, match="reads both ways"):
        adapt.apply(decoder(causal=False), PrefixTuning(3))
    with pytest.raises(VolvelleError, match="Complex positions need the words"):
        adapt.apply(decoder(c.Complex()), PromptTuning(3))
    with pytest.raises(VolvelleError, match="max_tokens=25 exceed the model's context of 29"):
        generate(tuned(), [1, 2, 3, 4, 5], max_tokens=25)
