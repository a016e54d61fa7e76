"""Jobs: one after the other, with what they say, until they end or are ended."""

from __future__ import annotations

import json
import signal
import sys
import time
from pathlib import Path

import httpx
import pytest
from fastapi.testclient import TestClient
from tests.serve.studio.browser import studio_in

from volvelle.serve.errors import Refused
from volvelle.serve.studio.jobs import LINES, Jobs
from volvelle.serve.studio.shell import create_studio

COMMAND = (sys.executable, "-c")
SAYS = "import sys; print('one'); print('two', file=sys.stderr); sys.exit(int({code}))"
STAYS = "import time; print('begun', flush=True); time.sleep(600)"
DEAF = "import signal, time; signal.signal(signal.SIGINT, signal.SIG_IGN); print('begun', flush=True); time.sleep(600)"


@pytest.fixture
def jobs():
    return Jobs(waiting=2, command=COMMAND)


@pytest.fixture
def client(jobs):
    with TestClient(create_studio([jobs.routes()]), base_url="http://127.0.0.1") as made:
        yield made


def start(client, jobs, title, *words):
    """Start a job where the app's loop runs, as a room's route does."""
    return client.portal.call(jobs.start, title, words)


def stream(client, number):
    """The events of a job until it has ended, as (name, data)."""
    with client.stream("GET", f"/studio/api/jobs/{number}/events") as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        blocks = "".join(answer.iter_text()).strip().split("\n\n")
    pairs = (block.split("\n") for block in blocks if not block.startswith(":"))
    return [(name.removeprefix("event: "), json.loads(data.removeprefix("data: "))) for name, data in pairs]


def wait(condition, seconds=60.0):
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, "it does not come"
        time.sleep(0.02)


def test_a_job_says_what_it_does_and_how_it_ended(client, jobs):
    job = start(client, jobs, "one", SAYS.format(code=3))
    events = stream(client, job.number)
    assert {data for name, data in events if name == "line"} == {"one", "two"}
    last = [data for name, data in events if name == "state"][-1]
    assert (last["state"], last["code"]) == ("failed", 3)
    again = stream(client, job.number)
    assert [data for name, data in again if name == "line"] == job.lines
    listed = client.get("/studio/api/jobs").json()["jobs"]
    assert [(one["number"], one["title"], one["state"]) for one in listed] == [(job.number, "one", "failed")]


def test_jobs_run_one_after_the_other_and_the_queue_is_bounded(client, jobs):
    first = start(client, jobs, "first", STAYS)
    wait(lambda: first.lines == ["begun"])
    with pytest.raises(Refused, match="first is already waiting or running") as caught:
        start(client, jobs, "first", STAYS)
    assert caught.value.status == 409
    rest = [start(client, jobs, f"{n}", SAYS.format(code=0) + f" # {n}") for n in range(2)]
    assert [job.state for job in rest] == ["waiting", "waiting"]
    with pytest.raises(Refused) as caught:
        start(client, jobs, "one more", "pass")
    assert caught.value.status == 503
    told = client.post(f"/studio/api/jobs/{rest[1].number}/cancel").json()
    assert told["state"] == "cancelled"
    assert client.post(f"/studio/api/jobs/{first.number}/cancel").json()["state"] == "cancelled"
    wait(lambda: rest[0].over)
    assert [job.state for job in (first, *rest)] == ["cancelled", "finished", "cancelled"]
    assert rest[1].lines == []


def test_the_studio_does_not_end_before_its_job():
    jobs = Jobs(command=COMMAND)
    with TestClient(create_studio([jobs.routes()]), base_url="http://127.0.0.1") as client:
        job = start(client, jobs, "stays", STAYS)
        wait(lambda: job.lines == ["begun"])
        process = jobs._process
        assert process is not None
        assert process.returncode is None
    assert process.returncode is not None
    assert job.state == "cancelled"


def test_a_job_that_does_not_hear_ctrl_c_is_ended_all_the_same(client, jobs, monkeypatch):
    monkeypatch.setattr("volvelle.serve.studio.jobs.PATIENCE", (0.2, 0.2))
    job = start(client, jobs, "deaf", DEAF)
    wait(lambda: job.lines == ["begun"])
    client.post(f"/studio/api/jobs/{job.number}/cancel")
    wait(lambda: job.ended is not None)
    assert job.code is not None
    assert job.code < 0


def test_only_the_newest_lines_are_kept(client, jobs):
    job = start(client, jobs, "talks", f"for i in range({LINES + 50}): print(i)")
    wait(lambda: job.over)
    assert (job.dropped, len(job.lines), job.lines[0]) == (50, LINES, "50")
    assert [data for name, data in stream(client, job.number) if name == "line"][:1] == ["50"]


@pytest.mark.slow
def test_a_studio_that_is_told_to_end_takes_its_job_with_it(tmp_path):
    """A real studio and a real measurement, with a reader of its output still there."""
    studio = studio_in(tmp_path)
    with studio as url, httpx.Client(base_url=url, timeout=60) as asked:
        job = asked.post("studio/api/claims/position-zoo/measure", json={"budget": "full"}).json()
        wait(lambda: asked.get("studio/api/jobs").json()["jobs"][0]["state"] == "running")
        children = Path(f"/proc/{studio.process.pid}/task/{studio.process.pid}/children")
        if not children.exists():
            pytest.skip("this system does not say which processes another one started")
        wait(lambda: children.read_text().split())
        child = int(children.read_text().split()[0])
        with asked.stream("GET", f"studio/api/jobs/{job['number']}/events") as answer:
            next(answer.iter_lines())
            studio.process.send_signal(signal.SIGINT)
            wait(lambda: studio.process.poll() is not None)
    assert not Path(f"/proc/{child}").exists()


def test_a_job_that_is_not_there(client):
    assert client.get("/studio/api/jobs/7/events").status_code == 404
    assert client.post("/studio/api/jobs/7/cancel").status_code == 404
