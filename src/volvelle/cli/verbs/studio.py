"""`volvelle studio`: the catalogue and the rooms, in the browser of this machine."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from pathlib import Path

from volvelle.cli.console import say
from volvelle.errors import UsageError, VolvelleError

EXAMPLES = ("volvelle studio", "volvelle studio port=8800 open=true")
HOST = "127.0.0.1"


@dataclass(frozen=True)
class Options:
    """What the rooms open, and where the page is."""

    model: str = "smollm2"
    """What Chat talks to: a known model, a Hugging Face repo id, a folder, or a run; opened with the first question."""
    port: int = 8765
    """The port on this machine, which no other machine can reach; 0 takes a free one."""
    open: bool = False
    """Open the page in the browser."""
    runs: Path = Path("runs")
    """Folder of the runs."""


def main(options: Options) -> int:
    """Serve the studio until SIGINT or SIGTERM."""
    if importlib.util.find_spec("fastapi") is None or importlib.util.find_spec("uvicorn") is None:
        raise VolvelleError("studio: FastAPI and uvicorn are not installed", tip='pip install "volvelle[serve]"')
    if not 0 <= options.port < 65536:
        raise UsageError(f"port: must be from 0 to 65535, got {options.port}")
    import threading
    import webbrowser

    from volvelle.serve.run import serve
    from volvelle.serve.studio.jobs import Jobs
    from volvelle.serve.studio.rooms import rooms
    from volvelle.serve.studio.shell import create_studio

    jobs = Jobs()
    app = create_studio(rooms(jobs, runs=options.runs, model=options.model))
    say(f"the studio of {Path.cwd()}; only this machine reaches it")

    def ready(url: str) -> None:
        if options.open:  # aside: a browser in the terminal would keep the server waiting
            threading.Thread(target=webbrowser.open, args=(url,), daemon=True).start()

    return serve(app, HOST, options.port, engine=jobs, grace=0.0, path="/", ready=ready)
