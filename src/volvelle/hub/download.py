"""One file over HTTP: resumed where the last try stopped, checked against a known SHA-256 before anybody sees it.

The bytes collect in a `.part` file that survives an interruption; only when its hash is right does it get its name.
"""

from __future__ import annotations

import http.client
import os
import re
import ssl
import time
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path

from volvelle import __version__
from volvelle.errors import VolvelleError
from volvelle.files import sha256, sync
from volvelle.hub.progress import Report

BLOCK = 1 << 18
TIMEOUT = 30.0  # seconds without a byte before the connection counts as dead
ATTEMPTS = 5  # in a row without a single new byte


class Interrupted(Exception):
    """The connection ended before the file did; the part file holds what arrived."""


def download(url: str, target: Path, *, sha256: str, size: int, report: Report, pause: float = 1.0) -> Path:
    """Fetch `url` into `target` and return it. `size` in bytes; `pause` in seconds, doubled after each dead attempt.

    The part file `target.part` is continued with an HTTP Range request, or from the start when the server ignores it.
    A part with the wrong hash that was begun by an earlier try is thrown away, once; a whole file with the wrong hash
    is refused. Raises VolvelleError when the server refuses, the network stays away or the hash is wrong.
    """
    part = target.with_name(target.name + ".part")
    shown = without_credentials(url)
    report.start(target.name, size)
    try:
        resumed = _collect(url, part, size, report, pause)
        if not _matches(part, sha256) and resumed:
            part.unlink()
            _collect(url, part, size, report, pause)
        if not _matches(part, sha256):
            got = _describe(part)
            part.unlink(missing_ok=True)
            raise VolvelleError(
                f"{shown}: expected {size} bytes with SHA-256 {sha256}, got {got}",
                tip="the file was refused and removed; a proxy or mirror may be changing it",
            )
    finally:
        report.finish()
    sync(part)
    os.replace(part, target)
    return target


def without_credentials(url: str) -> str:
    """Return the address without user name, password and query, fit for a message.

    >>> without_credentials("https://me:secret@host:81/a.whl?token=1")
    'https://host:81/a.whl'
    """
    parts = urllib.parse.urlsplit(url)
    return urllib.parse.urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", ""))


def _collect(url: str, part: Path, size: int, report: Report, pause: float) -> bool:
    """Fill `part` up to `size` bytes; return whether it began with bytes of an earlier run."""
    have = part.stat().st_size if part.exists() else 0
    if have > size:
        part.unlink()
        have = 0
    resumed, dead, best = have > 0, 0, have
    while have < size:
        try:
            _continue(url, part, have, size, report)
            reason: Exception | None = None
        except Interrupted as error:
            reason = error
        have = part.stat().st_size if part.exists() else 0
        dead = 0 if have > best else dead + 1
        best = max(best, have)
        if have >= size:
            break
        if dead >= ATTEMPTS:
            raise VolvelleError(
                f"{without_credentials(url)}: the download stopped at {have} of {size} bytes ({reason or 'cut short'})",
                tip="run the same command again: it continues from there",
            )
        time.sleep(pause * 2**dead)
    return resumed


def _continue(url: str, part: Path, have: int, size: int, report: Report) -> None:
    """Make one request for the bytes from `have` on and append them."""
    headers = {"User-Agent": f"volvelle/{__version__}", "Accept-Encoding": "identity"}
    if have:
        headers["Range"] = f"bytes={have}-"
    try:
        with _open(url, headers) as response:
            start = _start(response, have)
            with open(part, "r+b" if start else "wb") as file:
                file.seek(start)
                done = start
                report.update(done)
                # One byte more than expected is enough to know that the file is not the recorded one.
                while done <= size and (block := _read(response, min(BLOCK, size + 1 - done))):
                    file.write(block)
                    done += len(block)
                    report.update(done)
    except urllib.error.HTTPError as error:
        if error.code == 416:
            part.unlink()
            raise Interrupted("the server refused to continue") from error
        if error.code in (408, 425, 429) or error.code >= 500:
            raise Interrupted(f"HTTP {error.code} {error.reason}") from error
        raise VolvelleError(
            f"{without_credentials(url)}: HTTP {error.code} {error.reason}",
            tip="download the file by other means and pass it with from=FILE",
        ) from error
    except (urllib.error.URLError, http.client.HTTPException, ConnectionError, TimeoutError, ssl.SSLError) as error:
        raise Interrupted(str(getattr(error, "reason", error)) or type(error).__name__) from error


def _read(response: http.client.HTTPResponse, limit: int) -> bytes:
    try:
        return response.read(limit)
    except OSError as error:  # kept apart from a full disk, which is an OSError too but must not be retried
        raise Interrupted(str(error)) from error


def _open(url: str, headers: dict[str, str]) -> http.client.HTTPResponse:
    """Open the address with the proxies and certificates that the user's environment names."""
    context = ssl.create_default_context()
    for name in ("PIP_CERT", "REQUESTS_CA_BUNDLE"):
        if (bundle := os.environ.get(name)) and os.path.isfile(bundle):
            context.load_verify_locations(bundle)
    request = urllib.request.Request(without_login(url), headers=headers | _login(url))
    return urllib.request.urlopen(request, timeout=TIMEOUT, context=context)


def without_login(url: str) -> str:
    """Return the address without user name and password, which urllib would take for a part of the host name.

    >>> without_login("https://me:secret@host/a.whl?x=1")
    'https://host/a.whl?x=1'
    """
    parts = urllib.parse.urlsplit(url)
    return urllib.parse.urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2]))


def _login(url: str) -> dict[str, str]:
    parts = urllib.parse.urlsplit(url)
    if parts.username is None:
        return {}
    import base64

    pair = f"{urllib.parse.unquote(parts.username)}:{urllib.parse.unquote(parts.password or '')}"
    return {"Authorization": "Basic " + base64.b64encode(pair.encode()).decode()}


def _start(response: http.client.HTTPResponse, have: int) -> int:
    """Return the offset of the first byte the server is about to send."""
    if response.status != 206:
        return 0
    matched = re.match(r"bytes (\d+)-", response.headers.get("Content-Range", ""))
    if matched is None or int(matched[1]) > have:
        raise Interrupted("the server answered with another range than the one asked for")
    return int(matched[1])


def _matches(path: Path, expected: str) -> bool:
    return path.exists() and sha256(path) == expected


def _describe(path: Path) -> str:
    return f"{path.stat().st_size} bytes with SHA-256 {sha256(path)}" if path.exists() else "nothing"
