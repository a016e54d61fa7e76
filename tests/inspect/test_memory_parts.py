"""The pieces under a plan: ledger, tracker, known values, kernel rules, cards, drawing, isolation."""

from __future__ import annotations

import os
import signal
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.inspect.peaks import planned_and_measured
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from volvelle.errors import VolvelleError
from volvelle.inspect import plan_memory
from volvelle.inspect.memory_advice import at_least
from volvelle.inspect.memory_cards import quoted_figures
from volvelle.inspect.memory_drawing import timeline_svg
from volvelle.inspect.memory_inputs import Inputs
from volvelle.inspect.memory_isolated import isolated
from volvelle.inspect.memory_kernels import Kernels
from volvelle.inspect.memory_ledger import Block, Ledger
from volvelle.inspect.memory_options import Cards, StepOptions
from volvelle.inspect.memory_session import Session
from volvelle.inspect.memory_step import TrainingStep, blocks_of, cast
from volvelle.inspect.memory_tracker import StorageTracker

F = nn.functional


def loss_of(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return model(x).sum()


class TestLedger:
    @given(st.lists(st.tuples(st.integers(1, 100), st.integers(0, 5)), min_size=1, max_size=30))
    @settings(deadline=None)
    def test_peak_against_a_loop(self, program):
        """Each item allocates a size, then frees the oldest `n` live blocks."""
        ledger, live, total, best = Ledger(), [], 0, 0
        for size, free in program:
            live.append(ledger.allocate(Block(size, "op", "forward", "")))
            total += size
            best = max(best, total)
            for _ in range(min(free, len(live))):
                index = live.pop(0)
                total -= ledger.blocks[index].size
                ledger.release(index, "op", "backward")
        peak, at = ledger.peak()
        assert peak == best
        ledger.settle({})
        assert sum(ledger.composition(at).values()) == best
        assert sorted(ledger.live(len(ledger.entries) - 1)) == sorted(live)

    def test_window(self):
        ledger = Ledger()
        first = ledger.allocate(Block(100, "op", "forward", ""))
        ledger.release(first, "op", "forward")
        start = len(ledger.entries)
        ledger.allocate(Block(30, "op", "forward", ""))
        assert ledger.peak(start) == (30, 2)
        assert ledger.peak()[0] == 100


class TestTracker:
    def test_views_share_and_results_count(self):
        with FakeTensorMode(), StorageTracker() as tracker:
            x = torch.empty(100)
            views = [x[:10], x.view(10, 10).t(), x.detach()]
            assert tracker.live_bytes == 400
            del x
            assert tracker.live_bytes == 400
            del views
            assert tracker.live_bytes == 0

    def test_resize_and_in_place(self):
        with FakeTensorMode(), StorageTracker() as tracker:
            x = torch.empty(100)
            x.add_(1).mul_(2)
            assert tracker.live_bytes == 400
            x.resize_(300)
            assert tracker.live_bytes == 1200

    def test_grain(self):
        with FakeTensorMode(), StorageTracker(grain=512) as tracker:
            x = torch.empty(1)
            y = torch.empty(129)
            assert tracker.live_bytes == 512 + 1024
            del x, y

    def test_module_paths(self):
        model = nn.Sequential(nn.Linear(3, 5), nn.Sequential(nn.ReLU()))
        with FakeTensorMode(allow_non_fake_inputs=True), StorageTracker() as tracker, tracker.watching(model):
            model(torch.empty(2, 3))
        made = {block.op: block.module for block in tracker.ledger.blocks if block.module}
        assert made["aten::addmm"] == "0"
        assert made["aten::relu"] == "1.0"
        assert tracker.module == ""


class TestKnownValues:
    def test_constants_are_followed(self):
        with Session() as session:
            rates = torch.linspace(0, 0.3, 4)
            assert [round(r, 3) for r in rates.tolist()] == [0.0, 0.1, 0.2, 0.3]
            mask = torch.ones(3, 5, dtype=torch.bool)
            assert bool(mask.all())
            mask[1, 2] = False
            assert not bool(mask.all())
            assert int((torch.arange(10) % 3 == 0).sum()) == 4
        assert session.assumptions == []

    def test_overwritten_and_random_values_are_unknown(self):
        with Session() as session:
            x = torch.zeros(3)
            x += torch.empty(3)
            assert bool((x == 0).all())
            assert not bool(torch.rand(3).bool().any())
        assert len(session.assumptions) == 2

    def test_a_loop_that_waits_for_a_value_ends(self):
        def wait() -> None:
            while bool(torch.rand(3).bool().all()):
                pass

        with Session(), pytest.raises(VolvelleError, match="asks a tensor's value again and again"):
            wait()


CONVOLUTIONS = [
    # in, out, kernel, stride, groups, size, memory format
    (64, 64, 3, 1, 1, 28, torch.contiguous_format),
    (64, 128, 3, 2, 1, 28, torch.contiguous_format),
    (128, 256, 1, 2, 1, 28, torch.contiguous_format),
    (3, 64, 7, 2, 1, 64, torch.contiguous_format),
    (96, 96, 3, 1, 96, 28, torch.contiguous_format),
    (96, 96, 7, 1, 96, 28, torch.channels_last),
    (96, 192, 2, 2, 1, 28, torch.channels_last),
]


class TestKernels:
    """Each rule against the allocator, for one operation forward and backward."""

    @pytest.mark.parametrize("case", CONVOLUTIONS)
    def test_convolution(self, case):
        c_in, c_out, kernel, stride, groups, size, form = case

        def work() -> Callable[[], None]:
            x = torch.zeros(4, c_in, size, size).to(memory_format=form).requires_grad_(c_in > 3)
            layer = nn.Conv2d(c_in, c_out, kernel, stride, kernel // 2, groups=groups, bias=False)

            def run() -> None:
                x.grad = layer.weight.grad = None
                layer(x).backward(torch.ones(()).expand(*layer(x).shape))

            return run

        planned, measured = planned_and_measured(work)
        assert planned == pytest.approx(measured, rel=0.1)

    @pytest.mark.parametrize("heads", [2, 6])
    @pytest.mark.parametrize("n", [17, 200, 800])
    def test_attention(self, n: int, heads: int):
        def work() -> Callable[[], None]:
            q = torch.zeros(2, heads, n, 16, requires_grad=True)

            def run() -> None:
                q.grad = None
                F.scaled_dot_product_attention(q, q, q).sum().backward()

            return run

        planned, measured = planned_and_measured(work)
        assert planned == pytest.approx(measured, rel=0.01)

    @pytest.mark.parametrize("name", ["norm", "mixed", "batch norm", "masked softmax", "logsumexp", "expanded product"])
    def test_others(self, name: str):
        def work() -> Callable[[], None]:
            x = torch.zeros(8, 32, 10, 10, requires_grad=True)
            norm, batch_norm = nn.LayerNorm(10), nn.BatchNorm2d(32)
            half = torch.zeros(8, 32, 10, 10, dtype=torch.bfloat16)
            weight = torch.zeros(10, 50, requires_grad=True)
            runs = {
                "norm": lambda: norm(x.transpose(1, 2)).sum().backward(),
                "mixed": lambda: (x * half + half).sum().backward(),
                "batch norm": lambda: batch_norm(x).sum().backward(),
                "logsumexp": lambda: x.logsumexp(1).sum().backward(),
                "expanded product": lambda: (x.flatten(0, 2) @ weight).sum().backward(),
                "masked softmax": lambda: F.scaled_dot_product_attention(x, x, x, dropout_p=0.1).sum().backward(),
            }

            def run() -> None:
                x.grad = None
                runs[name]()

            return run

        planned, measured = planned_and_measured(work)
        assert planned == pytest.approx(measured, rel=0.01)

    def test_cuda_has_its_own_rules(self):
        with FakeTensorMode():
            x = torch.empty(4, 64, 28, 28)
            weight = torch.empty(64, 64, 3, 3)
            arguments = (x, weight, None, [1, 1], [1, 1], [1, 1], False, [0, 0], 1)
            op = torch.ops.aten.convolution.default
            assert Kernels("cpu", 2)(op, arguments, {}, op(*arguments)) > 0
            assert Kernels("cuda", 2)(op, arguments, {}, op(*arguments)) == 0


class TestStep:
    def test_cast_keeps_ties(self):
        model = nn.Sequential(nn.Embedding(5, 3), nn.Linear(3, 5))
        model[1].weight = model[0].weight
        model.register_buffer("count", torch.zeros(1, dtype=torch.long))
        cast(model, torch.bfloat16)
        assert model[1].weight is model[0].weight
        assert model[0].weight.dtype == torch.bfloat16
        assert model.get_buffer("count").dtype == torch.long

    def test_blocks_are_the_repeated_ones(self):
        model = nn.Module()
        model.stem = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
        model.blocks = nn.ModuleList(nn.Linear(50, 50) for _ in range(3))
        assert blocks_of(model) == list(model.blocks)
        assert blocks_of(nn.Linear(2, 2)) == []

    @pytest.mark.parametrize("precision", ["fp32", "bf16", "amp", "bf16-master"])
    def test_a_real_step_learns(self, precision):
        """The planned program is a training program: on real tensors it lowers its loss."""
        torch.manual_seed(0)
        x = torch.randn(16, 8)

        def loss(model: nn.Module, inputs: torch.Tensor) -> torch.Tensor:
            values.append(model(inputs.to(next(model.parameters()).dtype)).float().square().mean())
            return values[-1]

        values: list[torch.Tensor] = []
        step = TrainingStep(lambda: nn.Linear(8, 4), StepOptions(precision=precision), loss)
        for group in step.optimizer.param_groups:
            group["lr"] = 1e-2
        for _ in range(5):
            step.run(x)
        assert values[-1] < values[0]


class TestInputs:
    def test_a_tensor_that_stands_twice_is_one(self):
        ids, other = torch.arange(6).view(3, 2), torch.zeros(3, 1)
        for size in (2, 3, 5):
            real = Inputs({"ids": ids, "targets": [ids], "x": other}).real(size)
            assert real["ids"] is real["targets"][0] is not ids
            assert (len(real["ids"]), len(real["x"])) == (size, size)
        shared, apart = (
            plan_memory(
                lambda: nn.Embedding(7, 4),
                {"ids": ids, "again": again},
                loss=lambda model, batch: model(batch["ids"]).sum(),
            )
            for again in (ids, ids.clone())
        )
        assert apart.composition["inputs"] - shared.composition["inputs"] == ids.nbytes


class TestCards:
    def test_data_parallel_adds_gradient_buckets(self):
        build = lambda: nn.Sequential(nn.Linear(100, 100), nn.Linear(100, 100))  # noqa: E731
        x = torch.zeros(2, 100)
        one = plan_memory(build, x, loss=loss_of, gpus="1x1", device="cpu")
        two = plan_memory(build, x, loss=loss_of, gpus="2x1", device="cpu")
        assert one.card is not None
        assert two.card is not None
        assert one.card.peak == one.peak == two.peak
        assert two.card.peak - two.peak == 4 * 2 * (100 * 100 + 100)

    def test_sharding_divides_what_persists(self):
        build = lambda: nn.Sequential(*(nn.Linear(300, 300, bias=False) for _ in range(8)))  # noqa: E731
        peaks = {}
        for count in (2, 4, 8):
            plan = plan_memory(build, torch.zeros(1, 300), loss=loss_of, gpus=f"{count}x1", shard="fsdp", device="cpu")
            assert plan.card is not None
            peaks[count] = plan.card.peak - plan.card.communication
        layer = 4 * 300 * 300
        assert plan.card is not None
        assert plan.card.communication == 3 * layer  # two layers' weights, and the buffer that gradients travel in
        # 8 layers x 16 bytes, shared by 2, 4, 8 cards; activations of one sample are small.
        for count, peak in peaks.items():
            assert peak == pytest.approx(8 * 4 * layer / count, rel=0.3)
        assert peaks[2] > peaks[4] > peaks[8]

    def test_verdict_and_advice(self):
        build = lambda: nn.Sequential(*(nn.Linear(512, 512) for _ in range(4)))  # noqa: E731
        plan = plan_memory(
            build, torch.zeros(4, 512), loss=loss_of, gpus="1x0.012", advise=True, precision="amp", device="cpu"
        )
        assert plan.card is not None
        assert not plan.card.fits
        assert plan.card.verdict.startswith("does not fit")
        final = plan.cheaper[-1]
        assert final.change.endswith("precision=bf16")
        assert final.bound or final.fits is not None

    @pytest.mark.parametrize("gigabytes", [0.0008, 0.003])
    def test_largest_batch_is_the_largest(self, gigabytes: float):
        def peak(batch: int) -> int:
            return plan_memory(build, torch.zeros(batch, 64), loss=loss_of, device="cpu").peak

        build = lambda: nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 64))  # noqa: E731
        plan = plan_memory(build, torch.zeros(2, 64), loss=loss_of, gpus=f"1x{gigabytes}", search=True, device="cpu")
        best = plan.largest_batch
        assert best is not None
        assert best > 2
        assert peak(best) <= gigabytes * 1e9 < peak(best + 1)

    def test_nothing_fits(self):
        plan = plan_memory(lambda: nn.Linear(64, 64), torch.zeros(2, 64), loss=loss_of, gpus="1x0.00001", search=True)
        assert plan.largest_batch == 0
        assert "not even one sample" in str(plan)

    def test_quoted_figures(self):
        seven, seventy = quoted_figures(7_721_324_544), quoted_figures(72_287_920_128)
        assert "123.5 GB -> 2 x 80 GB" in seven
        assert "154.4 GB -> 2 x 80 GB = 160 GB" in seven
        assert "1156.6 GB -> 15 x 80 GB" in seventy
        assert "1445.8 GB -> 19 x 80 GB" in seventy

    def test_bounds_are_below_plans(self):
        n = 512 * 512
        for precision in ("fp32", "bf16", "amp", "bf16-master"):
            plan = plan_memory(
                lambda: nn.Linear(512, 512, bias=False),
                torch.zeros(1, 512),
                loss=lambda model, x: model(x.to(model.weight.dtype)).sum(),
                precision=precision,
            )
            assert at_least(StepOptions(precision=precision), n) <= plan.peak

    def test_capacity_is_decimal(self):
        assert Cards.parse("2 x 80GB").capacity == 80_000_000_000


class TestReport:
    def test_svg_is_well_formed_and_self_contained(self):
        plan = plan_memory(
            lambda: nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64)),
            torch.zeros(8, 64),
            loss=loss_of,
            gpus="1x0.0002",
            device="cpu",
        )
        root = ElementTree.fromstring(timeline_svg(plan))
        assert root.tag.endswith("svg")
        text = " ".join(element.text or "" for element in root.iter())
        assert all(word in text for word in ("weights", "activations", "backward", "one card"))
        assert "http" not in timeline_svg(plan).replace("http://www.w3.org/2000/svg", "")

    def test_text_names_every_category_and_adds_up(self):
        plan = plan_memory(lambda: nn.Linear(64, 64), torch.zeros(8, 64), loss=loss_of)
        shown = str(plan)
        assert all(f"  {category}" in shown for category in plan.composition)
        assert f"{plan.peak:,} bytes" in shown
        assert sum(plan.composition.values()) == plan.peak


class TestIsolated:
    def test_a_plan_crosses_the_border(self):
        build, x = lambda: nn.Linear(64, 64), torch.zeros(8, 64)
        inside = plan_memory(build, x, loss=loss_of, threads=2)
        outside = isolated(lambda: plan_memory(build, x, loss=loss_of, threads=2))
        assert outside.peak == inside.peak
        assert outside.timeline == inside.timeline

    def test_real_work_on_many_numbers_does_not_wait_for_threads_that_are_not_there(self):
        numbers = torch.arange(1_000_000.0)
        expected = float(numbers.cos().sum())  # with this process's threads
        assert isolated(lambda: float(numbers.cos().sum())) == pytest.approx(expected, rel=1e-4, abs=1.0)
        assert isolated(torch.get_num_threads) == 1

    def test_errors_cross_the_border(self):
        with pytest.raises(VolvelleError, match="without a loss"):
            isolated(lambda: plan_memory(lambda: nn.Linear(2, 2), torch.zeros(1, 2)))

    def test_a_crash_is_an_error(self):
        with pytest.raises(VolvelleError, match="ended by SIGABRT"):
            isolated(lambda: os.kill(os.getpid(), signal.SIGABRT))
