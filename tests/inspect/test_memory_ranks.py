"""The plan of sharded and replicated steps against what a rank's allocator sees.

What a rank takes is measured where collectives are over at once and take nothing themselves: gloo copies what it
gathers and reduces, and frees the copies when its threads get to it, so its ranks' peaks hang on the clock.
"""

from __future__ import annotations

import contextlib

import pytest
import torch
import torch.distributed as dist
from tests.train.many import run
from torch import nn
from torch.testing._internal.distributed.fake_pg import FakeStore

from volvelle.inspect.memory_cards import card_plan
from volvelle.inspect.memory_inputs import Inputs
from volvelle.inspect.memory_measure import measure_peak
from volvelle.inspect.memory_options import Cards, StepOptions
from volvelle.inspect.memory_session import StepSession
from volvelle.inspect.memory_step import sharded_blocks
from volvelle.systems.generation import vqgan
from volvelle.train.options import FitOptions
from volvelle.train.phase import Loss
from volvelle.train.sharded import ShardedGroup

VOCABULARY, WIDTH, DEPTH = 3000, 192, 6
IDS = torch.arange(2 * 48).reshape(2, 48) % VOCABULARY


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x):
        return x + self.down(torch.relu(self.up(x)))


class Tiny(nn.Module):
    """Embedding, blocks and a head, tied or not: what matters to sharding in a language model."""

    def __init__(self, tied):
        super().__init__()
        self.embedding, self.head = nn.Embedding(VOCABULARY, WIDTH), nn.Linear(WIDTH, VOCABULARY, bias=False)
        self.layers = nn.ModuleList(Block() for _ in range(DEPTH))
        if tied:
            self.head.weight = self.embedding.weight

    def forward(self, ids):
        x = self.embedding(ids)
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


def loss_of(model, ids):
    return nn.functional.cross_entropy(model(ids).flatten(0, 1), ids.flatten())


def travelled(_state, bucket):
    """A communication hook of DDP that leaves the gradients as they are."""
    done = torch.futures.Future()
    done.set_result(bucket.buffer())
    return done


def measured(ranks, tied, shard, *, travels=True, precision="fp32", passes=1):
    """Bytes of tensors at the peak of a second step on this rank, of so many micro-batches."""
    torch.set_num_threads(1)

    def setup():
        model = wrapped = Tiny(tied)
        group = ShardedGroup() if shard == "fsdp" else None
        if group:
            group.prepare({"model": model})
        else:
            wrapped = nn.parallel.DistributedDataParallel(model)
            if not travels:
                wrapped.register_comm_hook(None, travelled)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)

        def loss(batch):
            with torch.autocast("cpu", torch.bfloat16, enabled=precision == "amp"):
                return Loss(loss_of(wrapped, batch))

        def apart(last):
            """What training wraps around a micro-batch."""
            if group is not None:
                return group.accumulating(loss, last=last)
            return contextlib.nullcontext() if last else wrapped.no_sync()

        def step():
            optimizer.zero_grad()
            for left in reversed(range(passes)):
                with apart(last=not left):
                    loss(IDS).value.backward()
            optimizer.step()

        return step

    return measure_peak(setup).peak


@pytest.fixture
def alone(request):
    """Rank 0 of many whose collectives do nothing."""
    threads = torch.get_num_threads()
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=request.param)
    yield request.param
    dist.destroy_process_group()
    torch.set_num_threads(threads)


def planned(shard, world, tied, **options):
    options = StepOptions(device="cpu", **options)
    with StepSession(lambda: Tiny(tied), Inputs(IDS), options, loss=loss_of, threads=1) as session:
        return card_plan(session.trace(len(IDS)), session.step, Cards.parse(f"{world}x1"), shard)


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("alone", [2, 4, 8], indirect=True)
@pytest.mark.parametrize("shard", ["ddp", "fsdp"])
def test_a_ranks_peak_is_the_planned_one(shard, alone, tied):
    peak = measured(None, tied, shard, travels=False)
    assert peak == pytest.approx(planned(shard, alone, tied).peak, rel=1e-3)


@pytest.mark.parametrize("alone", [4], indirect=True)
@pytest.mark.parametrize("shard", ["ddp", "fsdp"])
def test_under_autocast_too(shard, alone):
    peak = measured(None, False, shard, travels=False, precision="amp")
    assert peak == pytest.approx(planned(shard, alone, False, precision="amp").peak, rel=1e-3)


@pytest.mark.parametrize(("shard", "above"), [("ddp", 1e-3), ("fsdp", 0.02)])
@pytest.mark.parametrize("alone", [4], indirect=True)
def test_gradients_of_earlier_micro_batches_are_planned(shard, above, alone):
    peak = measured(None, False, shard, travels=False, passes=3)
    plan = planned(shard, alone, False, accumulated=True).peak
    # Of fsdp it is a bound: the share of a block's gradients gives way to the sum's.
    assert (1 - 1e-3) * peak <= plan <= (1 + above) * peak
    assert plan > planned(shard, alone, False).peak


def test_blocks_are_sharded_once_and_the_outermost():
    class Holder(nn.Module):
        def __init__(self, *parts):
            super().__init__()
            self.parts = nn.ModuleList(parts)

    class Called(Holder):
        def forward(self, x):
            return x

    linear = [nn.Linear(2, 2) for _ in range(5)]
    model = nn.Module()
    model.levels = nn.ModuleList([Called(linear[0]), Holder(linear[1]), nn.ModuleList([linear[2]])])
    model.levels.extend([linear[3], linear[3], nn.ReLU()])
    assert sharded_blocks(model) == [model.levels[0], linear[1], linear[2], linear[3]]
    in_a_row = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2))
    assert sharded_blocks(in_a_row) == [in_a_row[0], in_a_row[2]]


@pytest.mark.parametrize("alone", [2], indirect=True)
@pytest.mark.parametrize("shard", ["fsdp"])
def test_nested_and_sequential_models_are_sharded_as_planned(shard, alone):
    for model in (vqgan("small-f4"), nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2))):
        blocks = sharded_blocks(model)
        group = ShardedGroup()
        group.prepare({"model": model})
        assert [id(unit) for unit in group._units] == [id(block) for block in blocks]


@pytest.mark.slow
@pytest.mark.parametrize("shard", ["ddp", "fsdp"])
def test_over_gloo_no_rank_takes_less(shard, tmp_path):
    peaks = [outcome["value"] for outcome in run(tmp_path, 2, FitOptions(ranks=2), measured, True, shard)]
    assert min(peaks) >= (1 - 1e-3) * planned(shard, 2, True).peak
