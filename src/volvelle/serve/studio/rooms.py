"""The rooms that the studio opens, in one list: a new room is one line here."""

from __future__ import annotations

from pathlib import Path

from fastapi import APIRouter

from volvelle.serve.studio import chat, claims, inspect_room, techniques, vision
from volvelle.serve.studio import runs as runs_room
from volvelle.serve.studio.jobs import Jobs
from volvelle.serve.studio.verdicts import Verdicts


def rooms(jobs: Jobs, *, runs: Path = Path("runs"), model: str = "smollm2") -> list[APIRouter]:
    """Every room's routes. `runs` is the folder of runs, `model` what Chat opens."""
    results = runs / "claims"
    verdicts = Verdicts(results)
    return [
        jobs.routes(),
        techniques.router(verdicts),
        claims.router(jobs, verdicts, results),
        runs_room.router(runs),
        chat.router(jobs, runs=runs, model=model),
        vision.router(jobs, runs=runs),
        inspect_room.router(),
    ]
