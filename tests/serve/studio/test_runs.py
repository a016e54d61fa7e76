"""The Runs room: folders as the trainings leave them, also while they are being written."""

from __future__ import annotations

import json

import pytest
from fastapi.testclient import TestClient

from volvelle.runs import RunFolder
from volvelle.serve.studio.runs import CHUNK, read_metrics, router
from volvelle.serve.studio.shell import create_studio


@pytest.fixture
def root(tmp_path):
    return tmp_path / "runs"


@pytest.fixture
def run(root):
    made = RunFolder.create("first", root=root, kind="train-language", config={"model": {"width": 8}, "steps": 3})
    made.log({"event": "train", "step": 1, "loss": 2.5, "seconds": 0.1})
    made.log({"event": "evaluate", "step": 1, "held_out_loss": float("nan")})
    made.log({"event": "train", "step": 2, "loss": 2.25, "seconds": 0.1})
    return made


@pytest.fixture
def client(root):
    with TestClient(create_studio([router(root)]), base_url="http://127.0.0.1") as made:
        yield made


def test_no_runs_is_no_error(client, root):
    assert client.get("/studio/api/runs").json() == {"root": str(root), "runs": []}


def test_runs_are_listed_newest_first_with_their_last_figures(client, run, root):
    later = RunFolder.create("second", root=root, kind="train-segment", config={})
    later.update_manifest(status="finished", created="2999-01-01T00:00:00+00:00")
    (root / "no-run").mkdir()
    found = client.get("/studio/api/runs").json()["runs"]
    assert [(one["name"], one["status"]) for one in found] == [("second", "finished"), ("first", "running")]
    assert found[1]["last"] == {"step": 2, "loss": 2.25, "held_out_loss": "NaN", "seconds": 0.1}
    assert found[0]["last"] == {}


def test_a_page_holds_configuration_and_environment(client, run):
    page = client.get("/studio/api/runs/first").json()
    assert page["config"] == {"model": {"width": 8}, "steps": 3}
    assert page["environment"]["python"]
    assert (page["report"], page["pictures"], page["samples"]) == (False, [], None)
    (run.path / "config.yaml").write_text("a: [")
    assert "not readable" in client.get("/studio/api/runs/first").json()["config"]


def test_metrics_come_piece_by_piece_and_a_torn_line_later(client, run):
    url = "/studio/api/runs/first/metrics"
    first = client.get(url).json()
    assert [record["step"] for record in first["records"]] == [1, 1, 2]
    path = run.path / "metrics.jsonl"
    assert first["offset"] == path.stat().st_size
    assert client.get(f"{url}?offset={first['offset']}").json()["records"] == []
    with open(path, "a", encoding="utf-8") as file:
        file.write('{"step": 3, "lo')
    torn = client.get(f"{url}?offset={first['offset']}").json()
    assert (torn["records"], torn["offset"]) == ([], first["offset"])
    with open(path, "a", encoding="utf-8") as file:
        file.write('ss": 2.0}\n')
    whole = client.get(f"{url}?offset={torn['offset']}").json()
    assert whole["records"] == [{"step": 3, "loss": 2.0}]
    assert whole["offset"] == path.stat().st_size


def test_a_file_that_was_written_anew_is_read_from_its_beginning(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n')
    _, offset, _ = read_metrics(path, 0)
    path.write_text('{"step": 1}\n')
    assert read_metrics(path, offset) == ([{"step": 1}], path.stat().st_size, 0)
    assert read_metrics(path, -5)[2] == 0
    assert read_metrics(tmp_path / "none", 7) == ([], 0, 0)


def test_lines_that_are_no_objects_are_passed_over(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1, "loss": NaN}\nno json\n[1]\n\xff\xfe\n{"step": 2}\n')
    assert read_metrics(path, 0)[0] == [{"step": 1, "loss": "NaN"}, {"step": 2}]


def test_a_long_file_comes_in_bounded_pieces(tmp_path):
    path = tmp_path / "metrics.jsonl"
    lines = [json.dumps({"step": step, "text": "x" * 200}) + "\n" for step in range(CHUNK // 100)]
    path.write_text("".join(lines))
    offset, seen = 0, 0
    while found := read_metrics(path, offset)[0]:
        records, offset, _ = read_metrics(path, offset)
        assert len(records) == len(found)
        seen += len(records)
    assert (seen, offset) == (len(lines), path.stat().st_size)


def test_pictures_are_those_of_the_list_and_links_are_not_followed(client, run, tmp_path):
    outside = tmp_path / "outside.png"
    outside.write_bytes(b"secret")
    (run.path / "samples").mkdir()
    (run.path / "samples" / "b.png").write_bytes(b"b")
    (run.path / "samples" / "a.SVG").write_text("<svg/>")
    (run.path / "samples" / "link.png").symlink_to(outside)
    (run.path / "away").symlink_to(tmp_path)
    (run.path / "data").mkdir()
    (run.path / "data" / "c.png").write_bytes(b"c")
    assert client.get("/studio/api/runs/first").json()["pictures"] == ["samples/a.SVG", "samples/b.png"]
    good = client.get("/studio/api/runs/first/pictures/1")
    assert (good.content, good.headers["content-type"]) == (b"b", "image/png")
    assert "sandbox" in client.get("/studio/api/runs/first/pictures/0").headers["content-security-policy"]
    assert client.get("/studio/api/runs/first/pictures/2").status_code == 404
    assert client.get("/studio/api/runs/first/pictures/-1").status_code == 404


def test_a_report_may_run_nothing(client, run, tmp_path):
    assert client.get("/studio/api/runs/first/report").status_code == 404
    (run.path / "report.html").write_text("<script>alert(1)</script>")
    answer = client.get("/studio/api/runs/first/report")
    policy = answer.headers["content-security-policy"]
    assert "sandbox" in policy
    assert "default-src 'none'" in policy
    assert "allow-scripts" not in policy
    (run.path / "report.html").unlink()
    (run.path / "report.html").symlink_to(tmp_path / "outside.html")
    (tmp_path / "outside.html").write_text("secret")
    assert client.get("/studio/api/runs/first/report").status_code == 404


@pytest.mark.parametrize("name", ["..", "%2e%2e", "first%2F..%2Ffirst", "nothing", "first%00"])
def test_only_runs_that_are_there_are_opened(client, run, name):
    for path in ("", "/metrics", "/report", "/pictures/0"):
        assert client.get(f"/studio/api/runs/{name}{path}").status_code in (404, 421)
