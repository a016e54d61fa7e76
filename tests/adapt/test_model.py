"""apply, merge, unmerge, remove on a plain network: what changes, what must not."""

from __future__ import annotations

import copy
import subprocess
import sys

import pytest
import torch
from torch import nn

from volvelle import adapt
from volvelle.adapt import DoRA, LoRA
from volvelle.adapt.targets import select
from volvelle.errors import UsageError, VolvelleError


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.q_proj = nn.Linear(8, 8)
        self.v_proj = nn.Linear(8, 6, bias=False)
        self.out = nn.Linear(6, 8)
        self.act = nn.GELU()

    def forward(self, x):
        return x + self.act(self.out(self.v_proj(x))) + self.q_proj(x)


class Net(nn.Module):
    def __init__(self, blocks=3):
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.layers = nn.ModuleList(Block() for _ in range(blocks))
        self.lm_head = nn.Linear(8, 11, bias=False)

    def forward(self, ids):
        x = self.embed(ids)
        for layer in self.layers:
            x = layer(x)
        return self.lm_head(x)


def random_b(model):
    torch.manual_seed(3)
    for name, parameter in model.named_parameters():
        if name.endswith(".b"):
            nn.init.normal_(parameter, std=0.3)


def graph(model):
    return [(name, type(module)) for name, module in model.named_modules()]


@pytest.fixture
def net():
    torch.manual_seed(0)
    return Net()


X = torch.arange(10).view(2, 5)


def test_step_zero_is_bitwise_the_base(net):
    before = net(X)
    adapt.apply(net, LoRA())
    assert torch.equal(net(X), before)


def test_only_the_adapter_receives_gradients(net):
    adapted = adapt.apply(net, LoRA(rank=2))
    net(X).square().sum().backward()
    with_gradient = {name for name, parameter in net.named_parameters() if parameter.grad is not None}
    assert with_gradient == set(adapted.trainable)
    own = {f"layers.{i}.{m}_proj.adapters.default.{p}" for i in range(3) for m in "qv" for p in "ab"}
    assert with_gradient == own
    assert adapted.trainable_count == 3 * (2 * (8 + 8) + 2 * (8 + 6))
    assert "LoRA: trains 180 of" in str(adapted)


def test_merge_unmerge_remove(net):
    base_graph, base_state, base_out = graph(net), copy.deepcopy(net.state_dict()), net(X)
    flags = {name: parameter.requires_grad for name, parameter in net.named_parameters()}
    adapt.apply(net, LoRA(rank=3))
    random_b(net)
    tuned = net(X)
    assert not torch.allclose(tuned, base_out)
    adapt.merge(net)
    assert graph(net) == base_graph
    assert list(net.state_dict()) == list(base_state)
    torch.testing.assert_close(net(X), tuned, rtol=1e-5, atol=1e-5)
    adapt.unmerge(net)
    assert torch.equal(net(X), tuned)
    for name, value in base_state.items():
        assert torch.equal(net.state_dict()[name], value)
    adapt.merge(net)
    adapt.remove(net)
    assert graph(net) == base_graph
    assert torch.equal(net(X), base_out)
    assert {name: parameter.requires_grad for name, parameter in net.named_parameters()} == flags


def test_merge_without_keeping(net):
    adapt.apply(net, LoRA(rank=3))
    random_b(net)
    tuned = net(X)
    assert adapt.merge(net, keep=False) is net
    torch.testing.assert_close(net(X), tuned, rtol=1e-5, atol=1e-5)
    assert all(parameter.requires_grad for parameter in net.parameters())
    with pytest.raises(VolvelleError, match="unmerge: this model carries no adapter"):
        adapt.unmerge(net)
    adapt.apply(net, LoRA())


def test_merging_keeps_the_weights_a_deep_copy_has(net):
    adapt.apply(net, LoRA(rank=3))
    random_b(net)
    tuned, other = net(X), copy.deepcopy(net)
    adapt.merge(other)
    torch.testing.assert_close(other(X), tuned, rtol=1e-5, atol=1e-5)
    assert torch.equal(net(X), tuned), "merging the copy must not touch the original"


def test_disabled_is_the_base(net):
    before = net(X)
    adapt.apply(net, LoRA())
    random_b(net)
    with adapt.disabled(net):
        assert torch.equal(net(X), before)
    assert not torch.equal(net(X), before)


@pytest.mark.parametrize("method", [LoRA(rank=3), DoRA(rank=3)])
def test_a_merge_without_originals_is_undone_to_rounding(net, method):
    before = {name: value.clone() for name, value in net.state_dict().items()}
    adapt.apply(net, method)
    random_b(net)
    tuned = net(X)
    adapt.merge(net, originals=False)
    assert not torch.equal(net.layers[0].q_proj.weight, before["layers.0.q_proj.weight"])
    adapt.unmerge(net)
    torch.testing.assert_close(net(X), tuned, rtol=1e-5, atol=1e-5)
    largest = max(value.abs().max() for value in before.values())
    for name, value in before.items():
        torch.testing.assert_close(net.state_dict()[name], value, rtol=0, atol=4 * 2**-23 * float(largest))


def test_merging_twice_over_leaves_no_trace(net):
    """Any number of merges and unmerges with originals gives the very tensors back."""
    adapt.apply(net, DoRA(rank=3))
    random_b(net)
    weights, tuned = [id(p) for p in net.parameters()], net(X)
    for _ in range(3):
        adapt.unmerge(adapt.merge(net))
    assert [id(p) for p in net.parameters()] == weights
    assert torch.equal(net(X), tuned)


def test_a_forward_that_others_put_on_a_layer_stays_below_the_adapter(net):
    """As accelerate does to move inputs between devices; it would else hide the adapter."""
    layer, seen = net.layers[0].q_proj, []
    inner = layer.forward
    layer.forward = lambda x: (seen.append(1), inner(x))[1]
    before = net(X)
    adapt.apply(net, LoRA(rank=3))
    random_b(net)
    assert not torch.allclose(net(X), before)
    adapt.merge(net)
    adapt.unmerge(net)
    adapt.remove(net)
    assert torch.equal(net(X), before)
    assert len(seen) == 3
    assert "forward" in vars(layer)


def test_an_adapted_model_survives_pickle(net):
    import pickle

    adapt.apply(net, LoRA(rank=2))
    random_b(net)
    again = pickle.loads(pickle.dumps(net))
    assert torch.equal(again(X), net(X))
    with adapt.disabled(again):
        assert not torch.equal(again(X), net(X))
    assert type(adapt.remove(again).layers[0].q_proj) is nn.Linear


def test_a_shared_weight_is_not_merged_silently(net):
    net.lm_head.weight = net.embed.weight
    adapt.apply(net, LoRA(targets=("lm_head",)))
    with pytest.raises(VolvelleError, match=r"merge: lm_head: its weight is shared with embed.weight"):
        adapt.merge(net)


def test_unmerge_after_a_move_to_another_dtype(net):
    adapt.apply(net.double(), LoRA(rank=2))
    random_b(net)
    adapt.merge(net)
    adapt.unmerge(net.train())
    assert net.layers[0].q_proj.training


def test_a_generator_seeds_the_parameters(net):
    twin = copy.deepcopy(net)
    adapt.apply(net, LoRA(), generator=torch.Generator().manual_seed(5))
    adapt.apply(twin, LoRA(), generator=torch.Generator().manual_seed(5))
    for ours, theirs in zip(net.parameters(), twin.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_patterns_layers_exclude_and_regular_expressions(net):
    method = LoRA(
        rank=4, targets=r".*\.(q|v)_proj", layers=(0, 2), exclude=("layers.2.v_proj",),
        rank_pattern={r"0\.q_proj": 2}, alpha_pattern={"v_proj": 3.0},
    )  # fmt: skip
    adapt.apply(net, method)
    layers = {name: module for name, module in net.named_modules() if hasattr(module, "scale")}
    assert [name.removesuffix(".adapters.default") for name in layers] == [
        "layers.0.q_proj", "layers.0.v_proj", "layers.2.q_proj"
    ]  # fmt: skip
    assert [layer.rank for layer in layers.values()] == [2, 4, 4]
    assert [layer.scale for layer in layers.values()] == [8.0, 0.75, 4.0]


@pytest.mark.parametrize("rule", ["all-linear", r".*(q|v)_proj"])
def test_a_rule_from_a_command_line_is_a_rule(net, rule):
    """There it comes as the only one of several words."""
    alone, among = (adapt.apply(copy.deepcopy(net), LoRA(targets=given)) for given in (rule, (rule,)))
    assert list(alone.trainable) == list(among.trainable)
    assert LoRA(targets=(rule,)) == LoRA(targets=rule)


def test_all_linear_leaves_the_head(net):
    adapted = adapt.apply(net, LoRA(targets="all-linear"))
    assert len(adapted.trainable) == 2 * 9
    assert not any("lm_head" in name for name in adapted.trainable)


def test_rslora_scales_with_the_root(net):
    adapt.apply(net, LoRA(rank=4, alpha=8, rslora=True))
    assert net.layers[0].q_proj.adapters["default"].scale == 4.0


def test_a_target_that_does_not_exist(net):
    before = graph(net)
    with pytest.raises(VolvelleError, match="'q_prj' does not exist") as error:
        adapt.apply(net, LoRA(targets=("v_proj", "q_prj")))
    assert error.value.tip == "close names: q_proj, v_proj"
    with pytest.raises(VolvelleError, match="'zzz' does not exist") as error:
        adapt.apply(net, LoRA(targets=("zzz",)))
    assert error.value.tip == "layers of this model: q_proj, v_proj, out, lm_head"
    with pytest.raises(VolvelleError, match=r"'\.\*nothing' does not exist"):
        adapt.apply(net, LoRA(targets=".*nothing"))
    with pytest.raises(UsageError, match="not a regular expression"):
        adapt.apply(net, LoRA(targets="*"))
    with pytest.raises(VolvelleError, match=r"layers=\[7\]: no targeted layer in block 7; the targets lie in 0 to 2"):
        adapt.apply(net, LoRA(layers=(7,)))
    assert graph(net) == before
    assert all(parameter.requires_grad for parameter in net.parameters())


def test_a_target_that_is_not_linear(net):
    with pytest.raises(VolvelleError, match=r"LoRA: cannot adapt layers.0: a Block has no weight that it only"):
        adapt.apply(net, LoRA(targets=("layers.0",)))
    with pytest.raises(VolvelleError, match=r"DoRA: cannot adapt layers.1.act: a GELU has no weight"):
        adapt.apply(net, DoRA(targets=("layers.1.act",)))
    encoder = nn.TransformerEncoderLayer(8, 2)
    with pytest.raises(VolvelleError, match="reads its weights directly when it does not train"):
        adapt.apply(encoder, LoRA(targets=("linear1",)))
    with pytest.raises(VolvelleError, match=r"reads its out_proj.weight directly"):
        adapt.apply(encoder, LoRA(targets=("out_proj",)))
    assert type(encoder.linear1) is nn.Linear


def test_a_second_adapter_is_refused(net):
    adapt.apply(net, LoRA())
    with pytest.raises(VolvelleError, match="already carries an adapter 'default'"):
        adapt.apply(net, LoRA())
    with pytest.raises(VolvelleError, match="not merged"):
        adapt.unmerge(net)
    adapt.merge(net)
    with pytest.raises(VolvelleError, match="already merged"):
        adapt.merge(net)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 0}, "rank must be at least 1, got 0"),
        ({"rank_pattern": {"q": 0}}, r"rank_pattern\['q'\] must be at least 1"),
        ({"dropout": 1.0}, r"dropout must be in \[0, 1\), got 1.0"),
        ({"targets": ()}, "targets is empty"),
    ],
)
def test_options_are_checked(options, message):
    with pytest.raises(UsageError, match=message):
        LoRA(**options)


def test_the_method_file_does_not_import_torch():
    code = (
        "import sys; from volvelle.adapt.methods import LoRA; from volvelle.adapt import LoRA as b; LoRA().rank_of('q')"
    )
    subprocess.run([sys.executable, "-c", f"{code}; sys.exit('torch' in sys.modules)"], check=True)


def test_selection_is_by_whole_parts():
    paths = ["a.q_proj", "a.xq_proj", "q_proj", "a.q_proj.sub"]
    assert select(paths, ("q_proj",)) == ["a.q_proj", "q_proj"]


@pytest.mark.peer
@pytest.mark.parametrize(
    "targets", ["all-linear", ("q_proj",), r".*\.1\..*(up|down)_proj", ("self_attn.o_proj", "lm_head")]
)
def test_the_selection_equals_pefts(tiny_llama, targets):
    peft = pytest.importorskip("peft")
    theirs = peft.get_peft_model(
        tiny_llama(), peft.LoraConfig(r=2, target_modules=targets if isinstance(targets, str) else list(targets))
    )
    expected = {name.removeprefix("base_model.model.") for name in theirs.targeted_module_names}
    adapted = adapt.apply(tiny_llama(), LoRA(rank=2, targets=targets))
    assert {name.partition(".adapters.")[0] for name in adapted.trainable} == expected
