"""Random bodies: whatever is sent, the server says what is wrong with it or answers, keeps its memory and goes on."""

from __future__ import annotations

import copy
import json
import os
import random

import pytest

fastapi = pytest.importorskip("fastapi", reason="wants the extra serve")
pytest.importorskip("httpx", reason="the client")

from fastapi.testclient import TestClient  # noqa: E402
from tests.serve.conftest import wait_until  # noqa: E402
from tests.serve.test_vision import encoded  # noqa: E402

from volvelle.decode import generate  # noqa: E402
from volvelle.decode.drafters.prompt_lookup import PromptLookup  # noqa: E402
from volvelle.decode.seats import Seats  # noqa: E402
from volvelle.serve.app import create_app  # noqa: E402
from volvelle.serve.engine import Engine  # noqa: E402
from volvelle.serve.figures import Figures  # noqa: E402
from volvelle.serve.texts import Texts, routes  # noqa: E402
from volvelle.serve.vision import detect_routes, segment_routes  # noqa: E402

TEXT = "/v1/completions"
CHAT = "/v1/chat/completions"
VALID = {
    TEXT: {
        "model": "tiny", "prompt": ["the quick", "brown"], "max_tokens": 3, "n": 2, "temperature": 0.5, "top_p": 0.9,
        "top_k": 5, "min_p": 0.1, "presence_penalty": 0.1, "frequency_penalty": 0.1, "repetition_penalty": 1.1,
        "seed": 3, "stop": ["x", "yz"], "logprobs": 2, "user": "me", "metadata": {"a": {"b": [1]}}, "stream": False,
        "echo": False, "best_of": 1, "suffix": None, "logit_bias": {},
    },
    CHAT: {
        "model": "poet", "messages": [
            {"role": "system", "content": "Be brief."}, {"role": "user", "content": [{"type": "text", "text": "Hi"}]},
        ],
        "max_completion_tokens": 3, "temperature": 0, "stop": "no", "logprobs": True, "top_logprobs": 2, "stream": True,
        "stream_options": {"include_usage": True}, "response_format": {"type": "text"}, "tools": [], "store": False,
    },
    "/v1/segment": {
        "image": encoded(), "points": [[[10, 12], [3, 4]]], "labels": [[1, 0]], "boxes": [[1, 2, 30, 30]],
        "polygons": True,
    },
    "/v1/detect": {"image": encoded(), "score": 0.1},
}  # fmt: skip
WRONG = [
    None, True, False, 0, -1, 1, 2.5, -0.0, 1e308, 10**30, -(10**30), 2**31, 2**63, "", "x", "1", "\ud800", "a\x00b",
    "\U0010ffff", "x" * 700, [], [[]], [None], [1, "a"], [[1, 2], [3]], ["\udfff"], {}, {"a": 1}, {"\ud83d": "\ude00"},
    float("nan"), float("inf"), -float("inf"), [0] * 300, [[0] * 30] * 40, {"type": "text"}, "data:,", "====",
]  # fmt: skip


def places(value, path=()):
    """Every place in a value."""
    yield path
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, one in inner:
        yield from places(one, (*path, key))


def mutated(draw, value):
    """The value with something wrong in some places."""
    for _ in range(draw.choice((1, 1, 1, 2, 5))):
        if len(json.dumps(value)) > 1 << 17:
            break  # lists of lists grow by 50 at a time; the server refuses bodies of half this size unread
        path = draw.choice(list(places(value)))
        if not path:
            return draw.choice(WRONG)
        holder = value
        for key in path[:-1]:
            holder = holder[key]
        how = draw.randrange(4)
        if how == 0:
            del holder[path[-1]]
        elif how == 1 and isinstance(holder, dict):
            holder[draw.choice(("new", "\ud800", "", "modell", "x" * 300))] = draw.choice(WRONG)
        elif how == 2 and isinstance(holder[path[-1]], list):
            holder[path[-1]] = holder[path[-1]] * draw.choice((0, 2, 50))
        else:
            holder[path[-1]] = copy.deepcopy(draw.choice(WRONG))
    return value


def body(draw, path):
    """A body: bytes of any kind, broken JSON, or JSON that asks for something odd."""
    valid = copy.deepcopy(VALID[path])
    text = json.dumps(valid)
    kind = draw.randrange(10)
    if kind == 0:
        return draw.randbytes(draw.choice((0, 1, 10, 1000)))
    if kind == 1:
        return text[: draw.randrange(len(text))].encode()
    if kind == 2:
        place = draw.randrange(len(text))
        return text.encode()[:place] + draw.randbytes(draw.randrange(1, 4)) + text.encode()[place + 1 :]
    if kind == 3:
        opening = draw.choice(("[", '{"a":', '{"model":"tiny","prompt":[', '{"metadata":{"a":'))
        return (opening * draw.choice((10, 900, 3000))).encode()
    if kind == 4:
        number = draw.choice(
            ("1e999", "-1e999", "1" * 5000, "0." + "3" * 5000, "NaN", "-Infinity", "1e-400", "00", "1.")
        )
        field = draw.choice(list(valid))
        return (text[:-1] + f", {json.dumps(field)}: {number}}}").encode()
    if kind == 5:
        return text.encode(draw.choice(("utf-16", "utf-32", "utf-8-sig", "utf-16-be")))
    return json.dumps(mutated(draw, valid), allow_nan=True).encode()


KINDS = ["application/json"] * 12 + [
    "text/plain",
    "multipart/form-data",
    "application/json; charset=latin1",
    "",
    "a/b/c",
]


@pytest.fixture(scope="module")
def served(model, promptable, finder):
    """All paths that take bodies, and the engine behind some of them."""
    engine = Engine(Seats(model, 4, context=64, drafter=PromptLookup(n=2, k=4)), queue=64)
    figures = Figures()
    texts = Texts(engine, model.tokenizer, {"tiny": None, "poet": "poet"}, figures)
    pictures = [segment_routes(promptable), detect_routes(*finder)]
    app = create_app([routes(texts), *pictures], figures, engine=engine, body=1 << 16)
    with TestClient(app, raise_server_exceptions=False) as client:
        yield client, engine


def send(served, model, count, seed):
    """That many bodies to every path in turn; nothing but answers and errors of ours, and it still works."""
    client, engine = served
    draw, statuses = random.Random(seed), {}
    for number in range(count):
        path = draw.choice(list(VALID))
        content, kind = body(draw, path), draw.choice(KINDS)
        found = client.post(path, content=content, headers={"Content-Type": kind})
        statuses[found.status_code] = statuses.get(found.status_code, 0) + 1
        assert found.status_code in {200, 400, 404, 413}, (number, path, kind, content, found.text)
        if found.status_code != 200:
            assert set(found.json()["error"]) == {"message", "type", "param", "code"}
    expected = generate(model, model.tokenizer.encode_prompt("the quick"), max_tokens=8)
    asked = {"model": "tiny", "prompt": "the quick", "max_tokens": 8, "temperature": 0}
    assert client.post(TEXT, json=asked).json()["choices"][0]["text"] == expected.text
    wait_until(lambda: engine.load.waiting == engine.load.running == 0)
    return statuses


def test_what_is_mutated_is_right_before(served):
    client, _ = served
    for path, valid in VALID.items():
        found = client.post(path, json=valid)
        assert (found.status_code, "error" in found.text) == (200, False), found.text


def test_random_bodies(served, model):
    statuses = send(served, model, 500, seed=1)
    assert statuses[200] > 10
    assert statuses[400] > 100


def resident():
    """The memory of this process in bytes."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.slow
@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="reads the kernel's figures of this process")
def test_ten_thousand_random_bodies_leave_nothing_behind(served, model):
    send(served, model, 2000, seed=2)  # caches and pools fill
    before = resident()
    send(served, model, 8000, seed=3)
    assert resident() - before < 32 << 20
