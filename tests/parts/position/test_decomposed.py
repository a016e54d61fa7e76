"""Relative positions by row and column: against loops, and carried by q and k through the fused kernel."""

from __future__ import annotations

import pytest
import torch

from volvelle.parts.attention.attention import attention
from volvelle.parts.position.decomposed import DecomposedBias, decomposed_bias

GRIDS = {"square": (4, 4), "wide": (3, 5), "row": (1, 7)}
EACH = pytest.mark.parametrize("grid", GRIDS.values(), ids=GRIDS)


def made(grid, d=6, dtype=torch.float64, b=2, h=3):
    torch.manual_seed(sum(grid))
    height, width = grid
    q, k, v = torch.randn(3, b, h, height * width, d, dtype=dtype)
    tables = torch.randn(2 * height - 1, d, dtype=dtype), torch.randn(2 * width - 1, d, dtype=dtype)
    return q, k, v, *(table.requires_grad_() for table in tables)


@EACH
def test_loops_over_rows_and_columns_agree(grid):
    q, _, _, rel_h, rel_w = made(grid)
    height, width = grid
    n = torch.arange(height * width)
    found = decomposed_bias(q, n, n, rel_h=rel_h, rel_w=rel_w)
    for i in range(height * width):
        for j in range(height * width):
            row = rel_h[i // width - j // width + height - 1]
            column = rel_w[i % width - j % width + width - 1]
            torch.testing.assert_close(found[..., i, j], q[:, :, i] @ (row + column))


@EACH
def test_the_factors_multiply_to_the_block(grid):
    q, k, _, rel_h, rel_w = made(grid)
    bias, n = DecomposedBias(rel_h, rel_w), torch.arange(q.shape[2])
    of_query, of_key = bias.factors(q, k)
    assert of_query.shape[-1] == of_key.shape[-1] == bias.rank(len(n), len(n)) == sum(grid)
    torch.testing.assert_close(of_query @ of_key.mT, bias.tile(q, k, n, n))


def test_only_a_whole_grid_factors():
    bias = DecomposedBias(torch.zeros(5, 2), torch.zeros(7, 2))
    assert bias.rank(12, 12) == 7
    assert bias.rank(12, 11) is bias.rank(1, 12) is None


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@EACH
def test_attention_carries_it_in_q_and_k(grid, dtype):
    q, k, v, rel_h, rel_w = made(grid)
    whole = decomposed_bias(q, torch.arange(q.shape[2]), torch.arange(q.shape[2]), rel_h=rel_h, rel_w=rel_w)
    wanted = attention(q, k, v, bias=whole, backend="reference")
    low = [x.detach().to(dtype) for x in (q, k, v, rel_h, rel_w)]
    found, why = attention(*low[:3], bias=DecomposedBias(*low[3:]), explain=True)
    assert why.backend == "sdpa"
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 0.05}[dtype]
    torch.testing.assert_close(found.double(), wanted.detach(), atol=tolerance, rtol=tolerance)


def test_gradients_are_those_of_the_whole_bias_where_the_kernel_would_refuse_it():
    q, k, v, rel_h, rel_w = made((12, 13), b=1, h=2)
    leaves = [x.requires_grad_() for x in (q, k, v)] + [rel_h, rel_w]
    out, why = attention(q, k, v, bias=DecomposedBias(rel_h, rel_w), explain=True)
    assert why.backend == "sdpa"  # 156^2 scores are more than it holds for a bias that learns
    n, towards = torch.arange(156), torch.randn_like(out)
    whole = decomposed_bias(q, n, n, rel_h=rel_h, rel_w=rel_w)
    wanted = torch.autograd.grad(attention(q, k, v, bias=whole, backend="reference"), leaves, towards)
    for found, want in zip(torch.autograd.grad(out, leaves, towards), wanted, strict=True):
        torch.testing.assert_close(found, want)


def test_it_goes_with_a_mask_and_grouped_heads():
    q, k, v, rel_h, rel_w = made((3, 5), h=4)
    k, v = k[:, :2], v[:, :2, :, :4]
    mask = torch.rand(2, 1, 15, 15) < 0.7
    bias = DecomposedBias(rel_h, rel_w)
    found = attention(q, k, v, bias=bias, mask=mask, scale=0.3)
    torch.testing.assert_close(found, attention(q, k, v, bias=bias, mask=mask, scale=0.3, backend="reference"))


def test_explicit_positions_and_other_back_ends_are_served_by_blocks():
    q, k, v, rel_h, rel_w = made((3, 5))
    bias, some = DecomposedBias(rel_h, rel_w), torch.tensor([4, 9, 2])
    whole = attention(q, k, v, bias=bias)
    found = attention(q[:, :, some], k, v, bias=bias, q_positions=some)
    torch.testing.assert_close(found, whole[:, :, some])
    torch.testing.assert_close(attention(q, k, v, bias=bias, backend="tiled"), whole)


def test_tables_that_do_not_fit_raise():
    with pytest.raises(ValueError, match=r"decomposed_bias: rel_h and rel_w must be .*got \(4, 6\)"):
        decomposed_bias(
            torch.zeros(1, 1, 2, 6), torch.arange(2), torch.arange(2), rel_h=torch.zeros(4, 6), rel_w=torch.zeros(1, 6)
        )
