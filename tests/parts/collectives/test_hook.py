"""Our all-reduce as DistributedDataParallel's communication hook, against stock DDP and one process."""

from __future__ import annotations

import pytest
import torch
from tests.parts.collectives import programs

from volvelle.parts.collectives import HookState


def relative(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    """Largest over the parameters of |found - expected| / |expected|, in the 2-norm."""
    assert found.keys() == expected.keys()
    return max(float((found[k] - expected[k]).norm() / expected[k].norm()) for k in expected)


@pytest.mark.parametrize("p", [2, 3, 4])
def test_gradients_equal_stock_ddp_and_one_process(pools, p):
    runs = {kind: pools(p).run(programs.train, kind) for kind in ("one", "stock", "ours")}
    one = runs["one"][0][0]
    for rank in range(p):
        assert relative(runs["ours"][rank][0], one) <= 1e-6
        assert relative(runs["ours"][rank][0], runs["stock"][rank][0]) <= 1e-6
        assert relative(runs["ours"][rank][0], runs["ours"][0][0]) == 0.0


@pytest.mark.parametrize("p", [2, 3])
def test_bf16_halves_the_bytes_and_costs_its_rounding(pools, p):
    full, short = (pools(p).run(programs.train, kind) for kind in ("ours", "bf16"))
    assert sum(sent for _, sent in full) == 2 * sum(sent for _, sent in short) > 0
    error = relative(short[0][0], full[0][0])
    assert 1e-6 < error <= 4 * torch.finfo(torch.bfloat16).eps


def test_compressing_into_integers_is_refused():
    with pytest.raises(TypeError, match=r"HookState: compress must be a floating dtype, got torch.int8"):
        HookState(compress=torch.int8)
