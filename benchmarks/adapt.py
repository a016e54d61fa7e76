"""Adapting in bf16 against peft: training steps, many adapters in one batch, prefixes with checkpointing and cache.

    python -m benchmarks.adapt [--quick] [--only step completions mixed prefix] [--rounds 5] [--threads N]

The fastest of three steps counts in each round. Writes results/adapt.json row by row; --quick takes two rounds of
little work, and prints only.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

if not __package__:  # run as a file
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from benchmarks import protocol, tables
from benchmarks.language import MODEL, transformers_model
from volvelle import adapt, decode
from volvelle.systems.language.huggingface import write_folder
from volvelle.systems.language.load import load_language_model
from volvelle.train.language import completion_loss

DTYPE = torch.bfloat16
IGNORED = -100
Step = Callable[[], object]


@dataclass(frozen=True)
class Size:
    """How much work a measurement is."""

    rounds: int
    best_of: int
    most: int
    batch: int
    length: int
    adapters: int
    new_tokens: int


FULL = Size(rounds=5, best_of=3, most=20, batch=4, length=256, adapters=8, new_tokens=32)
QUICK = Size(rounds=2, best_of=1, most=2, batch=1, length=32, adapters=2, new_tokens=4)


def main() -> None:
    options = _arguments()
    torch.set_num_threads(options.threads)
    size = QUICK if options.quick else FULL
    if options.memory:
        what, who = options.memory
        print(json.dumps(protocol.peak_memory(VARIANTS[what](Path(options.folder), size)[who]())))
        return
    with protocol.alone(), tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / MODEL
        facts = protocol.machine(("torch", "transformers", "peft"))
        write_folder(load_language_model(MODEL), folder)
        for what in options.only:
            row = measure(what, folder, size, options)
            print(
                f"{row['title']}: {protocol.shown(row['speed'])} of {row['baseline']}{_memory_words(row)}", flush=True
            )
            for fact, value in row["facts"].items():
                print(f"  {fact}: {value}", flush=True)
            if not options.quick:
                kept = [old for old in protocol.read("adapt").get("rows", []) if old["what"] != what]
                rows = sorted([*kept, row], key=lambda one: list(VARIANTS).index(one["what"]))
                protocol.write("adapt", {"model": MODEL, "size": vars(size), "machine": facts, "rows": rows})
                tables.write("adapt")


def measure(what: str, folder: Path, size: Size, options: argparse.Namespace) -> dict[str, Any]:
    """One row: seconds of every variant in turn, the ratio, and where it matters the memory of each by itself."""
    variants = {who: build() for who, build in VARIANTS[what](folder, size).items()}
    rounds = options.rounds or size.rounds
    series = protocol.interleave(variants, rounds=rounds, most=max(size.most, rounds), best_of=size.best_of)
    del variants
    gc.collect()
    ours, baseline = series
    row: dict[str, Any] = {"what": what, "title": TITLES[what].format(**vars(size)), "baseline": baseline}
    row["seconds"] = {who: one.summary() for who, one in series.items()}
    row["speed"] = protocol.compare(series, ours, baseline)
    row["memory"] = {}
    if baseline == "peft":
        flags = ["--threads", str(torch.get_num_threads()), "--folder", str(folder), *["--quick"] * options.quick]
        script = Path(__file__).resolve()
        row["memory"] = {who: protocol.in_subprocess(script, [*flags, "--memory", what, who]) for who in series}
    row["facts"] = FACTS[what](folder, size) if what in FACTS else {}
    return row


def memory_ratio(row: Mapping[str, Any], kind: str) -> float:
    """Our peak over peft's: `tensor_growth`, what a step allocates, or the process's `rss_peak`, with all it holds."""
    found = row["memory"]
    return found["ours"][kind] / found["peft"][kind]


def _memory_words(row: Mapping[str, Any]) -> str:
    if not row["memory"]:
        return ""
    words = (
        f"{name} {row['memory']['ours'][kind] / 2**20:.0f} of {row['memory']['peft'][kind] / 2**20:.0f} MiB "
        f"({memory_ratio(row, kind):.2f}x)"
        for name, kind in (("tensors of a step", "tensor_growth"), ("process", "rss_peak"))
    )
    return f"; peak: {', '.join(words)}"


def _batch(size: Size, *, completions: bool = False) -> dict[str, torch.Tensor]:
    """Random tokens; every one is learnt, or with `completions` the last quarter of each row."""
    ids = torch.randint(0, 49_000, (size.batch, size.length), generator=torch.Generator().manual_seed(0))
    labels = ids.clone()
    if completions:
        labels[:, : 3 * size.length // 4] = IGNORED
    return {"ids": ids, "labels": labels}


def our_step(folder: Path, method: Any, batch: dict[str, torch.Tensor], *, checkpointing: bool = False) -> Step:
    """The loop's own loss, backward and AdamW."""
    model = load_language_model(folder, dtype=DTYPE).train()
    model.gradient_checkpointing = checkpointing
    adapted = adapt.apply(model, method)
    optimiser = torch.optim.AdamW(adapted.trainable.values(), lr=1e-4)
    ids, labels = batch["ids"], batch["labels"]
    # The loss is of the next token: a target stands where the token before it does.
    read = {"ids": ids[:, :-1], "targets": labels[:, 1:]}

    def step() -> float:
        loss = completion_loss(model, read).value
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()
        return loss.item()

    return step


def peft_step(folder: Path, config: Any, batch: dict[str, torch.Tensor]) -> Step:
    """The same by peft over transformers."""
    import peft

    model = peft.get_peft_model(transformers_model(folder, DTYPE), config).train()
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)

    def step() -> float:
        loss = model(input_ids=batch["ids"], labels=batch["labels"]).loss
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()
        return loss.item()

    return step


def _lora(folder: Path, size: Size, *, completions: bool = False) -> dict[str, Callable[[], Step]]:
    batch = _batch(size, completions=completions)

    def theirs() -> Step:
        import peft  # here: the memory of our process is to be without it

        config = peft.LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
        return peft_step(folder, config, batch)

    return {"ours": lambda: our_step(folder, adapt.LoRA(rank=8, alpha=16), batch), "peft": theirs}


def _completions(folder: Path, size: Size) -> dict[str, Callable[[], Step]]:
    return _lora(folder, size, completions=True)


def _prefix(folder: Path, size: Size) -> dict[str, Callable[[], Step]]:
    batch = _batch(size)

    def theirs() -> Step:
        import peft

        return peft_step(folder, peft.PrefixTuningConfig(num_virtual_tokens=10, task_type="CAUSAL_LM"), batch)

    # As peft by default: keys and values themselves are trained.
    return {"ours": lambda: our_step(folder, adapt.PrefixTuning(length=10, hidden=None), batch), "peft": theirs}


def _mixed(folder: Path, size: Size) -> dict[str, Callable[[], Step]]:
    """One forward pass of a batch with an adapter a row, and with one adapter for all."""
    model: Any = load_language_model(folder, dtype=DTYPE).eval()
    names = [f"a{i}" for i in range(size.adapters)]
    for seed, name in enumerate(names):
        adapted = adapt.apply(model, adapt.LoRA(rank=8), name=name)
        generator = torch.Generator().manual_seed(seed)
        for parameter in adapted.trainable.values():
            torch.nn.init.normal_(parameter, std=0.02, generator=generator)
    ids = torch.randint(0, 49_000, (size.adapters, size.length), generator=torch.Generator().manual_seed(0))

    def run(chosen: Any) -> Step:
        @torch.no_grad()
        def forward() -> torch.Tensor:
            with adapt.using(model, chosen):
                return model.logits(model.hidden(ids)[:, -1])

        return forward

    return {"mixed": lambda: run(names), "one adapter": lambda: run(names[0])}


@torch.no_grad()
def _mixed_facts(folder: Path, size: Size) -> dict[str, Any]:
    """Each row of the mixed batch against the same row with its adapter alone."""
    steps = {who: build() for who, build in _mixed(folder, size).items()}
    mixed, one = (steps[who]() for who in ("mixed", "one adapter"))
    assert isinstance(mixed, torch.Tensor)
    assert isinstance(one, torch.Tensor)
    return {"largest difference of row 0 from its adapter alone": float((mixed[0] - one[0]).abs().max())}


def _prefix_facts(folder: Path, size: Size) -> dict[str, Any]:
    """Gradients with checkpointing against without, answers with the cache against without, and peft's word on both."""
    gradients = {}
    batch = _batch(size)
    for checkpointing in (False, True):
        model: Any = load_language_model(folder, dtype=torch.float32).train()
        model.gradient_checkpointing = checkpointing
        adapted = adapt.apply(model, adapt.PrefixTuning(length=10), generator=torch.Generator().manual_seed(0))
        read = {"ids": batch["ids"][:2, :65], "targets": batch["ids"][:2, 1:66]}
        if batch["ids"].shape[1] < 66:
            read = {"ids": batch["ids"][:, :-1], "targets": batch["ids"][:, 1:]}
        completion_loss(model, read).value.backward()
        gradients[checkpointing] = torch.cat(
            [p.grad.flatten() for p in adapted.trainable.values() if p.grad is not None]
        )
    error = (gradients[True] - gradients[False]).norm() / gradients[False].norm()
    model = model.eval()
    prompt = batch["ids"][0, :16].tolist()
    answer = decode.generate(model, prompt, max_tokens=size.new_tokens, eos_ids=()).tokens
    ids = list(prompt)
    with torch.no_grad():
        for _ in range(size.new_tokens):
            ids.append(int(model.logits(model.hidden(torch.tensor([ids]))[:, -1]).argmax()))
    same = sum(a == b for a, b in zip(answer, ids[len(prompt) :], strict=True))
    return {
        "gradients with checkpointing, relative difference": float(error),
        "greedy tokens with the cache that equal those without": f"{same}/{size.new_tokens}",
        "peft with gradient checkpointing": _peft_prefix_checkpointed(folder, batch),
    }


def _peft_prefix_checkpointed(folder: Path, batch: dict[str, torch.Tensor]) -> str:
    import peft

    model = transformers_model(folder, DTYPE)
    model.gradient_checkpointing_enable()
    try:
        config = peft.PrefixTuningConfig(num_virtual_tokens=10, task_type="CAUSAL_LM")
        wrapped = peft.get_peft_model(model, config).train()
        wrapped(input_ids=batch["ids"][:1], labels=batch["ids"][:1]).loss.backward()
    except Exception as error:  # noqa: BLE001 - what the peer says is what is reported
        return f"{type(error).__name__}: {str(error).splitlines()[0][:90]}"
    got = [p.grad for p in wrapped.parameters() if p.requires_grad]
    return "runs" if all(g is not None and bool(g.any()) for g in got) else "runs, without a gradient for its prefix"


VARIANTS: dict[str, Callable[[Path, Size], dict[str, Callable[[], Step]]]] = {
    "step": _lora,
    "completions": _completions,
    "mixed": _mixed,
    "prefix": _prefix,
}
"""Of each row: what is measured, ours first, then what it is held against."""
TITLES = {
    "step": "LoRA r = 8 on q and v, a training step of {batch} x {length}",
    "completions": "the same, the last quarter of each row learnt",
    "mixed": "{adapters} LoRAs in one batch of {adapters} x {length}, forward",
    "prefix": "prefix of 10, a training step of {batch} x {length}",
}
FACTS: dict[str, Callable[[Path, Size], dict[str, Any]]] = {"mixed": _mixed_facts, "prefix": _prefix_facts}


def _arguments() -> argparse.Namespace:
    parser = protocol.parser(__doc__, VARIANTS)
    parser.add_argument("--memory", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    main()
