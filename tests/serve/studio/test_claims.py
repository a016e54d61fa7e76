"""The Claims room: every claim, its verdict, and the command behind the button."""

from __future__ import annotations

import json
import sys
import time

import pytest
from fastapi.testclient import TestClient

from volvelle.claims.claim import names
from volvelle.serve.studio.claims import router
from volvelle.serve.studio.jobs import Jobs
from volvelle.serve.studio.shell import create_studio
from volvelle.serve.studio.verdicts import Verdicts

WRITES = """
import json, pathlib, sys
given = dict(word.split("=", 1) for word in sys.argv[2:] if "=" in word)
folder = pathlib.Path(given["results"])
folder.mkdir(parents=True)
print("measured", sys.argv[2], given["budget"])
record = {"claim": sys.argv[2], "verdict": "not held", "findings": [], "machine": {}, "budget": given["budget"]}
(folder / f"{sys.argv[2]}.json").write_text(json.dumps(record))
sys.exit(1)
"""
"""A stand-in for the command: it takes the same words and leaves the same file."""


@pytest.fixture
def jobs():
    return Jobs(waiting=0, command=(sys.executable, "-c", WRITES))


@pytest.fixture
def client(tmp_path, jobs):
    results = tmp_path / "runs" / "claims"
    rooms = [jobs.routes(), router(jobs, Verdicts(results, None), results)]
    with TestClient(create_studio(rooms), base_url="http://127.0.0.1") as made:
        yield made


def listed(client, name):
    return next(one for one in client.get("/studio/api/claims").json()["claims"] if one["name"] == name)


def test_every_claim_is_listed_and_none_is_measured_yet(client):
    found = client.get("/studio/api/claims").json()["claims"]
    assert [one["name"] for one in found] == names()
    assert all(one["found"] is None and one["job"] is None for one in found)
    assert all(one["sentence"] and one["declared"]["quick"] <= 60 for one in found)


def test_measuring_runs_the_command_and_its_verdict_is_shown(client, jobs):
    job = client.post("/studio/api/claims/rope/measure", json={"budget": "full"}).json()
    assert job["command"].startswith("volvelle claim rope budget=full results=")
    until = time.monotonic() + 60
    while not jobs.find(job["number"]).over:
        assert time.monotonic() < until
        time.sleep(0.02)
    assert jobs.find(job["number"]).lines == ["measured rope full"]
    assert listed(client, "rope")["found"]["verdict"] == "not held"
    assert json.loads(json.dumps(listed(client, "lora")["found"])) is None


def test_a_claim_that_is_measured_now_says_so(client, jobs):
    jobs.command = (sys.executable, "-c", "import time; time.sleep(600)")
    client.post("/studio/api/claims/rope/measure", json={})
    assert listed(client, "rope")["job"]["state"] in ("waiting", "running")
    assert client.post("/studio/api/claims/rope/measure", json={}).status_code == 409
    assert client.post("/studio/api/claims/lora/measure", json={}).status_code == 503


@pytest.mark.parametrize(
    ("name", "body", "status"),
    [
        ("nothing", {}, 404),
        ("../rope", {}, 404),
        ("rope", {"budget": "endless"}, 400),
        ("rope", {"budget": "quick", "results": "/tmp"}, 400),
        ("rope", [], 400),
    ],
)
def test_only_known_claims_and_budgets_are_measured(client, jobs, name, body, status):
    assert client.post(f"/studio/api/claims/{name}/measure", json=body).status_code == status
    assert jobs.jobs == {}
