"""Peers of the vision families, or a skip with the reason."""

from __future__ import annotations

from typing import Any

import pytest
from benchmarks.support.timm_peer import load_timm


def timm() -> Any:
    """The module timm."""
    try:
        return load_timm()
    except ImportError as error:
        pytest.skip(f"timm does not load: {error}")
