"""`volvelle bench`: how fast something is on this machine, beside the implementation people trust."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from tyro.conf import Positional

from volvelle.cli.console import result, say, table, wants_json
from volvelle.errors import UsageError, VolvelleError, did_you_mean

EXAMPLES = ("volvelle bench collectives ranks=3 sizes=1K,256K,8M,32M", "volvelle bench all stored=true")


@dataclass(frozen=True)
class Bench:
    """One row: what is typed, what is measured, and whether a script of the repository does it."""

    name: str
    help: str
    script: bool = True


BENCHES = (
    Bench(
        "collectives", "our all-reduces beside gloo's; a model of them with its error; which to use when", script=False
    ),
    Bench("language", "decoding beside transformers, a LoRA step beside peft"),
    Bench("decode", "decoding in fp32 to int4, with and without drafts, beside transformers and llama.cpp"),
    Bench("adapt", "adapting in bf16 beside peft, adapters mixed in one batch"),
    Bench("comparison", "full fine-tuning, LoRA, DoRA, adapter and prefix under one budget, on WebNLG"),
    Bench("summarization", "answers of an encoder-decoder beside transformers"),
    Bench("loader", "loader workers beside torch's DataLoader"),
    Bench("planner", "planned memory beside the profiler's"),
    Bench("amp", "bf16 autocast beside fp32"),
    Bench("attention", "attention in tiles beside SDPA and the reference"),
    Bench("attention_cuda", "attention in Triton beside SDPA and the card's own rate"),
    Bench("metrics", "a confusion matrix beside torchmetrics"),
    Bench("backbone", "pictures classified, folded, in bf16 and compiled, beside timm"),
    Bench("segmentation", "pictures segmented, folded and in bf16, beside eager fp32"),
    Bench("regions", "region and deformable parts beside torchvision's compiled ones"),
    Bench("detection", "R-FCN's head by the number of regions, and ThunderNet from picture to boxes"),
    Bench("sam", "Segment Anything: encoder, a click, and everything, beside transformers and the authors' code"),
    Bench("serving", "many clients of one server, beside loops over transformers; a minute of checked streams"),
    Bench("generation", "pictures from a prior beside transformers and a loop without a cache"),
    Bench("positions", "what each position encoding can and cannot do"),
)
ALL = "all"
"""All scripts one after another, and one page of what they found."""


@dataclass(frozen=True)
class Options:
    """What to measure."""

    name: Positional[str | None] = None
    """What to measure, or all; the list when left out."""
    ranks: int | None = None
    """Processes, for collectives (default: 4)."""
    sizes: tuple[str, ...] = ()
    """Bytes of the vectors, for collectives, such as 1K,64K,4M (default: 1K to 64M in steps of 4)."""
    rounds: int | None = None
    """Interleaved rounds (default: 5)."""
    quick: bool = False
    """A smoke run: few sizes and rounds, no figures to rely on."""
    stored: bool = False
    """With all: measure nothing, only print the page of what was measured before."""


def main(options: Options) -> int:
    """Measure, or list what can be measured."""
    if options.name is None:
        rows = [(b.name, b.help, _script(b) or "not here") for b in BENCHES]
        table(("bench", "what is measured", "by"), rows)
        result({"benches": [{"name": b.name, "help": b.help, "here": _script(b) is not None} for b in BENCHES]})
        return 0
    names = [b.name for b in BENCHES]
    if options.stored and options.name != ALL:
        raise UsageError("bench: stored=true goes with all", tip="volvelle bench all stored=true")
    if options.name == ALL:
        return _all(options)
    if options.name not in names:
        tip = did_you_mean(options.name, [*names, ALL]) or f"one of {', '.join(names)}, or all"
        raise UsageError(f"bench: there is no benchmark {options.name!r}", tip=tip)
    bench = BENCHES[names.index(options.name)]
    if bench.script:
        return _run_script(bench, options)
    from volvelle.cli import bench_collectives

    ranks = 4 if options.ranks is None else options.ranks
    rounds = options.rounds if options.rounds is not None else 2 if options.quick else 5
    if ranks < 2 or rounds < 1:
        raise UsageError(f"bench collectives: needs ranks >= 2 and rounds >= 1, got {ranks} and {rounds}")
    sizes = tuple(sorted({size_of(text) for text in options.sizes}))
    result(bench_collectives.run(ranks, sizes, rounds, quick=options.quick))
    return 0


def size_of(text: str) -> int:
    """Bytes, from how people write them; a whole number of fp32 elements.

    >>> size_of("1024"), size_of("64K"), size_of("1.5MB")
    (1024, 65536, 1572864)
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMG]?)(?:i?B)?", text, re.IGNORECASE)
    size = round(float(found[1]) * 1024 ** " KMG".index(found[2].upper() or " ")) // 4 * 4 if found else 0
    if not 4 <= size <= 1 << 30:
        raise UsageError(f"bench: sizes={text} is not a size from 4 bytes to 1G", tip="write 1024, 64K or 8M")
    return size


def _script(bench: Bench) -> str | None:
    """What measures it here: this package or a script of the checkout; None when there is no checkout."""
    if not bench.script:
        return "volvelle"
    return f"benchmarks/{bench.name}.py" if (_checkout() / "benchmarks" / f"{bench.name}.py").is_file() else None


def _checkout() -> Path:
    """The folder above src/, where this file lies in a checkout."""
    return Path(__file__).resolve().parents[4]


def _all(options: Options) -> int:
    """Run every script of the checkout, go on after one that fails, and print the page; exit code 1 says so."""
    if not (_checkout() / "benchmarks" / "page.py").is_file():
        raise VolvelleError("bench all: an installed package has no benchmarks", tip="run it in a checkout")
    if options.ranks is not None or options.sizes:
        raise UsageError("bench all: has no options ranks and sizes", tip="they are those of bench collectives")
    failed = []
    for bench in () if options.stored else BENCHES:
        say("", f"{bench.name}: {bench.help}")
        if options.quick and not _has(bench.name, "quick"):
            say("left out: it has no smoke run")
        elif _run([f"benchmarks.{bench.name}", *_flags(bench, options)]):
            failed.append(bench.name)
    command = [sys.executable, "-m", "benchmarks.page", *["--json"] * wants_json()]
    page = subprocess.run(command, cwd=_checkout(), stdout=subprocess.PIPE, text=True, check=False)
    if page.returncode not in {0, 1}:
        raise VolvelleError(f"bench all: the page ended with exit code {page.returncode}", tip="its last lines say why")
    if wants_json():
        result(json.loads(page.stdout) | {"failed": failed})
    else:
        say("", page.stdout.rstrip())
    if failed:
        say(f"ended with an error: {', '.join(failed)}")
    return 1 if failed else page.returncode


def _run_script(bench: Bench, options: Options) -> int:
    if _script(bench) is None:
        raise VolvelleError(
            f"bench {bench.name}: its script benchmarks/{bench.name}.py is not here: an installed package has none",
            tip="run it in a checkout of the repository; volvelle bench collectives works everywhere",
        )
    for key in ("ranks", "sizes", "rounds", "quick"):
        if getattr(options, key) and not _has(bench.name, key):
            raise UsageError(f"bench {bench.name}: has no option {key}")
    code = _run([f"benchmarks.{bench.name}", *_flags(bench, options)])
    if code:
        raise VolvelleError(f"bench {bench.name}: the script ended with exit code {code}", tip="its last lines say why")
    figures = _checkout() / "benchmarks" / "results" / f"{bench.name}.json"
    result({"name": bench.name, "figures": str(figures) if figures.is_file() and not options.quick else None})
    return 0


def _has(name: str, key: str) -> bool:
    """Whether a script takes --KEY: one of its own, or of the parser that many share."""
    source = (_checkout() / f"benchmarks/{name}.py").read_text(encoding="utf-8")
    return key in {"rounds", "quick"} and (f'"--{key}"' in source or "protocol.parser(" in source)


def _flags(bench: Bench, options: Options) -> list[str]:
    """What is handed on to the script; only what it takes."""
    rounds = [] if options.rounds is None or not _has(bench.name, "rounds") else [f"--rounds={options.rounds}"]
    return ["--quick"] * options.quick + rounds


def _run(module: list[str]) -> int:
    """Run a module of the checkout; returns its exit code. Its output is for people."""
    say(f"in {_checkout()}: python -m {' '.join(module)}")
    command = [sys.executable, "-m", *module]
    return subprocess.run(command, cwd=_checkout(), stdout=sys.stderr if wants_json() else None, check=False).returncode
