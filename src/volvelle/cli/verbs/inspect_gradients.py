"""`volvelle inspect gradients`: which parameters of a model a loss reaches, and where a NaN began."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from tyro.conf import Positional

from volvelle.cli.console import result, say, table

EXAMPLES = ("volvelle inspect gradients smollm2", "volvelle inspect gradients runs/adapt-smollm2-lora-1 svg=graph.svg")


@dataclass(frozen=True)
class Options:
    """The model, and the text whose next-token loss is traced."""

    model: Positional[str]
    """A known model, a Hugging Face repo id, a folder, or a run; adapters of a run stay apart from its weights."""
    text: str = "A volvelle is a paper wheel: a page that you operate by turning it."
    """The batch: one sequence."""
    svg: Path | None = None
    """Write the graph as a drawing."""
    depth: int | None = None
    """Fold modules below this level of the graph; chosen to stay readable when left out."""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """The dtype of weights and arithmetic: fp16 shows what overflows there."""


def main(options: Options) -> int:
    """Print the graph, what became of the parameters, and what is wrong; the exit code is 1 when something is."""
    import torch
    from torch.nn.functional import cross_entropy

    from volvelle.adapt import load_run
    from volvelle.errors import UsageError
    from volvelle.files import write_atomic
    from volvelle.inspect import trace_gradients

    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[options.precision]
    model = load_run(options.model, dtype=dtype, device="cuda" if torch.cuda.is_available() else "cpu", merged=False)
    assert model.tokenizer is not None
    tokens = model.tokenizer.encode(options.text)[: model.config.context]
    if len(tokens) < 2:
        raise UsageError(f"inspect gradients: text= needs at least two tokens, got {len(tokens)}")
    ids = torch.tensor([tokens], device=next(model.parameters()).device)
    say(f"{options.model}: next-token loss of {len(tokens)} tokens in {options.precision}; nothing is changed")

    report = trace_gradients(
        model, lambda: cross_entropy(model(ids[:, :-1]).logits[0].float(), ids[0, 1:]), depth=options.depth
    )
    say("", report.graph.text(), "")
    counts = Counter(p.state for p in report.parameters)
    table(("state", "parameters"), list(counts.items()))
    say("", str(report))
    if options.svg:
        write_atomic(options.svg, report.graph.svg())
        say(f"wrote {options.svg}")
    finite = report.loss if abs(report.loss) < float("inf") else str(report.loss)
    parameters = [{**asdict(p), "norm": None if p.state == "non-finite" else p.norm} for p in report.parameters]
    origin = asdict(report.origin) if report.origin else None
    result({"loss": finite, "origin": origin, "parameters": parameters})
    return 1 if report.problems or report.origin else 0
