"""The studio: one page in the browser over what Volvelle can do. Wants the extra `serve`."""

from volvelle.lazy import lazy

__getattr__, __dir__ = lazy(__name__, {"create_studio": "shell", "Jobs": "jobs"})
