"""Several adapters on one model: chosen for a call, mixed by the row, in training, decoding and files."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from volvelle import adapt
from volvelle.adapt import Bottleneck, DoRA, LoRA
from volvelle.decode import Sampling, generate, generate_batch
from volvelle.errors import VolvelleError
from volvelle.systems.language.config import GatedMLP, LanguageConfig, RMSNorm, Rope
from volvelle.systems.language.decoder import Decoder

CONFIG = LanguageConfig(
    "llama", vocabulary=60, width=32, depth=2, heads=4, context=64,
    norm=RMSNorm(), mlp=GatedMLP(48), position=Rope(), kv_heads=2,
)  # fmt: skip
METHODS = {
    "a": LoRA(rank=3),
    "b": LoRA(rank=5, alpha=4, targets=("q_proj", "down_proj")),
    "c": DoRA(rank=2, targets=("q_proj", "v_proj")),
    "d": Bottleneck(reduction=4),
    "e": LoRA(rank=2, targets=("embed_tokens", "v_proj")),
    "f": Bottleneck(form="parallel", width=3, scale=4.0),
}
ROWS = ["a", None, "c", "b", "d", "a", "e", "f"]
MIXES = {
    "all kinds": ROWS,
    "LoRA": ["a", "b", "e", None, "a", "b", "b", "e"],
    "8 in order": ["a", "b", "e", "a2", "b2", "e2", "a3", "b3"],
    "DoRA": ["c", "c2", None, "c2", "c", "c", "c2", "c2"],
    "one": ["b"] * 8,
}


def build(names=METHODS, dtype=torch.float64):
    torch.manual_seed(0)
    model = Decoder(CONFIG).to(dtype).eval()
    for name in names:
        adapted = adapt.apply(model, METHODS[name[0]], name=name)
        with torch.no_grad():
            for parameter in adapted.trainable.values():
                parameter += 0.2 * torch.randn_like(parameter)
    return model


IDS = torch.randint(60, (8, 9), generator=torch.Generator().manual_seed(3))


def alone(model, rows, ids=IDS):
    results = []
    for row, name in zip(ids, rows, strict=True):
        with adapt.using(model, name):
            results.append(model(row[None]).logits)
    return torch.cat(results)


@pytest.mark.parametrize("mix", MIXES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_mixed_batch_equals_one_by_one(mix, dtype):
    rows = MIXES[mix]
    model = build(sorted({name for name in rows if name}), dtype)
    expected = alone(model, rows)
    with adapt.using(model, rows):
        got = model(IDS).logits
    torch.testing.assert_close(got, expected, **({"rtol": 1e-4, "atol": 1e-5} if dtype is torch.float32 else {}))
    assert len({tuple(row[0, :3].tolist()) for row in expected}) == 8, "the rows must differ for this to mean anything"
    wrong = [*rows[1:], rows[0]]
    if mix != "one":
        with adapt.using(model, wrong):
            assert not torch.allclose(model(IDS).logits, expected, atol=1e-3)


@pytest.mark.parametrize("mix", MIXES)
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("autocast", [False, True])
def test_gradients_of_a_mixed_batch_are_the_rows_own(mix, checkpointing, autocast):
    rows = MIXES[mix]
    model = build(sorted({name for name in rows if name}), torch.float32 if autocast else torch.float64)
    model.gradient_checkpointing = checkpointing
    own = {name: p for name, p in model.named_parameters() if ".adapters." in name}
    for parameter in own.values():
        parameter.requires_grad_(True)

    def gradients(run):
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            run()
        return {name: None if p.grad is None else p.grad.clone() for name, p in own.items()}

    def mixed():
        with adapt.using(model, rows):
            model(IDS).logits.double().square().mean().backward()

    def one_by_one():
        for row, name in zip(IDS, rows, strict=True):
            if name is not None:
                with adapt.using(model, name):
                    (model(row[None]).logits.double().square().mean() / 8).backward()

    got, expected = gradients(mixed), gradients(one_by_one)
    assert all(gradient is not None for gradient in expected.values())
    if autocast:
        left, right = (torch.cat([g.flatten() for g in each.values()]) for each in (got, expected))
        assert (left - right).norm() < 0.05 * right.norm()
    else:
        for name, gradient in expected.items():
            torch.testing.assert_close(got[name], gradient)
    assert all(p.grad is None for name, p in model.named_parameters() if name not in own)


def test_a_mixed_batch_decodes_as_its_rows_do():
    """Ragged prompts, the KV cache, and rows that keep their adapter from step to step."""
    rows = ROWS
    model = build()
    prompts = [[int(i) for i in IDS[row, : 3 + row % 4]] for row in range(8)]
    options = {"sampling": Sampling(), "max_tokens": 12, "eos_ids": ()}
    with adapt.using(model, rows):
        together = [answer.tokens for answer in generate_batch(model, prompts, **options)]
    expected = []
    for prompt, name in zip(prompts, rows, strict=True):
        with adapt.using(model, name):
            expected.append(generate(model, prompt, **options).tokens)
    assert together == expected
    base = [answer.tokens for answer in generate_batch(adapt.remove(build()), prompts, **options)]
    assert sum(left != right for left, right in zip(together, base, strict=True)) >= 4
    assert together[1] == base[1]


def test_the_fast_path_of_the_base_never_hides_an_adapter():
    model = build(())
    generate(model, [1, 2, 3], max_tokens=2)
    assert model.model.straight is not None, "decoding prepares it"
    before = generate(model, [1, 2, 3], max_tokens=12, eos_ids=()).tokens
    adapted = adapt.apply(model, LoRA())
    with torch.no_grad():
        for parameter in adapted.trainable.values():
            parameter += torch.randn_like(parameter)
    assert generate(model, [1, 2, 3], max_tokens=12, eos_ids=()).tokens != before
    adapt.remove(model)
    assert generate(model, [1, 2, 3], max_tokens=12, eos_ids=()).tokens == before


def test_activate_chooses_and_trains_one():
    model = build("ab")
    for name in "ab":
        adapt.activate(model, name)
        assert {key for key, p in model.named_parameters() if p.requires_grad} == set(
            adapt.adapted(model, name).trainable
        )
        assert torch.equal(model(IDS[:1]).logits, alone(model, [name], IDS[:1]))
        model.zero_grad()
        model(IDS).logits.sum().backward()
        assert {key.split(".adapters.")[1][0] for key, p in model.named_parameters() if p.grad is not None} == {name}
    adapt.activate(model, None)
    assert torch.equal(model(IDS[:1]).logits, alone(model, [None], IDS[:1]))
    assert adapt.adapted(model, "a").name == "a"


def test_the_choice_ends_with_the_block_even_on_an_error():
    model = build("ab")
    before = model(IDS).logits
    with pytest.raises(RuntimeError), adapt.using(model, "a"):
        raise RuntimeError
    assert torch.equal(model(IDS).logits, before)
    with adapt.using(model, "a"):
        outer = model(IDS).logits
        with adapt.using(model, None):
            assert not torch.equal(model(IDS).logits, outer)
        assert torch.equal(model(IDS).logits, outer)


def test_one_is_removed_the_others_stay():
    model = build()
    base, b = alone(model, [None, "b"], IDS[:2])
    for name in "acdef":
        adapt.remove(model, name)
    assert torch.equal(alone(model, [None, "b"], IDS[:2])[1], b)
    assert {key.split(".adapters.")[1][0] for key, _ in model.named_parameters() if ".adapters." in key} == {"b"}
    adapt.remove(model)
    assert all(type(m).__name__.startswith("Adapted") is False for m in model.modules())
    assert torch.equal(model(IDS[:1]).logits[0], base)
    assert all(p.requires_grad for p in model.parameters())


def test_one_is_merged_and_the_others_add_to_it():
    model = build("ab")
    expected = alone(model, ["a"], IDS[:1])
    adapt.merge(model, name="a")
    torch.testing.assert_close(alone(model, [None], IDS[:1]), expected)
    with pytest.raises(VolvelleError, match="using: the adapter 'a' is merged"), adapt.using(model, "a"):
        pass
    with pytest.raises(VolvelleError, match="apply: the adapter 'a' is merged"):
        adapt.apply(model, LoRA(), name="z")
    adapt.merge(model, name="b")
    with pytest.raises(VolvelleError, match="remove: 'b' was merged later"):
        adapt.remove(model, "a")
    adapt.unmerge(adapt.unmerge(model))
    assert torch.equal(alone(model, ["a"], IDS[:1]), expected)


def test_what_cannot_be_is_named():
    model = build("ab")
    with (
        pytest.raises(VolvelleError, match="using: this model carries no adapter 'A'") as error,
        adapt.using(model, "A"),
    ):
        pass
    assert error.value.tip == "it carries a, b"
    with (
        adapt.using(model, ["a", "b"]),
        pytest.raises(VolvelleError, match=r"2 rows were named, but .* got a batch of 8"),
    ):
        model(IDS)
    for name in ("", "x.y", "keys"):
        with pytest.raises(VolvelleError, match="cannot be an adapter's name"):
            adapt.apply(model, LoRA(), name=name)
    with pytest.raises(VolvelleError, match="full fine-tuning stands alone"):
        adapt.apply(model, adapt.Full(), name="full")
    adapt.activate(model, None)
    with pytest.raises(VolvelleError, match="merge: which adapter"):
        adapt.merge(model)
    with pytest.raises(VolvelleError, match=r"merge: .*: what it adds is no linear function of a weight"):
        adapt.merge(build("d"))


def test_a_backward_pass_for_another_adapter_is_refused():
    model = build("ab")
    model.gradient_checkpointing = True
    for parameter in adapt.adapted(model, "a").trainable.values():
        parameter.requires_grad_(True)
    with adapt.using(model, "a"):
        loss = model(IDS).logits.sum()
    with pytest.raises(VolvelleError, match="recomputes a layer for 'a', but 'b' is chosen"):
        loss.backward()
    with adapt.using(model, "b"):
        model(IDS).logits.sum().backward()


def test_a_copy_has_a_switch_of_its_own():
    model = build("ab")
    twin = copy.deepcopy(model)
    with adapt.using(twin, "a"):
        assert torch.equal(model(IDS).logits, alone(model, ["b"] * 8)) or torch.allclose(
            model(IDS).logits, alone(model, ["b"] * 8)
        )
        assert not torch.allclose(twin(IDS).logits, model(IDS).logits)
    adapt.remove(twin)
    assert any(".adapters." in name for name, _ in model.named_parameters())


def test_adapters_do_not_target_each_other():
    model = build("ab")
    adapt.apply(model, LoRA(targets="all-linear"), name="q_proj")
    assert not any(name.count(".adapters.") > 1 for name, _ in model.named_parameters())
    adapt.apply(model, Bottleneck(), name="z")
    assert not any(name.count(".adapters.") > 1 for name, _ in model.named_parameters())


def test_files_hold_one_adapter_each(tmp_path):
    model = build()
    expected = alone(model, ["a", "b", "c", "d", "e", "f"], IDS[:6])
    for name in "abcdef":
        adapt.save(model, tmp_path / name, name=name)
    fresh = build(())
    for name in "fedcba":
        adapted = adapt.load(fresh, tmp_path / name, name=name)
        assert adapted.method.label == METHODS[name].label
    torch.testing.assert_close(alone(fresh, list("abcdef"), IDS[:6]), expected)


@pytest.mark.peer
def test_a_mixed_batch_on_a_transformers_model_equals_pefts(tiny_llama, tmp_path):
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    theirs = peft.get_peft_model(tiny_llama(), peft.LoraConfig(r=3, init_lora_weights=False), adapter_name="a")
    theirs.add_adapter("b", peft.LoraConfig(r=4, lora_alpha=3, target_modules=["k_proj"], init_lora_weights=False))
    theirs.save_pretrained(tmp_path)
    ours = tiny_llama()
    for name in "ab":
        adapt.load(ours, tmp_path / name, name=name)
    ids = IDS[:4]
    expected = theirs.eval()(ids, adapter_names=["b", "__base__", "a", "b"]).logits
    with adapt.using(ours, ["b", None, "a", "b"]):
        torch.testing.assert_close(ours.eval()(ids).logits, expected, rtol=1e-5, atol=1e-6)


def test_rows_of_a_convolution():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Conv2d(6, 4, 1)).double()
    for name, method in {"a": LoRA(rank=2, targets=("0",)), "b": DoRA(rank=3, targets=("0", "2"))}.items():
        for parameter in adapt.apply(model, method, name=name).trainable.values():
            nn.init.normal_(parameter)
    x, rows = torch.randn(4, 3, 5, 6, dtype=torch.float64), ["b", "a", None, "b"]
    with adapt.using(model, rows):
        got = model(x)
    for i, name in enumerate(rows):
        with adapt.using(model, name):
            torch.testing.assert_close(got[i : i + 1], model(x[i : i + 1]))
