"""The claim fsdp on two ranks and a few steps, and that neither whole weights nor wrong averages pass for it."""

from __future__ import annotations

import dataclasses

import pytest
import torch
import torch.distributed as dist

from volvelle.claims import fsdp
from volvelle.inspect.collectives_ranks import on_ranks

STILL, CURVE = 2, 4


def with_mutants(rank, jobs):
    """One of two ranks: the runs as they are, with whole weights on every rank, and with sums in place of means."""
    from volvelle.parts import collectives

    right = fsdp.replica(rank, jobs)
    whole = fsdp.replica(rank, [dataclasses.replace(job, shard="ddp") for job in jobs])
    original = collectives.reduce_scatter

    def summed(output, inputs, op, group, **options):
        return original(output, [2 * block for block in inputs], op, group, **options)

    collectives.reduce_scatter = summed
    assert dist.get_world_size() == 2
    return right, whole, fsdp.replica(rank, jobs)


@pytest.fixture(scope="module")
def found():
    """Findings by mutant."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    answers = on_ranks(2, with_mutants, (fsdp.jobs_of(STILL, CURVE),))
    still, one = fsdp.alone(fsdp.Setting(STILL, 2, moves=False)), fsdp.alone(fsdp.Setting(CURVE, 2))
    torch.set_num_threads(threads)
    names = ("right", "whole weights", "sums")
    return {name: fsdp.judge(2, runs, still, one) for name, runs in zip(names, zip(*answers, strict=True), strict=True)}


def broken(findings):
    return [finding.what for finding in findings if finding.held is False]


def test_sharded_training_is_the_same_training(found):
    assert broken(found["right"]) == []
    assert len([finding for finding in found["right"] if finding.held]) == 9


def test_whole_weights_do_not_pass_for_shards(found):
    assert broken(found["whole weights"]) == [
        "2 ranks: weights, gradients and moments of a rank, times p, over those of one process",
        "2 ranks: the same, beside (p - 1) (3 V of blocks + 2 V of the rest)",
    ]


def test_a_wrong_average_is_seen_in_gradients(found):
    assert any("gradient" in what for what in broken(found["sums"]))


def test_ranks_that_do_not_divide_the_weights_are_shown_and_not_judged(found):
    seen = fsdp.Seen([1.0, 1.0], torch.zeros(1).numpy(), torch.zeros(1).numpy(), {"weights": 40}, 90)
    one = seen._replace(held={"weights": 100})
    (share,) = fsdp._memory(3, [seen] * 3, one)
    assert share.value == pytest.approx(1.2)
    assert share.held is None
    assert not any("beside" in finding.what for finding in fsdp._bytes(3, [seen] * 3, [seen] * 3))
