"""Weights on grids: what rounding loses, what the stored order means, and layers that compute with them."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from volvelle.parts.quantization.grid import dequantize_weight, quantize_weight
from volvelle.parts.quantization.int4 import Int4Linear
from volvelle.parts.quantization.int4_packed import PackedInt4
from volvelle.parts.quantization.int8 import Int8Linear
from volvelle.parts.quantization.tiles import pack, pack_steps, unpack, unpack_steps
from volvelle.parts.quantization.weight_only import quantized_linear

LAYERS = {4: Int4Linear, 8: Int8Linear}
STORED = torch.ones(1, 2, 16).byte(), torch.ones(1, 1, 2, 16)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_rounding_loses_half_a_step_at_most_and_no_other_code_is_nearer(bits, dtype):
    torch.manual_seed(bits)
    weight = torch.randn(6, 96).to(dtype)
    weight[2, :32] = 0.25  # a group of one value has no steps
    grid = quantize_weight(weight, bits)
    assert grid.group == 32
    back = dequantize_weight(*grid, torch.float64)
    wide, step = weight.double(), grid.scale.t().double().repeat_interleave(32, 1)
    # the scale itself is rounded to fp16, so the outermost codes may lie a little inside of the weights
    assert bool(((back - wide).abs() <= step / 2 + 16 * step * 2**-10 + 1e-6 * (bits == 4)).all())
    for other in (-1, 1):
        codes = (grid.codes.int() + other).clamp(0 if bits == 4 else -127, 15 if bits == 4 else 127)
        moved = dequantize_weight(codes, grid.scale, grid.offset, torch.float64)
        assert bool(((moved - wide).abs() >= (back - wide).abs() - 1e-9).all())


def test_a_matrix_on_a_grid_is_returned_exactly():
    codes = torch.randint(0, 16, (16, 64), dtype=torch.uint8)
    codes[:, ::32], codes[:, 1::32] = 0, 15
    scale, offset = torch.full((2, 16), 0.125).half(), torch.full((2, 16), -0.5).half()
    again = quantize_weight(dequantize_weight(codes, scale, offset, torch.float32), 4)
    assert torch.equal(again.codes, codes)
    assert torch.equal(again.scale, scale)


@pytest.mark.parametrize("bits", [4, 8])
def test_storage_holds_neighbours_side_by_side(bits):
    out, features = 48, 10
    codes = torch.randint(0, 16, (out, features)).to(torch.uint8 if bits == 4 else torch.int8)
    tiles = pack(codes, bits)
    assert torch.equal(unpack(tiles), codes)
    for o, p, r in ((0, 0, 0), (2, 3, 7), (1, 4, 15)):
        first, second = codes[16 * o + r, 2 * p], codes[16 * o + r, 2 * p + 1]
        if bits == 4:
            assert int(tiles[o, p, r]) == int(first) + 16 * int(second)
        else:
            assert tiles[o, p, r].tolist() == [int(first), int(second)]
    scale, offset = torch.randn(2, 5, out).half()
    for numbers in ((scale, offset), (scale, None)):
        found = unpack_steps(pack_steps(*numbers))
        assert all(a is b is None or torch.equal(a, b) for a, b in zip(found, numbers, strict=True))


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(64,), (3, 64), (2, 5, 64)])
def test_a_layer_computes_with_the_dequantised_matrix(bits, dtype, shape):
    torch.manual_seed(0)
    kind = LAYERS[bits]
    dense = nn.Linear(64, 32)
    layer = kind.from_linear(dense)
    x = torch.randn(shape, dtype=dtype)
    expected = x.double() @ layer.dequantized(torch.float64).T + dense.bias.double()
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 0.05}[dtype]
    torch.testing.assert_close(layer(x).double(), expected, rtol=tolerance, atol=tolerance)
    assert torch.equal(layer(x), quantized_linear(x, layer.tiles, layer.steps, layer.bias))
    assert layer(x).dtype is dtype


@pytest.mark.parametrize("rows", [1, 2, 7, 8, 9, 40])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_torchs_own_kernel_keeps_the_grid(rows, dtype):
    torch.manual_seed(rows)
    layer = Int4Linear.from_linear(nn.Linear(96, 48))
    x = torch.randn(2, rows, 96).to(dtype)[:1] if rows % 2 else torch.randn(rows, 96).to(dtype)
    expected = x.double() @ layer.dequantized(torch.float64).T + layer.bias.double()
    found = PackedInt4(layer)(x)
    assert found.dtype is dtype
    tolerance = 0.02 if dtype is torch.bfloat16 else 1e-5
    torch.testing.assert_close(found.double(), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("bits", [4, 8])
def test_gradients_reach_the_input_and_nothing_else(bits):
    layer = LAYERS[bits].from_linear(nn.Linear(32, 16))
    assert not list(layer.parameters())
    x = torch.randn(2, 32, dtype=torch.float64, requires_grad=True)
    layer(x).sum().backward()
    torch.testing.assert_close(x.grad, layer.dequantized(torch.float64).sum(0).expand(2, -1))


def test_casts_and_state_dicts_leave_the_grid_as_it_is():
    layer = Int4Linear.from_linear(nn.Linear(64, 16))
    before = layer.dequantized(torch.float32)
    steps = layer.steps.clone()
    nn.Sequential(layer).to(torch.bfloat16)
    assert torch.equal(layer.steps, steps)
    assert layer.bias is not None
    assert layer.bias.dtype is torch.bfloat16
    other = Int4Linear.from_linear(nn.Linear(64, 16))
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other.dequantized(torch.float32), before)
    assert layer.tiles.nbytes + layer.steps.nbytes == 0.625 * 64 * 16
    eight = Int8Linear.from_linear(nn.Linear(64, 16))
    assert eight.tiles.nbytes + eight.steps.nbytes == 1.0625 * 64 * 16


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: quantize_weight(torch.ones(2, 32), 3), "bits must be 4 or 8"),
        (lambda: quantize_weight(torch.ones(2, 33), 4), "multiple of group=32"),
        (lambda: quantize_weight(torch.ones(2, 32, dtype=torch.int8), 4), "floating"),
        (lambda: quantize_weight(torch.full((2, 32), torch.nan), 8), "not finite"),
        (lambda: pack(torch.ones(15, 4, dtype=torch.uint8), 4), "multiple of 16"),
        (lambda: dequantize_weight(torch.ones(4, 4), torch.ones(3, 4), None, torch.float32), "in / group, out"),
        (lambda: quantized_linear(torch.ones(3), *STORED), "quantized_linear: "),
        (lambda: quantized_linear(torch.ones(4), torch.ones(1, 2, 8).byte(), STORED[1]), "quantized_linear: "),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused_by_name(call, says):
    with pytest.raises(ValueError, match=says):
        call()
