"""What holds for all of the family: derivatives, dtypes, autocast, empty batches, graphs, rows alone."""

from __future__ import annotations

import pytest
import torch
from tests.onnx_runtime import same_in_onnx_runtime
from tests.parts.resampling.cases import CASES, SHAPE, images
from torch import nn

QUICK = {"bilinear", "pixel_shuffle", "unpool"}
GRAPHS = pytest.mark.parametrize("name", [pytest.param(n, marks=() if n in QUICK else pytest.mark.slow) for n in CASES])
EACH = pytest.mark.parametrize("name", CASES)


def made(name, dtype=torch.float32):
    case = CASES[name]()
    return case.to(dtype) if isinstance(case, nn.Module) else case


@EACH
def test_first_and_second_derivatives(name):
    case, x = made(name, torch.float64), images(torch.float64, batch=1).requires_grad_()
    assert torch.autograd.gradcheck(case, (x,), fast_mode=True)
    assert torch.autograd.gradgradcheck(case, (x,), fast_mode=True)
    if isinstance(case, nn.Module):
        values = [p.detach().clone().requires_grad_() for p in case.parameters()]
        names = [n for n, _ in case.named_parameters()]
        run = lambda *v: torch.func.functional_call(case, dict(zip(names, v, strict=True)), (x.detach(),))  # noqa: E731
        assert torch.autograd.gradcheck(run, values, fast_mode=True)
        assert torch.autograd.gradgradcheck(
            lambda x, *v: torch.func.functional_call(case, dict(zip(names, v, strict=True)), (x,)),
            (x, *values),
            fast_mode=True,
        )


@EACH
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_every_dtype_and_autocast(name, dtype):
    exact = made(name, torch.float64)(images(torch.float64))
    found = made(name, dtype)(images(dtype))
    assert found.dtype == (torch.float32 if name == "checkerboard" else dtype)
    assert (found.double() - exact).abs().max() <= 32 * torch.finfo(dtype).eps
    if dtype != torch.float32:
        with torch.autocast("cpu", dtype):
            mixed = made(name)(images())
        assert (mixed.double() - exact).abs().max() <= 32 * torch.finfo(dtype).eps


@EACH
def test_an_empty_batch_and_rows_alone(name):
    case, x = made(name, torch.float64), images(torch.float64)
    whole = case(x)
    assert case(x[:0]).shape == (0, *whole.shape[1:])
    torch.testing.assert_close(torch.cat([case(row) for row in x.split(1)]), whole)
    x[1] = torch.nan
    assert case(x)[0].isfinite().all()
    if name != "checkerboard":
        assert case(x)[1].isnan().any()


class Wrapped(nn.Module):
    """torch.export takes Modules."""

    def __init__(self, call):
        super().__init__()
        self.call = call

    def forward(self, x):
        return self.call(x)


@GRAPHS
def test_one_graph(name):
    torch.compiler.reset()
    case, x = made(name), images()
    torch.testing.assert_close(torch.compile(case, fullgraph=True, backend="aot_eager")(x), case(x))
    program = torch.export.export(Wrapped(case), (x,), dynamic_shapes=({0: torch.export.Dim("b", min=1)},))
    other = torch.randn(3, *SHAPE[1:])
    torch.testing.assert_close(program.module()(other), case(other))


@pytest.mark.slow
@pytest.mark.peer
@EACH
def test_onnx_runtime_computes_the_same(name, tmp_path):
    same_in_onnx_runtime(Wrapped(made(name)).eval(), images(), tmp_path)
