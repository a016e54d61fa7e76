"""The model's formulas against counted bytes, its fit against numbers it must recover, and the choice of algorithm."""

from __future__ import annotations

import itertools

import pytest
import torch
from tests.parts.collectives import programs

from volvelle.parts.collectives import Topology, choose
from volvelle.parts.collectives.model import Error, Fit, Timing, error_of, fit, work_of

NAMES = ("ring", "halving-doubling", "recursive-doubling", "tree", "star")


@pytest.mark.parametrize("p", [1, 2, 3, 4, 5])
def test_formulas_say_what_is_sent(pools, p):
    """Bytes and messages of all ranks, counted on real runs, are those of the model."""
    batch = [{"algorithm": a, "count": 240, "dtype": torch.float32, "op": "sum"} for a in NAMES]
    results = pools(p).run(programs.reduce_all, batch)
    for i, case in enumerate(batch):
        work = work_of(case["algorithm"], p, 960)
        assert sum(results[rank][i][1] for rank in range(p)) == work.total, case
        assert sum(results[rank][i][3] for rank in range(p)) == work.messages, case


def runs(truth: Fit, noise: float = 0.0) -> list[Timing]:
    generator = torch.Generator().manual_seed(0)
    grid = itertools.product(NAMES, (2, 3, 4), (1 << 10, 1 << 16, 1 << 22))
    return [
        Timing(a, p, n, truth.seconds(a, p, n) * (1 + noise * float(torch.randn((), generator=generator))))
        for a, p, n in grid
    ]


def test_fit_recovers_and_never_goes_negative():
    truth = Fit(3e-5, 2e-10, 0.0, 4e-10)
    found = fit(runs(truth))
    assert found == pytest.approx(truth, rel=1e-6, abs=1e-12)
    noisy = fit(runs(truth, noise=0.1))
    assert min(noisy) >= 0
    assert error_of(noisy, runs(truth)).median < 0.1


def test_error_is_relative_and_sees_a_wrong_model():
    truth = Fit(1e-5, 1e-9, 0.0, 0.0)
    assert error_of(truth, runs(truth)).worst < 1e-12
    half = Fit(0.5e-5, 0.5e-9, 0.0, 0.0)
    assert error_of(half, runs(truth)) == pytest.approx(Error(0.5, 0.5, 45))


def test_too_few_timings_are_refused():
    with pytest.raises(ValueError, match="fit: needs at least 4 timings, got 3"):
        fit(runs(Fit(1e-5, 1e-9, 0.0, 0.0))[:3])
    with pytest.raises(ValueError, match="work_of: algorithm has no formula: 'butterfly'"):
        work_of("butterfly", 4, 8)


def test_apart_is_shared_where_every_rank_has_a_core():
    found = Fit(1e-5, 1e-9, 1e-6, 1e-10)
    for name in ("ring", "halving-doubling", "recursive-doubling"):
        assert found.apart(name, 2, 4096, cores=2) == pytest.approx(found.seconds(name, 2, 4096))


@pytest.mark.parametrize(
    ("size", "ranks", "expected"),
    [
        (1 << 10, 4, "recursive-doubling"),
        (1 << 10, 5, "recursive-doubling"),
        (512 << 10, 4, "halving-doubling"),
        (512 << 10, 5, "ring"),
        (64 << 20, 4, "ring"),
        (64 << 20, 1024, "halving-doubling"),
    ],
)
def test_choice(size, ranks, expected):
    choice = choose(size, ranks)
    assert choice.algorithm == expected
    assert choice.why


def test_machines_with_several_ranks_get_two_levels():
    assert choose(1 << 20, 4, Topology.of(["a", "a", "b", "b"])).algorithm == "two-level"
    assert choose(64 << 20, 4, Topology.of("abcd")).algorithm == "ring"
    assert choose(64 << 20, 4, Topology.of("aaaa")).algorithm == "ring"


@pytest.mark.parametrize("nodes", [((0, 1), ()), ((0,), (2,)), ((0, 1), (1,))])
def test_topology_holds_every_rank_once(nodes):
    with pytest.raises(ValueError, match=r"every rank 0 \.\. p - 1 once"):
        Topology(nodes)
