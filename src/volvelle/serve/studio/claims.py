"""The Claims room: what every claim was found to be, and the command that measures it again, from a button."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fastapi import APIRouter
from pydantic import BaseModel, ConfigDict

from volvelle.claims.claim import Budget, catalogue
from volvelle.serve.errors import Refused
from volvelle.serve.studio.jobs import Jobs
from volvelle.serve.studio.verdicts import Verdicts, this_machine


class Wanted(BaseModel):
    """The body of "measure it again"."""

    model_config = ConfigDict(extra="forbid")

    budget: Budget = "quick"


def router(jobs: Jobs, verdicts: Verdicts, results: Path) -> APIRouter:
    """The room's routes; `results` is the folder that a new measurement is written to."""
    router = APIRouter(prefix="/studio/api/claims")

    @router.get("")
    def listed() -> dict[str, Any]:
        """Every claim with its verdict and the job that measures it now."""
        running = {job.title: job.told() for job in jobs.jobs.values() if not job.over}
        rows = [
            {
                "name": name,
                "title": claim.title,
                "family": claim.family,
                "paper": str(claim.paper),
                "sentence": claim.sentence,
                "declared": dict(claim.seconds),
                "found": None if (found := verdicts.best(name)) is None else found.short(),
                "job": running.get(_title(name)),
            }
            for name, claim in catalogue()
        ]
        return {"claims": rows, "machine": this_machine(), "results": str(results)}

    @router.post("/{name}/measure")
    async def measure(name: str, wanted: Wanted) -> dict[str, Any]:
        """Put `volvelle claim NAME` in the queue; what it says comes from the job's events."""
        claim = next((claim for known, claim in catalogue() if known == name), None)
        if claim is None:
            raise Refused(404, f"there is no claim {name!r}")
        if wanted.budget not in claim.seconds:
            raise Refused(400, f"the claim {name} has no {wanted.budget} budget", param="budget")
        return jobs.start(_title(name), ["claim", name, f"budget={wanted.budget}", f"results={results}"]).told()

    return router


def _title(name: str) -> str:
    return f"claim {name}"
