"""Training memory: bytes a parameter before activations, and what checkpointing trades, planned and measured.

The plan runs the step on fake tensors; the oracle runs it for real and asks torch's profiler what the allocator saw.
"""

from __future__ import annotations

import dataclasses
import statistics
import time
from typing import TYPE_CHECKING, Any

from volvelle.claims.claim import Budget, Claim, Finding, Measurement, Paper, at_least, at_most

if TYPE_CHECKING:
    from volvelle.systems.language.config import LanguageConfig

CLAIM = Claim(
    title="The memory of a training step",
    family="train",
    paper=Paper(
        "Chen et al.; Rajbhandari et al.",
        2016,
        "Training Deep Nets with Sublinear Memory Cost; ZeRO (2020)",
        "section 4; ZeRO section 3.1",
        "https://arxiv.org/abs/1604.06174",
    ),
    sentence="mixed-precision training with Adam needs 16 to 20 bytes a parameter before any activation; recomputing "
    "activations (checkpointing) makes their memory sublinear in depth for one more forward pass",
    measured_by="small decoders: plan_memory's bytes a parameter at the end of a step, its peak against that of the "
    "profiler, activations at two depths with and without checkpointing, and the CPU time of both steps",
    summary="Know before the run what a training step will hold: weights, gradients, optimiser, activations, "
    "temporaries.",
    summary_zh="在运行之前就知道一个训练步占用多少内存：权重、梯度、优化器状态、激活与临时张量。",
    seconds={"quick": 50, "full": 240},
    recipe="volvelle plan qwen1.5-7b gpus=2x80",
)

_BOUNDS = {"amp": 16, "bf16-master": 20}


def measure(budget: Budget) -> Measurement:
    """Bytes a parameter, planned against profiled peaks, and what checkpointing saves and costs."""
    import torch

    depths = (4, 8) if budget == "quick" else (8, 16)
    rounds = 5 if budget == "quick" else 9
    config = _config(depths[0], width=192 if budget == "quick" else 384)
    findings = [*_bytes_a_parameter(config), *_against_the_profiler(config)]
    findings += _checkpointing(config, depths, rounds)
    setting = {
        "model": f"Llama-style decoders of {depths[0]} and {depths[1]} blocks, width {config.width}, "
        f"vocabulary {config.vocabulary}",
        "batch": "4 x 128 tokens",
        "threads": torch.get_num_threads(),
        "rounds": rounds,
    }
    plan = _plan(config, precision="amp", checkpointing=True)
    notes = ["the peak is that of tensor allocations; a process's resident set is larger"]
    return Measurement(
        findings, setting=setting, peers={"torch": torch.__version__}, pictures={"timeline": plan.svg()}, notes=notes
    )


def _config(depth: int, width: int) -> LanguageConfig:
    from volvelle.systems.language.config import GatedMLP, LanguageConfig, RMSNorm, Rope

    return LanguageConfig(
        "llama",
        vocabulary=2048,
        width=width,
        depth=depth,
        heads=width // 48,
        context=256,
        norm=RMSNorm(),
        mlp=GatedMLP(3 * width),
        position=Rope(),
    )


def _step(config: LanguageConfig) -> tuple[Any, Any, Any]:
    """What plan and profiler are given: the model, a batch, the loss over all its tokens."""
    import torch
    from torch.nn.functional import cross_entropy

    from volvelle.systems.language.decoder import Decoder

    def loss(model: Any, ids: Any) -> Any:
        return cross_entropy(model(ids).logits.flatten(0, 1).float(), ids.flatten())

    return lambda: Decoder(config), torch.zeros(4, 128, dtype=torch.long), loss


def _plan(config: LanguageConfig, **options: Any) -> Any:
    from volvelle.inspect import plan_memory

    build, ids, loss = _step(config)
    return plan_memory(build, ids, loss=loss, **options)


def _bytes_a_parameter(config: LanguageConfig) -> list[Finding]:
    """What stays when a step is over: weights, gradients and optimiser, over the number of parameters."""
    from volvelle.inspect.memory_ledger import CATEGORIES

    findings = []
    for precision, expected in _BOUNDS.items():
        plan = _plan(config, precision=precision)
        end = dict(zip(CATEGORIES, plan.timeline[-1].sizes, strict=True))
        kept = sum(end[name] for name in ("weights", "gradients", "optimiser")) / plan.parameters
        what = f"{precision}: bytes a parameter of weights, gradients and Adam"
        findings.append(Finding(what, kept, "B", bound=f"{expected} +- 0.1", held=abs(kept - expected) <= 0.1))
    return findings


def _against_the_profiler(config: LanguageConfig) -> list[Finding]:
    from volvelle.inspect import measure_memory

    build, ids, loss = _step(config)
    cases: dict[str, dict[str, Any]] = {
        "fp32": {},
        "bf16 autocast": {"precision": "amp"},
        "bf16 with fp32 masters": {"precision": "bf16-master"},
        "fp32, checkpointed": {"checkpointing": True},
        "LoRA": {"method": "lora"},
    }
    findings = []
    for name, options in cases.items():
        planned = _plan(config, **options).peak
        measured = measure_memory(build, ids, loss=loss, **options).peak
        findings.append(Finding(f"{name}: the profiler's peak", measured / 1e6, "MB"))
        findings.append(at_most(f"{name}: the plan's error", abs(planned / measured - 1), 0.05))
    return findings


def _checkpointing(config: LanguageConfig, depths: tuple[int, int], rounds: int) -> list[Finding]:
    """Activations a block, and the time of a step, with and without recomputation."""
    deeper = dataclasses.replace(config, depth=depths[1])
    a_block = {}
    for switch in (False, True):
        held = [_activations(_plan(c, checkpointing=switch)) for c in (config, deeper)]
        a_block[switch] = (held[1] - held[0]) / (depths[1] - depths[0])
    ratio = _time_ratio(config, rounds)
    middle = statistics.median(ratio)
    return [
        Finding("activations that a further block adds", a_block[False] / 1e6, "MB"),
        Finding("the same with checkpointing", a_block[True] / 1e6, "MB"),
        at_least("activations a block: plain over checkpointed", a_block[False] / a_block[True], 5, "x"),
        # One forward pass more, of three passes' worth of products: 4/3.
        at_least("time of a step: checkpointed over plain", middle, 1.05, "x", spread=(min(ratio), max(ratio))),
        at_most("time of a step: no more than twice", middle, 2.0, "x"),
    ]


def _activations(plan: Any) -> int:
    """The largest sum of activations that is alive in the forward pass."""
    from volvelle.inspect.memory_ledger import CATEGORIES

    index = CATEGORIES.index("activations")
    return max(point.sizes[index] for point in plan.timeline if point.phase == "forward")


def _time_ratio(config: LanguageConfig, rounds: int) -> list[float]:
    """Steps of both kinds in turn, one ratio a round, after a warm-up."""
    from volvelle.inspect.memory_options import StepOptions
    from volvelle.inspect.memory_step import TrainingStep

    build, ids, loss = _step(config)
    steps = [TrainingStep(build, StepOptions(checkpointing=switch), loss) for switch in (False, True)]
    ratios = []
    for number in range(rounds + 1):
        seconds = []
        for step in steps:
            begin = time.process_time()
            step.run(ids)
            seconds.append(time.process_time() - begin)
        if number:
            ratios.append(seconds[1] / seconds[0])
    return ratios
