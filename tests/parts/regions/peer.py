"""torchvision's compiled operators, or a skip with the reason."""

from __future__ import annotations

from typing import Any

import pytest

from volvelle.claims.peer_ops import torchvision_ops


def torchvision() -> Any:
    """Its namespace of operators."""
    try:
        return torchvision_ops()
    except ImportError as error:
        pytest.skip(f"torchvision's operators do not load: {error}")
