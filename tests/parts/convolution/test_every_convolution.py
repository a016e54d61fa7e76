"""What holds for every Module of the family: derivatives, dtypes, autocast, empty batches, graphs, rows alone."""

from __future__ import annotations

import pytest
import torch
from tests.onnx_runtime import same_in_onnx_runtime
from tests.parts.convolution.cases import CASES

QUICK = {"AtrousConv2d", "DepthwiseSeparableConv2d", "InceptionBlock"}
GRAPHS = pytest.mark.parametrize("name", [pytest.param(n, marks=() if n in QUICK else pytest.mark.slow) for n in CASES])
EACH = pytest.mark.parametrize("name", CASES)


@EACH
def test_first_and_second_derivatives(name):
    case = CASES[name]
    module, x = case.module(torch.float64), case.input(torch.float64, batch=1)[..., :4].requires_grad_()
    parameters = [x, *module.parameters()]
    names = [n for n, _ in module.named_parameters()]

    def run(x, *values):
        return torch.func.functional_call(module, dict(zip(names, values, strict=True)), (x,))

    fast = {"fast_mode": True}
    assert torch.autograd.gradcheck(run, parameters, **fast)
    assert torch.autograd.gradgradcheck(run, parameters, **fast)


@EACH
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_every_dtype_and_autocast(name, dtype):
    case, steps = CASES[name], 64
    exact = case.module().double()(case.input().double())
    found = case.module(dtype)(case.input(dtype))
    assert found.dtype == dtype
    assert (found.double() - exact).abs().max() <= steps * torch.finfo(dtype).eps
    if dtype != torch.float32:
        with torch.autocast("cpu", dtype):
            mixed = case.module()(case.input())
        assert (mixed.double() - exact).abs().max() <= steps * torch.finfo(dtype).eps


@EACH
def test_an_empty_batch_and_rows_alone(name):
    case = CASES[name]
    module, x = case.module(torch.float64), case.input(torch.float64)
    whole = module(x)
    assert module(x[:0]).shape == (0, *whole.shape[1:])
    torch.testing.assert_close(torch.cat([module(row) for row in x.split(1)]), whole)
    x[1] = torch.nan
    assert module(x)[0].isfinite().all(), "rows of a batch are apart"
    assert module(x)[1].isnan().any()


@GRAPHS
def test_one_graph(name):
    torch.compiler.reset()
    case = CASES[name]
    module, x = case.module(), case.input()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), module(x))
    dynamic = {0: torch.export.Dim("b", min=1), x.dim() - 1: torch.export.Dim.AUTO}
    program = torch.export.export(module, (x,), dynamic_shapes=(dynamic,))
    other = torch.randn(3, *x.shape[1:-1], x.shape[-1] + 4)
    torch.testing.assert_close(program.module()(other), module(other))


@EACH
def test_meta_and_placement(name):
    case = CASES[name]
    with torch.device("meta"):
        module = case.build()
    assert module(case.input().to("meta")).shape == case.module()(case.input()).shape


@pytest.mark.slow
@pytest.mark.peer
@EACH
def test_onnx_runtime_computes_the_same(name, tmp_path):
    same_in_onnx_runtime(CASES[name].module().eval(), CASES[name].input(), tmp_path)
