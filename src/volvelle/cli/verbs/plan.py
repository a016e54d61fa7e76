"""`volvelle plan`: the memory of a training step, before it is run: its parts, whether it fits, what is cheaper."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tyro.conf import Positional

from volvelle.adapt.choices import MethodName, Methods
from volvelle.cli.console import result, say
from volvelle.inspect.memory_options import PRECISIONS, Cards, Optimizer, Precision, Shard

if TYPE_CHECKING:
    from volvelle.inspect.memory_models import Found
    from volvelle.inspect.memory_plan import MemoryPlan

EXAMPLES = (
    "volvelle plan smollm2 method=lora checkpointing=true batch=8 length=512",
    "volvelle plan qwen1.5-72b gpus=20x80 shard=fsdp precision=bf16-master checkpointing=true svg=timeline.svg",
)


@dataclass(frozen=True)
class Options(Methods):
    """The model, the step, and the cards that it should fit."""

    model: Positional[str]
    """A published model (qwen1.5-72b), a known one, a folder with config.json, a .gguf file, a run, or owner/name."""
    method: MethodName = "full"
    """What is trained: all (full), additions to some layers (lora, dora, adapter), or to the text (prefix, prompt)."""
    precision: Precision = "amp"
    """amp: fp32 weights, bf16 autocast; bf16: everything in bf16; -master: half precision with fp32 copies."""
    checkpointing: bool = False
    """Recompute each block in the backward pass instead of keeping its activations."""
    batch: int = 1
    """Samples a card in one micro-batch."""
    length: int | None = None
    """Tokens in one sample (of an encoder-decoder, in its source and in its answer); 2048, or a shorter context."""
    optimizer: Optimizer = "adamw"
    """adamw is torch's fused form; adamw-foreach its default on CUDA, with temporaries as large as the weights."""
    gpus: str | None = None
    """Cards as COUNTxGIGABYTES, such as 2x80; without it the step is planned for this machine's processor."""
    shard: Shard = "ddp"
    """ddp: every card holds everything; fsdp: weights, gradients and optimiser are split over the cards."""
    svg: Path | None = None
    """Write the step's timeline as a drawing."""
    advise: bool = True
    """Plan cheaper alternatives, and the largest batch that fits the cards."""


def main(options: Options) -> int:
    """Print the plan; nothing is allocated and no weights are read."""
    from volvelle.inspect.memory_models import find_config

    # All that can be mistyped is checked before torch is loaded.
    cards = None if options.gpus is None else Cards.parse(options.gpus)
    found = find_config(options.model)
    length = _length(options, found)
    plan = _plan(options, found, length, cards)
    say(_first_line(options, found, length, cards), "", str(plan))
    explained = _explain(options, plan, cards)
    say(*explained)
    if options.svg is not None:
        from volvelle.files import write_atomic

        write_atomic(options.svg, plan.svg())
        say("", f"wrote {options.svg}")
    from volvelle.inspect.memory_report import record

    result({"model": options.model, "source": found.source, "length": length, **record(plan), "explained": explained})
    return 0


def _length(options: Options, found: Found) -> int:
    from volvelle.errors import UsageError

    for name in ("batch", "length"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise UsageError(f"plan: {name} must be at least 1, got {value}")
    if options.length is not None and options.length > found.config.context:
        raise UsageError(f"length={options.length}: {options.model} has a context of {found.config.context} tokens")
    return options.length or min(found.config.context, 2048)


def _plan(options: Options, found: Found, length: int, cards: Cards | None) -> MemoryPlan:
    import torch

    from volvelle.inspect.memory_isolated import isolated
    from volvelle.systems.language.encoder_decoder_config import EncoderDecoderConfig
    from volvelle.train.estimate import plan_language, whole_windows

    planning: dict[str, Any] = {
        "method": "full" if options.method == "full" else options.named(options.method),
        "precision": options.precision,
        "checkpointing": options.checkpointing,
        "optimizer": options.optimizer,
        "threads": torch.get_num_threads(),  # of the training, not of the process that plans it
    }
    if cards is not None:
        planning |= {"gpus": cards, "shard": options.shard, "search": options.advise}
    batch = whole_windows(length, sources=isinstance(found.config, EncoderDecoderConfig))
    # In a process of its own: an operation that cannot run on fake tensors would end this one without a word.
    return isolated(lambda: plan_language(found.config, batch, size=options.batch, advise=options.advise, **planning))


def _first_line(options: Options, found: Found, length: int, cards: Cards | None) -> str:
    where = "this machine's processor" if cards is None else str(cards)
    sides = " of source and as many of answer" if found.config.family == "bart" else ""
    where += f", {options.shard}" if cards is not None and cards.count > 1 else ""
    return (
        f"{options.model}: {found.config.family}, {found.config.depth} blocks, from {found.source}\n"
        f"{options.method}, {PRECISIONS[options.precision]}; {options.batch} x {length} tokens{sides} a card; {where}; "
        "planned on fake tensors, nothing is allocated"
    )


def _explain(options: Options, plan: MemoryPlan, cards: Cards | None) -> list[str]:
    """Where the figures come from that are quoted for full fine-tuning."""
    from volvelle.inspect.memory_cards import INCLUDED, QUOTE, quoted_figures

    if options.method != "full" or not options.optimizer.startswith("adamw"):
        return []
    size = 80.0 if cards is None else cards.gigabytes
    lines = ["", quoted_figures(plan.parameters, size), *(f"  {line}" for line in INCLUDED)]
    return [*lines, QUOTE] if plan.parameters > 1e9 else lines
