"""Measuring a claim and keeping what was seen: one JSON file a claim, written only when the measurement finished."""

from __future__ import annotations

import dataclasses
import json
import os
import platform
import time
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from volvelle.claims.claim import Budget, Claim, Measurement, load
from volvelle.errors import UsageError
from volvelle.files import write_atomic


def run_claim(name: str, budget: Budget, results: Path) -> dict[str, Any]:
    """Measure one claim and write `results`/NAME.json; returns the record that was written.

    The record holds the claim's sentence and paper, the verdict, every finding, the peers' versions, the machine, and
    the seconds it took beside the seconds it declared.
    """
    module = load(name)
    claim: Claim = module.CLAIM
    if budget not in claim.seconds:
        raise UsageError(f"claim {name}: has no {budget} budget", tip=f"it has: {', '.join(claim.seconds)}")
    began = time.perf_counter()
    measurement: Measurement = module.measure(budget)
    seconds = time.perf_counter() - began
    record = _record(name, claim, measurement, budget, seconds)
    for title, svg in measurement.pictures.items():
        write_atomic(results / f"{name}-{title}.svg", svg)
    text = json.dumps(record, indent=1, ensure_ascii=False) + "\n"
    write_atomic(results / f"{name}.json", text)
    return json.loads(text)


def _record(name: str, claim: Claim, measurement: Measurement, budget: Budget, seconds: float) -> dict[str, Any]:
    return {
        "claim": name,
        "title": claim.title,
        "family": claim.family,
        "paper": str(claim.paper),
        "sentence": claim.sentence,
        "measured_by": claim.measured_by,
        "verdict": measurement.verdict,
        "why": measurement.unmeasurable,
        "findings": [dataclasses.asdict(finding) for finding in measurement.findings],
        "notes": list(measurement.notes),
        "setting": dict(measurement.setting),
        "peers": dict(measurement.peers),
        "pictures": sorted(measurement.pictures),
        "budget": budget,
        "seconds": round(seconds, 1),
        "declared_seconds": claim.seconds[budget],
        "machine": machine(),
        "measured": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def machine() -> dict[str, Any]:
    """What a figure depends on: processor, cores, operating system, Python, torch."""
    processor = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        lines = (line.partition(":") for line in info.read_text().splitlines())
        processor = next((value.strip() for key, _, value in lines if key.strip() == "model name"), processor)
    return {
        "processor": processor,
        "cores": os.cpu_count(),
        "system": platform.system(),
        "python": platform.python_version(),
        "torch": metadata.version("torch"),
    }
