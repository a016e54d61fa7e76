"""`volvelle serve` as a process: it starts, answers, and ends as it says."""

import re
import signal
import subprocess
import sys
import threading

import pytest
from tests.small_runs import adapt

from volvelle.cli.main import main

httpx = pytest.importorskip("httpx", reason="the client")
pytest.importorskip("uvicorn", reason="wants the extra serve")


def started(*words):
    """The process and its address."""
    command = [sys.executable, "-m", "volvelle", "serve", "runs/base", "port=0", "precision=fp32", "seats=2", *words]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    watch = threading.Timer(120, process.kill)
    watch.start()
    said = []
    for line in process.stdout:
        said.append(line)
        if found := re.match(r"(http://127\.0\.0\.1:\d+)/v1", line):
            return process, watch, found[1]
    raise AssertionError("".join(said))


def test_it_answers_and_sigterm_lets_it_finish(in_trained):
    assert adapt("run=tuned") == 0
    process, watch, url = started("adapters=tuned=runs/tuned", "draft=lookup", "context=60")
    try:
        names = [one["id"] for one in httpx.get(f"{url}/v1/models", timeout=30).json()["data"]]
        assert names == ["base", "tuned"]
        body = {"prompt": "the cat", "max_tokens": 5, "temperature": 0}
        texts = [
            httpx.post(f"{url}/v1/completions", json={**body, "model": name}, timeout=60).json()["choices"][0]["text"]
            for name in names
        ]
        assert all(isinstance(text, str) for text in texts)
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) in (0, -signal.SIGTERM)
    finally:
        process.kill()
        watch.cancel()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["host=0.0.0.0"], "can be reached from other machines, and there is no key"),
        (["api_key= x"], "printable ASCII without spaces around it is wanted"),
        (["port=70000"], "port: must be from 0 to 65535"),
        (["seats=0"], "seats: must be at least 1, got 0"),
        (["stats=true", "draft=lookup"], "/metrics says what drafts gain"),
        (["adapters=tuned"], "NAME=RUN is wanted"),
    ],
)
def test_what_cannot_be_served_is_said(in_trained, capsys, words, said):
    assert main(["serve", "runs/base", "precision=fp32", *words]) == 2
    assert said in capsys.readouterr().err
