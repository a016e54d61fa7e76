"""The plan of sharded and replicated steps against what a rank's allocator sees.

What a rank takes is measured where collectives are over at once and take nothing themselves: gloo copies what it
gathers and reduces, and frees the copies when its threads get to it, so its ranks' peaks hang on the clock.
"""

from __future__ import annotations

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


def measured(ranks, tied, shard, *, travels=True):
    """Bytes of tensors at the peak of a second step on this rank."""
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
            return Loss(loss_of(wrapped, batch))

        def step():
            optimizer.zero_grad()
            if group is None:
                loss(IDS).value.backward()
            else:
                with group.accumulating(loss, last=True):
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


def planned(shard, world, tied):
    options = StepOptions(device="cpu")
    with StepSession(lambda: Tiny(tied), Inputs(IDS), options, loss=loss_of, threads=1) as session:
        return card_plan(session.trace(len(IDS)), session.step, Cards.parse(f"{world}x1"), shard)


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("alone", [2, 4, 8], indirect=True)
@pytest.mark.parametrize("shard", ["ddp", "fsdp"])
def test_a_ranks_peak_is_the_planned_one(shard, alone, tied):
    peak = measured(None, tied, shard, travels=False)
    assert peak == pytest.approx(planned(shard, alone, tied).peak, rel=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("shard", ["ddp", "fsdp"])
def test_over_gloo_no_rank_takes_less(shard, tmp_path):
    peaks = [outcome["value"] for outcome in run(tmp_path, 2, FitOptions(ranks=2), measured, True, shard)]
    assert min(peaks) >= (1 - 1e-3) * planned(shard, 2, True).peak
