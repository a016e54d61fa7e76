"""Writes the figures in results/*.json into the pages that quote them: python -m benchmarks.tables

A page marks the place with `<!-- figures: NAME -->` and `<!-- end of figures -->`; a test compares page and JSON.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks import protocol
from benchmarks.support import (
    claims_table,
    from_code,
    generation_table,
    page_table,
    serving_table,
    supported_table,
    text_tables,
    vision_tables,
)
from benchmarks.support.comparison_table import comparison
from benchmarks.support.footer import footer

ROOT = Path(__file__).resolve().parent.parent
PAGES = {
    "language": "docs/language.md",
    "decode": "docs/quantization.md",
    "summarization": "docs/summarization.md",
    "summaries": "docs/summarization.md",
    "loader": "docs/data.md",
    "positions": "docs/positions.md",
    "collectives": "docs/collectives.md",
    "attention": "docs/attention.md",
    "capabilities": "docs/attention.md",
    "attention_cuda": "docs/attention.md",
    "amp": "docs/precision.md",
    "adapt": "docs/adapt.md",
    "comparison": "docs/adapt.md",
    "metrics": "docs/metrics.md",
    "segmentation": "docs/segmentation.md",
    "backbone": "docs/backbones.md",
    "detection": "docs/detection.md",
    "thundernet": "docs/detection.md",
    "sam": "docs/sam.md",
    "generation": "docs/priors.md",
    "serving": "docs/serving.md",
    "regions": "docs/regions.md",
    "camvid": "docs/segmentation.md",
    "bccd": "docs/detection.md",
    "clicks": "docs/sam.md",
    "boxes": "docs/sam.md",
    "codecs": "docs/codecs.md",
    "priors": "docs/priors.md",
    "captions": "docs/priors.md",
    "claims": "docs/claims.md",
    "short claims": "README.md",
    "short claims in Chinese": "README.zh-CN.md",
    "benchmarks": "docs/benchmarks.md",
    "short benchmarks": "README.md",
    "short benchmarks in Chinese": "README.zh-CN.md",
    "assets": "docs/provenance.md",
    "supported": "docs/support.md",
    "names": "docs/support.md",
}
RUN_BY = {
    "camvid": "trained camvid RUN",
    "bccd": "trained bccd RUN",
    "clicks": "trained clicks RUN",
    "boxes": "trained boxes RUN --data DATA",
    "codecs": "trained codecs RUN",
    "priors": "trained priors RUN --judge RUN --data DATA",
    "captions": "trained captions RUN --data DATA",
    "summaries": "trained summaries RUN --data DATA",
}  # where the name is not the module's
NOTHING = "Not measured yet: `python -m benchmarks.{name}` writes the table here."


def loader(record: Mapping[str, Any]) -> list[str]:
    """Samples a second of every kind of worker, and the ratios against torch's DataLoader."""
    lines = [
        "| work | ours, no workers | threads | processes | torch DataLoader | threads : torch | processes : torch |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in record["rows"]:
        rates = " | ".join(f"{value:.0f}/s" for value in row["samples_per_second"].values())
        speeds = " | ".join(protocol.shown(row["speed_against_torch"][f"ours, {k}"]) for k in ("threads", "processes"))
        lines.append(f"| {row['title']} | {rates} | {speeds} |")
    workers, batch = record["rows"][0]["workers"], record["batch"]
    return [
        *lines,
        "",
        f"Samples a second, {workers} workers, batches of {batch}. " + footer("loader", record["machine"]),
    ]


def positions(record: Mapping[str, Any]) -> list[str]:
    """Facts of every position encoding, the leak of convolutions, and the solvers of the recurrent one."""
    size, machine = record["size"], record["machine"]
    lines = [
        "| encoding | trained numbers | positions served | told apart | change by a shift | fp32 error, near and far |",
        "|---|---|---|---|---|---|",
    ]
    for row in record["rows"]:
        served = "any" if row["limit"] is None else f"0 to {row['limit'] - 1:,}"
        shift = "none" if row["shift"] < 1e-12 else f"{row['shift']:.2g}"
        lines.append(
            f"| {row['name']} | {row['trained']:,} | {served} | {row['told_apart']:,} | {shift} | "
            f"{row['error_near']:.0e} and {row['error_far']:.0e} at {row['far']:,} |"
        )
    layers = list(record["leaks"][0]["layers"])
    lines += ["", f"| padding, by number of convolutions | {' | '.join(layers)} |"]
    lines += ["|---" * (len(layers) + 1) + "|"]
    for row in record["leaks"]:
        cells = " | ".join(f"{max(value, 0):.2f}" for value in row["layers"].values())
        lines.append(f"| {row['padding']} | {cells} |")
    lines += ["", "| solver of FLOATER | step | error at time 6.4 |", "|---|---|---|"]
    lines += [f"| {row['solver']} | {row['delta']} | {row['error']:.0e} |" for row in record["solvers"]]
    versions = ", ".join(f"{package} {version}" for package, version in machine["packages"].items())
    return [
        *lines,
        "",
        f"Width {size['width']}, {size['heads']} heads, tables of {size['length']} positions. Told apart: vectors, or "
        f"scores of keys before the query, that differ among the first {size['span']:,} (of a table: all it has, at "
        "most as many). Shift and errors: one attention layer over 64 tokens, relative to its largest output, "
        f"unmasked; shift by {size['shift']:,} or as far as the table goes, fp32 against fp64. Convolutions: R² of a "
        "linear readout of the position behind untrained layers of width 7 with ReLU over random tokens, on new rows, "
        f"below 0 shown as 0. {versions}, {machine['date'][:10]}. Made by `python -m benchmarks.positions`.",
    ]


def collectives(record: Mapping[str, Any]) -> list[str]:
    """Time of every algorithm over gloo's, by ranks and size, and the errors of the fitted model."""
    names = list(dict.fromkeys(row["algorithm"] for row in record["rows"]))
    lines = [f"| ranks | bytes | gloo | {' | '.join(names)} |", "|---" * (len(names) + 3) + "|"]
    cells = {(row["ranks"], row["bytes"], row["algorithm"]): row for row in record["rows"]}
    for ranks, size in dict.fromkeys((row["ranks"], row["bytes"]) for row in record["rows"]):
        found = [cells.get((ranks, size, name)) for name in names]
        gloo = next(row["gloo_seconds"] for row in found if row)
        shown = ["" if row is None else f"{row['time_ratio']:.2f}" if row["time_ratio"] else "none" for row in found]
        lines.append(f"| {ranks} | {size:,} | {gloo * 1e3:.3g} ms | {' | '.join(shown)} |")
    kinds = {"sizes": "held_out_sizes", "ranks": "held_out_ranks", "two-level": "held_out_algorithm"}
    errors = {name: record["model"][key] for name, key in kinds.items() if key in record["model"]}
    told = "; ".join(f"{name} {e['median']:.0%} median, {e['worst']:.0%} worst" for name, e in errors.items())
    machine = record["machine"]
    return [
        *lines,
        "",
        "Time over gloo's own all-reduce, below 1 is faster; medians of at least 5 interleaved rounds, fp32 "
        "sums over loopback, one thread a rank; none: gloo itself drifted by more than 15 %. Error of the model on "
        f"what it was not fitted on: {told}. {machine['cpus']} cores of {machine['cpu']}, "
        f"torch {machine['packages']['torch']}, {machine['date'][:10]}. Made by `python -m benchmarks.collectives`.",
    ]


def attention(record: Mapping[str, Any]) -> list[str]:
    """Time and extra memory of every kind of call against SDPA."""
    lines = [
        "| call | tokens | threads | forward | forward and backward | extra memory, ours and SDPA |",
        "|---|---|---|---|---|---|",
    ]
    for row in record["rows"]:
        speeds = " | ".join(protocol.shown(row[kind]["speed"]) for kind in ("forward", "forward and backward"))
        memory = " and ".join(f"{row['memory'][who] / 2**20:.0f}" for who in ("ours", "sdpa"))
        lines.append(f"| {row['what']} | {row['tokens']} | {row['threads']} | {speeds} | {memory} MiB |")
    growth, auto, notes = record.get("memory_exponent"), record.get("auto"), ""
    if growth:
        notes += f"Memory grows as n^{growth['tiled']:.2f} in tiles and as n^{growth['reference']:.2f} written out. "
    if auto:
        notes += f"Where SDPA serves the call, `backend='auto'` ends in {auto['kernel']} "
        notes += f"and adds {auto['added_us']:.0f} µs. "
    return [*lines, "", notes + footer("attention", record["machine"])]


def attention_cuda(record: Mapping[str, Any]) -> list[str]:
    """Share of the card's dense rate, time and extra memory of every kind of call against SDPA."""
    lines = [
        "| call | tokens | forward, of the dense rate | forward | forward and backward | extra memory, ours and SDPA |",
        "|---|---|---|---|---|---|",
    ]
    for row in record["rows"]:
        share = row["forward"]["flops"]["ours"] / record["dense_flops"]
        speeds = " | ".join(protocol.shown(row[kind]["speed"]) for kind in ("forward", "forward and backward"))
        memory = " and ".join(f"{row['memory'][who] / 2**20:.0f}" for who in ("ours", "sdpa"))
        lines.append(f"| {row['what']} | {row['tokens']} | {share:.0%} | {speeds} | {memory} MiB |")
    setting, machine = record["setting"], record["machine"]
    return [
        *lines,
        "",
        f"{setting['dtype']}, batch {setting['batch']}, {setting['heads']} heads of {setting['width']} features on "
        f"{machine['device']}, whose dense rate is {record['dense_flops'] / 1e12:.0f} Tflop/s. "
        + footer("attention_cuda", machine),
    ]


def amp(record: Mapping[str, Any]) -> list[str]:
    """Seconds of a training step in every precision, and fp32's time over the others'."""
    lines = [
        "| network | batch | of | fp32 | bf16 | fp16 | bf16 : fp32 | fp16 : fp32 |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in record["rows"]:
        times = " | ".join(f"{row['seconds'][kind]['wall_median']:.2f} s" for kind in ("fp32", "bf16", "fp16"))
        speeds = " | ".join(protocol.shown(row["speed"][kind]) for kind in ("bf16", "fp16"))
        lines.append(f"| {row['title']} | {row['batch']} | {row['best_of']} | {times} | {speeds} |")
    return [
        *lines,
        "",
        "Forward, backward and an SGD update with momentum under autocast over fp32 weights, fp16 with dynamic loss "
        "scaling; in each round the fastest of that many steps counts (column: of). "
        + footer("amp", record["machine"], "the half precision is faster than fp32"),
    ]


TABLES: dict[str, Callable[[Mapping[str, Any]], list[str]]] = {
    "language": text_tables.language,
    "decode": text_tables.decode,
    "summarization": text_tables.summarization,
    "loader": loader,
    "positions": positions,
    "collectives": collectives,
    "attention": attention,
    "attention_cuda": attention_cuda,
    "amp": amp,
    "adapt": text_tables.adapt,
    "comparison": comparison,
    "metrics": vision_tables.metrics,
    "segmentation": vision_tables.segmentation,
    "backbone": vision_tables.backbone,
    "detection": vision_tables.detection,
    "regions": vision_tables.regions,
    "sam": vision_tables.sam,
    "generation": generation_table.generation,
    "serving": serving_table.serving,
    "camvid": partial(vision_tables.trained, columns=vision_tables.CAMVID),
    "bccd": partial(vision_tables.trained, columns=vision_tables.BCCD),
    "clicks": partial(vision_tables.trained, columns=vision_tables.CLICKS),
    "boxes": partial(vision_tables.trained, columns=vision_tables.BOXES),
    "codecs": partial(vision_tables.trained, columns=vision_tables.CODECS),
    "priors": partial(vision_tables.trained, columns=vision_tables.PRIORS),
    "captions": partial(vision_tables.trained, columns=vision_tables.CAPTIONS),
    "summaries": text_tables.summaries,
    "supported": supported_table.supported,
}


FROM_CODE: dict[str, Callable[[], list[str]]] = {
    "capabilities": from_code.capabilities,
    "thundernet": vision_tables.thundernet,
    "claims": claims_table.page,
    "short claims": partial(claims_table.short, claims_table.ENGLISH),
    "short claims in Chinese": partial(claims_table.short, claims_table.CHINESE),
    "benchmarks": lambda: page_table.full(PAGES),
    "short benchmarks": partial(page_table.short, page_table.ENGLISH),
    "short benchmarks in Chinese": partial(page_table.short, page_table.CHINESE),
    "assets": from_code.assets,
    "names": from_code.names,
}
"""Tables that follow from the code, and those of many records."""


def rendered(name: str) -> str:
    """What stands between the marks of `name`: its table, or that there is none yet."""
    if name in FROM_CODE:
        return "\n".join(FROM_CODE[name]())
    record = protocol.read(name)
    return "\n".join(TABLES[name](record)) if record else NOTHING.format(name=RUN_BY.get(name, name))


def place(name: str) -> re.Pattern[str]:
    """Finds the marks of `name` in a page, and what stands between them, which may be nothing, as group 2."""
    return re.compile(rf"(<!-- figures: {name} -->\n)(.*?)\n?(<!-- end of figures -->)", re.DOTALL)


def write(name: str) -> None:
    """Bring the page of `name` up to date."""
    page = ROOT / PAGES[name]
    text = page.read_text(encoding="utf-8")
    page.write_text(place(name).sub(lambda m: f"{m[1]}{rendered(name)}\n{m[3]}", text), encoding="utf-8")


if __name__ == "__main__":
    for one in PAGES:
        write(one)
