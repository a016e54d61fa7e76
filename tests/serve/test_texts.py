"""OpenAI's API, asked by OpenAI's own client and by bare HTTP."""

from __future__ import annotations

import concurrent.futures
import json
import threading
import time

import httpx
import pytest
from tests.serve.conftest import serving, wait_until

import volvelle.adapt as adapt
from volvelle.decode import Sampling, generate
from volvelle.serve.protocol import token_text

openai = pytest.importorskip("openai", reason="the client that users have")

PROMPT = "the quick brown fox the quick"
CHAT = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "what is the capital?"}]


@pytest.fixture
def client(address):
    with openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0) as client:
        yield client


def alone(model, ids, **options):
    return generate(model, ids, **{"max_tokens": 20, **options})


def test_models_are_listed(client):
    assert [one.id for one in client.models.list()] == ["tiny", "poet", "chef"]
    assert client.models.retrieve("poet").id == "poet"
    with pytest.raises(openai.NotFoundError, match="'nobody' does not exist; there are: tiny, poet, chef"):
        client.models.retrieve("nobody")


@pytest.mark.parametrize("name", ["tiny", "poet", "chef"])
def test_a_completion_is_what_generate_writes(client, model, name):
    found = client.completions.create(model=name, prompt=PROMPT, max_tokens=20, temperature=0)
    with adapt.using(model, None if name == "tiny" else name):
        expected = alone(model, model.tokenizer.encode_prompt(PROMPT))
    assert found.choices[0].text == expected.text
    assert found.choices[0].finish_reason == "length"
    ids = model.tokenizer.encode_prompt(PROMPT)
    assert (found.usage.prompt_tokens, found.usage.completion_tokens) == (len(ids), 20)


def test_a_chat_too_and_streamed(client, model):
    expected = alone(model, model.tokenizer.chat_ids(CHAT)).text
    whole = client.chat.completions.create(model="tiny", messages=CHAT, max_completion_tokens=20, temperature=0)
    assert whole.choices[0].message.content == expected
    assert whole.choices[0].message.role == "assistant"
    events = list(
        client.chat.completions.create(
            model="tiny",
            messages=CHAT,
            max_tokens=20,
            temperature=0,
            stream=True,
            stream_options={"include_usage": True},
        )
    )
    assert events[0].choices[0].delta.role == "assistant"
    assert "".join(e.choices[0].delta.content or "" for e in events if e.choices) == expected
    assert [e.choices[0].finish_reason for e in events if e.choices][-1] == "length"
    assert not events[-1].choices
    assert events[-1].usage.completion_tokens == 20
    assert len({e.id for e in events}) == 1


def test_many_answers_to_many_prompts(client, model):
    """With a seed each choice has its own; prompts may be ids."""
    ids = model.tokenizer.encode_prompt(PROMPT)
    found = client.completions.create(model="tiny", prompt=[ids, ids[:3]], n=2, seed=5, temperature=0.9, max_tokens=8)
    assert [choice.index for choice in found.choices] == [0, 1, 2, 3]
    assert found.choices[0].text != found.choices[1].text
    again = client.completions.create(model="tiny", prompt=[ids, ids[:3]], n=2, seed=5, temperature=0.9, max_tokens=8)
    assert [c.text for c in again.choices] == [c.text for c in found.choices]


def test_stop_strings_end_an_answer_and_are_left_out(client, model):
    text = alone(model, model.tokenizer.encode_prompt(PROMPT)).text
    stop = text[6:8]
    found = client.completions.create(model="tiny", prompt=PROMPT, max_tokens=20, temperature=0, stop=[stop, "never"])
    assert found.choices[0].text == text[: text.index(stop)]
    assert found.choices[0].finish_reason == "stop"


def test_penalties_and_cuts_reach_the_sampling(client, model):
    options = {"presence_penalty": 0.5, "frequency_penalty": 1.5}
    found = client.completions.create(model="tiny", prompt=PROMPT, max_tokens=20, temperature=0, **options)
    ids = model.tokenizer.encode_prompt(PROMPT)
    assert found.choices[0].text == alone(model, ids, sampling=Sampling(**options)).text
    assert found.choices[0].text != alone(model, ids).text
    cut = client.completions.create(model="tiny", prompt=PROMPT, max_tokens=20, temperature=1, top_p=1e-6, seed=1)
    assert cut.choices[0].text == alone(model, ids).text


def test_logprobs_of_both_kinds(client, model):
    ids = model.tokenizer.encode_prompt(PROMPT)
    expected = alone(model, ids, logprobs=2, max_tokens=6)
    found = client.completions.create(model="tiny", prompt=PROMPT, max_tokens=6, temperature=0, logprobs=2)
    logprobs = found.choices[0].logprobs
    assert logprobs.token_logprobs == pytest.approx([one.logprob for one in expected.logprobs], abs=1e-5)
    assert logprobs.tokens == [token_text(model.tokenizer, token) for token in expected.tokens]
    assert all(len(top) == 2 for top in logprobs.top_logprobs)
    assert logprobs.text_offset[0] == 0
    events = client.chat.completions.create(
        model="tiny", messages=CHAT, max_tokens=6, temperature=0, logprobs=True, top_logprobs=3, stream=True
    )
    entries = [entry for e in events if e.choices and e.choices[0].logprobs for entry in e.choices[0].logprobs.content]
    known = alone(model, model.tokenizer.chat_ids(CHAT), logprobs=3, max_tokens=6)
    assert [entry.logprob for entry in entries] == pytest.approx([one.logprob for one in known.logprobs], abs=1e-5)
    assert [len(entry.top_logprobs) for entry in entries] == [3] * 6


def test_many_clients_at_once_get_their_own_answers(address, model):
    """Different prompts, models and lengths, streamed and not: no token is lost or crossed."""
    names = ["tiny", "poet", "chef", "tiny"]

    def ask(number):
        prompt, name = f"{PROMPT} {number} " * (1 + number % 3), names[number % 4]
        with openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0) as client:
            options = {"model": name, "prompt": prompt, "max_tokens": 5 + number, "temperature": 0}
            if number % 2:
                return "".join(e.choices[0].text for e in client.completions.create(**options, stream=True))
            return client.completions.create(**options).choices[0].text

    with concurrent.futures.ThreadPoolExecutor(16) as pool:
        found = list(pool.map(ask, range(24)))
    for number, text in enumerate(found):
        ids = model.tokenizer.encode_prompt(f"{PROMPT} {number} " * (1 + number % 3))
        name = names[number % 4]
        with adapt.using(model, None if name == "tiny" else name):
            assert text == alone(model, ids, max_tokens=5 + number).text


REFUSED = [
    ({"prompt": "x", "model": "nobody"}, 404, "does not exist"),
    ({"prompt": "", "model": "tiny"}, 400, "the prompt is empty"),
    ({"prompt": [], "model": "tiny"}, 400, "at least one is wanted"),
    ({"prompt": [[]], "model": "tiny"}, 400, "the prompt is empty"),
    ({"prompt": [10**6], "model": "tiny"}, 400, "outside the model's vocabulary"),
    ({"prompt": [-1], "model": "tiny"}, 400, "outside the model's vocabulary"),
    ({"prompt": "x" * 3000, "model": "tiny"}, 400, "exceed the context of 160"),
    ({"prompt": "x", "model": "tiny", "max_tokens": 400}, 400, "max_tokens="),
    ({"prompt": "x", "model": "tiny", "max_tokens": 0}, 400, "max_tokens: "),
    ({"prompt": "x", "model": "tiny", "n": 9}, 400, "n: "),
    ({"prompt": ["x"] * 20, "model": "tiny", "n": 2}, 400, "at most 32 answers"),
    ({"prompt": "x", "model": "tiny", "temperature": -1}, 400, "temperature: "),
    ({"prompt": "x", "model": "tiny", "logit_bias": {"5": 3}}, 400, "logit_bias is not served here"),
    ({"prompt": "x", "model": "tiny", "best": 3}, 400, "best: "),
    ({"prompt": "x", "model": "tiny", "stop": [""]}, 400, "stop: "),
    ({"prompt": "x", "model": "tiny", "stream_options": {"include_usage": True}}, 400, "only with stream=true"),
    ({"prompt": "\ud800", "model": "tiny"}, 400, "half of a surrogate pair"),
    ({"model": "tiny"}, 400, "prompt"),
]


@pytest.mark.parametrize(("asked", "status", "said"), REFUSED)
def test_what_is_refused_is_said_in_openais_form(address, asked, status, said):
    body = json.dumps(asked)
    found = httpx.post(f"{address}/v1/completions", content=body, headers={"Content-Type": "application/json"})
    assert found.status_code == status
    assert said in found.json()["error"]["message"]
    assert set(found.json()["error"]) == {"message", "type", "param", "code"}


@pytest.mark.parametrize(
    ("path", "content", "status"),
    [
        ("/v1/completions", b"{", 400),
        ("/v1/completions", b'{"model": "tiny", "prompt": "x", "temperature": NaN}', 400),
        ("/v1/completions", b"[" * 50_000, 400),
        ("/v1/completions", b"x" * 70_000, 413),
        ("/v1/nothing", b"{}", 404),
        ("/v1/models", b"{}", 405),
        ("/v1/chat/completions", b'{"model": "tiny", "messages": [{"role": "tool", "content": "x"}]}', 400),
        ("/v1/chat/completions", b'{"model": "tiny", "messages": []}', 400),
    ],
)
def test_broken_requests_get_an_error_and_no_more(address, path, content, status):
    found = httpx.post(f"{address}{path}", content=content, headers={"Content-Type": "application/json"})
    assert found.status_code == status
    assert found.json()["error"]["message"]


def test_a_body_without_a_length_is_cut_too(address):
    def much():
        for _ in range(100):
            yield b"x" * 1000

    found = httpx.post(f"{address}/v1/completions", content=much(), headers={"Content-Type": "application/json"})
    assert found.status_code == 413


def test_health_figures_and_threads(address, client):
    client.completions.create(model="tiny", prompt=PROMPT, max_tokens=12, temperature=0)
    assert httpx.get(f"{address}/health").json()["status"] == "ok"
    assert httpx.get(f"{address}/ready").json() == {"ready": True}
    figures = httpx.get(f"{address}/metrics").text
    values = dict(line.rsplit(" ", 1) for line in figures.splitlines() if not line.startswith("#"))
    assert float(values["volvelle_tokens_total"]) >= 12
    assert float(values["volvelle_draft_tokens_total"]) >= float(values["volvelle_accepted_tokens_total"]) > 0
    assert float(values['volvelle_requests_total{path="/v1/completions",status="200"}']) >= 1
    assert float(values["volvelle_time_to_first_token_seconds_count"]) >= 1
    names = [thread["name"] for thread in httpx.get(f"{address}/debug/threads").json()["threads"]]
    assert "volvelle-engine" in names


def test_who_goes_away_frees_the_seat(model):
    with serving(model, count=1) as (url, engine):
        turn = engine.seats.step
        engine.seats.step = lambda: (time.sleep(0.2), turn())[1]  # else the answer may be over before we look
        body = {"model": "tiny", "prompt": "a", "max_tokens": 150, "temperature": 0, "stream": True}
        with httpx.stream("POST", f"{url}/v1/completions", json=body) as stream:
            next(stream.iter_lines())
            wait_until(lambda: engine.load.running == 1)
        wait_until(lambda: engine.load.running == 0)
        assert engine.seats.free == 1


def test_a_full_queue_is_said_and_nothing_is_lost(model):
    with serving(model, count=1, queue=1) as (url, engine):
        slow = {"model": "tiny", "prompt": "a", "max_tokens": 150, "temperature": 0}
        gate, turn = threading.Event(), engine.seats.step

        def held():
            gate.wait(30)
            return turn()

        engine.seats.step = held
        with concurrent.futures.ThreadPoolExecutor(8) as pool:
            asked = [pool.submit(httpx.post, f"{url}/v1/completions", json=slow, timeout=60) for _ in range(7)]
            wait_until(lambda: sum(one.done() for one in asked) >= 3)  # one sits, two are read, one waits
            assert {one.result().status_code for one in asked if one.done()} == {503}
            gate.set()
            found = [one.result() for one in asked]
        refused = [one for one in found if one.status_code == 503]
        assert all(one.headers["Retry-After"] == "1" for one in refused)
        served = [one.json()["choices"][0]["text"] for one in found if one.status_code == 200]
        assert len(served) == 7 - len(refused) >= 1
        assert len(refused) >= 3
        assert len(set(served)) == 1


def test_an_answer_that_takes_too_long_ends_with_an_error(model):
    with serving(model, count=1, seconds=0.2) as (url, engine):
        turn = engine.seats.step
        engine.seats.step = lambda: (time.sleep(0.05), turn())[1]
        body = {"model": "tiny", "prompt": "a", "max_tokens": 150, "temperature": 0}
        found = httpx.post(f"{url}/v1/completions", json=body, timeout=30)
        assert (found.status_code, found.json()["error"]["code"]) == (504, "timeout")
        with httpx.stream("POST", f"{url}/v1/completions", json={**body, "stream": True}) as stream:
            lines = list(stream.iter_lines())
        assert json.loads(lines[-2].removeprefix("data: "))["error"]["code"] == "timeout"
        wait_until(lambda: engine.load.running == 0)


def test_a_key_is_wanted_where_one_is_set(model):
    with serving(model, api_key="s3cret") as (url, _):
        assert httpx.get(f"{url}/health").status_code == 200
        for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "Basic s3cret"}):
            found = httpx.get(f"{url}/v1/models", headers=headers)
            assert (found.status_code, found.json()["error"]["code"]) == (401, "invalid_api_key")
            assert found.headers["WWW-Authenticate"] == "Bearer"
        with openai.OpenAI(base_url=f"{url}/v1", api_key="s3cret") as client:
            assert len(list(client.models.list())) == 3


def test_an_end_finishes_what_is_written_and_takes_no_more(model):
    with serving(model, count=2) as (url, engine):
        turn = engine.seats.step
        engine.seats.step = lambda: (time.sleep(0.02), turn())[1]
        body = {"model": "tiny", "prompt": "a", "max_tokens": 40, "temperature": 0}
        with concurrent.futures.ThreadPoolExecutor(1) as pool:
            asked = pool.submit(httpx.post, f"{url}/v1/completions", json=body, timeout=60)
            wait_until(lambda: engine.load.running == 1)
            engine.end(30)
            assert httpx.get(f"{url}/ready").status_code == 503
            assert httpx.post(f"{url}/v1/completions", json=body).status_code == 503
            expected = alone(model, model.tokenizer.encode_prompt("a"), max_tokens=40)
            assert asked.result().json()["choices"][0]["text"] == expected.text


def test_an_end_without_grace_says_so(model):
    with serving(model, count=2) as (url, engine):
        turn = engine.seats.step
        engine.seats.step = lambda: (time.sleep(0.05), turn())[1]
        body = {"model": "tiny", "prompt": "a", "max_tokens": 150, "temperature": 0, "stream": True}
        with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=30) as stream:
            lines = stream.iter_lines()
            next(lines)
            engine.end(0)
            last = [line for line in lines if line][-1]
        assert json.loads(last.removeprefix("data: "))["error"]["code"] == "shutdown"


def test_a_step_that_fails_fails_its_texts_and_no_others(model):
    with serving(model, count=2) as (url, engine):
        turn = engine.seats.step

        def broken():
            engine.seats.step = turn
            raise RuntimeError("out of luck")

        engine.seats.step = broken
        body = {"model": "tiny", "prompt": "abc", "max_tokens": 10, "temperature": 0}
        first = httpx.post(f"{url}/v1/completions", json=body, timeout=30)
        second = httpx.post(f"{url}/v1/completions", json=body, timeout=30)
        assert (first.status_code, second.status_code) == (500, 200)
        assert "out of luck" in first.json()["error"]["message"]
