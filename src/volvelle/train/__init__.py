"""Training: one loop (`fit`) for every objective, exact checkpoints, and the recipes behind `train` and `adapt`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from volvelle.lazy import lazy

if TYPE_CHECKING:
    from volvelle.train.adaptation import adapt_language as adapt_language
    from volvelle.train.classify import train_classify as train_classify
    from volvelle.train.detect import train_detect as train_detect
    from volvelle.train.draft import train_draft as train_draft
    from volvelle.train.evaluate import evaluate_language as evaluate_language
    from volvelle.train.gan import train_gan as train_gan
    from volvelle.train.gan_objective import Game as Game
    from volvelle.train.gan_objective import GANObjective as GANObjective
    from volvelle.train.language import LanguageObjective as LanguageObjective
    from volvelle.train.loop import FitResult as FitResult
    from volvelle.train.loop import fit as fit
    from volvelle.train.mtp import MultiTokenObjective as MultiTokenObjective
    from volvelle.train.observer import Observer as Observer
    from volvelle.train.options import FitOptions as FitOptions
    from volvelle.train.phase import Loss as Loss
    from volvelle.train.phase import Objective as Objective
    from volvelle.train.phase import Phase as Phase
    from volvelle.train.prior import train_prior as train_prior
    from volvelle.train.promptable import train_promptable as train_promptable
    from volvelle.train.resume import resume_run as resume_run
    from volvelle.train.scratch import train_language as train_language
    from volvelle.train.segment import train_segment as train_segment
    from volvelle.train.summarize import train_summarize as train_summarize
    from volvelle.train.vqgan import train_vqgan as train_vqgan
    from volvelle.train.vqgan_objective import VQGANObjective as VQGANObjective

_HOMES = {
    "FitOptions": "options",
    "FitResult": "loop",
    "GANObjective": "gan_objective",
    "Game": "gan_objective",
    "LanguageObjective": "language",
    "Loss": "phase",
    "MultiTokenObjective": "mtp",
    "Objective": "phase",
    "Observer": "observer",
    "Phase": "phase",
    "VQGANObjective": "vqgan_objective",
    "adapt_language": "adaptation",
    "evaluate_language": "evaluate",
    "fit": "loop",
    "resume_run": "resume",
    "train_classify": "classify",
    "train_detect": "detect",
    "train_draft": "draft",
    "train_gan": "gan",
    "train_language": "scratch",
    "train_prior": "prior",
    "train_promptable": "promptable",
    "train_segment": "segment",
    "train_summarize": "summarize",
    "train_vqgan": "vqgan",
}
__all__ = sorted(_HOMES)  # noqa: PLE0605  # pyright: ignore[reportUnsupportedDunderAll]

__getattr__, __dir__ = lazy(__name__, _HOMES)
