"""Nearest codes: those of fp64, whatever the format; the first of equals."""

from __future__ import annotations

import pytest
import torch

from volvelle.parts.quantization.nearest import nearest_code

FORMATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def oracle(z, e):
    """argmin of the squared differences in fp64, a few rows at a time."""
    found = [((row.double()[None] - e.double()) ** 2).sum(1).argmin() for row in z.reshape(-1, e.shape[1])]
    return torch.stack(found).view(z.shape[:-1])


def collapsed(z, e):
    """What taming-transformers computes, in the tensors' own format."""
    return ((z**2).sum(1, keepdim=True) + (e**2).sum(1) - 2 * z @ e.T).argmin(1)


@pytest.mark.parametrize("dtype", FORMATS)
@pytest.mark.parametrize(("codes", "width", "spread"), [(257, 19, 1.0), (1024, 64, 1 / 1024), (16384, 4, 1 / 16384)])
def test_every_format_finds_the_codes_of_fp64(dtype, codes, width, spread):
    torch.manual_seed(codes)
    e = torch.empty(codes, width).uniform_(-spread, spread).to(dtype)
    z = (torch.randn(3, 13, width) * 3).to(dtype)
    assert torch.equal(nearest_code(z, e), oracle(z, e))


def test_where_the_usual_sum_collapses_in_bf16_ours_does_not():
    torch.manual_seed(0)
    e = torch.empty(1024, 64).uniform_(-1 / 1024, 1 / 1024).bfloat16()
    z = (torch.randn(200, 64) * 3).bfloat16()
    assert len(collapsed(z, e).unique()) <= 2
    assert len(nearest_code(z, e).unique()) > 50


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_changes_nothing(dtype):
    torch.manual_seed(1)
    z, e = torch.randn(64, 32), torch.randn(512, 32) / 100
    with torch.autocast("cpu", dtype):
        assert torch.equal(nearest_code(z, e), oracle(z, e))


def test_a_lower_precision_of_products_is_known_of(monkeypatch):
    # The error of the sums is planted where the hardware would make it.
    torch.manual_seed(2)
    z, e = torch.randn(100, 16), torch.randn(300, 16)
    exact = torch.addmm
    monkeypatch.setattr(torch, "addmm", lambda a, b, c, **more: exact(a, b.bfloat16().float(), c, **more))
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: "medium")
    assert torch.equal(nearest_code(z, e), oracle(z, e))


def test_vectors_far_from_the_origin_and_close_codes():
    torch.manual_seed(3)
    e = 1000 + torch.rand(400, 8) * 1e-2
    z = e[torch.randint(400, (50,))] + torch.randn(50, 8) * 1e-3
    assert torch.equal(nearest_code(z, e), oracle(z, e))


def test_of_equal_codes_the_first():
    e = torch.tensor([[5.0, 5.0], [1.0, 0.0], [1.0, 0.0], [-1.0, 0.0]])
    assert nearest_code(torch.tensor([[0.0, 3.0], [1.0, 0.0], [-2.0, 0.0]]), e).tolist() == [1, 1, 3]
    assert nearest_code(torch.randn(7, 2), torch.ones(5, 2)).tolist() == [0] * 7


def test_shapes_layouts_none_and_nan():
    e = torch.randn(6, 4)
    z = torch.randn(2, 4, 3, 5).movedim(1, -1)
    assert torch.equal(nearest_code(z, e), oracle(z, e))
    assert nearest_code(torch.empty(0, 4), e).shape == (0,)
    assert nearest_code(e[3], e).item() == 3
    assert 0 <= int(nearest_code(torch.full((4,), float("nan")), e)) < 6


def test_many_rows_are_cut_into_blocks(monkeypatch):
    torch.manual_seed(4)
    z, e = torch.randn(37, 5), torch.randn(11, 5)
    monkeypatch.setattr("volvelle.parts.quantization.nearest.SCORES", 44)
    assert torch.equal(nearest_code(z, e), oracle(z, e))


def test_it_compiles_whole():
    e = torch.randn(9, 3)
    compiled = torch.compile(lambda z: nearest_code(z, e) + 1, fullgraph=True, backend="eager")
    z = torch.randn(4, 3)
    assert torch.equal(compiled(z), nearest_code(z, e) + 1)


@pytest.mark.parametrize(("z", "e"), [((2, 3), (4, 5)), ((2, 3), (0, 3)), ((2, 3), (3,))])
def test_shapes_that_do_not_fit(z, e):
    with pytest.raises(ValueError, match="nearest_code: vectors"):
        nearest_code(torch.zeros(z), torch.zeros(e))


def test_integers_are_refused():
    with pytest.raises(TypeError, match="nearest_code: floating-point"):
        nearest_code(torch.zeros(2, 3, dtype=torch.long), torch.zeros(4, 3))
