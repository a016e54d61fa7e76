"""What oneDNN packs for products in half precision, against the allocator."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tests.inspect.peaks import planned_and_measured
from torch import nn
from torch.profiler import ProfilerActivity, profile

from volvelle.inspect.memory_products import SMALL, Product, instructions, product_scratch

# One shape for each branch: rows that divide evenly or not, one row, one column, long and very long sums, an A whose
# rows are a power of two apart, more blocks of columns than are taken at once, sums shared by threads, batches.
SHAPES = [
    (256, 64, 64),
    (999, 64, 64),
    (999, 111, 128),
    (128, 999, 32),
    (300, 1536, 65),
    (300, 200, 1500),
    (1, 200, 500),
    (1, 4096, 64),
    (500, 200, 1),
    (1024, 4096, 32),
    (1024, 2048, 32),
    (40, 2048, 50),
    (40, 2000, 50),
    (16, 16, 17),
    (16, 16, 16),
]


def operand(rows: int, columns: int, transposed: bool, batch: int = 1, dtype: torch.dtype = torch.bfloat16):
    made = (
        torch.zeros(batch, columns, rows, dtype=dtype).mT if transposed else torch.zeros(batch, rows, columns).to(dtype)
    )
    return made if batch > 1 else made[0]


def extra(a: torch.Tensor, b: torch.Tensor) -> int:
    """Bytes at the peak of a @ b that the result does not occupy, as the profiler saw them."""
    torch.matmul(a, b)  # the first call of a shape also makes its kernel
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        kept = a @ b
    assert profiler.profiler is not None
    assert profiler.profiler.kineto_results is not None
    total = peak = 0
    events: list[Any] = list(profiler.profiler.kineto_results.events())
    for event in events:
        if event.name() == "[memory]":
            total += event.nbytes()
            peak = max(peak, total)
    assert total == kept.nbytes
    return peak - total


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


exact = pytest.mark.skipif(instructions() == "amx", reason="where AMX multiplies the rule is a fit")


@exact
@pytest.mark.parametrize("count", [1, 2, 3])
def test_scratch_is_the_allocators(count: int, threads):
    threads(count)
    wrong = {}
    for m, k, n in SHAPES:
        for transposed in (False, True):
            measured = extra(operand(m, k, transposed), operand(k, n, m % 2 == 0))  # how B lies makes no difference
            rule = product_scratch(Product(m, k, n, 1, transposed), torch.bfloat16, count, instructions())
            if rule != measured:
                wrong[m, k, n, transposed] = (rule, measured)
    assert not wrong


@exact
@pytest.mark.parametrize("count", [1, 2])
def test_scratch_of_batches(count: int, threads):
    threads(count)
    for batch, m, k, n in [(3, 300, 64, 300), (2, 111, 300, 64), (8, 17, 300, 1), (8, 1, 32, 1), (16, 300, 128, 16)]:
        for transposed in (False, True):
            measured = extra(operand(m, k, transposed, batch), operand(k, n, False, batch))
            product = Product(m, k, n, batch, transposed)
            assert product_scratch(product, torch.bfloat16, count, instructions()) == measured, (product, measured)


@pytest.mark.parametrize(("m", "k", "n"), [(576, 256, 576), (128, 512, 128), (100, 70, 33)])
@pytest.mark.skipif(not torch.cpu._is_avx512_bf16_supported(), reason="only there oneDNN packs in this way")
def test_a_layer_forward_and_backward(m: int, k: int, n: int, threads):
    """A layer's product and the gradient of its weight, planned and run; in one thread, to be repeatable."""
    threads(1)

    def work() -> Callable[[], None]:
        layer = nn.Linear(k, n, bias=False, dtype=torch.bfloat16)
        x, grad = torch.zeros(m, k, dtype=torch.bfloat16), torch.zeros(m, n, dtype=torch.bfloat16)

        def run() -> None:
            layer.weight.grad = None
            layer(x).backward(grad)

        return run

    planned, measured = planned_and_measured(work)
    assert planned == pytest.approx(measured, rel=0.15 if instructions() == "amx" else 0)


@exact
def test_fp16_packs_nothing_without_amx():
    assert extra(operand(30, 40, False, dtype=torch.float16), operand(40, 30, False, dtype=torch.float16)) == 0
    assert product_scratch(Product(300, 400, 300), torch.float16, 2, instructions()) == 0


@pytest.mark.parametrize("isa", ["amx", "avx512_bf16", "avx512"])
def test_small_products_are_torchs_own(isa):
    assert product_scratch(Product(16, 16, 16), torch.bfloat16, 1, isa) == 0
    assert product_scratch(Product(SMALL // 8, 1, 1, batch=8), torch.bfloat16, 1, isa) == 0
    assert product_scratch(Product(17, 16, 16), torch.bfloat16, 1, isa) > 0


@pytest.mark.slow
@pytest.mark.skipif(instructions() not in ("avx512_bf16", "avx512"), reason="needs AVX-512, and no AMX")
def test_scratch_without_instructions_for_bf16():
    """oneDNN told to use AVX-512 alone: its sums are a whole result."""
    code = (
        "import torch; from tests.inspect.test_memory_products import *\n"
        "for count in (1, 2):\n"
        "    torch.set_num_threads(count)\n"
        "    for m, k, n, batch in (64, 64, 64, 1), (100, 70, 33, 1), (1, 300, 40, 1), (8, 8, 65, 3):\n"
        "        rule = product_scratch(Product(m, k, n, batch), torch.bfloat16, count, 'avx512')\n"
        "        print(rule - extra(operand(m, k, False, batch), operand(k, n, False, batch)))"
    )
    environment = os.environ | {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert [line for line in done.stdout.split() if line.lstrip("-").isdigit()] == ["0"] * 8
