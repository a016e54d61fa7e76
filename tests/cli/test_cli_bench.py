"""`volvelle bench`: the list, the collectives end to end on tiny vectors, and what is refused."""

from __future__ import annotations

import json
import math
import subprocess
import sys

import pytest

from volvelle.cli.main import main
from volvelle.cli.verbs import bench


def test_collectives_end_to_end(capsys):
    """Errors are printed before anything is extrapolated, and every extrapolated figure carries one."""
    assert main(["bench", "collectives", "ranks=4", "sizes=1K,4K,16K", "rounds=1", "quick=true"]) == 0
    text = capsys.readouterr().out
    places = [text.index(word) for word in ("time / gloo", "bytes sent", "alpha", "held-out", "extrapol", "selection")]
    assert places == sorted(places)
    assert "counts are exactly that" in text
    for ranks in ("10", "100", "1000", "10000"):
        lines = [line for line in text.splitlines() if line.split()[:1] == [ranks]]
        assert len(lines) == 2 * 2  # two sizes, on this machine and apart
        assert all("%, worst " in line for line in lines)


def test_collectives_as_json(capsys):
    assert main(["bench", "collectives", "ranks=2", "sizes=1K,4K", "rounds=1", "quick=true", "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert record["bytes_exact"] is True
    ring = next(row for row in record["rows"] if (row["algorithm"], row["bytes"]) == ("ring", 4096))
    assert ring["sent"] == 2 * 4096
    assert ring["ratio"] is None or math.isfinite(ring["ratio"])
    assert record["held_out"]["sizes"]["count"] == 4
    assert [row["bytes"] for row in record["selection"]] == [1024, 4096]


def test_the_list_says_what_is_here(capsys, monkeypatch, tmp_path):
    assert main(["bench", "--json"]) == 0
    rows = {row["name"]: row["here"] for row in json.loads(capsys.readouterr().out)["benches"]}
    assert rows["collectives"]
    assert rows["loader"]
    monkeypatch.setattr(bench, "_checkout", lambda: tmp_path)
    assert main(["bench"]) == 0
    assert "not here" in capsys.readouterr().out


def test_every_script_has_a_row(repository):
    aids = {"__init__", "protocol", "tables", "targets", "page", "supported", "trained"}  # none measures a speed
    scripts = {path.stem for path in (repository / "benchmarks").glob("*.py")} - aids
    assert scripts <= {row.name for row in bench.BENCHES}


def test_a_wheel_without_the_scripts_says_so(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(bench, "_checkout", lambda: tmp_path)
    assert main(["bench", "loader"]) == 1
    error = capsys.readouterr().err
    assert "error: bench loader: its script benchmarks/loader.py is not here" in error
    assert "tip: run it in a checkout" in error


def test_scripts_run_and_their_failure_is_ours(capfd, monkeypatch, tmp_path):
    folder = tmp_path / "benchmarks"
    folder.mkdir()
    (folder / "__init__.py").write_text("")
    (folder / "loader.py").write_text('import sys; print(\'ran with\', *sys.argv[1:])  # "--quick" "--rounds"')
    (folder / "planner.py").write_text("raise SystemExit(3)")
    monkeypatch.setattr(bench, "_checkout", lambda: tmp_path)
    assert main(["bench", "loader", "rounds=7", "quick=true"]) == 0
    assert "ran with --quick --rounds=7" in capfd.readouterr().out
    assert main(["bench", "planner"]) == 1
    assert "error: bench planner: the script ended with exit code 3" in capfd.readouterr().err


@pytest.fixture
def few(monkeypatch, tmp_path):
    """A checkout with three scripts and a page."""
    folder = tmp_path / "benchmarks"
    folder.mkdir()
    (folder / "__init__.py").write_text("")
    (folder / "one.py").write_text("import sys; print('one with', *sys.argv[1:])  # protocol.parser(")
    (folder / "two.py").write_text("print('two, as always')")
    (folder / "bad.py").write_text('raise SystemExit(3)  # "--quick"')
    (folder / "page.py").write_text("import json, sys\nprint(json.dumps({'rows': []}) if sys.argv[1:] else 'the page')")
    monkeypatch.setattr(bench, "_checkout", lambda: tmp_path)
    monkeypatch.setattr(bench, "BENCHES", tuple(bench.Bench(name, "") for name in ("one", "bad", "two")))
    return folder


def test_all_go_on_after_one_that_fails_and_end_with_the_page(few, capfd):
    assert main(["bench", "all", "rounds=3"]) == 1
    out = capfd.readouterr().out
    places = [out.index(text) for text in ("one with --rounds=3", "two, as always", "the page", "with an error: bad")]
    assert places == sorted(places)


def test_all_quick_leaves_out_what_has_no_smoke_run(few, capfd):
    (few / "bad.py").unlink()
    (few / "bad.py").write_text('print("fine")  # "--quick"')
    assert main(["bench", "all", "quick=true"]) == 0
    out = capfd.readouterr().out
    assert "one with --quick" in out
    assert "left out: it has no smoke run" in out
    assert "two, as always" not in out


def test_stored_runs_nothing(few, capfd):
    assert main(["bench", "all", "stored=true"]) == 0
    assert capfd.readouterr().out.strip() == "the page"
    assert main(["bench", "all", "stored=true", "--json"]) == 0
    assert json.loads(capfd.readouterr().out) == {"rows": [], "failed": []}


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["colectives"], "did you mean collectives?"),
        (["loader", "stored=true"], "stored=true goes with all"),
        (["all", "ranks=3"], "has no options ranks and sizes"),
        (["loader", "ranks=3"], "error: bench loader: has no option ranks"),
        (["planner", "quick=true"], "error: bench planner: has no option quick"),
        (["collectives", "ranks=1"], "needs ranks >= 2 and rounds >= 1, got 1 and 5"),
        (["collectives", "sizes=1K"], "needs two sizes"),
        (["collectives", "sizes=1K,many"], "bench: sizes=many is not a size from 4 bytes to 1G"),
        (["collectives", "sizes=1K,8T"], "bench: sizes=8T is not a size"),
    ],
)
def test_wrong_use_is_explained(capsys, words, says):
    assert main(["bench", *words]) == 2
    assert says in capsys.readouterr().err


def test_help_and_the_list_do_not_import_torch():
    for words in (["bench", "--help"], ["bench"], ["bench", "xyz"]):
        code = f"import sys; from volvelle.cli.main import main; main({words}); sys.exit('torch' in sys.modules)"
        assert subprocess.run([sys.executable, "-c", code], capture_output=True, check=False).returncode == 0
