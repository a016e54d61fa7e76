import base64
import hashlib
import os
import random
import signal
import subprocess
import sys
import threading
import time

import pytest

from volvelle.errors import VolvelleError
from volvelle.hub.download import ATTEMPTS, download
from volvelle.hub.progress import Lines, Silent

CONTENT = random.Random(0).randbytes(700_001)
DIGEST = hashlib.sha256(CONTENT).hexdigest()


def get(site, folder, content=CONTENT, report=None):
    target = folder / "file.whl"
    digest = hashlib.sha256(content).hexdigest()
    return download(site.url, target, sha256=digest, size=len(content), report=report or Silent(), pause=0.0)


def test_whole_file(site, tmp_path):
    site.content = CONTENT
    path = get(site, tmp_path)
    assert path.read_bytes() == CONTENT
    assert [p.name for p in tmp_path.iterdir()] == ["file.whl"]
    assert site.requests == [None]


def test_cut_connections_are_continued_where_they_stopped(site, tmp_path):
    site.content, site.cut_after = CONTENT, [300_000, 100_000, 0, None]
    assert get(site, tmp_path).read_bytes() == CONTENT
    assert site.requests == [None, "bytes=300000-", "bytes=400000-", "bytes=400000-"]


def test_server_that_ignores_range_starts_over(site, tmp_path):
    site.content, site.cut_after, site.honours_range = CONTENT, [300_000, None], False
    assert get(site, tmp_path).read_bytes() == CONTENT
    assert site.requests == [None, "bytes=300000-"]


def test_giving_up_keeps_the_part_for_the_next_try(site, tmp_path):
    site.content, site.cut_after = CONTENT, [1000] + [0] * ATTEMPTS
    with pytest.raises(VolvelleError, match="stopped at 1000 of 700001 bytes") as caught:
        get(site, tmp_path)
    assert "continues" in caught.value.tip
    assert [p.name for p in tmp_path.iterdir()] == ["file.whl.part"]
    assert get(site, tmp_path).read_bytes() == CONTENT
    assert site.requests[-1] == "bytes=1000-"


def test_corrupt_part_of_an_earlier_run_is_restarted_once(site, tmp_path):
    site.content = CONTENT
    (tmp_path / "file.whl.part").write_bytes(b"\0" * 5000)
    assert get(site, tmp_path).read_bytes() == CONTENT
    assert site.requests == ["bytes=5000-", None]


def test_part_longer_than_the_file_is_thrown_away(site, tmp_path):
    site.content = CONTENT
    (tmp_path / "file.whl.part").write_bytes(CONTENT + b"more")
    assert get(site, tmp_path).read_bytes() == CONTENT
    assert site.requests == [None]


def test_complete_part_needs_no_request(site, tmp_path):
    (tmp_path / "file.whl.part").write_bytes(CONTENT)
    assert get(site, tmp_path).read_bytes() == CONTENT
    assert site.requests == []


@pytest.mark.parametrize("wrong", [b"x" * len(CONTENT), CONTENT + b"x", CONTENT[:-1] + b"x"])
def test_wrong_bytes_are_refused(site, tmp_path, wrong):
    site.content = wrong
    with pytest.raises(VolvelleError, match=f"expected 700001 bytes with SHA-256 {DIGEST}"):
        get(site, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_corrupt_part_and_wrong_server_are_refused_without_end(site, tmp_path):
    site.content = b"y" * len(CONTENT)
    (tmp_path / "file.whl.part").write_bytes(b"\0" * 5000)
    with pytest.raises(VolvelleError, match="SHA-256"):
        get(site, tmp_path)
    assert len(site.requests) == 2
    assert list(tmp_path.iterdir()) == []


def test_shorter_file_than_recorded_ends_with_an_error(site, tmp_path):
    site.content = CONTENT[:1000]
    with pytest.raises(VolvelleError, match="of 700001 bytes"):
        get(site, tmp_path)
    assert len(site.requests) <= 2 * ATTEMPTS
    assert not (tmp_path / "file.whl").exists()


def test_server_errors_are_retried_and_refusals_are_not(site, tmp_path):
    site.content, site.statuses = CONTENT, [503, 429]
    assert get(site, tmp_path).read_bytes() == CONTENT
    assert len(site.requests) == 3
    (tmp_path / "file.whl").unlink()
    site.statuses = [404]
    with pytest.raises(VolvelleError, match="HTTP 404"):
        get(site, tmp_path)
    assert len(site.requests) == 4


def test_nobody_listening(tmp_path, site):
    port_of_nobody = "http://127.0.0.1:9/file.whl"
    with pytest.raises(VolvelleError, match="stopped at 0 of 5 bytes"):
        download(port_of_nobody, tmp_path / "a", sha256="0", size=5, report=Silent(), pause=0.0)


def test_login_in_the_address_is_used_and_never_shown(site, tmp_path):
    site.content, site.login = CONTENT, "Basic " + base64.b64encode(b"me:s3cret").decode()
    site.url = site.url.replace("http://", "http://me:s3cret@")
    assert get(site, tmp_path).read_bytes() == CONTENT
    (tmp_path / "file.whl").unlink()
    site.login = "Basic other"
    with pytest.raises(VolvelleError, match="HTTP 401") as caught:
        get(site, tmp_path)
    assert "s3cret" not in str(caught.value)


def test_report_sees_the_resumed_start_and_the_end(site, tmp_path, capsys):
    site.content = CONTENT
    (tmp_path / "file.whl.part").write_bytes(CONTENT[:500_000])
    calls = []

    class Record(Lines):
        def update(self, done):
            calls.append(done)
            super().update(done)

    get(site, tmp_path, report=Record(interval=0.0))
    assert calls[0] == 500_000
    assert calls[-1] == len(CONTENT)
    printed = capsys.readouterr()
    assert printed.out == ""
    assert "MB/s" in printed.err or "kB/s" in printed.err


CHILD = """
import sys
from pathlib import Path
from volvelle.hub.download import download
from volvelle.hub.progress import Silent
url, target, digest, size = sys.argv[1:]
download(url, Path(target), sha256=digest, size=int(size), report=Silent())
"""


def test_kill_in_the_middle_leaves_no_file_and_the_next_run_continues(site, tmp_path):
    content = random.Random(1).randbytes(4_000_000)
    site.content, site.trickle = content, threading.Event()
    target, digest = tmp_path / "file.whl", hashlib.sha256(content).hexdigest()
    command = [sys.executable, "-c", CHILD, site.url, str(target), digest, str(len(content))]
    child = subprocess.Popen(command)
    part = tmp_path / "file.whl.part"
    deadline = time.monotonic() + 20
    while (not part.exists() or part.stat().st_size < 1_000_000) and time.monotonic() < deadline:
        time.sleep(0.01)
    os.kill(child.pid, signal.SIGKILL)
    assert child.wait() == -signal.SIGKILL
    assert not target.exists()
    have = part.stat().st_size
    assert 0 < have < len(content)
    site.trickle.set()
    assert get(site, tmp_path, content).read_bytes() == content
    assert site.requests[-1] == f"bytes={have}-"
