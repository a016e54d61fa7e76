"""Server-sent events."""

from __future__ import annotations

import json
from typing import Any


def event(name: str, data: Any) -> str:
    r"""One event of a stream, its data as JSON.

    >>> event("line", "a\nb")
    'event: line\ndata: "a\\nb"\n\n'
    """
    return f"event: {name}\ndata: {json.dumps(data, ensure_ascii=False)}\n\n"
