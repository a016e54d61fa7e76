"""The claims stage: what papers say, measured on this machine."""

from __future__ import annotations

from volvelle.cli.console import say
from volvelle.cli.tour.frame import Tour

CLAIMS = ("autograd", "mrope", "roi-align", "soft-nms")
"""Claims short enough for the tour; `volvelle claim` measures all."""


def claims(tour: Tour) -> None:
    """Measure the tour's claims and tabulate what held."""
    from volvelle.claims import records
    from volvelle.claims.run import run_claim

    rows = []
    for name in CLAIMS:
        record = run_claim(name, "quick", tour.path / "claims")
        decided = records.deciding(record)
        figure = f"{decided['what']}: {records.figure(decided)} ({decided['bound']})" if decided else ""
        rows.append((record["title"], record["sentence"], figure, record["verdict"]))
        say(f"      {record['title']}: {record['verdict']}; {figure}")
    tour.report.table(("technique", "the paper says", "measured here", "verdict"), rows)
    held = sum(verdict == "held" for *_, verdict in rows)
    tour.tiles.append(("claims", f"{held} of {len(rows)} held", "measured on this machine"))
    tour.results["claims"] = {row[0]: row[3] for row in rows}
    tour.next.append("volvelle claim")
