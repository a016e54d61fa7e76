"""Answers of an encoder-decoder against transformers' generate: same weights, same sources, one run.

    python -m benchmarks.summarization [--quick] [--rounds 5] [--threads N]

A model of BART-base's size with random weights, so nothing is downloaded; speed does not depend on what was learnt.
Writes results/summarization.json; --quick takes two rounds of little work, and prints only.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import os
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

if not __package__:  # run as a file
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from benchmarks import protocol, tables
from volvelle import decode
from volvelle.systems.language.config import MLP, SpecialTokens
from volvelle.systems.language.encoder_decoder import EncoderDecoder
from volvelle.systems.language.encoder_decoder_config import EncoderDecoderConfig, Stack
from volvelle.systems.language.huggingface import write_folder

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
BEAMS = decode.Beams(width=4)


@dataclass(frozen=True)
class Size:
    """How much work a measurement is: `sources` of up to `length` tokens, ragged, each answered."""

    rounds: int
    most: int  # rounds until as many in a row as `rounds` were calm
    new_tokens: int
    sources: int
    length: int
    width: int
    depth: int
    vocabulary: int


FULL = Size(rounds=5, most=20, new_tokens=48, sources=4, length=256, width=768, depth=6, vocabulary=50265)
QUICK = Size(rounds=2, most=2, new_tokens=4, sources=2, length=16, width=32, depth=1, vocabulary=200)


def main() -> None:
    """Measure greedy decoding and a search with 4 beams in both precisions."""
    options = _arguments()
    torch.set_num_threads(options.threads)
    size = QUICK if options.quick else dataclasses.replace(FULL, rounds=options.rounds)
    with tempfile.TemporaryDirectory() as folder, protocol.alone():
        facts = protocol.machine(("torch", "transformers"))
        torch.manual_seed(0)
        write_folder(EncoderDecoder(_config(size)), folder)
        rows = [row for name in DTYPES for row in _rows(Path(folder), name, size)]
    if not options.quick:
        payload = {"size": vars(size), "beams": BEAMS.width, "machine": facts, "rows": rows}
        print(protocol.write("summarization", payload))
        tables.write("summarization")


def _config(size: Size) -> EncoderDecoderConfig:
    side = Stack(size.depth, max(1, size.width // 64), MLP(4 * size.width, "gelu"))
    return EncoderDecoderConfig(
        "bart", vocabulary=size.vocabulary, width=size.width, encoder=side, decoder=side, context=1024, start=2,
        special=SpecialTokens(0, (2,), 1),
    )  # fmt: skip


def _rows(folder: Path, name: str, size: Size) -> list[dict[str, Any]]:
    from volvelle.systems.language.load import load_language_model

    ours, theirs = load_language_model(folder, dtype=DTYPES[name]), _transformers(folder, DTYPES[name])
    sources = _sources(size)
    rows = []
    for what, width in (("greedy", 1), (f"{BEAMS.width} beams", BEAMS.width)):
        answers: dict[str, list[list[int]]] = {}

        def run_ours(width: int = width, answers: dict[str, list[list[int]]] = answers) -> None:
            answers["ours"] = _our_answers(ours, sources, width, size.new_tokens)

        def run_theirs(width: int = width, answers: dict[str, list[list[int]]] = answers) -> None:
            answers["transformers"] = _their_answers(theirs, sources, width, size.new_tokens)

        work = {"ours": run_ours, "transformers": run_theirs}
        series = protocol.interleave(work, rounds=size.rounds, most=size.most)
        tokens = size.sources * size.new_tokens
        row = {
            "what": what,
            "dtype": name,
            "tokens_per_second": {who: tokens / one.summary()["wall_median"] for who, one in series.items()},
            "identical_answers": sum(a == b for a, b in zip(*answers.values(), strict=True)),
            "seconds": {who: one.summary() for who, one in series.items()},
            "speed": protocol.compare(series, "ours", "transformers"),
        }
        rates = ", ".join(f"{who} {rate:.1f} tok/s" for who, rate in row["tokens_per_second"].items())
        same = f"{row['identical_answers']}/{size.sources} identical answers"
        print(f"{what:8} {name}: {rates}; {protocol.shown(row['speed'])} of transformers; {same}", flush=True)
        rows.append(row)
        gc.collect()
    return rows


def _sources(size: Size) -> list[list[int]]:
    draw = torch.Generator().manual_seed(0)
    lengths = [size.length - row * size.length // (2 * size.sources) for row in range(size.sources)]
    return [torch.randint(4, size.vocabulary, (n,), generator=draw).tolist() for n in lengths]


def _our_answers(model: Any, sources: list[list[int]], width: int, tokens: int) -> list[list[int]]:
    """No end: both sides give the same number of tokens."""
    if width == 1:
        found = decode.generate_batch(model, sources, max_tokens=tokens, eos_ids=())
    else:
        found = decode.beam_search(model, sources, beams=BEAMS, max_tokens=tokens, eos_ids=())
    return [answer.tokens for answer in found]


def _transformers(folder: Path, dtype: torch.dtype) -> Any:
    from transformers import AutoModelForSeq2SeqLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    model = AutoModelForSeq2SeqLM.from_pretrained(folder, dtype=dtype).eval()
    model.generation_config.eos_token_id = None
    return model


@torch.no_grad()
def _their_answers(model: Any, sources: list[list[int]], width: int, tokens: int) -> list[list[int]]:
    longest = max(map(len, sources))
    ids = torch.tensor([source + [1] * (longest - len(source)) for source in sources])
    mask = torch.tensor([[1] * len(source) + [0] * (longest - len(source)) for source in sources])
    out = model.generate(
        input_ids=ids, attention_mask=mask, max_new_tokens=tokens, num_beams=width, do_sample=False
    )  # fmt: skip
    return out[:, 1:].tolist()


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--rounds", type=int, default=FULL.rounds)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    return parser.parse_args()


if __name__ == "__main__":
    main()
