"""Exact resume: training runs killed by SIGKILL at random moments against the same runs that nobody disturbed."""

from __future__ import annotations

import json
import os
import random
import signal
import statistics
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from volvelle.claims.claim import Budget, Claim, Finding, Measurement, Paper, at_least, at_most

if TYPE_CHECKING:
    from torch import Tensor

    from volvelle.data.loader import Loader
    from volvelle.train.loop import FitResult
    from volvelle.train.options import FitOptions
    from volvelle.train.phase import Objective

CLAIM = Claim(
    title="Exact resume after kill -9",
    family="train",
    paper=Paper(
        "Mohan et al.",
        2021,
        "CheckFreq: Frequent, Fine-Grained DNN Checkpointing",
        "abstract",
        "https://www.usenix.org/conference/fast21/presentation/mohan",
    ),
    sentence="maintains the training data invariant of using each item in the dataset exactly once per epoch by "
    "checkpointing data loader state using a light-weight resumable iterator",
    measured_by="a small language model on Python's language reference and a GAN with a critic that plays twice: each "
    "is trained in a process that gets SIGKILL at random moments, again and again, and goes on in a new one; every "
    "logged loss and every bit of the final weights against a run in one piece; the same from a checkpoint that lacks "
    "its optimisers, its random generators or its place in the data; steps lost, and what a checkpoint costs",
    summary="A killed run goes on from its last checkpoint and ends with the same bits as if nothing had happened.",
    summary_zh="训练进程被强制终止后从最近的检查点继续，最终的损失与权重与未中断时逐位相同。",
    seconds={"quick": 60, "full": 300},
    recipe="volvelle train language data=book.txt checkpoint_every=100",
)

Kind = Literal["language model", "GAN"]
KINDS: tuple[Kind, ...] = ("language model", "GAN")
EVERY = 6
"""Steps between two checkpoints of the runs that are killed."""
OVERHEAD = 0.035
"""The share of the time that the paper spends on checkpoints at most."""


class Folder:
    """A run folder with its metrics and nothing else."""

    def __init__(self, path: Path):
        self.path = path
        path.mkdir(parents=True, exist_ok=True)

    def log(self, record: dict[str, Any]) -> None:
        """Append a line."""
        with open(self.path / "metrics.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")

    def metrics(self) -> list[dict[str, Any]]:
        """The whole lines so far; a killed process may have left half of one."""
        file = self.path / "metrics.jsonl"
        lines = file.read_text(encoding="utf-8").splitlines(keepends=True) if file.is_file() else []
        return [json.loads(line) for line in lines if line.endswith("\n")]


def measure(budget: Budget) -> Measurement:
    """Kill each of both runs twice (full: ten times)."""
    import torch

    kills, steps = (2, 26) if budget == "quick" else (10, 90)
    findings: list[Finding] = []
    before = torch.get_num_threads()
    torch.set_num_threads(1)  # as in the processes that are killed: bits may depend on it
    try:
        with tempfile.TemporaryDirectory() as place:
            for kind in KINDS:
                findings += _killed(Path(place) / kind, kind, kills, steps)
            findings += [_needed(Path(place) / "parts", kind, steps) for kind in KINDS]
            findings += _cost(Path(place) / "cost", 40 if budget == "quick" else 150)
    finally:
        torch.set_num_threads(before)
    setting = {
        "steps": steps, "checkpoint every": EVERY, "kills a run": kills, "dtype": "fp32", "threads": 1,
        "language model": "2 blocks of width 48, dropout of embeddings, AdamW, 2 micro-batches a step",
        "GAN": "batch norm, dropout, Wasserstein with gradient penalty, two optimisers, critic twice a step",
    }  # fmt: skip
    notes = [
        "the moments are drawn in time, so some fall into the writing of a checkpoint and some before the first",
        "losses that are equal to the bit need equal batches: no item is left out or seen twice",
        "the paper bounds what checkpoints cost by 3.5 % of the time; it overlaps writing and training, here "
        "training waits, and the interval decides the share",
        "bits depend on kernels and threads: a run that moves to another processor goes on, but not to the bit",
    ]
    return Measurement(findings, setting=setting, notes=notes, peers={"a run in one piece, torch": torch.__version__})


def objective(kind: Kind, seed: int) -> Objective:
    """What is trained, from weights of this seed."""
    import torch
    from torch import nn

    from volvelle.train.gan_constraints import Slope
    from volvelle.train.gan_objective import Game, GANObjective

    torch.manual_seed(seed)
    if kind == "language model":
        return _language()
    generator = nn.Sequential(nn.Linear(8, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, WINDOW))
    critic = nn.Sequential(nn.Linear(WINDOW, 32), nn.LeakyReLU(0.2), nn.Dropout(0.2), nn.Linear(32, 1))
    return GANObjective(
        generator,
        critic,
        Game("wasserstein", Slope(), critic_steps=2),
        optimizers=(
            lambda p: torch.optim.Adam(p.values(), lr=1e-3, betas=(0.5, 0.9)),
            lambda p: torch.optim.RMSprop(p.values(), lr=1e-3, momentum=0.1),
        ),
        latents=lambda count: torch.randn(count, 8),
        real=lambda batch: batch["ids"].float() / 128 - 1,
    )


WINDOW = 48


def _language() -> Objective:
    import torch
    from torch import nn

    from volvelle.systems.language.config import GatedMLP, LanguageConfig, RMSNorm, Rope
    from volvelle.systems.language.decoder import Decoder
    from volvelle.train.language import LanguageObjective
    from volvelle.train.phase import Phase
    from volvelle.train.schedule import cosine

    config = LanguageConfig(
        "llama", vocabulary=256, width=48, depth=2, heads=4, kv_heads=2, context=WINDOW, norm=RMSNorm(),
        mlp=GatedMLP(96), position=Rope(),
    )  # fmt: skip

    def drop(module: nn.Module, inputs: Any, out: Any) -> Tensor:
        return nn.functional.dropout(out, 0.1, module.training)

    class Dropping(LanguageObjective):
        """With dropout behind the embeddings, so that the random generator matters."""

        def phases(self, steps: int) -> Sequence[Phase]:
            embed = next(part for part in self.model.modules() if isinstance(part, nn.Embedding))
            embed.register_forward_hook(drop)
            make = lambda p: torch.optim.AdamW(p.values(), lr=3e-3)  # noqa: E731
            return [Phase("fit", dict(self.model.named_parameters()), self.loss, make, cosine(steps, warmup=4))]

    return Dropping(Decoder(config), options_of(1, EVERY))


def options_of(steps: int, every: int | None, accumulate: int = 1) -> FitOptions:
    """How long, and how often it is saved."""
    from volvelle.train.options import FitOptions

    return FitOptions(steps=steps, batch=8, accumulate=accumulate, checkpoint_every=every, seed=5)


def _loader() -> Loader:
    """Windows of text in a seeded order; an epoch ends inside the runs."""
    import torch

    from volvelle.claims.position_zoo import corpus
    from volvelle.data.loader import Loader
    from volvelle.data.packing import Windows, collate_windows

    text: Tensor = corpus()[1][: WINDOW * 150].to(torch.int32)
    return Loader(Windows(text, WINDOW), 8, seed=5, collate=collate_windows)


def run(folder: Path, kind: Kind, steps: int, *, every: int | None = EVERY, seed: int = 1, until: int | None = None,
        resume: bool = True) -> tuple[FitResult, dict[str, Tensor]]:  # fmt: skip
    """Train in this process, from the newest checkpoint where there is one; the final weights."""
    from volvelle.train.loop import fit
    from volvelle.train.observer import Quiet

    what = objective(kind, seed)
    options = options_of(steps, every, accumulate=2)
    result = fit(what, _loader(), options=options, run=Folder(folder), observer=Quiet(), resume=resume, until=until)
    return result, {f"{name}.{key}": v for name, m in what.modules().items() for key, v in m.state_dict().items()}


def _victim(folder: str, kind: Kind, steps: int, seed: int) -> None:
    """The process that is killed."""
    import torch

    torch.set_num_threads(1)
    run(Path(folder), kind, steps, seed=seed)


def reached(folder: Folder) -> int:
    """The last step that was logged."""
    return max((record["step"] for record in folder.metrics() if record["event"] == "train"), default=0)


def killed_at(folder: Path, kind: Kind, steps: int, after: int, wait: float, seed: int) -> tuple[int, bool]:
    """Go on in a new process and kill it `wait` seconds after it logged step `after`.

    The step it reached, and whether SIGKILL was what ended it.
    """
    from volvelle.inspect.collectives_ranks import fresh_processes

    process = fresh_processes(__name__).Process(target=_victim, args=(str(folder), kind, steps, seed), daemon=True)
    process.start()
    own, end = Folder(folder), time.monotonic() + 240
    while process.is_alive() and reached(own) < after and time.monotonic() < end:
        time.sleep(0.002)
    time.sleep(wait)
    if process.is_alive() and process.pid is not None:
        os.kill(process.pid, signal.SIGKILL)
    process.join(30)
    return reached(own), process.exitcode == -signal.SIGKILL


def history(folder: Path) -> list[dict[str, Any]]:
    """What was logged, without times and without the notes that a run was resumed."""
    found = [record for record in Folder(folder).metrics() if record["event"] != "resume"]
    return [{key: value for key, value in record.items() if key != "seconds"} for record in found]


def differing(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> int:
    """Tensors of which a bit differs."""
    import torch

    return len(a.keys() ^ b.keys()) + sum(not torch.equal(a[name], b[name]) for name in a.keys() & b.keys())


def _saved(folder: Path) -> list[int]:
    """Steps with a checkpoint."""
    return [int(path.name.removeprefix("step-")) for path in (folder / "checkpoints").glob("step-*")]


def _seed(folder: Path, other: int) -> int:
    """Of the initial weights: others than the run began with, where all must come from a checkpoint."""
    return other if _saved(folder) else 1


def _killed(place: Path, kind: Kind, kills: int, steps: int) -> list[Finding]:
    """One run in one piece, and one that is killed at moments spread over it."""
    _, weights = run(place / "whole", kind, steps)
    draw, lost, moments, ended = random.Random(f"{kind}/{kills}"), [], [], 0
    seconds = statistics.median(r["seconds"] for r in Folder(place / "whole").metrics() if r["event"] == "train")
    folder = place / "killed"
    for number in range(kills):
        # From the very beginning to a few steps before the end, in order: later kills hit what earlier ones left.
        after = round(number * (steps - EVERY - 2) / kills) + draw.randint(0, 3)
        at, by_us = killed_at(folder, kind, steps, after, draw.random() * seconds, _seed(folder, 100 + number))
        ended += by_us
        moments.append(at)
        lost.append(at - max(_saved(folder), default=0))
    began = time.monotonic()
    result, mine = run(folder, kind, steps, seed=_seed(folder, 7))  # in yet another process: this one
    back = time.monotonic() - began - result.seconds
    theirs, ours = history(place / "whole"), history(folder)
    unlike = sum(a != b for a, b in zip(theirs, ours, strict=False)) + abs(len(theirs) - len(ours))
    return [
        at_least(f"{kind}: processes ended by SIGKILL", ended, kills),
        at_most(f"{kind}: lines of metrics that differ from the run in one piece, of {len(theirs)}", unlike, 0),
        at_most(f"{kind}: tensors of {len(weights)} that differ in a bit", differing(weights, mine), 0),
        at_most(f"{kind}: most steps lost by a kill", max(lost), EVERY),
        Finding(f"{kind}: steps lost by a kill, mean", statistics.mean(lost)),
        Finding(f"{kind}: killed after steps", ", ".join(map(str, moments))),
        Finding(f"{kind}: building the model and reading the data again", back, "s"),
    ]


def _needed(place: Path, kind: Kind, steps: int) -> Finding:
    """Parts of a checkpoint without which the run ends elsewhere, of three."""
    folder, half = place / kind, steps // 2
    _, weights = run(folder / "whole", kind, steps, every=None)
    changed = 0
    for part in ("optimisers", "random generators", "place in the data"):
        apart = folder / part
        run(apart, kind, steps, every=None, until=half)
        forget(apart, half, part)
        changed += differing(weights, run(apart, kind, steps, every=None, seed=7)[1]) > 0
    return at_least(f"{kind}: parts of a checkpoint, of optimisers, generators and place, that are needed", changed, 3)


def forget(folder: Path, step: int, part: str) -> None:
    """Write a checkpoint again in which one part is that of a run that begins."""
    import torch

    from volvelle.train.checkpoint import Checkpoints
    from volvelle.train.random_state import random_state, untouched_random_state

    checkpoints = Checkpoints(folder / "checkpoints")
    state = checkpoints.load(step)
    if part == "optimisers":
        state["players"] = {name: _fresh(player) for name, player in state["players"].items()}
    elif part == "random generators":
        with untouched_random_state():
            torch.manual_seed(99)
            state["random"] = [random_state()]
    else:
        state["loader"] = _loader().state_dict()
    checkpoints.save(step, state)


def _fresh(tree: Any) -> Any:
    """The same state with every tensor at zero, as moments begin."""
    import torch

    if isinstance(tree, torch.Tensor):
        return torch.zeros_like(tree)
    if isinstance(tree, dict):
        return {key: _fresh(value) for key, value in tree.items()}
    return type(tree)(map(_fresh, tree)) if isinstance(tree, list | tuple) else tree


def _cost(place: Path, steps: int) -> list[Finding]:
    """What a checkpoint takes beside a step, and how far apart they must lie to take a 28th of the time."""
    whole, _ = run(place, "language model", steps, every=EVERY, resume=False)
    busy = [record["seconds"] for record in Folder(place).metrics() if record["event"] == "train"]
    saves = steps // EVERY + (steps % EVERY > 0)
    each, step = max(0.0, whole.seconds - sum(busy)) / saves, statistics.median(busy)
    size = sum(file.stat().st_size for file in max((place / "checkpoints").glob("step-*")).iterdir())
    return [
        Finding("language model: a checkpoint in steps' time", each / step, "x"),
        Finding(
            f"share of the time that checkpoints every {EVERY} steps take", 100 * each / (each + EVERY * step), "%"
        ),
        Finding("interval at which they take the paper's 3.5 %", each / step * (1 - OVERHEAD) / OVERHEAD, "steps"),
        Finding("bytes of a checkpoint", size),
        Finding("seconds of a step", step, "s"),
    ]
