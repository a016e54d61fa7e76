"""The rooms that the studio opens, in one list: a new room is one line here."""

from __future__ import annotations

from pathlib import Path

from fastapi import APIRouter

from volvelle.serve.studio.jobs import Jobs


def rooms(jobs: Jobs, *, runs: Path = Path("runs"), model: str = "smollm2") -> list[APIRouter]:
    """Every room's routes. `runs` is the folder of runs, `model` what Chat opens."""
    return [jobs.routes()]
