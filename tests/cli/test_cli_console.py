import io

import pytest

from volvelle.cli import console


def test_table_aligns_numbers_right_and_wide_letters(capsys):
    console.table(("name", "size"), [("a", 5), ("模型", 12345), (None, 7)])
    assert capsys.readouterr().out == (
        "name   size\n"
        "----  -----\n"
        "a         5\n"
        "模型  12345\n"
        "          7\n"
    )  # fmt: skip


def test_table_of_nothing(capsys):
    console.table(("name",), [], title="models")
    assert capsys.readouterr().out == "models\nname\n----\n"


def test_table_is_cut_on_a_narrow_terminal(monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    terminal = Terminal()
    monkeypatch.setattr(console.sys, "stdout", terminal)
    monkeypatch.setenv("COLUMNS", "20")
    console.table(("a", "b"), [("x", "y" * 50)])
    assert terminal.getvalue().splitlines()[2] == "x  " + "y" * 16 + "…"


def test_progress_in_a_pipe_prints_lines_with_rate_and_time_left(capsys, monkeypatch):
    clock = iter([100.0, 101.0, 102.0, 102.0, 106.0, 106.0, 106.0, 110.0, 110.0, 110.0])
    monkeypatch.setattr(console.time, "monotonic", lambda: next(clock))
    with console.progress("training", 10, unit="step") as progress:  # begins at 100
        progress.advance()  # 101, too early for a line
        progress.update(2)  # 102, too early
        progress.update(3, note="loss 2.1")
        progress.advance(1)
    lines = capsys.readouterr().err.splitlines()
    assert lines
    assert all(line.startswith("training: ") and "step/s" in line for line in lines)
    assert lines[-1].startswith("training: 4/10")
    assert "left" in lines[-1]
    assert "loss 2.1" in lines[-1]


def test_resumed_work_does_not_count_in_the_rate(monkeypatch):
    clock = iter([0.0, 10.0])
    monkeypatch.setattr(console.time, "monotonic", lambda: next(clock))
    progress = console.Progress("download", 300_000_000, unit="B", interval=1e9)
    progress.resume(100_000_000)
    progress.done = 200_000_000
    assert progress.text() == "200.0 MB/300.0 MB, 10.0 MB/s, 10 s left"


def test_progress_on_a_terminal_draws_a_bar(monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    terminal = Terminal()
    monkeypatch.setattr(console.sys, "stderr", terminal)
    monkeypatch.setenv("COLUMNS", "120")
    with console.progress("training", 4, unit="step") as progress:
        for _ in range(4):
            progress.advance(note="loss 1.5")
    assert "training" in terminal.getvalue()
    assert "4/4" in terminal.getvalue()


def test_json_mode_moves_people_s_text_to_stderr(capsys):
    with console.json_output(True):
        console.say("a", "b")
        console.write("c")
        console.result({"x": (1, 2)})
    assert capsys.readouterr() == ('{"x": [1, 2]}\n', "a\nb\nc")
    console.result({"x": 1})
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.4, "0 s"), (59.6, "1 min 0 s"), (3599.7, "1 h 0 min"), (1e5, "27 h 46 min")]
)
def test_duration(seconds, text):
    assert console.duration(seconds) == text
