"""Counts against hand formulas and against torch's own counter."""

import json

import pytest
import torch
from tests.inspect.nets import Net
from torch import nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from volvelle.errors import UsageError, VolvelleError
from volvelle.inspect import count_flops, flops_rules


def by_torch(net, shape):
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        net.eval()(torch.zeros(shape))
    return counter.get_total_flops()


CONVOLUTIONS = {
    "plain": (nn.Conv2d(6, 8, (3, 5), bias=False), (2, 6, 11, 13), 2 * 8 * 9 * 9 * 6 * 15),
    "strided": (nn.Conv2d(6, 8, 3, 2, 1), (1, 6, 11, 13), 8 * 6 * 7 * 6 * 9),
    "grouped": (nn.Conv2d(6, 9, 3, groups=3), (1, 6, 11, 13), 9 * 9 * 11 * 2 * 9),
    "depthwise": (nn.Conv2d(6, 12, 3, groups=6, dilation=2), (1, 6, 11, 13), 12 * 7 * 9 * 9),
    "one axis": (nn.Conv1d(4, 5, 7, padding="same"), (3, 4, 20), 3 * 5 * 20 * 4 * 7),
    "three axes": (nn.Conv3d(2, 3, 3), (1, 2, 5, 6, 7), 3 * 3 * 4 * 5 * 2 * 27),
    "transposed": (nn.ConvTranspose2d(6, 8, 3, 2, 1, 1, groups=2), (1, 6, 11, 13), 6 * 11 * 13 * 4 * 9),
}


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_convolutions_by_hand_and_by_torch(name):
    layer, shape, macs = CONVOLUTIONS[name]
    found = count_flops(layer, shape)
    assert found.macs == macs
    assert found.flops == 2 * macs == by_torch(layer, shape)
    out = layer(torch.zeros(shape)).numel()
    assert found.other == (out if layer.bias is not None else 0)


def products(m, x):
    a, b = x.flatten(2), x.flatten(2).transpose(1, 2)
    found = [
        a @ b,
        torch.bmm(a, b),
        torch.mm(a[0], b[0]),
        torch.baddbmm(a @ b, a, b),
        m.linear(a),
        F.linear(a, m.linear.weight),
    ]
    return [*found, torch.einsum("bij,bjk->bik", a, b), torch.addmm(a[0] @ b[0], a[0], b[0])]


def test_products_by_hand_and_by_torch():
    net, shape = Net(products, linear=nn.Linear(30, 7)), (2, 4, 5, 6)
    found = count_flops(net, shape)
    one = 4 * 30 * 4
    assert found.macs == 13 * one + 2 * (2 * 4 * 30 * 7)
    assert found.flops == by_torch(net, shape)
    assert [layer.module for layer in found if layer.op == "linear"] == ["linear", ""]


@pytest.mark.parametrize(
    ("equation", "shapes", "macs"),
    [
        ("ij,jk->ik", [(3, 4), (4, 5)], 60),
        ("bhqd,bhkd->bhqk", [(2, 3, 4, 5), (2, 3, 6, 5)], 2 * 3 * 4 * 5 * 6),
        ("i,i->", [(7,), (7,)], 7),
        ("i,j->ij", [(3,), (4,)], 12),
        ("ij,jk,kl->il", [(2, 3), (3, 4), (4, 5)], 2 * 3 * 4 + 2 * 4 * 5),
        ("ii->i", [(4, 4)], 0),
        ("...ij,...jk->...ik", [(2, 3, 4, 5), (2, 3, 5, 6)], 2 * 3 * 4 * 5 * 6),
    ],
)
def test_einsum(equation, shapes, macs):
    net = Net(lambda m, x: torch.einsum(equation, *(torch.zeros(s) + x.sum() for s in shapes)))
    assert count_flops(net, (1,)).macs == macs


def test_attention_with_causal_and_grouped_heads():
    def attended(causal, heads, keys):
        q, k, v = (torch.zeros(2, h, n, d) for h, n, d in ((6, 5, 8), (heads, keys, 8), (heads, keys, 4)))
        run = lambda m, x: F.scaled_dot_product_attention(q + x, k + x, v + x, is_causal=causal, enable_gqa=heads != 6)  # noqa: E731
        return count_flops(Net(run), (1,))

    assert attended(False, 6, 7).macs == 2 * 6 * 5 * 7 * (8 + 4)
    assert attended(False, 2, 7).macs == 2 * 6 * 5 * 7 * (8 + 4)
    assert attended(True, 6, 5).macs == 2 * 6 * (5 * 6 // 2) * (8 + 4)
    assert attended(True, 2, 3).macs == 2 * 6 * (1 + 2 + 3 + 3 + 3) * (8 + 4)


def test_multi_head_attention_counts_as_torch_does():
    net = Net(lambda m, x: m.a(x, x, x, need_weights=False)[0], a=nn.MultiheadAttention(16, 4, batch_first=True))
    found = count_flops(net, (2, 9, 16))
    assert found.macs == 2 * 9 * 16 * 48 + 2 * 9 * 16 * 16 + 2 * 2 * 9 * 9 * 16


def test_an_embedding_is_free_and_the_rest_is_apart():
    net = nn.Sequential(nn.Embedding(50, 8), nn.LayerNorm(8), nn.GELU(), nn.Linear(8, 3), nn.Softmax(-1))
    found = count_flops(net, (2, 5), dtype=torch.int64)
    assert found.macs == 10 * 8 * 3
    assert {layer.op: layer.other for layer in found} == {
        "embedding": 0, "layer_norm": 80 * 7, "gelu": 80, "linear": 30, "softmax": 30 * 5,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("layer", "other"),
    [
        (nn.BatchNorm2d(3), 2 * 3 * 64), (nn.MaxPool2d(3, 2, 1), 3 * 16 * 9), (nn.AvgPool2d(2), 3 * 16 * 4),
        (nn.AdaptiveAvgPool2d(1), 3 * 64), (nn.AdaptiveAvgPool2d(3), 3 * 10 * 10), (nn.Upsample(scale_factor=2), 0),
        (nn.Upsample(scale_factor=2, mode="bilinear"), 3 * 256 * 7), (nn.GroupNorm(3, 3, affine=False), 5 * 3 * 64),
        (nn.PixelUnshuffle(2), 0), (nn.ReLU(inplace=True), 3 * 64), (nn.RMSNorm(8), 4 * 3 * 64), (nn.Flatten(), 0),
    ],
)  # fmt: skip
def test_what_is_no_product_follows_the_stated_rules(layer, other):
    found = count_flops(layer, (1, 3, 8, 8))
    assert (found.macs, found.other, dict(found.unknown)) == (0, other, {})


def test_an_adaptive_pool_counts_each_window():
    """8 into 3: windows 0-2, 2-5, 5-7 hold 3, 4 and 3 inputs."""
    assert count_flops(nn.AdaptiveAvgPool2d((3, 8)), (1, 1, 8, 8)).other == 10 * 8


def test_blocks_of_another_mode_count():
    def forward(m, x):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return m.a(x)

    assert count_flops(Net(forward, a=nn.Linear(4, 5)), (2, 4)).macs == 40


def test_layers_sums_text_and_json():
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Sequential(nn.ReLU(), nn.Conv2d(4, 2, 1)), nn.Flatten())
    found = count_flops(net, (1, 3, 6, 6))
    assert found["1"].macs == 16 * 2 * 4
    assert found.macs == found["0"].macs + found["1"].macs
    assert found.parameters == sum(p.numel() for p in net.parameters())
    record = json.loads(json.dumps(found.record()))
    assert record["flops"] == 2 * record["macs"] == sum(layer["flops"] for layer in record["layers"])
    assert f"{found.macs:,}" in str(found)
    assert found.by_op()["conv2d"].macs == found.macs
    with pytest.raises(UsageError, match="no operation of Sequential runs in '9'"):
        found["9"]


def test_a_module_used_twice_counts_twice():
    found = count_flops(Net(lambda m, x: m.a(m.a(x)), a=nn.Linear(4, 4, bias=False)), (1, 4))
    assert [(layer.module, layer.calls, layer.macs) for layer in found] == [("a", 2, 32)]


def test_an_operation_without_a_rule_is_named():
    found = count_flops(Net(lambda m, x: torch.linalg.matrix_exp(x)), (3, 3))
    assert dict(found.unknown) == {"linalg_matrix_exp": 1}
    assert "not counted, for want of a rule: linalg_matrix_exp" in str(found)
    with pytest.raises(VolvelleError, match="count_flops: Net cannot be traced"):
        count_flops(Net(lambda m, x: x.view(7)), (3, 3))


def test_nothing_is_computed_and_the_module_stays(monkeypatch):
    with torch.device("meta"):
        net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)).train()
    assert count_flops(net, (1, 3, 9, 9)).macs == 8 * 49 * 27
    assert net.training


@pytest.mark.parametrize("name", ["groups", "transposed"])
def test_a_wrong_rule_is_caught(name, monkeypatch):
    def wrong(node, args):
        weight, out = flops_rules._shape(args["weight"]), node.meta["val"].numel()
        width = weight[1] * (args["groups"] if name == "groups" else 1)
        return flops_rules.Count(out * width * weight[2:].count(0) or out * width * torch.Size(weight[2:]).numel())

    layer, shape, macs = CONVOLUTIONS["grouped" if name == "groups" else "transposed"]
    key = "conv2d" if name == "groups" else "conv_transpose2d"
    monkeypatch.setitem(flops_rules.RULES, key, wrong)
    assert count_flops(layer, shape).macs != macs
