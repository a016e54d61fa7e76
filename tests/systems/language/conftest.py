"""The real model, fetched once; tests that ask for it are skipped, with the reason, where it cannot be had."""

from __future__ import annotations

from pathlib import Path

import pytest

from volvelle.errors import VolvelleError


@pytest.fixture(scope="session")
def smollm2_path() -> Path:
    """SmolLM2-135M-Instruct as a GGUF file."""
    from volvelle import hub

    try:
        return hub.fetch("smollm2")
    except VolvelleError as error:
        pytest.skip(f"smollm2 cannot be fetched: {error}")
