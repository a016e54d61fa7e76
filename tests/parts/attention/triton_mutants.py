"""Broken copies of the Triton kernels, each of which the comparison of triton_cases.py must notice."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
from tests.parts.attention.triton_cases import both, close, quick  # noqa: F401 - a fixture

from volvelle.parts.attention import triton_backward, triton_bias, triton_forward, triton_launch, triton_tiles

# what is broken: (call, file, what stands there, what stands there instead)
MUTANTS = {
    "causal order is off by one": ("causal", triton_tiles, "ahead <= call.right", "ahead <= call.right + 1"),
    "the window is off by one": ("window", triton_tiles, "ahead >= -call.left", "ahead > -call.left"),
    "tiles at the edge count as whole": (
        "causal", triton_tiles, "last_full = tl.minimum(tl.maximum(i0 + shift + call.right + 1, 0)",
        "last_full = tl.minimum(tl.maximum(i0 + shift + call.right + BLOCK_K, 0)",
    ),
    "keys at the right edge are left out": (
        "causal", triton_tiles, "last = tl.minimum(tl.maximum(i1 + shift + call.right, 0)",
        "last = tl.minimum(tl.maximum(i0 + shift + call.right, 0)",
    ),
    "queries above the diagonal are left out": (
        "causal", triton_tiles, "first = tl.maximum(j0 - shift - call.right, 0)",
        "first = tl.maximum(j0 + BLOCK_Q - shift - call.right, 0)",
    ),
    "the mask is read along the wrong axis": (
        "mask (q, k)", triton_tiles, "i.to(tl.int64) * call.mask_i + j.to(tl.int64) * call.mask_j",
        "i.to(tl.int64) * call.mask_i + j.to(tl.int64) * call.mask_i",
    ),
    "diagonals are counted from one": (
        "distance", triton_tiles, "(i - j + call.n_k - 1)", "(i - j + call.n_k)",
    ),
    "segments need only be ordered": ("packed", triton_tiles, "of_query == of_key", "of_query >= of_key"),
    "the sum is not rescaled": ("plain", triton_forward, "sums * shrink[:, None]", "sums"),
    "the log-sum-exp forgets the sum": ("plain", triton_forward, "largest + tl.log2(total)", "largest"),
    "empty rows keep their -inf": (
        "nothing allowed", triton_tiles, 'tl.where(found == float("-inf"), float("inf"), found * LOG2E)',
        "found * LOG2E",
    ),
    "keys forget the scale": ("plain", triton_backward, "d_keys * call.scale", "d_keys"),
    "queries forget the scale": ("plain", triton_backward, "d_queries * call.scale", "d_queries"),
    "heads of a group are strided": (
        "plain", triton_backward, "head_kv * call.group + member", "head_kv + member * heads_kv",
    ),
    "the bias gradient is scaled": ("learnable", triton_bias, "total.to(d_bias", "(total * call.scale).to(d_bias"),
    "the bias gradient takes one row of the batch": (
        "learnable for all rows", triton_bias, "tl.where(b_bias == 1, b, batch_bias + 1)", "batch_bias + 1",
    ),
    "a diagonal falls on the wrong side": (
        "distance", triton_bias, "tl.where(turned < BLOCK, skewed, 0.0)", "tl.where(turned <= BLOCK, skewed, 0.0)",
    ),
    "the last tile of a diagonal is left out": (
        "distance", triton_bias, "for block in range(first, last)", "for block in range(first, last - 1)",
    ),
}  # fmt: skip
FILES = (triton_tiles, triton_forward, triton_backward, triton_bias, triton_launch)


def mutate(monkeypatch, folder, module, old, new):
    """Every file takes the kernels of a copy of `module` in which `new` stands for `old`."""
    source = Path(module.__file__).read_text()
    assert source.count(old) == 1
    path = Path(folder) / "mutant.py"
    path.write_text(source.replace(old, new))
    spec = importlib.util.spec_from_file_location("mutant", path)
    mutant = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(mutant)
    kernels = {name: value for name, value in vars(module).items() if type(value) is type(triton_tiles.mix)}
    for file in FILES:
        for name, kernel in kernels.items():
            if vars(file).get(name) is kernel:
                monkeypatch.setattr(file, name, getattr(mutant, name))


@pytest.mark.parametrize("mutant", MUTANTS)
def test_mutants_are_caught(mutant, monkeypatch, tmp_path):
    call, *change = MUTANTS[mutant]
    mutate(monkeypatch, tmp_path, *change)
    assert not close(*both(call, "grouped" if call == "learnable for all rows" or "group" in mutant else "square"))
