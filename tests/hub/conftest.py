"""A loopback HTTP server that misbehaves on request."""

import http.server
import re
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field

import pytest


@dataclass
class Site:
    """What the server serves and how: change the fields between requests, read `requests` afterwards."""

    content: bytes = b""
    cut_after: list[int | None] = field(default_factory=list)  # bytes sent before the connection drops, a request
    honours_range: bool = True
    statuses: list[int] = field(default_factory=list)  # answered before anything else
    trickle: threading.Event | None = None  # after the first block, wait for it
    login: str | None = None
    url: str = ""
    requests: list[str | None] = field(default_factory=list)  # the Range header of each request


class Handler(http.server.BaseHTTPRequestHandler):
    site: Site

    def do_GET(self) -> None:
        site = self.site
        site.requests.append(self.headers.get("Range"))
        if site.login is not None and self.headers.get("Authorization") != site.login:
            self.send_error(401)
            return
        if site.statuses and (status := site.statuses.pop(0)) != 200:
            self.send_error(status)
            return
        start, content = 0, site.content
        asked = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range") or "")
        if asked and site.honours_range:
            start = int(asked[1])
            if start >= len(content):
                self.send_error(416)
                return
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        else:
            self.send_response(200)
        body = content[start:]
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        cut = site.cut_after.pop(0) if site.cut_after else None
        if site.trickle is not None:
            self.wfile.write(body[: len(body) // 2])
            self.wfile.flush()
            site.trickle.wait(20)
            body = body[len(body) // 2 :]
        self.wfile.write(body if cut is None else body[:cut])
        self.close_connection = True

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def site() -> Iterator[Site]:
    state = Site()
    handler = type("Bound", (Handler,), {"site": state})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    state.url = f"http://127.0.0.1:{server.server_port}/file.whl"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    yield state
    if state.trickle is not None:
        state.trickle.set()
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
