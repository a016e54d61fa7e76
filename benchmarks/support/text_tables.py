"""Tables about language models: rates of decoding and adapting, and what summaries are worth."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from benchmarks import protocol
from benchmarks.support.footer import footer


def language(record: Mapping[str, Any]) -> list[str]:
    """Decoding and LoRA steps: rates, ratio, peak of the process."""
    lines = [
        "| work | dtype | batch | ours | peer | ours : peer | peak RSS, ours and peer |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in record["rows"]:
        peer = next(who for who in row["seconds"] if who != "ours")
        rates = row.get("tokens_per_second")
        shown = {
            who: f"{rates[who]:.1f} tokens/s" if rates else f"{one['wall_median']:.2f} s"
            for who, one in row["seconds"].items()
        }
        rss = " and ".join(f"{row['memory'][who]['rss_peak'] / 2**20:.0f}" for who in ("ours", peer))
        lines.append(
            f"| {row['what']} | {row['dtype']} | {row['batch']} | {shown['ours']} | {peer} {shown[peer]} | "
            f"{protocol.shown(row['speed'])} | {rss} MiB |"
        )
    size, machine = record["size"], record["machine"]
    return [
        *lines,
        "",
        f"Greedy, {size['new_tokens']} new tokens; LoRA of rank 8 on q and v, {size['length']} tokens a row, AdamW. "
        + footer("language", machine),
    ]


def summarization(record: Mapping[str, Any]) -> list[str]:
    """Greedy answers and beam searches of an encoder-decoder: rates and the ratio."""
    lines = ["| work | dtype | ours | transformers | ours : transformers |", "|---|---|---|---|---|"]
    for row in record["rows"]:
        rates = " | ".join(f"{row['tokens_per_second'][who]:.1f} tokens/s" for who in ("ours", "transformers"))
        lines.append(f"| {row['what']} | {row['dtype']} | {rates} | {protocol.shown(row['speed'])} |")
    size = record["size"]
    return [
        *lines,
        "",
        f"A model of BART-base's size with random weights; a batch of {size['sources']} sources of up to "
        f"{size['length']} tokens, {size['new_tokens']} new tokens each. " + footer("summarization", record["machine"]),
    ]


def decode(record: Mapping[str, Any]) -> list[str]:
    """Plain speeds beside the peers, speeds with drafts, the cost of wide steps and of exactness."""
    rows, peers = record["rows"], ("transformers fp32", "llama.cpp")
    facts: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        facts.setdefault(row["what"], []).append(row)

    def over(row: Mapping[str, Any], who: str) -> str:
        return protocol.shown(row[f"over {who}"]) if f"over {who}" in row else "-"

    lines = ["| plain | tokens/s | : transformers fp32 | : llama.cpp |", "|---|---|---|---|"]
    for row in facts.get("plain", []):
        told = " | ".join(over(row, peer) for peer in peers)
        lines.append(f"| {row['who']} | {row['tokens_per_second']:.1f} | {told} |")
    drafts = facts.get("drafts", [])
    if drafts:
        kinds = list(drafts[0]["kinds"])
        lines += [
            "",
            "| drafts | tokens/s | : plain | : transformers fp32 | : llama.cpp "
            f"| tokens a step: {', '.join(kinds)} | flips |",
        ]
        lines.append("|---|---|---|---|---|---|---|")
        for row in drafts:
            told = " | ".join(over(row, who) for who in ("plain", *peers))
            steps = ", ".join(f"{row['kinds'][kind]['accepted_per_step']:.2f}" for kind in kinds)
            flips = sum(x["flips"] for x in row["kinds"].values())
            name = f"{row['precision']} {row['drafter']}"
            lines.append(f"| {name} | {row['tokens_per_second']:.1f} | {told} | {steps} | {flips} |")
    accepted = facts.get("accepted", [])
    if accepted:
        kinds = list(accepted[0]["kinds"])
        lines += ["", f"| tokens a step of drafts always made | {' | '.join(kinds)} | flips |"]
        lines.append("|---" * (len(kinds) + 2) + "|")
        for row in accepted:
            steps = " | ".join(f"{row['kinds'][kind]['accepted_per_step']:.2f}" for kind in kinds)
            flips = sum(x["flips"] for x in row["kinds"].values())
            lines.append(f"| {row['precision']} {row['drafter']} | {steps} | {flips} |")
    curves = facts.get("curve", [])
    if curves:
        widths = list(curves[0]["ratios"])
        lines += ["", "| a step of n tokens : one | " + " | ".join(widths) + " |", "|---" * (len(widths) + 1) + "|"]
        for row in curves:
            told = " | ".join("refused" if x is None else f"{x:.2f}" for x in row["ratios"].values())
            lines.append(f"| {row['precision']}, one {row['milliseconds']['1']:.1f} ms | {told} |")
    for row in facts.get("bitwise", []):
        lines += [
            "",
            f"exact=bitwise in {row['precision']}: a plain answer takes {protocol.shown(row['cost'])} the time; drafts "
            f"changed {row['flips default']} of {row['answers']} answers without it, {row['flips bitwise']} with it.",
        ]
    size, machine = record["size"], record["machine"]
    about = (
        f"{record['model']}; plain: {size['new_tokens']} new tokens; llama.cpp: {machine.get('llama.cpp', 'absent')}. "
    )
    return [*lines, "", about + footer("decode", machine)]


def adapt(record: Mapping[str, Any]) -> list[str]:
    """Steps against peft, and many adapters in a batch against one: times, ratio, and the memory of each."""
    lines = [
        "| work | ours | held against | ours : that | memory a step allocates | peak of the process |",
        "|---|---|---|---|---|---|",
    ]
    for row in record["rows"]:
        ours, theirs = (one["wall_median"] for one in row["seconds"].values())
        memory = []
        for kind in ("tensor_growth", "rss_peak"):
            sizes = [row["memory"][who][kind] for who in ("ours", "peft")] if row["memory"] else []
            shown = " and ".join(f"{size / 2**20:.0f}" for size in sizes)
            memory.append(f"{shown} MiB, {sizes[0] / sizes[1]:.2f}x" if sizes else "")
        lines.append(
            f"| {row['title']} | {ours:.2f} s | {row['baseline']} {theirs:.2f} s | {protocol.shown(row['speed'])} | "
            f"{memory[0]} | {memory[1]} |"
        )
    facts = [f"- {fact}: {value}" for row in record["rows"] for fact, value in row["facts"].items()]
    return [*lines, "", *facts, "", f"{record['model']} in bf16, AdamW. " + footer("adapt", record["machine"])]


def summaries(record: Mapping[str, Any]) -> list[str]:
    """ROUGE of a summariser on texts of a kind it was not trained on, and of what was adapted to them."""
    lines = ["| run | numbers | ROUGE-1 | ROUGE-2 | ROUGE-L | loss | steps |", "|---" * 7 + "|"]
    for row in record["runs"]:
        told = " | ".join(f"{row['after'][name]:.1f}" for name in ("rouge1", "rouge2", "rougeL"))
        lines.append(f"| {row['run']} | {row['stored']:,} | {told} | {row['after']['loss']:.3f} | {row['steps']} |")
    first, machine = record["runs"][0], record["machine"]
    return [
        *lines,
        "",
        f"{first['answers']} answers to texts of {first['data']}, {first['beams']} beams; the first dozen words of "
        f"each text have a ROUGE-L of {first['after']['rougeL_of_beginning']:.1f}. Numbers: what is stored. "
        f"torch {machine['packages']['torch']}, {first['date'][:10]}. "
        "Stored by `python -m benchmarks.trained summaries`.",
    ]
