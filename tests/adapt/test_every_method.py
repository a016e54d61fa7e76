"""What holds for each method alike: nothing changes at step 0, only what is said is trained, files and copies hold."""

from __future__ import annotations

import copy

import pytest
import torch

from volvelle import adapt
from volvelle.adapt import Bottleneck, DoRA, Full, LoRA
from volvelle.errors import UsageError, VolvelleError
from volvelle.systems.language.config import MLP, GatedMLP, LanguageConfig, LayerNorm, Learned, RMSNorm, Rope
from volvelle.systems.language.decoder import Decoder

METHODS = {
    "lora": LoRA(rank=3, targets="all-linear", dropout=0.2),
    "rslora": LoRA(rank=4, rslora=True),
    "lora of embeddings": LoRA(rank=3, targets=("down_proj", "embed_tokens", "q_proj")),
    "dora": DoRA(rank=3, targets="all-linear", dropout=0.2),
    "dora of embeddings": DoRA(rank=3, targets=("embed_tokens",)),
    "houlsby": Bottleneck(reduction=4, dropout=0.2),
    "pfeiffer": Bottleneck(form="pfeiffer", width=5, activation="gelu"),
    "parallel": Bottleneck(form="parallel", scale=4.0, layers=(1,)),
    "full": Full(),
}
ADDED = [name for name in METHODS if name != "full"]


def config(family):
    if family == "llama":
        parts = {"norm": RMSNorm(), "mlp": GatedMLP(48), "position": Rope(), "kv_heads": 2}
    else:
        parts = {"norm": LayerNorm(), "mlp": MLP(48), "position": Learned(), "kv_heads": 4}
    return LanguageConfig(family, vocabulary=60, width=32, depth=2, heads=4, context=64, **parts)


@pytest.fixture(params=["llama", "gpt2"])
def model(request):
    torch.manual_seed(0)
    return Decoder(config(request.param)).eval()


IDS = torch.randint(60, (3, 9), generator=torch.Generator().manual_seed(3))


def scramble(adapted):
    torch.manual_seed(5)
    with torch.no_grad():
        for parameter in adapted.trainable.values():
            parameter += 0.2 * torch.randn_like(parameter)


def loss(model, ids=IDS):
    return model(ids).logits.float().log_softmax(-1)[..., 7].mean()


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("training", [False, True])
def test_step_zero_is_the_base_bit_for_bit(model, name, dtype, training):
    model = model.to(dtype).train(training)
    before = model(IDS).logits
    adapt.apply(model, METHODS[name])
    assert torch.equal(model(IDS).logits, before)


@pytest.mark.parametrize("name", METHODS)
def test_only_what_is_stated_trains_and_has_optimiser_state(model, name):
    adapted = adapt.apply(model.train(), METHODS[name])
    scramble(adapted)
    before = {key: p.detach().clone() for key, p in model.named_parameters()}
    asking = {key for key, p in model.named_parameters() if p.requires_grad}
    assert asking == set(adapted.trainable)
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1)
    loss(model).backward()
    optimiser.step()
    with_gradient = {key for key, p in model.named_parameters() if p.grad is not None}
    moved = {key for key, p in model.named_parameters() if not torch.equal(p, before[key])}
    stated = {key for key, p in model.named_parameters() if p in optimiser.state}
    assert with_gradient == moved == stated == asking
    assert (len(asking) == len(before)) == (name == "full")
    assert f"{METHODS[name].label}: trains" in str(adapted)


@pytest.mark.parametrize("name", ADDED)
def test_taking_it_out_leaves_no_trace(model, name):
    flags = [p.requires_grad_(i % 3 > 0).requires_grad for i, p in enumerate(model.parameters())]
    graph = [(path, type(m)) for path, m in model.named_modules()]
    state, before = copy.deepcopy(model.state_dict()), model(IDS).logits
    scramble(adapt.apply(model, METHODS[name]))
    assert not torch.allclose(model(IDS).logits, before, atol=1e-4)
    with adapt.disabled(model):
        assert torch.equal(model(IDS).logits, before)
    assert set(state) < set(model.state_dict()), "the base's own names stay"
    adapt.remove(model)
    assert [(path, type(m)) for path, m in model.named_modules()] == graph
    assert [p.requires_grad for p in model.parameters()] == flags
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert torch.equal(model(IDS).logits, before)


def test_full_fine_tuning_has_nothing_to_take_out(model, tmp_path):
    adapt.apply(model, Full())
    with pytest.raises(VolvelleError, match="full fine-tuning changed the weights themselves"):
        adapt.remove(model)
    with pytest.raises(VolvelleError, match="full fine-tuning changed the weights themselves"), adapt.disabled(model):
        pass
    with pytest.raises(VolvelleError, match="save: full fine-tuning has no adapter file"):
        adapt.save(model, tmp_path)
    with pytest.raises(VolvelleError, match="full fine-tuning stands alone"):
        adapt.apply(model, LoRA(), name="more")
    assert adapt.adapted(adapt.merge(model, keep=False)) is None


@pytest.mark.parametrize("name", ADDED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_files_round_trip_bit_for_bit(model, name, dtype, tmp_path):
    fresh = copy.deepcopy(model).to(dtype)
    scramble(adapt.apply(model.to(dtype), METHODS[name]))
    adapt.save(model, tmp_path, base="org/base")
    adapted = adapt.load(fresh, tmp_path)
    assert torch.equal(fresh(IDS).logits, model(IDS).logits) or (
        # GPT-2's files hold q, k and v as one layer, and what is joined there is parted again.
        model.config.family == "gpt2" and (fresh(IDS).logits - model(IDS).logits).abs().max() < 0.05
    )
    if model.config.family == "llama":
        assert adapted.method == METHODS[name]
        for (key, ours), (also, theirs) in zip(model.named_parameters(), fresh.named_parameters(), strict=True):
            assert key == also
            assert torch.equal(ours, theirs)


@pytest.mark.parametrize("name", [name for name in ADDED if name not in {"houlsby", "pfeiffer", "parallel"}])
def test_a_merged_model_has_the_bases_graph_and_file_layout(model, name):
    if "embeddings" in name and model.config.head.tied:
        model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    graph, state = [(path, type(m)) for path, m in model.named_modules()], model.state_dict()
    layout = {key: (value.shape, value.dtype) for key, value in state.items()}
    scramble(adapt.apply(model, METHODS[name]))
    tuned = model(IDS).logits
    adapt.merge(model, keep=False)
    assert [(path, type(m)) for path, m in model.named_modules()] == graph
    assert {key: (value.shape, value.dtype) for key, value in model.state_dict().items()} == layout
    torch.testing.assert_close(model(IDS).logits, tuned, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ADDED)
def test_gradients_of_each_method_in_double(name):
    """Through the whole model; DoRA's norm is a constant, so its factors are moved by nothing else but themselves."""
    torch.manual_seed(0)
    model = Decoder(config("llama")).double().eval()
    adapted = adapt.apply(model, METHODS[name])
    scramble(adapted)
    if isinstance(METHODS[name], DoRA):
        for layer in adapt.model.record_of(model).adapters["default"].layers.values():
            fixed = layer.update.norm(layer.layer)
            layer.update.norm = lambda _, fixed=fixed: fixed
    names = list(adapted.trainable)[:: max(1, len(adapted.trainable) // 6)]
    ids = IDS[:2, :4]

    def run(*values):
        return torch.func.functional_call(model, dict(zip(names, values, strict=True)), (ids,)).logits[:, -1, :5]

    values = [adapted.trainable[key].detach().requires_grad_() for key in names]
    assert torch.autograd.gradcheck(run, values, fast_mode=True)


@pytest.mark.parametrize("name", METHODS)
def test_checkpointing_and_autocast_give_the_same_gradients(model, name):
    adapted = adapt.apply(model, METHODS[name])
    scramble(adapted)

    def gradients(checkpointing, autocast=False):
        model.gradient_checkpointing = checkpointing
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss(model).backward()
        return torch.cat([p.grad.flatten() for p in adapted.trainable.values()])

    for autocast in (False, True):
        plain = gradients(False, autocast)
        assert plain.isfinite().all()
        assert plain.norm() > 0
        assert torch.equal(gradients(True, autocast), plain)


@pytest.mark.parametrize(
    "name", [name if name in {"lora", "parallel"} else pytest.param(name, marks=pytest.mark.slow) for name in ADDED]
)
def test_compiles_to_the_same_result(name):
    torch.compiler.reset()
    torch.manual_seed(0)
    model = Decoder(config("llama")).eval()
    scramble(adapt.apply(model, METHODS[name]))
    with torch.no_grad():
        compiled = torch.compile(model, backend="eager", fullgraph=True)
        torch.testing.assert_close(compiled(IDS).logits, model(IDS).logits)
        with adapt.disabled(model):
            torch.testing.assert_close(compiled(IDS).logits, model(IDS).logits)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"width": 0}, "Houlsby adapters: width must be at least 1, got 0"),
        ({"reduction": 0}, "reduction must be at least 1"),
        ({"dropout": 1.0}, r"dropout must be in \[0, 1\)"),
        ({"targets": ()}, "targets is empty"),
    ],
)
def test_options_are_checked(options, message):
    with pytest.raises(UsageError, match=message):
        Bottleneck(**options)
    with pytest.raises(UsageError, match="DoRA: rank must be at least 1"):
        DoRA(rank=0)
