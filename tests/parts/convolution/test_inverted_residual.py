"""Inverted residuals, squeeze and excitation, TensorFlow's padding: against loops, and their gradients."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.autograd import gradcheck, gradgradcheck

import volvelle.functional as f
import volvelle.nn as parts

DOUBLE = torch.float64


def loop_same(x, weight, stride, dilation):
    """TensorFlow's definition, one output at a time."""
    b, _, high, wide = x.shape
    d, _, k, _ = weight.shape
    out = torch.zeros(b, d, -(-high // stride), -(-wide // stride), dtype=x.dtype)
    before = [max(0, (-(-n // stride) - 1) * stride + dilation * (k - 1) + 1 - n) // 2 for n in (high, wide)]
    for i in range(out.shape[2]):
        for j in range(out.shape[3]):
            for u in range(k):
                for v in range(k):
                    y, z = i * stride + u * dilation - before[0], j * stride + v * dilation - before[1]
                    if 0 <= y < high and 0 <= z < wide:
                        out[:, :, i, j] += x[:, :, y, z] @ weight[:, :, u, v].T
    return out


@pytest.mark.parametrize("size", [(7, 8), (5, 5), (1, 2)])
@pytest.mark.parametrize(("kernel", "stride", "dilation"), [(3, 2, 1), (5, 2, 1), (3, 1, 2), (2, 3, 1), (1, 2, 1)])
def test_same_padding_is_tensorflow_s(size, kernel, stride, dilation):
    x, weight = torch.randn(2, 3, *size, dtype=DOUBLE), torch.randn(4, 3, kernel, kernel, dtype=DOUBLE)
    found = f.conv2d_same(x, weight, None, stride, dilation)
    assert torch.allclose(found, loop_same(x, weight, stride, dilation))


def test_same_padding_differs_from_symmetric_where_it_should():
    x, weight = torch.randn(1, 1, 8, 8), torch.ones(1, 1, 3, 3)
    assert not torch.allclose(f.conv2d_same(x, weight, None, 2), nn.functional.conv2d(x, weight, None, 2, 1))
    x = x[..., :7, :7]
    assert torch.allclose(f.conv2d_same(x, weight, None, 2), nn.functional.conv2d(x, weight, None, 2, 1))


def test_gradients():
    x = torch.randn(2, 4, 3, 3, dtype=DOUBLE, requires_grad=True)
    weights = [torch.randn(*s, dtype=DOUBLE, requires_grad=True) for s in ((3, 4, 1, 1), (3,), (4, 3, 1, 1), (4,))]
    assert gradcheck(f.squeeze_excite, (x, *weights))
    assert gradgradcheck(f.squeeze_excite, (x, *weights))
    kernel = torch.randn(2, 4, 3, 3, dtype=DOUBLE, requires_grad=True)
    assert gradcheck(lambda a, w: f.conv2d_same(a, w, None, 2), (x, kernel))


def test_squeeze_excite_by_hand():
    x, gate = torch.randn(2, 4, 3, 5), parts.SqueezeExcite(4, 2, activation="relu")
    for b in range(2):
        z = x[b].mean((1, 2))
        inner = (gate.conv_reduce.weight[:, :, 0, 0] @ z + gate.conv_reduce.bias).relu()
        s = (gate.conv_expand.weight[:, :, 0, 0] @ inner + gate.conv_expand.bias).sigmoid()
        assert torch.allclose(gate(x)[b], x[b] * s[:, None, None], atol=1e-6)


@pytest.mark.parametrize(("expansion", "squeezed", "stride", "out"), [(1, 0, 1, 8), (6, 2, 2, 12), (3, 0, 1, 8)])
def test_block_is_its_equations(expansion, squeezed, stride, out):
    block = parts.InvertedResidual(8, out, 5, stride, expansion=expansion, squeezed=squeezed, activation="silu").eval()
    x, silu = torch.randn(2, 8, 9, 6), nn.functional.silu
    h = silu(block.bn1(block.conv_pw(x))) if expansion > 1 else x
    norm, project = (block.bn2, block.conv_pwl) if expansion > 1 else (block.bn1, block.conv_pw)
    h = block.se(silu(norm(nn.functional.conv2d(h, block.conv_dw.weight, None, stride, 2, 1, h.shape[1]))))
    y = (block.bn3 if expansion > 1 else block.bn2)(project(h))
    assert torch.allclose(block(x), x + y if stride == 1 and out == 8 else y, atol=1e-6)


def test_dropped_branches_keep_the_mean():
    x = torch.ones(20_000, 1, dtype=DOUBLE)
    dropped = f.drop_path(x, 0.3, generator=torch.Generator().manual_seed(0))
    assert float(dropped.mean()) == pytest.approx(1, abs=0.02)
    assert float((dropped == 0).double().mean()) == pytest.approx(0.3, abs=0.02)
    assert f.drop_path(x, 0.0) is x
    block = parts.InvertedResidual(8, 8, drop=0.9).train()
    rows = (block(torch.randn(64, 8, 4, 4)) - 0).shape
    assert rows == (64, 8, 4, 4)


def test_compiled_equals_eager():
    block = parts.InvertedResidual(8, 8, squeezed=2, padding="same", stride=2).eval()
    x = torch.randn(2, 8, 7, 7)
    exported = torch.export.export(block, (x,)).module()
    assert torch.allclose(exported(x), block(x), atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_number_formats(dtype):
    block = parts.InvertedResidual(8, 8, squeezed=2).eval().to(dtype)
    found = block(torch.randn(2, 8, 5, 5, dtype=dtype))
    assert found.dtype == dtype
    assert found.isfinite().all()


def test_what_is_refused():
    x = torch.randn(2, 4, 3, 3)
    with pytest.raises(ValueError, match="squeeze_excite"):
        f.squeeze_excite(x, torch.zeros(2, 3, 1, 1), None, torch.zeros(4, 2, 1, 1), None)
    with pytest.raises(ValueError, match="SqueezeExcite"):
        parts.SqueezeExcite(4, 0)
    with pytest.raises(ValueError, match="InvertedResidual"):
        parts.InvertedResidual(4, 4, expansion=0)
    with pytest.raises(ValueError, match="drop_path"):
        f.drop_path(x, 1.0)
    with pytest.raises(ValueError, match="conv2d_same"):
        f.conv2d_same(x, torch.zeros(2, 3, 3, 3))
