"""Low-rank updates of Conv1D, Conv2d and Embedding: against layers that have W + scale · B A as their weight."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from volvelle.parts.lowrank.dora import DoRAUpdate
from volvelle.parts.lowrank.kinds import kind_of
from volvelle.parts.lowrank.lora import LoRAUpdate, LowRank

IMAGE = (2, 4, 6, 5)
CONVS = {
    "plain": {"kernel_size": 3},
    "1 x 1": {"kernel_size": 1},
    "stride": {"kernel_size": (3, 2), "stride": (2, 3), "padding": (1, 0)},
    "dilation": {"kernel_size": 3, "dilation": 2, "padding": 2},
    "groups": {"kernel_size": 3, "groups": 2},
    "depthwise": {"kernel_size": 3, "groups": 4, "padding": 1},
    "circular": {"kernel_size": 3, "padding": 1, "padding_mode": "circular"},
    "no bias": {"kernel_size": 3, "bias": False, "padding": "same"},
}


def conv1d():
    pytorch_utils = pytest.importorskip("transformers.pytorch_utils")
    layer = pytorch_utils.Conv1D(8, 5).double()
    nn.init.normal_(layer.bias)
    return layer


LAYERS = {
    "linear": lambda: nn.Linear(5, 8, dtype=torch.float64),
    "conv1d": conv1d,
    "embedding": lambda: nn.Embedding(11, 8, padding_idx=4, dtype=torch.float64),
    **{name: (lambda options=options: nn.Conv2d(4, 8, **options).double()) for name, options in CONVS.items()},
}


def inputs(layer, dtype=torch.float64):
    if isinstance(layer, nn.Embedding):
        return torch.tensor([[1, 2, 10], [0, 0, 3]])
    return torch.randn(IMAGE, dtype=dtype) if isinstance(layer, nn.Conv2d) else torch.randn(2, 3, 5, dtype=dtype)


def scrambled(update):
    for parameter in update.parameters():
        nn.init.normal_(parameter, mean=0.3, std=0.5)
    return update


@pytest.fixture(params=LAYERS)
def layer(request):
    torch.manual_seed(0)
    return LAYERS[request.param]()


@pytest.mark.parametrize("kind", [LoRAUpdate, DoRAUpdate])
def test_nothing_changes_at_step_zero(layer, kind):
    x = inputs(layer)
    result = layer(x)
    assert torch.equal(kind(layer, 4, 8.0).update(layer, x, result), result)


@pytest.mark.parametrize("kind", [LoRAUpdate, DoRAUpdate])
@pytest.mark.parametrize("rslora", [False, True])
def test_the_update_is_the_merged_weight(layer, kind, rslora):
    x = inputs(layer)
    update = scrambled(kind(layer, 4, 6.0, rslora=rslora))
    assert update.scale == (3.0 if rslora else 1.5)
    result = update.update(layer, x, layer(x))
    merged = copy.deepcopy(layer)
    folded = update.merged(layer)
    merged.weight = nn.Parameter(folded.weight)
    torch.testing.assert_close(merged(x), result)
    assert not torch.allclose(result, layer(x))
    torch.testing.assert_close(update.unmerged(layer, folded), layer.weight.detach())


def test_the_product_is_a_dense_loops(layer):
    """B A, entry by entry, in the weight's own layout."""
    update = scrambled(LoRAUpdate(layer, 4, 4.0))
    a, b = update.a.detach(), update.b.detach()
    expected = torch.zeros_like(layer.weight)
    if isinstance(layer, nn.Conv2d):
        share = 4 // layer.groups
        for output in range(8):
            group = output // (8 // layer.groups)
            for r in range(share):
                expected[output] += b[output, r, 0, 0] * a[group * share + r]
    else:
        dense = sum(torch.outer(b[:, r], a[r]) for r in range(4))
        expected = dense if type(layer) is nn.Linear else dense.T
    got = kind_of(layer).layout(update.delta(layer), layer.weight)
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("kind", [LoRAUpdate, DoRAUpdate])
def test_gradients_in_double(layer, kind):
    """The norm of DoRA is a constant for gradients: here the one before the factors are moved."""
    torch.manual_seed(1)
    x, update = inputs(layer), scrambled(kind(layer, 4, 6.0))
    if kind is DoRAUpdate:
        fixed = update.norm(layer)
        update.norm = lambda layer: fixed
    names = [name for name, _ in update.named_parameters()]
    base = layer(x).detach()

    def run(*values):
        moved = dict(zip(names, values, strict=True))
        stateless = copy.deepcopy(update)
        for name, value in moved.items():
            del stateless._parameters[name]
            setattr(stateless, name, value)
        return stateless.update(layer, x, base)

    assert torch.autograd.gradcheck(run, [p.detach().requires_grad_() for p in update.parameters()], fast_mode=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_factors_of_half_precision_layers_are_fp32(dtype):
    for layer in (nn.Conv2d(4, 8, 3, dtype=dtype), nn.Embedding(11, 8, dtype=dtype), nn.Linear(5, 8, dtype=dtype)):
        update = scrambled(DoRAUpdate(layer, 4, 1.0))
        assert {p.dtype for p in update.parameters()} == {torch.float32}
        x = inputs(layer, dtype)
        result = update.update(layer, x, layer(x))
        assert result.dtype == dtype
        wide = copy.deepcopy(layer).float()
        exact = update.update(
            wide, x if x.dtype == torch.int64 else x.float(), wide(x if x.dtype == torch.int64 else x.float())
        )
        torch.testing.assert_close(result.float(), exact, rtol=0.05, atol=0.1)


def test_a_rank_that_groups_cannot_share_is_named():
    with pytest.raises(ValueError, match="rank must be a multiple of its 4 groups, got 6"):
        LowRank(nn.Conv2d(4, 8, 3, groups=4), 6)


def test_kinds_survive_a_copy():
    update = LoRAUpdate(nn.Embedding(3, 2), 1)
    assert copy.deepcopy(update).kind == update.kind == kind_of(nn.Embedding(1, 1))
    assert kind_of(nn.Linear(1, 1)) != kind_of(nn.Embedding(1, 1))


def test_dropout_drops_only_the_update_and_not_token_numbers():
    torch.manual_seed(0)
    layer = nn.Conv2d(4, 8, 3)
    x = torch.randn(IMAGE)
    update = LoRAUpdate(layer, 4, dropout=0.5)
    result = layer(x)
    assert torch.equal(update.update(layer, x, result), result)
    scrambled(update)
    assert not torch.equal(update.update(layer, x, result), update.update(layer, x, result))
    embedding = nn.Embedding(11, 8)
    numbers = scrambled(LoRAUpdate(embedding, 4, dropout=0.5))
    ids = inputs(embedding)
    assert torch.equal(*(numbers.update(embedding, ids, embedding(ids)) for _ in range(2)))
