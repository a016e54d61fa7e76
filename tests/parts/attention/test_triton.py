"""The Triton back end: its kernels in the interpreter and on a device, what they compile to, and what it refuses."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from tests.parts.attention.test_attention import tensors
from tests.triton_runs import CARDS, NoDevice, in_python, needs_triton, run_cases

from volvelle.parts.attention.attention import attention
from volvelle.parts.attention.spec import Shape, Spec
from volvelle.parts.attention.triton import Triton

CASES, MUTANTS = (Path(__file__).with_name(f"triton_{name}.py") for name in ("cases", "mutants"))
SPEC = Spec(Shape(2, 4, 2, 64, 64, 32, 32), "cuda", torch.bfloat16, False, False, False, False, False)


@needs_triton
def test_the_kernels_in_the_interpreter(repository):
    run_cases(repository, (CASES, MUTANTS), "not slow", interpret=True)


@needs_triton
@pytest.mark.slow
def test_more_of_the_kernels_in_the_interpreter(repository):
    run_cases(repository, (CASES, MUTANTS), "slow", interpret=True)


@needs_triton
@pytest.mark.gpu
def test_the_kernels_on_a_device(repository):
    run_cases(repository, (CASES,), "slow or not slow", interpret=False)


def test_the_cpu_never_goes_to_triton():
    q, k, v = (x.requires_grad_() for x in tensors(1, 1, 1, 200, 200, 4, dtype=torch.float32))
    bias = torch.zeros(200, 200, requires_grad=True)
    why = attention(q, k, v, bias=bias, explain=True)[1]
    assert why.backend == "tiled"
    with pytest.raises(ValueError, match="back end 'triton' cannot serve this call: the kernels run on CUDA devices"):
        attention(q, k, v, backend="triton")


@needs_triton
@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({}, None),
        ({"dtype": torch.float32, "causal": True, "masked": True, "lse": True, "dropout": True}, None),
        ({"biased": True, "learnable_bias": True, "window": True, "segments": True}, None),
        ({"device": "cpu"}, "run on CUDA devices, not on cpu"),
        ({"dtype": torch.float64}, "float64 would lose digits"),
        ({"shape": SPEC.shape._replace(d=320)}, "wider than 256"),
        ({"shape": SPEC.shape._replace(d_v=320)}, "wider than 256"),
        ({"biased": True, "value_term": True}, "value term"),
        ({"biased": True, "computed_bias": True, "blockwise": lambda: True}, "asked block by block"),
        ({"order": 2}, "no second and no forward-mode"),
        ({"tangents": True}, "no second and no forward-mode"),
    ],
)
def test_support_is_said_honestly(change, reason):
    found = Triton().supports(SPEC._replace(**change))
    assert found is None if reason is None else reason in str(found)


def test_triton_is_imported_with_the_first_call_only():
    source = "import sys, volvelle.parts.attention.attention; print('triton' in sys.modules)"
    assert in_python(source).strip() == "False"


def test_without_triton_the_reason_names_it():
    source = (
        "import sys; sys.modules['triton'] = None\n"
        "import torch\n"
        "from volvelle.parts.attention.attention import attention\n"
        "q = torch.zeros(1, 1, 2, 4)\n"
        "try: attention(q, q, q, backend='triton')\n"
        "except ValueError as error: print(error)\n"
    )
    assert "triton is not installed (pip install triton)" in in_python(source, TRITON_INTERPRET="1")


TERMS = {  # dtype, d, terms
    "plain": (torch.bfloat16, 128, {}),
    "by diagonal": (torch.bfloat16, 128, {"right": 0, "numbers": torch.empty(4, 1023)}),
    "wide": (torch.bfloat16, 256, {"right": 0}),
    "all": (torch.float16, 64, {
        "left": 100, "right": 0, "dropout": 0.1, "seed": 2**50, "mask": torch.ones(512, 512).bool(),
        "bias": torch.empty(4, 512, 512), "q_segments": torch.zeros(1, 512).long(),
        "k_segments": torch.zeros(1, 512).long(),
    }),
}  # fmt: skip


@needs_triton
@pytest.mark.slow
@pytest.mark.parametrize("terms", TERMS)
@pytest.mark.parametrize("card", CARDS)
def test_the_kernels_compile_and_fit(card, terms, monkeypatch, tmp_path):
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver

    from volvelle.parts.attention import triton_launch as launch

    (arch, kib), (dtype, d, given) = CARDS[card], TERMS[terms]
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(driver, "_active", NoDevice(GPUTarget("cuda", arch, 32)))
    added = launch.Added(*(given.get(name) for name in launch.Added._fields))
    read = sum(x.element_size() for x in added[:3] if x is not None)
    monkeypatch.setattr(
        launch, "_blocks", lambda kind, *_: launch.choose(kind, (d, d), dtype.itemsize, kib * 1024, read)
    )
    compiled = {}

    def start(kernel, programs, arguments, blocks, sizes):
        compiled[kernel.__name__] = kernel.warmup(
            *arguments, grid=(programs,), **sizes, num_warps=blocks.warps, num_stages=blocks.stages
        )

    monkeypatch.setattr(launch, "_start", start)
    defaults = {"left": None, "right": None, "scale": 0.1, "dropout": 0.0, "seed": 0}
    options = launch.Options(**{name: given.get(name, value) for name, value in defaults.items()})
    q, k = torch.empty(1, 4, 512, d, dtype=dtype), torch.empty(1, 2, 512, d, dtype=dtype)
    out, lse = launch.forward(q, k, k, added, options)
    launch.backward(launch.Saved(out, lse, q, k, k, out, lse), added, options, bias_too=True)
    assert {"attend", "key_gradients", "query_gradients"} <= compiled.keys()
    assert len(compiled) == (4 if read else 3)
    for name, kernel in compiled.items():
        assert kernel.metadata.shared <= kib * 1024, name
        assert re.search(r"mma", kernel.asm["ptx"]), f"{name}: no matrix units"
        assert not re.search(r"\b(atom|red)\.", kernel.asm["ptx"]), f"{name}: atomics"
