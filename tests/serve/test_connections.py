"""Clients that keep a server waiting, or speak HTTP badly, over real sockets."""

from __future__ import annotations

import contextlib
import json
import socket
import struct
import time

import httpx
import pytest
from tests.serve.conftest import serving, wait_until

from volvelle.decode import generate
from volvelle.serve.connection import Connection

ASKED = {"model": "tiny", "prompt": "the quick", "max_tokens": 8, "temperature": 0}
MUCH = {"model": "tiny", "prompt": "a", "n": 8, "max_tokens": 120, "logprobs": 20, "stream": True, "seed": 1}
HEAD = b"POST /v1/completions HTTP/1.1\r\nHost: here\r\nContent-Type: application/json\r\n"


class Impatient(Connection):
    """Waits for tenths of what others wait, and remembers which connections are open."""

    head, body, stall = 1.0, 1.5, 0.4
    open: set[Connection] = set()  # noqa: RUF012

    def connection_made(self, transport):
        Impatient.open.add(self)
        super().connection_made(transport)

    def connection_lost(self, exc):
        Impatient.open.discard(self)
        super().connection_lost(exc)


@pytest.fixture(scope="module")
def served(model):
    with serving(model, count=2, seconds=600, body_seconds=0.5, http=Impatient, held=4096) as (url, engine):
        yield url, engine


@contextlib.contextmanager
def connected(url, receive=None):
    """A socket to the server; with `receive`, the kernel holds hardly more than that many bytes for it."""
    host, _, port = url.removeprefix("http://").partition(":")
    with socket.socket() as wire:
        if receive is not None:
            wire.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive)
        wire.settimeout(60)
        wire.connect((host, int(port)))
        yield wire


def everything(wire):
    """What comes until the server closes."""
    found = b""
    with contextlib.suppress(ConnectionError):
        while part := wire.recv(1 << 16):
            found += part
    return found


def works(url, model):
    """The server answers somebody else."""
    expected = generate(model, model.tokenizer.encode_prompt("the quick"), max_tokens=8).text
    found = httpx.post(f"{url}/v1/completions", json=ASKED, timeout=60)
    assert found.json()["choices"][0]["text"] == expected


def test_who_says_nothing_is_let_go(served, model):
    url, _ = served
    with contextlib.ExitStack() as stack:
        wires = [stack.enter_context(connected(url)) for _ in range(50)]
        works(url, model)
        assert [everything(wire) for wire in wires] == [b""] * 50


def test_half_a_head_and_a_trickle_of_it_too(served, model):
    url, _ = served
    with connected(url) as wire:
        wire.sendall(HEAD)
        works(url, model)
        assert everything(wire) == b""
    with connected(url) as wire:
        began = time.monotonic()
        with contextlib.suppress(ConnectionError):  # each byte is news, and the time runs nonetheless
            for byte in HEAD * 20:
                wire.sendall(bytes([byte]))
                time.sleep(0.05)
        assert time.monotonic() - began < 0.05 * 20 * len(HEAD)
        assert everything(wire) == b""


@pytest.mark.parametrize(
    "start",
    [
        HEAD + b"Content-Length: 500\r\n\r\n" + b'{"model": "tiny"',
        HEAD + b"Transfer-Encoding: chunked\r\n\r\n5\r\n     \r\n",
        HEAD + b"Content-Length: 500\r\nExpect: 100-continue\r\n\r\n",
    ],
)
def test_half_a_body_is_waited_for_no_longer(served, model, start):
    url, engine = served
    with connected(url) as wire:
        wire.sendall(start)
        works(url, model)
        found = everything(wire).removeprefix(b"HTTP/1.1 100 Continue\r\n\r\n")
    head, _, said = found.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 408 ")
    assert b"connection: close" in head.lower()
    assert json.loads(said)["error"]["message"] == "the body did not arrive in time"
    assert engine.load.running == 0


def test_a_body_that_goes_on_after_its_refusal_is_cut(served, model):
    """Above the limit: the answer comes at once, and the rest is not read for ever."""
    url, _ = served
    with connected(url) as wire:
        wire.sendall(HEAD + b"Content-Length: 9000000\r\n\r\n")
        found = b""
        while b"larger than" not in found:
            found += wire.recv(1 << 16)
        assert found.startswith(b"HTTP/1.1 413 ")
        with contextlib.suppress(ConnectionError):
            while True:
                wire.sendall(b"x" * 100)
                time.sleep(0.02)
    works(url, model)


@pytest.mark.parametrize(("pause", "size"), [(None, 0), (0.05, 1)])
def test_who_does_not_read_is_let_go_and_the_seats_are_free(served, model, pause, size):
    url, engine = served
    wait_until(lambda: not Impatient.open)
    with connected(url, receive=4096) as wire:
        content = json.dumps(MUCH).encode()
        wire.sendall(HEAD + b"Content-Length: %d\r\n\r\n" % len(content) + content)
        wait_until(lambda: engine.load.running > 0)
        until = time.monotonic() + 60
        while Impatient.open and time.monotonic() < until:
            if pause is not None:
                with contextlib.suppress(ConnectionError):
                    wire.recv(size)
            time.sleep(pause or 0.05)
        assert not Impatient.open
        assert b"[DONE]" not in everything(wire)
    wait_until(lambda: engine.load.running == engine.load.waiting == 0)
    works(url, model)


def test_a_slow_reader_that_reads_is_served_to_the_end(served):
    """Slower than the answer is written, and faster than what is let go."""
    url, _ = served
    with connected(url, receive=4096) as wire:
        content = json.dumps(MUCH).encode()
        wire.sendall(HEAD + b"Connection: close\r\nContent-Length: %d\r\n\r\n" % len(content) + content)
        found = b""
        while part := wire.recv(4096):
            found += part
            time.sleep(0.002)
    assert b"data: [DONE]" in found


def test_a_reset_in_the_middle_frees_the_seat(served):
    url, engine = served
    with connected(url) as wire:
        content = json.dumps(MUCH).encode()
        wire.sendall(HEAD + b"Content-Length: %d\r\n\r\n" % len(content) + content)
        assert wire.recv(100)
        wire.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    wait_until(lambda: engine.load.running == engine.load.waiting == 0)


def test_requests_one_behind_the_other_are_answered_in_turn(served, model):
    url, _ = served
    content = json.dumps(ASKED).encode()
    ask = HEAD + b"Content-Length: %d\r\n\r\n" % len(content) + content
    last = b"GET /v1/models HTTP/1.1\r\nHost: here\r\nConnection: close\r\n\r\n"
    with connected(url) as wire:
        wire.sendall(ask + ask + last)
        found = everything(wire)
    assert found.count(b"HTTP/1.1 200 OK") == 3
    text = generate(model, model.tokenizer.encode_prompt("the quick"), max_tokens=8).text
    assert found.decode().count(json.dumps(text, ensure_ascii=False)) == 2
    assert found.index(b"text_completion") < found.index(b'"object":"list"')


@pytest.mark.parametrize("stream", [False, True])
def test_http_1_0(served, model, stream):
    url, _ = served
    content = json.dumps({**ASKED, "stream": stream}).encode()
    with connected(url) as wire:
        head = HEAD.replace(b"HTTP/1.1", b"HTTP/1.0")
        wire.sendall(head + b"Content-Length: %d\r\n\r\n" % len(content) + content)
        said = everything(wire).partition(b"\r\n\r\n")[2].decode()
    expected = generate(model, model.tokenizer.encode_prompt("the quick"), max_tokens=8).text
    if stream:
        lines = [line.removeprefix("data: ") for line in said.split("\n\n") if line]
        assert lines[-1] == "[DONE]"
        assert "".join(json.loads(line)["choices"][0]["text"] for line in lines[:-1]) == expected
    else:
        assert json.loads(said)["choices"][0]["text"] == expected


@pytest.mark.parametrize(
    "said",
    [
        b"GET /v1/models HTTP/9.9\r\nHost: here\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
        b"GET\r\n\r\n",
        HEAD + b"Content-Length: five\r\n\r\n{}   ",
        HEAD + b"Content-Length: -5\r\n\r\n{}   ",
        HEAD + b"Content-Length: 2\r\nContent-Length: 5\r\n\r\n{}   ",
        HEAD + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n{}\r\n0\r\n\r\n",
        HEAD + b"X: " + b"x" * 70_000 + b"\r\n\r\n",
        b"GET /v1/models HTTP/1.1\r\nConnection: Upgrade\r\nUpgrade: websocket\r\nHost: here\r\n\r\n",
    ],
)
def test_what_is_no_http_is_refused_and_nobody_else_minds(served, model, said):
    url, _ = served
    with connected(url) as wire:
        with contextlib.suppress(ConnectionError):
            wire.sendall(said)
        found = everything(wire)
    assert found == b"" or found.startswith((b"HTTP/1.1 4", b"HTTP/1.1 200"))
    works(url, model)


def test_a_length_that_is_too_short_leaves_a_second_request_that_is_none(served, model):
    url, _ = served
    content = json.dumps(ASKED).encode()
    with connected(url) as wire:
        wire.sendall(HEAD + b"Content-Length: 10\r\n\r\n" + content)
        found = everything(wire)
    assert found.startswith(b"HTTP/1.1 400 ")
    works(url, model)
