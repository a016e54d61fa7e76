"""The Chat room: what is streamed of an answer, who drafts, and what is refused."""

from __future__ import annotations

import asyncio
import json
import time

import pytest
from fastapi.testclient import TestClient
from tests.serve.studio.events import events_of

from volvelle.decode import generate
from volvelle.decode.contract import Checked
from volvelle.decode.request import Token
from volvelle.errors import VolvelleError
from volvelle.runs import RunFolder
from volvelle.serve.engine import Busy, Piece
from volvelle.serve.studio.chat import router, step
from volvelle.serve.studio.chat_speaker import Speaker
from volvelle.serve.studio.jobs import Jobs
from volvelle.serve.studio.shell import create_studio
from volvelle.serve.studio.turns import Turns

ASKED = {"messages": [{"role": "user", "content": "the quick brown fox the quick"}], "max_tokens": 24}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Two runs of `volvelle draft`, one of them for another model."""
    root = tmp_path_factory.mktemp("chat") / "runs"
    for name, base in (("counts", "tiny"), ("foreign", "other")):
        run = RunFolder.create(name, root=root, kind="draft", config={"model": base})
        (run.path / "ngram").mkdir()
        (run.path / "ngram" / "config.json").write_text("{}")
    return root


@pytest.fixture(scope="module")
def client(model, runs):
    jobs = Jobs()
    speaker = Speaker("tiny", runs, opened=lambda name: model, context=120)
    with TestClient(create_studio([router(jobs, speaker=speaker)]), base_url="http://127.0.0.1") as made:
        assert made.post("/studio/api/chat/answer", json=ASKED).json()["error"]["code"] == "closed"
        assert made.get("/studio/api/chat").json()["state"] == "closed"
        made.post("/studio/api/chat/open")
        until = time.monotonic() + 30
        while made.get("/studio/api/chat").json()["state"] != "open":
            assert time.monotonic() < until
            time.sleep(0.02)
        yield made


def asked(client, **more):
    answer = client.post("/studio/api/chat/answer", json=ASKED | more)
    assert answer.status_code == 200, answer.text
    assert answer.headers["content-type"].startswith("text/event-stream")
    return events_of(answer.text)


def test_the_model_says_what_it_is_and_who_may_draft(client):
    facts = client.get("/studio/api/chat").json()
    assert (facts["model"], facts["dtype"], facts["context"], facts["chats"]) == ("tiny", "float64", 120, True)
    assert [way["name"] for way in facts["ways"]] == ["none", "lookup", "ngram", "run:counts"]


@pytest.mark.parametrize("draft", ["none", "lookup", "ngram"])
def test_an_answer_comes_step_by_step_and_is_what_generate_writes(client, model, draft):
    found = asked(client, draft=draft)
    assert found[0] == ("begin", {"prompt_tokens": found[0][1]["prompt_tokens"], "draft": draft, "exact": "default"})
    steps = [data for name, data in found if name == "step"]
    name, end = found[-1]
    assert name == "end"
    expected = generate(model, model.tokenizer.chat_ids(ASKED["messages"]), max_tokens=24)
    assert end["ids"] == expected.tokens
    assert "".join(token["text"] for one in steps for token in one["tokens"]) == expected.text == end["text"]
    assert [one["at"] for one in steps] == sorted(one["at"] for one in steps)
    kept = sum(token["drafted"] for one in steps for token in one["tokens"])
    rejected = sum(len(one["rejected"]) for one in steps)
    assert (kept, kept + rejected) == (end["drafted"], sum(end["proposed"]))
    assert draft != "none" or kept + rejected == 0


def test_a_step_tells_what_was_rejected(model):
    piece = Piece([Token(5, "a", True), Token(6, "b", False)], None, Checked([5, 7, 8], [True, False, False]))
    told = step(piece, model.tokenizer)
    assert told["tokens"] == [{"text": "a", "drafted": True}, {"text": "b", "drafted": False}]
    assert told["rejected"] == [model.tokenizer.decode([7]), model.tokenizer.decode([8])]


def test_a_seed_gives_the_same_answer_again_and_another_seed_another(client):
    answers = [asked(client, temperature=1.2, seed=seed)[-1][1]["ids"] for seed in (1, 1, 2)]
    assert answers[0] == answers[1] != answers[2]


def test_a_conversation_that_leaves_no_room_is_an_error_in_the_stream(client):
    found = asked(client, messages=[{"role": "user", "content": "x" * 400}])
    assert [name for name, _ in found] == ["begin", "error"]
    assert "exceed the context of 120" in found[1][1]["message"]


def test_an_answer_is_cut_where_the_context_ends(client):
    found = asked(client, max_tokens=1024)
    assert found[-1][1]["finish"] in ("length", "eos")
    assert found[0][1]["prompt_tokens"] + len(found[-1][1]["ids"]) <= 120


WRONG = [
    ({"draft": "medusa:/etc"}, "there is no way to draft called 'medusa:/etc'"),
    ({"draft": "run:foreign"}, "there is no way to draft"),
    ({"messages": []}, "messages"),
    ({"messages": [{"role": "tool", "content": "x"}]}, "role"),
    ({"messages": [{"role": "user", "content": "x" * 40_000}]}, "content"),
    ({"messages": [{"role": "user", "content": "\ud800"}]}, "content"),
    ({"temperature": 3}, "temperature"),
    ({"max_tokens": 0}, "max_tokens"),
    ({"seed": -1}, "seed"),
    ({"more": 1}, "more"),
]


@pytest.mark.parametrize(("wrong", "said"), WRONG, ids=range(len(WRONG)))
def test_what_cannot_be_asked_is_said(client, wrong, said):
    headers = {"content-type": "application/json"}
    answer = client.post("/studio/api/chat/answer", content=json.dumps(ASKED | wrong), headers=headers)
    assert answer.status_code == 400
    assert said in answer.json()["error"]["message"]


def test_only_known_models_are_fetched(client):
    answer = client.post("/studio/api/chat/fetch")
    assert (answer.status_code, "not a model that can be fetched" in answer.text) == (400, True)


def test_a_known_model_is_fetched_by_a_job_of_its_own(tmp_path):
    jobs = Jobs(command=("true",))
    rooms = [jobs.routes(), router(jobs, model="smollm2", runs=tmp_path)]
    with TestClient(create_studio(rooms), base_url="http://127.0.0.1") as client:
        job = client.post("/studio/api/chat/fetch").json()
    assert job["command"] == "volvelle get smollm2"


def test_a_model_that_does_not_open_says_why(tmp_path):
    def opened(name):
        raise VolvelleError("no weights there", tip="train it")

    speaker = Speaker("tiny", tmp_path, opened=opened)
    with TestClient(create_studio([router(Jobs(), speaker=speaker)]), base_url="http://127.0.0.1") as client:
        client.post("/studio/api/chat/open")
        until = time.monotonic() + 30
        while (facts := client.get("/studio/api/chat").json())["state"] == "opening":
            assert time.monotonic() < until
    assert (facts["state"], facts["problem"]) == ("failed", "no weights there (tip: train it)")


def test_who_goes_away_frees_the_seat(model, runs):
    """The stream is closed while it is read: its job is left, and the next answer begins."""
    speaker = Speaker("tiny", runs, opened=lambda name: model, context=120)
    speaker._open()
    answer = next(route.endpoint for route in router(Jobs(), speaker=speaker).routes if route.path.endswith("/answer"))

    async def some():
        from volvelle.serve.studio.chat import Said

        first = (await answer(Said(**ASKED))).body_iterator
        assert "begin" in await anext(first)
        assert "step" in await anext(first)
        await first.aclose()
        return [piece async for piece in (await answer(Said(**ASKED))).body_iterator]

    found = asyncio.run(some())
    assert json.loads(found[-1].split("data: ")[1])["finish"]
    engine = speaker.engine("none")
    until = time.monotonic() + 20
    while engine.load.running:
        assert time.monotonic() < until
    speaker.close()


def test_turns_are_taken_one_by_one_and_a_full_room_is_said():
    order = []

    async def work(turns, number):
        async with turns.take():
            order.append(("in", number))
            await asyncio.sleep(0.01)
            order.append(("out", number))

    async def some():
        turns = Turns("chat", waiting=1)
        first, second = asyncio.create_task(work(turns, 1)), asyncio.create_task(work(turns, 2))
        await asyncio.sleep(0.001)
        with pytest.raises(Busy, match="chat: 2 requests"):
            turns.check()
        with pytest.raises(Busy):
            await work(turns, 3)
        await asyncio.gather(first, second)
        turns.check()

    asyncio.run(some())
    assert order == [("in", 1), ("out", 1), ("in", 2), ("out", 2)]
