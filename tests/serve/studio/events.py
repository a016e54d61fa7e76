"""Server-sent events, read back."""

from __future__ import annotations

import json
from typing import Any


def events_of(text: str) -> list[tuple[str, Any]]:
    """The events of a whole stream: (name, data)."""
    found = []
    for block in text.split("\n\n"):
        lines = dict(line.split(": ", 1) for line in block.split("\n") if ": " in line)
        if "data" in lines:
            found.append((lines["event"], json.loads(lines["data"])))
    return found
