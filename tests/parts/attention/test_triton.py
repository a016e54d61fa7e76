"""The Triton back end: its kernels in the interpreter and on a device, what they compile to, and what it refuses."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tests.parts.attention.test_attention import tensors

from volvelle.parts.attention.attention import attention
from volvelle.parts.attention.spec import Shape, Spec
from volvelle.parts.attention.triton import Triton

CASES, MUTANTS = (Path(__file__).with_name(f"triton_{name}.py") for name in ("cases", "mutants"))
INSTALLED = importlib.util.find_spec("triton") is not None
needs_triton = pytest.mark.skipif(not INSTALLED, reason="triton is not installed (pip install triton)")
SPEC = Spec(Shape(2, 4, 2, 64, 64, 32, 32), "cuda", torch.bfloat16, False, False, False, False, False)


def run_cases(repository, marker, interpret):
    """Run triton_cases.py and, in the interpreter, triton_mutants.py in a process of its own."""
    environment = os.environ | {"TRITON_INTERPRET": "1" if interpret else "0"}
    files = [str(CASES), str(MUTANTS)] if interpret else [str(CASES)]
    command = [sys.executable, "-m", "pytest", *files, "-q", "-m", marker, "-p", "no:cacheprovider", "--tb=short"]
    done = subprocess.run(command, cwd=repository, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert " passed" in done.stdout


@needs_triton
def test_the_kernels_in_the_interpreter(repository):
    run_cases(repository, "not slow", interpret=True)


@needs_triton
@pytest.mark.slow
def test_more_of_the_kernels_in_the_interpreter(repository):
    run_cases(repository, "slow", interpret=True)


@needs_triton
@pytest.mark.gpu
def test_the_kernels_on_a_device(repository):
    run_cases(repository, "slow or not slow", interpret=False)


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


def in_python(source, **environment):
    done = subprocess.run(
        [sys.executable, "-c", source], capture_output=True, text=True, env=os.environ | environment
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


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
