"""The stages in their order: a family joins with one row."""

from __future__ import annotations

from volvelle.cli.tour import claims, generation, language, vision
from volvelle.cli.tour.frame import Stage

STAGES: tuple[tuple[str, Stage], ...] = (
    ("A chat answer from a real model", language.chat),
    ("The same answers in fewer steps, by drafts", language.draft),
    ("Adapting it with LoRA, on a table-to-text task", language.adapt),
    ("What is in a picture, and what a unit sees of it", vision.classify),
    ("A segmenter, trained for a moment", vision.segment),
    ("A detector, trained for a moment", vision.detect),
    ("Pictures drawn from codes", generation.draw),
    ("Claims of papers, measured here", claims.claims),
)
