"""Decoding against transformers' generate, and a LoRA step against peft: same weights, same work, one run.

    python -m benchmarks.language [--quick] [--only decode lora] [--rounds 5] [--threads N]

Writes results/language.json; --quick takes two rounds of little work, and prints only.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import json
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

if not __package__:  # run as a file
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from benchmarks import protocol, tables
from volvelle import adapt, decode
from volvelle.systems.language.decoder import Decoder
from volvelle.systems.language.huggingface import write_folder
from volvelle.systems.language.load import load_language_model
from volvelle.train.losses import linear_cross_entropy

MODEL = "smollm2"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
PROMPTS = (
    "Explain in a few sentences why the sky is blue.",
    "Write a short story about a lighthouse keeper who finds a letter in a bottle.",
    "List three uses of a paper clip.",
    "Paris",
    "Translate to French: The weather is fine today, and we are going to the market to buy bread, cheese and apples.",
    "def fibonacci(n):",
    "What is the difference between a list and a tuple in Python? Give one example of each.",
    "Name the planets of the solar system in order from the sun.",
)


@dataclass(frozen=True)
class Size:
    """How much work a measurement is."""

    rounds: int
    most: int  # rounds until as many in a row as `rounds` were calm
    new_tokens: int
    batch: int
    length: int
    batches: tuple[int, ...] = (1, 8)


FULL, QUICK = (
    Size(rounds=5, most=20, new_tokens=128, batch=4, length=256),
    Size(rounds=2, most=2, new_tokens=4, batch=1, length=32),
)


def main() -> None:
    options = _arguments()
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / MODEL
        if options.memory:
            what, who, dtype, batch = options.memory
            print(json.dumps(memory_of(Path(options.folder), what, who, dtype, int(batch), options.size)))
            return
        with protocol.alone():
            facts = protocol.machine(("torch", "transformers", "peft"))
            write_folder(load_language_model(MODEL), folder)
            rows = [row for name in options.only for row in RUNS[name](folder, options.size)]
            if not options.quick:
                rows = merged(rows)
            payload = {"model": MODEL, "size": vars(options.size), "machine": facts, "rows": rows}
            if not options.quick:
                print(protocol.write("language", payload))
                tables.write("language")


def merged(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The stored rows with those just measured in their places.

    A ratio that was refused because the machine was noisy does not take the place of one that was not.
    """
    kept: dict[tuple, dict[str, Any]] = {}
    for row in [*protocol.read("language").get("rows", []), *rows]:
        key = (row["what"], row["dtype"], row["batch"])
        if key not in kept or row["speed"]["ratio"] is not None or kept[key]["speed"]["ratio"] is None:
            kept[key] = row
    return list(kept.values())


def decode_rows(folder: Path, size: Size) -> list[dict[str, Any]]:
    """Tokens a second for greedy decoding, prompt included, at batch 1 and 8."""
    rows = []
    for name, dtype in DTYPES.items():
        ours, theirs = load_language_model(folder, dtype=dtype), transformers_model(folder, dtype)
        for batch in size.batches:
            prompts = _prompts(ours, batch)
            row = {"what": "decode", "dtype": name, "batch": batch, "prompt_tokens": [len(p) for p in prompts]}
            row |= {"new_tokens": size.new_tokens}
            series = _race(row, ours, theirs, prompts, size)
            rows.append(_finish(row, series, "transformers", folder, size))
        del ours, theirs
        gc.collect()
    return rows


def _race(
    row: dict[str, Any], ours: Decoder, theirs: Any, prompts: list[list[int]], size: Size
) -> dict[str, protocol.Series]:
    answers: dict[str, list[list[int]]] = {}

    def run_ours() -> None:
        answers["ours"] = _our_answers(ours, prompts, size.new_tokens)

    def run_theirs() -> None:
        answers["transformers"] = _their_answers(theirs, prompts, size.new_tokens)

    series = protocol.interleave({"ours": run_ours, "transformers": run_theirs}, rounds=size.rounds, most=size.most)
    same = sum(a == b for a, b in zip(answers["ours"], answers["transformers"], strict=True))
    row["identical_answers"] = f"{same}/{len(prompts)}"
    tokens = len(prompts) * size.new_tokens
    row["tokens_per_second"] = {who: tokens / one.summary()["wall_median"] for who, one in series.items()}
    return series


def lora_rows(folder: Path, size: Size) -> list[dict[str, Any]]:
    """Seconds for one training step: forward, loss on every token, backward, AdamW. r = 8 on q and v."""
    rows = []
    for name, dtype in DTYPES.items():
        batch = _batch(size)
        series = protocol.interleave(
            {"ours": _our_step(folder, dtype, batch), "peft": _peft_step(folder, dtype, batch)},
            rounds=size.rounds,
            most=size.most,
        )
        row = {"what": "lora step", "dtype": name, "batch": size.batch, "length": size.length, "rank": 8}
        rows.append(_finish(row, series, "peft", folder, size))
        gc.collect()
    return rows


RUNS: dict[str, Callable[[Path, Size], list[dict[str, Any]]]] = {"decode": decode_rows, "lora": lora_rows}


def memory_of(folder: Path, what: str, who: str, dtype: str, batch: int, size: Size) -> dict[str, int]:
    """Peak memory of one variant; runs in a process of its own."""
    kind = DTYPES[dtype]
    if what == "lora":
        build = _our_step if who == "ours" else _peft_step
        return protocol.peak_memory(build(folder, kind, _batch(size)))
    tokens = min(size.new_tokens, 16)
    if who == "ours":
        ours = load_language_model(folder, dtype=kind)
        prompts = _prompts(ours, batch)
        return protocol.peak_memory(lambda: _our_answers(ours, prompts, tokens))
    prompts = _prompts(load_language_model(folder, dtype=kind), batch)
    theirs = transformers_model(folder, kind)
    return protocol.peak_memory(lambda: _their_answers(theirs, prompts, tokens))


def _finish(
    row: dict[str, Any], series: dict[str, protocol.Series], baseline: str, folder: Path, size: Size
) -> dict[str, Any]:
    row["seconds"] = {who: one.summary() for who, one in series.items()}
    row["speed"] = protocol.compare(series, "ours", baseline)
    script, quick = Path(__file__).resolve(), ["--quick"] if size.new_tokens == QUICK.new_tokens else []
    kind, threads = row["what"].split()[0], str(torch.get_num_threads())
    row["memory"] = {
        who: protocol.in_subprocess(
            script,
            [
                *quick,
                "--threads",
                threads,
                "--folder",
                str(folder),
                "--memory",
                kind,
                who,
                row["dtype"],
                str(row["batch"]),
            ],
        )
        for who in series
    }
    mib = {who: f"{one['rss_peak'] / 2**20:.0f}" for who, one in row["memory"].items()}
    rate = row.get("tokens_per_second")
    speed = ", ".join(f"{who} {value:.1f} tok/s" for who, value in rate.items()) if rate else ", ".join(
        f"{who} {one['wall_median']:.2f} s" for who, one in row["seconds"].items()
    )  # fmt: skip
    print(
        f"{row['what']:9} {row['dtype']} batch {row['batch']}: {speed}; {protocol.shown(row['speed'])} of {baseline}; "
        f"peak RSS MiB {mib}" + (f"; identical answers {row['identical_answers']}" if rate else ""),
        flush=True,
    )
    return row


def _prompts(model: Decoder, batch: int) -> list[list[int]]:
    assert model.tokenizer is not None
    return [model.tokenizer.chat_ids([{"role": "user", "content": text}]) for text in PROMPTS[:batch]]


def _our_answers(model: Decoder, prompts: list[list[int]], tokens: int) -> list[list[int]]:
    answers = decode.generate_batch(model, prompts, max_tokens=tokens, eos_ids=())
    return [answer.tokens for answer in answers]


def transformers_model(folder: Path, dtype: torch.dtype) -> Any:
    """The peer, with weights stored as `dtype`."""
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
    # No end: both sides give the same number of tokens.
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model


@torch.no_grad()
def _their_answers(model: Any, prompts: list[list[int]], tokens: int) -> list[list[int]]:
    longest = max(map(len, prompts))
    ids = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    out = model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=tokens, do_sample=False)
    return out[:, longest:].tolist()


def _batch(size: Size) -> torch.Tensor:
    return torch.randint(0, 49_000, (size.batch, size.length), generator=torch.Generator().manual_seed(0))


def _our_step(folder: Path, dtype: torch.dtype, ids: torch.Tensor) -> Callable[[], float]:
    model = load_language_model(folder, dtype=dtype).train()
    adapted = adapt.apply(model, adapt.LoRA(rank=8, alpha=16, targets=("q_proj", "v_proj")))
    optimiser = torch.optim.AdamW(adapted.trainable.values(), lr=1e-4)

    def step() -> float:
        hidden = model.hidden(ids)[:, :-1].flatten(0, 1)
        loss = linear_cross_entropy(hidden, model.output_weight, ids[:, 1:].flatten())
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()
        return loss.item()

    return step


def _peft_step(folder: Path, dtype: torch.dtype, ids: torch.Tensor) -> Callable[[], float]:
    import peft

    config = peft.LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    model = peft.get_peft_model(transformers_model(folder, dtype), config).train()
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)

    def step() -> float:
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()
        return loss.item()

    return step


def _arguments() -> argparse.Namespace:
    parser = protocol.parser(__doc__, RUNS)
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 8], help="rows decoded together")
    parser.add_argument("--memory", nargs=4, help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.size = QUICK if options.quick else FULL
    options.size = dataclasses.replace(options.size, batches=tuple(options.batches))
    if options.rounds:
        options.size = dataclasses.replace(options.size, rounds=options.rounds)
    return options


if __name__ == "__main__":
    main()
