"""What docs/scale.md tells nginx, Prometheus and the shell to ask for is there."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest

pytest.importorskip("fastapi", reason="wants the extra serve")

from volvelle.cli.verbs import export, serve
from volvelle.decode.seats import Seats
from volvelle.serve.app import BODY, OPEN, create_app
from volvelle.serve.engine import Engine
from volvelle.serve.figures import Figures
from volvelle.serve.texts import Texts, routes

PAGE = (Path(__file__).resolve().parents[2] / "docs/scale.md").read_text(encoding="utf-8")
VERBS = {"serve": serve.Options, "export": export.Options}


def blocks(language):
    return re.findall(rf"^```{language}[^\n]*\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)


@pytest.fixture(scope="module")
def figures_and_paths(model):
    figures, engine = Figures(), Engine(Seats(model, 1, context=16))
    figures.watch(engine)
    app = create_app([routes(Texts(engine, model.tokenizer, {"tiny": None}, figures))], figures)
    figures.requests.labels("/", "503").inc()
    return figures.text().decode(), set(app.openapi()["paths"])


def test_every_path_that_is_forwarded_is_served(figures_and_paths):
    (conf,) = blocks("nginx")
    _, paths = figures_and_paths
    forwarded = re.findall(r"location (= )?(\S+) {", conf)
    assert forwarded
    for exact, path in forwarded:
        assert path in paths if exact else any(one.startswith(path) for one in paths)
    kept = {
        path for path in paths if not any(path == one if exact else path.startswith(one) for exact, one in forwarded)
    }
    assert kept == {"/health", "/metrics", "/debug/threads"}  # what the page says is not forwarded, and why
    assert "/ready" in OPEN


def test_the_ports_are_those_that_replicas_listen_on():
    (conf,) = blocks("nginx")
    started = {port for block in blocks("sh") for port in re.findall(r"volvelle serve .*port=(\d+)", block)}
    assert set(re.findall(r"server 127\.0\.0\.1:(\d+)", conf)) == started
    assert {port for block in blocks("yaml") for port in re.findall(r"127\.0\.0\.1:(\d+)", block)} == started
    assert re.search(r"client_max_body_size (\d+)m;", conf)[1] == str(BODY >> 20)
    longest = {field.name: field.default for field in dataclasses.fields(serve.Options)}["seconds"]
    assert int(re.search(r"proxy_read_timeout (\d+)s;", conf)[1]) > longest


def test_every_figure_is_one_of_the_servers(figures_and_paths):
    text, _ = figures_and_paths
    named = set(re.findall(r"\bvolvelle_[a-z_]+", PAGE))
    assert len(named) >= 7
    for name in named:
        assert re.search(rf"^{name}(_count)?[ {{]", text, re.MULTILINE), name


def test_every_option_of_a_command_exists():
    tried = 0
    for block in (*blocks("sh"), *blocks("console")):
        for verb, words in re.findall(r"volvelle (serve|export) ([^\n&|]*)", block):
            known = {field.name for field in dataclasses.fields(VERBS[verb])}
            for word in words.split()[1:]:
                assert word.partition("=")[0] in known, (verb, word)
                tried += 1
    assert tried > 8
