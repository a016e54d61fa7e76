"""Continue an interrupted run from its folder alone: the manifest says which recipe, config.yaml its options."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable
from typing import Any

from volvelle.errors import VolvelleError
from volvelle.runs import RunFolder
from volvelle.train.observer import Observer
from volvelle.train.options import from_dict
from volvelle.train.outcome import Outcome


def _adapt() -> tuple[type, Callable[..., Outcome]]:
    from volvelle.train.adaptation import adapt_language
    from volvelle.train.recipes.adapt import AdaptLanguage

    return AdaptLanguage, adapt_language


def _language() -> tuple[type, Callable[..., Outcome]]:
    from volvelle.train.recipes.language import TrainLanguage
    from volvelle.train.scratch import train_language

    return TrainLanguage, train_language


KINDS: dict[str, Callable[[], tuple[type, Callable[..., Outcome]]]] = {"adapt": _adapt, "language": _language}
"""Run kinds and the recipe and function behind each."""


def resume_run(path: str | os.PathLike[str], *, observer: Observer | None = None) -> Outcome:
    """Continue the run in `path` from its newest sound checkpoint (from the start when it has none).

    Raises VolvelleError when the run is of a kind that cannot be continued, or is still running.
    """
    run = RunFolder.open(path)
    kind = str(run.manifest.get("kind"))
    if kind not in KINDS:
        raise VolvelleError(
            f"{path}: a run of kind {kind} cannot be resumed", tip=f"kinds that can: {', '.join(KINDS)}"
        )
    if run.status == "running" and run.manifest.get("pid") != os.getpid():
        raise VolvelleError(f"{path}: still running, as process {run.manifest.get('pid')}")
    if run.status == "finished":
        raise VolvelleError(f"{path}: already finished", tip=f"volvelle eval {path} data=…")
    recipe, function = KINDS[kind]()
    run.update_manifest(pid=os.getpid(), status="running")
    return function(_recipe(recipe, run.config()), run, observer=observer, resume=True)


def _recipe(kind: type, config: dict[str, Any]) -> Any:
    # The command line's own fields (the run's name) lie in the same file.
    known = {field.name for field in dataclasses.fields(kind)}
    return from_dict(kind, {name: value for name, value in config.items() if name in known})
