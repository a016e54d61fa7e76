"""Row sums: the operators' plain meaning, their Triton kernels in the interpreter and compiled, what is chosen when."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tests.triton_runs import CARDS, NoDevice, in_python, needs_triton, run_cases

from volvelle.parts.regions import rows

CASES = Path(__file__).with_name("triton_rows_cases.py")


def case(dtype=torch.float64):
    g = torch.Generator().manual_seed(0)
    table, weight = (torch.randn(20, 7, generator=g, dtype=dtype), torch.randn(13, 4, generator=g, dtype=dtype))
    return table, torch.randint(0, 20, (13, 4), generator=g), weight, torch.randn(13, 7, generator=g, dtype=dtype)


def test_on_a_cpu_the_operators_are_plain_pytorch():
    table, at, weight, grad = case()
    assert torch.equal(rows.fused_sums(table, at, weight), rows.plain_sums(table, at, weight))
    plain = rows.plain_table_gradient(grad, at, weight, 20)
    assert torch.equal(rows.fused_table_gradient(grad, at, weight, 20), plain)
    plain = rows.plain_weight_gradient(table, at, grad)
    assert torch.equal(rows.fused_weight_gradient(table, at, grad), plain)


def test_the_operators_are_registered_as_torch_wants_them():
    table, at, weight, grad = case(torch.float32)
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(rows.fused_sums, (table, at, weight), test_utils=checks)
    torch.library.opcheck(rows.fused_table_gradient, (grad, at, weight, 20), test_utils=checks)
    torch.library.opcheck(rows.fused_weight_gradient, (table, at, grad), test_utils=checks)


def test_derivatives():
    table, at, weight, _ = case()
    inputs = (table.requires_grad_(), weight.requires_grad_())
    assert torch.autograd.gradcheck(lambda t, w: rows.row_sums(t, at, w), inputs, fast_mode=True)
    assert torch.autograd.gradgradcheck(lambda t, w: rows.row_sums(t, at, w), inputs, fast_mode=True)


class OnCuda:
    is_cuda = True


def test_kernels_serve_cuda_tensors_where_triton_is_installed(monkeypatch):
    assert not rows.served(torch.zeros(1))
    for installed in (True, False):
        monkeypatch.setattr(rows, "INSTALLED", installed)
        assert rows.served(OnCuda()) is installed  # type: ignore[arg-type]


def test_the_same_bits_where_torch_is_asked_for_them(monkeypatch):
    table, at, weight, grad = case()
    table.requires_grad_()
    monkeypatch.setattr(rows, "served", lambda table: True)
    monkeypatch.setattr(rows, "fused_sums", rows.plain_sums)
    monkeypatch.setattr(rows, "fused_table_gradient", lambda *inputs: pytest.fail("adds up by atomics"))
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        (found,) = torch.autograd.grad(rows.row_sums(table, at, weight), table, grad)
    finally:
        torch.use_deterministic_algorithms(before)
    assert torch.equal(found, rows.plain_table_gradient(grad, at, weight, 20))


@pytest.mark.slow
def test_triton_is_not_imported_and_need_not_be_there():
    source = (
        "import sys; sys.modules['triton'] = None\n"
        "import torch\n"
        "from volvelle.functional import roi_align\n"
        "from volvelle.parts.regions import rows\n"
        "box = torch.tensor([[0.0, 0, 0, 4, 4]])\n"
        "print(rows.INSTALLED, roi_align(torch.ones(1, 1, 4, 4), box, 1, 1.0, 2).item())\n"
    )
    assert in_python(source).split() == ["False", "1.0"]


@needs_triton
def test_the_kernels_in_the_interpreter(repository):
    run_cases(repository, (CASES,), "not slow", interpret=True)


@needs_triton
@pytest.mark.slow
def test_more_of_the_kernels_in_the_interpreter(repository):
    run_cases(repository, (CASES,), "slow", interpret=True)


@needs_triton
@pytest.mark.gpu
def test_the_kernels_on_a_device(repository):
    run_cases(repository, (CASES,), "slow or not slow", interpret=False)


@needs_triton
@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("card", CARDS)
def test_the_kernels_compile(card, dtype, monkeypatch, tmp_path):
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver

    from volvelle.parts.regions import triton_rows

    arch, kib = CARDS[card]
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(driver, "_active", NoDevice(GPUTarget("cuda", arch, 32)))
    compiled = {}

    def start(kernel, shape, arguments, taps=None):
        sizes = {"BLOCK_M": triton_rows.BLOCK_M, "BLOCK_C": triton_rows.WIDEST, "num_warps": 4}
        compiled[kernel.__name__] = kernel.warmup(*arguments, grid=(1, 1), **sizes)

    monkeypatch.setattr(triton_rows, "_start", start)
    table, at, weight, grad = case(dtype)
    triton_rows.sums(table, at, weight)
    triton_rows.table_gradient(grad, at, weight, 20)
    triton_rows.weight_gradient(table, at, grad)
    assert set(compiled) == {"sum_rows", "add_to_rows", "multiply_rows"}
    assert all(one.metadata.shared <= kib * 1024 for one in compiled.values())
