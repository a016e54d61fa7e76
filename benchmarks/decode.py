"""Decoding: our own speeds in fp32, bf16, int8 and int4, with and without drafts, beside transformers and llama.cpp.

    python -m benchmarks.decode [--quick] [--only plain drafts accepted curve bitwise] [--rounds 5] [--threads N]
                                [--drafter NAME=PATH …] [--precisions bf16 int4]

One process, the same weights (SmolLM2's Q4_1 file and what it dequantises to), the same prompts, rounds in turn.
plain    greedy answers of a fixed length, to a short prompt and a long one
drafts   greedy answers to 20 prompts with prompt lookup and every --drafter (a run of `volvelle draft`, a model, or
         ngram: the counts of prompt and answer alone)
accepted what stays of drafts that are always made, and are as long as a drafter makes them, without the clock: lookup,
         n-grams, the model without a third of its layers, and every --drafter
curve    the time of a step of n tokens over that of one
bitwise  what exact="bitwise" costs, and how many answers drafts change without and with it
Writes results/decode.json as its parts finish; --quick takes one round of little work, and prints only. llama.cpp
takes part where llama-cpp-python is installed (support/llama_peer.py says how).
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import subprocess
import sys
import tempfile
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

if not __package__:  # run as a file
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from benchmarks import protocol
from benchmarks.language import MODEL, transformers_model
from benchmarks.support import llama_peer
from benchmarks.support.decode_prompts import PROMPTS
from benchmarks.support.draft_race import Raced, Writer, race, tokens_of
from volvelle import decode, hub
from volvelle.decode.contract import ALWAYS
from volvelle.decode.drafters.early_exit import EarlyExit, without
from volvelle.decode.drafters.ngram import NGram
from volvelle.decode.drafters.opening import open_drafter
from volvelle.decode.drafters.prompt_lookup import PromptLookup
from volvelle.decode.policy import Adaptive
from volvelle.decode.request import Generation
from volvelle.systems.language.decoder import Decoder
from volvelle.systems.language.huggingface import write_folder
from volvelle.systems.language.load import load_language_model
from volvelle.systems.language.projections import fuse_projections

PRECISIONS = ("fp32", "bf16", "int8", "int4")
WIDTHS = (1, 2, 4, 8, 16, 32)
Answers = dict[str, list[list[int]]]
Row = dict[str, Any]


@dataclass(frozen=True)
class Size:
    """How much work a measurement is."""

    rounds: int
    most: int  # rounds until as many in a row as `rounds` were calm
    passes: int  # of a round through all variants
    new_tokens: int  # of plain answers
    longest: int  # of answers with drafts, which end where they end
    prompts: int  # of each kind
    repeats: int  # steps a measurement of the cost curve


FULL = Size(rounds=5, most=12, passes=3, new_tokens=32, longest=64, prompts=5, repeats=30)
QUICK = Size(rounds=1, most=1, passes=1, new_tokens=4, longest=8, prompts=1, repeats=1)


class Bench:
    """The models of one run, opened when they are first asked for, and what was measured so far."""

    def __init__(self, folder: Path, options: argparse.Namespace):
        self.folder, self.size, self.options = folder, options.size, options
        self.file = Path(hub.fetch(MODEL))
        self.rows: list[Row] = [] if options.quick else protocol.read("decode").get("rows", [])
        self._models: dict[str, Any] = {}
        known = {} if options.quick else protocol.read("decode").get("machine", {})
        self.facts: Row = {name: known[name] for name in ("llama.cpp",) if name in known}  # of rows that are kept

    def ours(self, precision: str) -> Decoder:
        """Our model. int4 is the file's own grid; int8 is rounded from the dequantised weights."""
        if precision not in self._models:
            options: dict[str, Any] = {"precision": precision} if precision.startswith("int") else {
                "dtype": {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]
            }  # fmt: skip
            model = load_language_model(self.folder if precision == "int8" else self.file, **options)
            assert isinstance(model, Decoder)
            fuse_projections(model)
            self._models[precision] = model
        return self._models[precision]

    def transformers(self, precision: str) -> Any:
        """The peer with the same dequantised weights."""
        name = f"transformers {precision}"
        if name not in self._models:
            dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]
            self._models[name] = transformers_model(self.folder, dtype)
        return self._models[name]

    def llama(self) -> llama_peer.Llama | None:
        """llama.cpp on the same file; with its repacked weights unless these crash it here."""
        if llama_peer.missing():
            self.facts["llama.cpp"] = f"absent: {llama_peer.missing()}"
            return None
        if "llama.cpp" not in self._models:
            code = (
                "from benchmarks.support.llama_peer import Llama; import pathlib, sys; "
                "Llama(pathlib.Path(sys.argv[1]), 1, 64).answer([1, 2, 3], 4, ())"
            )
            root = Path(__file__).resolve().parent.parent
            tried = subprocess.run([sys.executable, "-c", code, str(self.file)], cwd=root, capture_output=True)
            repacked = tried.returncode == 0
            note = "" if repacked else f" (its repacked weights crash here, exit code {tried.returncode}: off)"
            self.facts["llama.cpp"] = llama_peer.version() + note
            self._models["llama.cpp"] = llama_peer.Llama(self.file, torch.get_num_threads(), repacked=repacked)
        return self._models["llama.cpp"]

    def prompts(self, kind: str) -> list[list[int]]:
        """The prompts of a kind, as ids with the chat template."""
        tokenizer = self.ours("int4").tokenizer
        assert tokenizer is not None
        return [tokenizer.chat_ids([{"role": "user", "content": x}]) for x in PROMPTS[kind][: self.size.prompts]]

    @property
    def ends(self) -> tuple[int, ...]:
        """The ids that end an answer."""
        tokenizer = self.ours("int4").tokenizer
        assert tokenizer is not None
        return tuple(tokenizer.eos_ids)

    def race(
        self,
        variants: Mapping[str, Callable[[], object]],
        steady: Collection[str] | None = None,
        passes: int | None = None,
    ) -> dict[str, protocol.Series]:
        """Rounds in turn, until the baselines `steady` (all, when absent) were calm."""
        size = self.size
        passes = passes or size.passes
        return protocol.interleave(variants, rounds=size.rounds, most=size.most, passes=passes, steady=steady)

    def keep(self, row: Row) -> None:
        """Store a row as it comes; one whose ratio was refused does not replace a good one."""
        self.rows = protocol.keep(self.rows, row, ("what", "who", "precision", "drafter"))
        if not self.options.quick:
            packages = ["torch", "transformers"] + [llama_peer.PACKAGE] * (llama_peer.missing() is None)
            facts = protocol.machine(packages) | self.facts
            protocol.write("decode", {"model": MODEL, "size": vars(self.size), "machine": facts, "rows": self.rows})


def plain_rows(bench: Bench) -> None:
    """Greedy answers of `new_tokens` to a short prompt and a long one.

    transformers in bf16 is slower than in fp32 here: it answers once, to be compared token for token.
    """
    prompts = [bench.prompts(kind)[0] for kind in ("chat", "data to text")]
    count, answers = bench.size.new_tokens, Answers()
    variants: dict[str, Callable[[], object]] = {}

    def add(name: str, answer: Callable[[list[int]], list[int]]) -> None:
        variants[name] = lambda: answers.update({name: [answer(prompt) for prompt in prompts]})

    for precision in ("fp32", "bf16"):
        peer = bench.transformers(precision)
        add(f"transformers {precision}", lambda p, m=peer: theirs(m, p, count, None))
    variants.pop("transformers bf16")()
    llama = bench.llama()
    if llama is not None:
        add("llama.cpp", lambda p: llama.answer(p, count, ()))
    for precision in PRECISIONS:
        model = bench.ours(precision)
        add(precision, lambda p, m=model: decode.generate(m, p, max_tokens=count, eos_ids=()).tokens)
    series = bench.race(variants, [name for name in variants if name not in PRECISIONS])
    bench.rows = [row for row in bench.rows if row["what"] != "plain" or row["who"] in variants]  # those of older runs
    for name in variants:
        row: Row = {"what": "plain", "who": name, "seconds": series[name].summary()}
        row["tokens_per_second"] = len(prompts) * count / series[name].summary()["wall_median"]
        for peer in ("transformers fp32", "llama.cpp"):
            if peer in series and name != peer:
                row[f"over {peer}"] = protocol.compare(series, name, peer)
        if name in ("fp32", "bf16"):
            wide = f"transformers {name}"
            row["identical_to"] = {wide: same(answers[name], answers[wide])}
        bench.keep(row)
        told = ", ".join(f"{protocol.shown(v)} {k.removeprefix('over ')}" for k, v in row.items() if k[:5] == "over ")
        print(
            f"plain {name:18} {row['tokens_per_second']:6.1f} tokens/s; {told} {row.get('identical_to', '')}",
            flush=True,
        )


def draft_rows(bench: Bench) -> None:
    """Greedy answers to all prompts, plainly and with every drafter, in turn with the peers."""
    longest, ends = bench.size.longest, bench.ends
    writers: dict[str, Writer] = {}

    def own(precision: str, name: str, drafter: Any) -> None:
        model = bench.ours(precision)
        options: dict[str, Any] = {} if drafter is None else {"drafter": drafter, "policy": Adaptive()}
        writers[f"{precision} {name}"] = lambda ids: decode.generate(model, ids, max_tokens=longest, **options)

    model, llama = bench.transformers("fp32"), bench.llama()
    writers["transformers fp32"] = lambda ids: theirs(model, ids, longest, ends)
    if llama is not None:
        writers["llama.cpp"] = lambda ids: llama.answer(ids, longest, ends)
    names = ["plain", "lookup", *(name for name, _ in bench.options.drafter)]
    for precision in bench.options.precisions:
        own(precision, "plain", None)
        own(precision, "lookup", PromptLookup())
        for name, path in bench.options.drafter:
            own(precision, name, NGram() if str(path) == "ngram" else open_drafter(path, bench.ours(precision)))
    steady = [name for name in writers if name.endswith("plain") or " " not in name or name.startswith("transformers")]
    raced = race(writers, {kind: bench.prompts(kind) for kind in PROMPTS}, steady=steady, most=bench.size.most)
    for precision in bench.options.precisions:
        for name in names:
            bench.keep(_draft_row(precision, name, raced))


def _draft_row(precision: str, name: str, raced: Raced) -> Row:
    who, plain, series = f"{precision} {name}", f"{precision} plain", raced.series
    row: Row = {"what": "drafts", "precision": precision, "drafter": name, "seconds_per_token": series[who].summary()}
    row["tokens_per_second"] = 1 / series[who].summary()["wall_median"]
    for peer in ("transformers fp32", "llama.cpp", plain):
        if peer in series and peer != who:
            row[f"over {'plain' if peer == plain else peer}"] = protocol.compare(series, who, peer)
    row["kinds"] = {}
    for kind in PROMPTS:
        done = [one for one in raced.answers[who, kind] if isinstance(one, Generation)]
        alone = [tokens_of(one) for one in raced.answers[plain, kind]]
        row["kinds"][kind] = {
            "accepted_per_step": sum(len(g.tokens) for g in done) / sum(g.steps for g in done),
            "near_ties": sum(g.near_ties or 0 for g in done),
            "flips": len(done) - same([g.tokens for g in done], alone),
            "over plain": protocol.compare(series, f"{who}|{kind}", f"{plain}|{kind}") if name != "plain" else None,
            "tokens": sum(len(g.tokens) for g in done),
        }
    kinds = "; ".join(f"{kind} {x['accepted_per_step']:.2f}" for kind, x in row["kinds"].items())
    told = ", ".join(f"{protocol.shown(v)} {k.removeprefix('over ')}" for k, v in row.items() if k[:5] == "over ")
    flips = sum(x["flips"] for x in row["kinds"].values())
    print(
        f"{who:16} {row['tokens_per_second']:6.1f} tokens/s; {told}; flips {flips}; accepted a step: {kinds}",
        flush=True,
    )
    return row


def accepted_rows(bench: Bench) -> None:
    """Tokens a step of every drafter by kind of prompt, whatever they cost, and answers that differ from plain ones."""
    precision = bench.options.precisions[0]
    model = bench.ours(precision)
    depth = model.config.depth
    skipping = EarlyExit(without(depth, depth // 3))
    drafters: dict[str, Any] = {"lookup": PromptLookup(), "ngram": NGram(), "a third of the layers left out": skipping}
    for name, path in bench.options.drafter:
        if str(path) != "ngram":
            drafters[name] = open_drafter(path, model)
    plain = {
        kind: [decode.generate(model, ids, max_tokens=bench.size.longest).tokens for ids in bench.prompts(kind)]
        for kind in PROMPTS
    }
    for name, drafter in drafters.items():
        row: Row = {"what": "accepted", "precision": precision, "drafter": name, "kinds": {}}
        for kind in PROMPTS:
            done = [
                decode.generate(model, ids, max_tokens=bench.size.longest, drafter=drafter, policy=ALWAYS)
                for ids in bench.prompts(kind)
            ]
            row["kinds"][kind] = {
                "accepted_per_step": sum(len(one.tokens) for one in done) / sum(one.steps for one in done),
                "flips": len(done) - same([one.tokens for one in done], plain[kind]),
                "near_ties": sum(one.near_ties or 0 for one in done),
            }
        bench.keep(row)
        told = "; ".join(f"{kind} {found['accepted_per_step']:.2f}" for kind, found in row["kinds"].items())
        print(f"accepted a step, {precision} {name}: {told}", flush=True)


def curve_rows(bench: Bench) -> None:
    """Seconds of a step of n tokens over 200 tokens in the cache, and its ratio to a step of one."""
    for precision in PRECISIONS:
        model = bench.ours(precision)
        ids = torch.randint(0, 40_000, (1, 200 + max(WIDTHS)), generator=torch.Generator().manual_seed(0))
        with torch.inference_mode():
            cache = model.new_cache(1, ids.shape[1])
            model.hidden(ids[:, :200], cache=cache)
            cache.commit()

        def step(n: int, model: Decoder = model, cache: Any = cache, ids: torch.Tensor = ids) -> None:
            with torch.inference_mode():
                for _ in range(bench.size.repeats):
                    model.logits(model.hidden(ids[:, 200 : 200 + n], cache=cache))

        series = bench.race({str(n): (lambda n=n: step(n)) for n in WIDTHS}, steady=["1"])
        row: Row = {"what": "curve", "precision": precision}
        row["milliseconds"] = {n: 1e3 * one.summary()["wall_median"] / bench.size.repeats for n, one in series.items()}
        row["ratios"] = {n: 1 / r if (r := protocol.compare(series, n, "1")["ratio"]) else None for n in series}
        bench.keep(row)
        told = ", ".join(f"{n}: {'refused' if r is None else f'{r:.2f}'}" for n, r in row["ratios"].items())
        print(f"curve {precision}: one token {row['milliseconds']['1']:.1f} ms; n tokens over one {told}", flush=True)


def bitwise_rows(bench: Bench) -> None:
    """The cost of exact="bitwise", and the answers that prompt lookup changes without and with it.

    All prompts are answered once, to be compared; two of each kind are timed.
    """
    kinds = [bench.prompts(kind) for kind in PROMPTS]
    prompts, timed = [ids for some in kinds for ids in some], [ids for some in kinds for ids in some[:2]]
    for precision in bench.options.precisions:
        model = bench.ours(precision)

        def answers(
            prompts: Sequence[list[int]], exact: Any, drafter: Any = None, model: Decoder = model
        ) -> list[list[int]]:
            options: dict[str, Any] = {"drafter": drafter, "exact": exact, "max_tokens": bench.size.longest}
            return [decode.generate(model, ids, **options).tokens for ids in prompts]

        variants = {exact: (lambda exact=exact: answers(timed, exact)) for exact in ("default", "bitwise")}
        series = bench.race(variants, passes=1)
        row: Row = {"what": "bitwise", "precision": precision, "answers": len(prompts)}
        row["cost"] = protocol.compare(series, "default", "bitwise")
        for exact in variants:
            found = same(answers(prompts, exact), answers(prompts, exact, PromptLookup()))
            row[f"flips {exact}"] = len(prompts) - found
        bench.keep(row)
        print(
            f"bitwise {precision}: a plain answer takes {protocol.shown(row['cost'])} the time; answers changed by "
            f"drafts {row['flips default']} of {len(prompts)} without it, {row['flips bitwise']} with it",
            flush=True,
        )


RUNS: dict[str, Callable[[Bench], None]] = {
    "plain": plain_rows, "drafts": draft_rows, "accepted": accepted_rows, "curve": curve_rows, "bitwise": bitwise_rows,
}  # fmt: skip


def same(ours: Sequence[list[int]], others: Sequence[list[int]]) -> int:
    """How many answers are equal, token for token."""
    return sum(a == b for a, b in zip(ours, others, strict=True))


@torch.no_grad()
def theirs(model: Any, prompt: list[int], most: int, ends: Sequence[int] | None) -> list[int]:
    """The greedy answer of transformers."""
    ids = torch.tensor([prompt])
    model.generation_config.eos_token_id = None if ends is None else list(ends)
    out = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=most, do_sample=False)
    return out[0, len(prompt) :].tolist()


def main() -> None:
    options = _arguments()
    torch.set_num_threads(options.threads)
    # a smoke run makes no figures, so it need not wait for those of others, and these not for it
    with tempfile.TemporaryDirectory() as scratch, contextlib.nullcontext() if options.quick else protocol.alone():
        folder = Path(scratch) / MODEL
        write_folder(load_language_model(MODEL), folder)
        bench = Bench(folder, options)
        for name in options.only:
            RUNS[name](bench)
    if not options.quick:
        print(protocol.RESULTS / "decode.json")


def _named(text: str) -> tuple[str, str]:
    name, _, path = text.partition("=")
    return (name, path) if path else (Path(name).name, name)


def _arguments() -> argparse.Namespace:
    parser = protocol.parser(__doc__, RUNS)
    parser.add_argument(
        "--drafter", nargs="+", type=_named, default=[], help="NAME=PATH of what drafts, besides lookup"
    )
    parser.add_argument("--precisions", nargs="+", choices=PRECISIONS, default=["bf16", "int4"])
    options = parser.parse_args()
    options.size = QUICK if options.quick else FULL
    if options.rounds:
        options.size = dataclasses.replace(options.size, rounds=options.rounds)
    return options


if __name__ == "__main__":
    main()
