"""What the answers of a summariser, or of one that was adapted, are worth on a file of texts with summaries."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from volvelle.adapt import load_run
from volvelle.adapt.files import stored_numbers
from volvelle.data.text import read_corpus
from volvelle.decode import Beams
from volvelle.train.evaluate import evaluate_language, rouge
from volvelle.train.summarize import beginning

BEAMS = Beams(width=4)
LONGEST = 48
"""Tokens of an answer."""


def summaries(run: Path, data: str) -> dict[str, Any]:
    """Loss and scores of all texts that fit the model, and of their beginnings; how many numbers the run stores."""
    model: Any = load_run(str(run))
    found = evaluate_language(model, read_corpus(data), max_tokens=LONGEST, beams=BEAMS, on_bad="skip")
    beginnings = rouge([beginning(p) for p in found.prompts], [p.references for p in found.prompts])
    adapter = run / "adapter"
    whole = sum(p.numel() for p in model.parameters())
    return {
        "data": "/".join(Path(data).parts[-2:]),
        "answers": len(found.prompts),
        "beams": BEAMS.width,
        "stored": stored_numbers(adapter) if adapter.is_dir() and any(adapter.iterdir()) else whole,
        "after": found.metrics | {"rougeL_of_beginning": beginnings["rougeL"]},
    }
