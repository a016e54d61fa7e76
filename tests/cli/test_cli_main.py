"""Dispatch, exit codes and messages, with toy verbs in the place of the real ones."""

import json
import os
import signal
import subprocess
import sys
import types
from dataclasses import dataclass

import pytest
from tyro.conf import Positional

import volvelle
from volvelle.cli import console, table
from volvelle.cli.main import choose, main
from volvelle.cli.table import VERBS, Verb
from volvelle.errors import UsageError, VolvelleError


@dataclass(frozen=True)
class Options:
    what: Positional[str] = "ok"
    """What to do."""


def act(options: Options) -> int | None:
    """The toy verb."""
    failures = {
        "user": VolvelleError("no such model", tip="try another"),
        "usage": UsageError("wrong"),
        "ctrl-c": KeyboardInterrupt(),
        "bug": ZeroDivisionError("oops"),
        "package": ModuleNotFoundError("No module named 'fastapi'", name="fastapi"),
    }
    if options.what in failures:
        raise failures[options.what]
    if options.what == "three":
        return 3
    console.say("working")
    console.warn("careful")
    console.result({"what": options.what, "loss": float("nan")})
    return None


@pytest.fixture
def toys(monkeypatch):
    """Four verbs that exist: act, `act all`, `train language`, `train gan`."""
    module = types.ModuleType("volvelle.cli.verbs.toy")
    module.__dict__.update(EXAMPLES=("volvelle act ok",), Options=Options, main=act)
    monkeypatch.setitem(sys.modules, "volvelle.cli.verbs.toy", module)
    rows = [Verb(n, f"do {n}", "toy", "use") for n in ("act", "act all", "train language", "train gan")]
    monkeypatch.setattr(table, "available", lambda: rows)
    monkeypatch.delenv("VOLVELLE_DEBUG", raising=False)


@pytest.mark.parametrize(
    ("what", "code", "error", "tip"),
    [
        ("user", 1, "error: no such model", "tip: try another"),
        ("usage", 2, "error: wrong", ""),
        ("ctrl-c", 130, "interrupted", ""),
        ("bug", 1, "error: unexpected ZeroDivisionError: oops", "VOLVELLE_DEBUG=1"),
        ("package", 1, "error: this needs the package fastapi", "pip install fastapi"),
        ("three", 3, "", ""),
    ],
)
def test_failures_become_messages_and_codes(toys, capsys, what, code, error, tip):
    assert main(["act", what]) == code
    printed = capsys.readouterr()
    assert printed.out == ""
    assert error in printed.err
    assert tip in printed.err
    assert "Traceback" not in printed.err


def test_debug_shows_where_it_came_from(toys, capsys, monkeypatch):
    monkeypatch.setenv("VOLVELLE_DEBUG", "1")
    assert main(["act", "bug"]) == 1
    printed = capsys.readouterr().err
    assert "Traceback" in printed
    assert "error: unexpected ZeroDivisionError" in printed


def test_json_leaves_one_object_on_stdout(toys, capsys):
    assert main(["act"]) == 0
    assert capsys.readouterr() == ("working\n", "warning: careful\n")
    for words in (["act", "--json"], ["--json", "act"]):
        assert main(words) == 0
        printed = capsys.readouterr()
        assert json.loads(printed.out) == {"what": "ok", "loss": "NaN"}
        assert printed.err == "working\nwarning: careful\n"
    assert not console.wants_json()


def test_words_after_dashes_are_text(toys, capsys):
    assert main(["act", "--json", "--", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["what"] == "--json"


def test_two_words_win_over_one(toys):
    names = {"act": "act", "act all": "act all", "act one": "act", "train language x": "train language"}
    for words, name in names.items():
        verb, _ = choose(words.split())
        assert verb is not None
        assert verb.name == name
    assert choose(["train", "language", "x", "y"])[1] == ["x", "y"]


@pytest.mark.parametrize(
    ("words", "message", "tip"),
    [
        (["atc"], "unknown verb 'atc'", "did you mean act"),
        (["xyzzy"], "unknown verb 'xyzzy'", "lists the verbs"),
        (["trian", "language"], "unknown verb 'trian'", "train"),
        (["train", "langauge"], "unknown verb 'train langauge'", "did you mean language"),
        (["train"], "train what? One of: language, gan", "volvelle train language|gan"),
        (["train", "data=x"], "train what?", "language|gan"),
    ],
)
def test_wrong_verbs(toys, capsys, words, message, tip):
    assert main(words) == 2
    printed = capsys.readouterr().err
    assert message in printed
    assert tip in printed


@pytest.mark.parametrize(
    "words", [[], ["--help"], ["-h"], ["help"], ["train", "--help"], ["act", "-h"], ["help", "act"]]
)
def test_help_pages(toys, capsys, words):
    assert main(words) == 0
    page = capsys.readouterr().out
    assert page.startswith("usage: volvelle act [WHAT]" if "act" in words else "Deep-learning")
    assert ("train language" in page) == ("act" not in words)


def test_version(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"volvelle {volvelle.__version__}\n"


def test_every_verb_file_has_a_row_and_keeps_the_form():
    import importlib
    from pathlib import Path

    import volvelle.cli.verbs

    files = {path.stem for path in Path(volvelle.cli.verbs.__path__[0]).glob("*.py")} - {"__init__"}
    files = {name for name in files if not name.startswith("_")}
    present = [verb for verb in VERBS if verb.exists()]
    assert {verb.file for verb in present} == files
    for verb in present:
        module = importlib.import_module(verb.module)
        assert not isinstance(module.EXAMPLES, str), verb.name
        assert len(module.EXAMPLES) >= 2, verb.name
        first, *rest = verb.name.split()  # of two words the second may stand behind what it is asked of
        assert all(line.startswith(f"volvelle {first}") for line in module.EXAMPLES), verb.name
        assert all(set(rest) <= set(line.split()) for line in module.EXAMPLES), verb.name
        assert module.Options.__dataclass_params__.frozen, verb.name
        assert callable(module.main), verb.name


def test_a_row_without_a_file_is_not_shown():
    rows = (Verb("ls", "list", "ls", "start"), Verb("later", "not yet", "not_there_yet", "start"))
    assert [verb.name for verb in table.available(rows)] == ["ls"]


def test_broken_pipe_is_quiet():
    script = "import sys; from volvelle.cli.main import main; sys.exit(main(['ls']))"
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run([sys.executable, "-c", script], stdout=writer, stderr=subprocess.PIPE, check=False)
    os.close(writer)
    assert (done.returncode, done.stderr) == (141, b"")


def test_module_and_ctrl_c_from_outside(tmp_path):
    """A real SIGINT while a verb works: exit code 130, one line, no traceback."""
    script = (
        "import sys, time, volvelle.cli.catalogue as c; from volvelle.cli.main import main\n"
        "def slow():\n    print('ready', flush=True); time.sleep(30); return []\n"
        "c.techniques = slow; sys.exit(main(['ls', 'techniques']))"
    )
    child = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert child.stdout is not None
    assert child.stdout.readline() == "ready\n"
    child.send_signal(signal.SIGINT)
    _, errors = child.communicate(timeout=20)
    assert (child.returncode, errors) == (130, "interrupted\n")
    done = subprocess.run(
        [sys.executable, "-m", "volvelle", "--version"], capture_output=True, check=True, cwd=tmp_path
    )
    assert done.stdout.startswith(b"volvelle ")
