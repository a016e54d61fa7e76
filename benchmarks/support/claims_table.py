"""The claims and what was measured of them, for the pages: all of docs/claims.md, and a short table for each README.

Claims come from the files of `volvelle.claims`, figures from benchmarks/results/claims. A claim without figures is
listed as not measured yet.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from volvelle.claims import records
from volvelle.claims.claim import Claim, catalogue

RESULTS = Path(__file__).resolve().parents[1] / "results" / "claims"
SHORT = ("lora", "speculative", "flash", "rf", "gcn-k", "rfcn", "wgan", "allreduce")
"""The rows of the READMEs, each of another family."""
SHOWN = 8
"""Figures that a claim's section shows; a record with more is linked."""
NOT_YET = "not measured yet"

Found = tuple[str, Claim, Mapping[str, Any] | None]
"""A claim's name, the claim, and its record."""


def found(results: Path = RESULTS) -> list[Found]:
    """Every claim with its record, by family and name."""
    every: list[Found] = [(name, claim, records.read(name, results)) for name, claim in catalogue()]
    return sorted(every, key=lambda one: (one[1].family, one[0]))


def page(results: Path = RESULTS) -> list[str]:
    """All claims: how many held, a table, and a section each."""
    every = found(results)
    counts: dict[str, int] = {}
    for _, _, record in every:
        verdict = verdict_of(record)
        counts[verdict] = counts.get(verdict, 0) + 1
    order = ("held", "not held", "not measurable here", NOT_YET)
    lines = [
        f"{len(every)} claims: " + ", ".join(f"{counts[kind]} {kind}" for kind in order if kind in counts) + ".",
        "",
        "| claim | technique | family | verdict | bounds that held | budget, seconds |",
        "|---|---|---|---|---|---|",
    ]
    for name, claim, record in every:
        what = ["", ""]
        if record:
            held, judged = records.bounds(record)
            what = [f"{held} of {judged}" if judged else "", f"{record['budget']}, {record['seconds']:g}"]
        row = (f"[{name}](#{name})", cell(claim.title), claim.family, verdict_of(record), *what)
        lines.append(f"| {' | '.join(row)} |")
    for one in every:
        lines += ["", *section(*one)]
    return lines


def section(name: str, claim: Claim, record: Mapping[str, Any] | None) -> Iterator[str]:
    """One claim: the sentence and where it stands, how it was measured, the figures, and what they depend on."""
    paper = f"[{claim.paper.title}]({claim.paper.url})" if claim.paper.url else claim.paper.title
    why = f" ({record['why']})" if record and record["why"] else ""
    yield from (
        f"### {name}",
        "",
        f"{claim.title}: **{verdict_of(record)}**{why}",
        "",
        f"> {claim.sentence}",
        ">",
        f"> {claim.paper.authors} {claim.paper.year}, {paper}, {claim.paper.where}",
        "",
        f"Measured by: {claim.measured_by}.",
    )
    if record is None:
        yield from ("", f"`volvelle claim {name}` measures it.")
        return
    findings = sorted(record["findings"], key=lambda one: {False: 0, True: 1, None: 2}[one["held"]])
    if findings:
        yield from ("", "| measured | figure | bound | held |", "|---|---|---|---|")
    for one in findings[:SHOWN]:
        row = (cell(one["what"]), records.figure(one), one["bound"] or "", records.mark(one["held"]))
        yield f"| {' | '.join(row)} |"
    if len(findings) > SHOWN:
        held, judged = records.bounds(record)
        yield from ("", f"{SHOWN} of {len(findings)} figures; {held} of {judged} bounds held.")
    yield from ("", " ".join(depends_on(name, record)))
    if record["notes"]:
        yield from ("", *(f"- {note}" for note in record["notes"]))
    for title in record["pictures"]:
        yield from ("", f"![{name}: {title}](../benchmarks/results/claims/{name}-{title}.svg)")


def depends_on(name: str, record: Mapping[str, Any]) -> Iterator[str]:
    """The peers, the setting, the machine, and the file with everything."""
    peers = ", ".join(f"{peer} {version}" for peer, version in record["peers"].items())
    yield f"Against: {peers or 'no other implementation'}."
    setting = "; ".join(f"{key}: {_plain(value)}" for key, value in record["setting"].items())
    if setting:
        yield f"Setting: {setting}."
    machine = record["machine"]
    yield (
        f"Budget {record['budget']}, {record['seconds']:g} s (declared: {record['declared_seconds']}) on "
        f"{machine['cores']} cores of {machine['processor']}, {machine['system']}, Python {machine['python']}, torch "
        f"{machine['torch']}, {record['measured'][:10]}. "
        f"All of it: [{name}.json](../benchmarks/results/claims/{name}.json)."
    )


@dataclass(frozen=True)
class Words:
    """The words of a short table in one language, and which summary it shows."""

    head: tuple[str, ...]
    verdicts: Mapping[str, str]
    nobody: str
    summary: Callable[[Claim], str]


ENGLISH = Words(
    ("claim", "technique", "measured here", "bound", "peer", "verdict"),
    {kind: kind for kind in ("held", "not held", "not measurable here", NOT_YET)},
    "-",
    lambda claim: claim.title,
)
CHINESE = Words(
    ("论断", "技术", "本机测得（原始记录为英文）", "判据", "对照", "结论"),
    {"held": "成立", "not held": "不成立", "not measurable here": "此处无法测量", NOT_YET: "尚未测量"},
    "-",
    lambda claim: claim.summary_zh,
)


def short(words: Words, results: Path = RESULTS) -> list[str]:
    """The rows of a README: of each claim the figure that decided."""
    by_name = {one[0]: one for one in found(results)}
    lines = [f"| {' | '.join(words.head)} |", "|---" * len(words.head) + "|"]
    for name, claim, record in (by_name[one] for one in SHORT):
        one = records.deciding(record) if record else None
        figure = f"{cell(one['what'])}: {records.figure(one)}" if one else ""
        peers = ", ".join(f"{peer} {version}" for peer, version in record["peers"].items()) if record else ""
        row = (
            f"[{name}](docs/claims.md#{name})",
            cell(words.summary(claim)),
            figure,
            (one["bound"] or "") if one else "",
            (peers or words.nobody) if record else "",
            words.verdicts[verdict_of(record)],
        )
        lines.append(f"| {' | '.join(row)} |")
    return lines


def verdict_of(record: Mapping[str, Any] | None) -> str:
    """Held, not held, not measurable here, or not measured yet."""
    return NOT_YET if record is None else record["verdict"]


def cell(text: str) -> str:
    """Text that may stand in a table: |x| is written with other bars."""
    return text.replace("|", "∣")


def _plain(value: object) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {_plain(each)}" for key, each in value.items())
    return ", ".join(map(_plain, value)) if isinstance(value, list) else str(value)
