"""Continue an interrupted run from its folder alone: the manifest says which recipe, config.yaml its options."""

from __future__ import annotations

import dataclasses
import os
import socket
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from volvelle.errors import UsageError, VolvelleError
from volvelle.runs import RunFolder
from volvelle.train.observer import Observer
from volvelle.train.options import FitOptions, from_dict
from volvelle.train.outcome import Outcome

if TYPE_CHECKING:
    from volvelle.train.ranks import Ranks


def _adapt() -> tuple[type, Callable[..., Outcome]]:
    from volvelle.train.adaptation import adapt_language
    from volvelle.train.recipes.adapt import AdaptLanguage

    return AdaptLanguage, adapt_language


def _compare() -> tuple[type, Callable[..., Outcome]]:
    from volvelle.train.comparison import compare_methods
    from volvelle.train.recipes.compare import CompareMethods

    return CompareMethods, compare_methods


def _language() -> tuple[type, Callable[..., Outcome]]:
    from volvelle.train.recipes.language import TrainLanguage
    from volvelle.train.scratch import train_language

    return TrainLanguage, train_language


def _draft() -> tuple[type, Callable[..., Outcome]]:
    from volvelle.train.draft import train_draft
    from volvelle.train.recipes.draft import TrainDraft

    return TrainDraft, train_draft


def _summarize() -> tuple[type, Callable[..., Outcome]]:
    from volvelle.train.recipes.summarize import TrainSummarize
    from volvelle.train.summarize import train_summarize

    return TrainSummarize, train_summarize


def _classify() -> tuple[type, Callable[..., Outcome]]:
    from volvelle.train.classify import train_classify
    from volvelle.train.recipes.classify import TrainClassify

    return TrainClassify, train_classify


def _segment() -> tuple[type, Callable[..., Outcome]]:
    from volvelle.train.recipes.segment import TrainSegment
    from volvelle.train.segment import train_segment

    return TrainSegment, train_segment


def _detect() -> tuple[type, Callable[..., Outcome]]:
    from volvelle.train.detect import train_detect
    from volvelle.train.recipes.detect import TrainDetect

    return TrainDetect, train_detect


def _promptable() -> tuple[type, Callable[..., Outcome]]:
    from volvelle.train.promptable import train_promptable
    from volvelle.train.recipes.promptable import TrainPromptable

    return TrainPromptable, train_promptable


def _prior() -> tuple[type, Callable[..., Outcome]]:
    from volvelle.train.prior import train_prior
    from volvelle.train.recipes.prior import TrainPrior

    return TrainPrior, train_prior


def _gan() -> tuple[type, Callable[..., Outcome]]:
    from volvelle.train.gan import train_gan
    from volvelle.train.recipes.gan import TrainGAN

    return TrainGAN, train_gan


def _vqgan() -> tuple[type, Callable[..., Outcome]]:
    from volvelle.train.recipes.vqgan import TrainVQGAN
    from volvelle.train.vqgan import train_vqgan

    return TrainVQGAN, train_vqgan


KINDS: dict[str, Callable[[], tuple[type, Callable[..., Outcome]]]] = {
    "adapt": _adapt,
    "classify": _classify,
    "compare": _compare,
    "detect": _detect,
    "draft": _draft,
    "gan": _gan,
    "language": _language,
    "prior": _prior,
    "promptable": _promptable,
    "segment": _segment,
    "summarize": _summarize,
    "vqgan": _vqgan,
}
"""Run kinds and the recipe and function behind each."""


def recipe_of_run(path: str | os.PathLike[str]) -> FitOptions:
    """The options of a run that can be continued.

    Raises VolvelleError when it is of a kind that cannot be, is still running, or has finished.
    """
    run = RunFolder.open(path)
    kind = str(run.manifest.get("kind"))
    if kind not in KINDS:
        raise VolvelleError(
            f"{path}: a run of kind {kind} cannot be resumed", tip=f"kinds that can: {', '.join(KINDS)}"
        )
    # The process that made the folder may have started this one to do the work.
    if run.status == "running" and run.manifest.get("pid") not in (os.getpid(), os.getppid()):
        host = str(run.manifest.get("host"))
        elsewhere = host != socket.gethostname()
        raise VolvelleError(
            f"{path}: still running, as process {run.manifest.get('pid')}" + (f" of {host}" if elsewhere else ""),
            tip=f"if {host} is gone: volvelle resume {path} lost=true" if elsewhere else None,
        )
    if run.status == "finished":
        raise VolvelleError(f"{path}: already finished", tip=f"volvelle eval {path} data=…")
    recipe, _ = KINDS[kind]()
    return _recipe(recipe, run.config())


def give_up(path: str | os.PathLike[str]) -> None:
    """Say that the machine on which the run was going on is lost. Raises UsageError when it went on on this one."""
    run = RunFolder.open(path)
    if run.manifest.get("host") == socket.gethostname():
        raise UsageError(f"lost: {path} ran on this machine", tip=f"volvelle resume {path}")
    if run.status == "running":
        run.update_manifest(status="interrupted")


def resume_run(
    path: str | os.PathLike[str], *, observer: Observer | None = None, ranks: Ranks | None = None
) -> Outcome:
    """Continue the run in `path` from its newest sound checkpoint (from the start when it has none).

    Raises VolvelleError when the run is of a kind that cannot be continued, or is still running. With many `ranks` all
    of them call this, and only rank 0 writes.
    """
    from volvelle.train.launch import Onlooker, options_of
    from volvelle.train.ranks import Ranks

    ranks = ranks or Ranks()
    recipe = ranks.share(recipe_of_run(path) if ranks.leads else None)
    assert recipe is not None
    run = (RunFolder if ranks.leads else Onlooker).open(path)
    run.update_manifest(pid=os.getpid(), status="running")
    _, function = KINDS[str(run.manifest["kind"])]()
    return function(options_of(recipe, ranks), run, observer=observer, resume=True, ranks=ranks)


def _recipe(kind: type, config: dict[str, Any]) -> Any:
    # The command line's own fields (the run's name) lie in the same file.
    known = {field.name for field in dataclasses.fields(kind)}
    return from_dict(kind, {name: value for name, value in config.items() if name in known})
