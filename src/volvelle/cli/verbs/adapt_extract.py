"""`volvelle adapt extract`: a full fine-tune as a LoRA."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from tyro.conf import Positional

from volvelle.cli.console import result, say, table

if TYPE_CHECKING:
    from volvelle.adapt.extract import Kept

EXAMPLES = (
    "volvelle adapt extract smollm2 runs/adapt-smollm2-full-1",
    "volvelle adapt extract smollm2 runs/adapt-smollm2-full-1 rank=16",
)


@dataclass(frozen=True)
class Options:
    """Which two models, and how much to keep."""

    model: Positional[str]
    """The base: a known model, a Hugging Face repo id, a folder, or a run."""
    tuned: Positional[str]
    """The same model after full fine-tuning: a run, or a folder."""
    rank: int | None = None
    """The rank of every layer; None: by energy."""
    energy: float | None = None
    """Share of each difference's squared singular values to keep; None: 0.99, unless a rank is given."""
    run: str | None = None
    """Name of the run folder under runs/; numbered when left out."""


def main(options: Options) -> int:
    """Extract, and leave the adapter and a report in a new run folder."""
    from volvelle.adapt import extract_lora, load_run
    from volvelle.runs import RunFolder
    from volvelle.train.report import Report

    base, tuned = (load_run(path, merged=True) for path in (options.model, options.tuned))
    say(f"{options.tuned} as a LoRA of {options.model}; fp64 on the CPU")
    found = extract_lora(base, tuned, options.rank, energy=options.energy)
    run = RunFolder.create(options.run, kind="extract", config=asdict(options))
    found.save(run.path / "adapter", base=options.model)
    groups = summary(found.layers)
    say()
    table(("layers", "how many", "shape", "ranks", "energy kept", "change of the weight"), groups)
    say("", str(found))
    if found.left_out:
        worst = [[name, f"{change:.2%}"] for name, change in list(found.left_out.items())[:8]]
        more = f", the largest {len(worst)} of {len(found.left_out)}" if len(found.left_out) > len(worst) else ""
        table(("changed, and not in the adapter" + more, "by"), worst)
    commands = (
        f"volvelle eval {run.path} data=…",
        f"volvelle generate {run.path} Once",
        f"volvelle export {run.path} to=peft",
    )
    report = Report(run.path.name, subtitle=str(found))
    report.heading("Energy kept").table(
        ("layer", "shape", "rank", "energy", "change of the weight"),
        [[path, f"{k.shape[0]} x {k.shape[1]}", k.rank, k.energy, k.change] for path, k in found.layers.items()],
    )
    if found.left_out:
        rows = list(found.left_out.items())
        report.heading("Changed, and not in the adapter").table(("parameter", "change of its norm"), rows)
    report.heading("Next").commands(commands).write(run.path / "report.html")
    run.update_manifest(status="finished")
    say(f"run      {run.path}", f"report   {run.path / 'report.html'}", *(f"next     {line}" for line in commands))
    layers = {path: kept._asdict() for path, kept in found.layers.items()}
    trained = found.adapted.trainable_count
    result({"run": run.path, "layers": layers, "unchanged": found.unchanged, "left_out": found.left_out,
            "energy": found.energy, "stored": trained, "next": commands})  # fmt: skip
    return 0


def summary(layers: dict[str, Kept]) -> list[list[object]]:
    """One row for the layers of each name: how many, their shape, and the ranges of rank, energy and change."""
    groups: dict[tuple[str, tuple[int, int]], list[Kept]] = {}
    for path, kept in layers.items():
        groups.setdefault((path.rpartition(".")[2], kept.shape), []).append(kept)
    return [
        [
            name,
            len(group),
            f"{shape[0]} x {shape[1]}",
            _range([kept.rank for kept in group], "d"),
            _range([kept.energy for kept in group], ".2%"),
            _range([kept.change for kept in group], ".2%"),
        ]
        for (name, shape), group in groups.items()
    ]


def _range(values: list[int] | list[float], form: str) -> str:
    low, high = format(min(values), form), format(max(values), form)
    return low if low == high else f"{low} to {high}"
