"""What the pages show is what happens: every ```python and ```console fence runs.

A fence may carry words after its language: test markers (`slow`, `shared_data`, `gpu`, `peer`, `browser`) and `fails`
(the last command is meant to fail). Each fence starts in an empty folder; with `shared_data`, `../shared/data` leads to
the development data. In a console fence, the lines after `$ command` are its expected output, where `...` stands for
anything; no lines expect nothing in particular.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
PAGES = ("README.md", "CONTRIBUTING.md", *(f"docs/{page.name}" for page in sorted((REPOSITORY / "docs").glob("*.md"))))
MARKERS = ("slow", "shared_data", "gpu", "peer", "browser")
WORDS = {*MARKERS, "fails"}
FENCE = re.compile(
    r"^```(?P<language>console|python)(?P<words>[^\n]*)\n(?P<body>.*?)^```\s*$", re.MULTILINE | re.DOTALL
)


@dataclass(frozen=True)
class Fence:
    """A block of a page: its place (`README.md:12`), language, words and text."""

    place: str
    language: str
    words: tuple[str, ...]
    body: str


def fences(text: str, page: str) -> list[Fence]:
    found = []
    for match in FENCE.finditer(text):
        line = text.count("\n", 0, match.start()) + 1
        found.append(Fence(f"{page}:{line}", match["language"], tuple(match["words"].split()), match["body"]))
    return found


def commands(body: str) -> list[tuple[str, str]]:
    """Split a console session into (command, expected output); a trailing backslash continues a command."""
    session: list[tuple[str, str]] = []
    continued = False
    for line in body.splitlines():
        if line.startswith("$ "):
            session.append((line[2:], ""))
        elif not session:
            if line.strip():
                raise ValueError(f"a console fence starts with `$ command`, got {line!r}")
        elif continued:
            session[-1] = (f"{session[-1][0]}\n{line}", "")
        else:
            session[-1] = (session[-1][0], f"{session[-1][1]}{line}\n")
        continued = (line.startswith("$ ") or continued) and line.endswith("\\")
    return session


def matches(expected: str, output: str) -> bool:
    """Equal up to runs of white space, with `...` or `…` for anything; expecting nothing accepts everything."""
    if not expected.strip():
        return True
    pieces = re.split(r"\.\.\.|…", " ".join(expected.split()))
    pattern = ".*".join(re.escape(piece.strip()) for piece in pieces)
    flat = " ".join(output.split())
    return re.fullmatch(pattern.replace(".*", r"\s*.*\s*"), flat, re.DOTALL) is not None


def workplace(tmp_path: Path, fence: Fence) -> Path:
    folder = tmp_path / "work"
    folder.mkdir()
    if "shared_data" in fence.words:
        (tmp_path / "shared").symlink_to(REPOSITORY.parent / "shared")
    return folder


def run(fence: Fence, folder: Path) -> None:
    """Run a fence; a failure names the place, the command and what it printed."""
    environment = os.environ | {
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "COLUMNS": "120",
    }
    if fence.language == "python":
        script = folder / "fence.py"
        script.write_text(fence.body, encoding="utf-8")
        steps = [(f'"{sys.executable}" fence.py', "")]
        if ">>>" in fence.body:  # its examples too
            steps.append((f'"{sys.executable}" -m doctest fence.py', ""))
    else:
        steps = commands(fence.body)
    if not steps:
        pytest.fail(f"{fence.place}: an empty fence", pytrace=False)
    for index, (command, expected) in enumerate(steps):
        result = subprocess.run(
            command,
            shell=True,
            executable="/bin/bash",
            cwd=folder,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
        may_fail = "fails" in fence.words and index == len(steps) - 1
        if (result.returncode != 0) != may_fail:
            pytest.fail(f"{fence.place}: exit code {result.returncode} from: {command}\n{result.stdout}", pytrace=False)
        if not matches(expected, result.stdout):
            pytest.fail(
                f"{fence.place}: {command}\n--- expected\n{expected}--- printed\n{result.stdout}", pytrace=False
            )


def parameters() -> list:
    cases = []
    for page in PAGES:
        for fence in fences((REPOSITORY / page).read_text(encoding="utf-8"), page):
            marks = [getattr(pytest.mark, word) for word in fence.words if word in MARKERS]
            cases.append(pytest.param(fence, marks=marks, id=f"{fence.place} {fence.language}"))
    return cases


@pytest.mark.parametrize("fence", parameters())
def test_the_fence_runs(fence, tmp_path):
    assert set(fence.words) <= WORDS, f"{fence.place}: unknown words {set(fence.words) - WORDS}, known: {sorted(WORDS)}"
    run(fence, workplace(tmp_path, fence))


PAGE = """# A page
```console
$ echo one \\
  two
one two
$ printf 'step 1\\nloss 0.25 in 3 s\\n'
step 1
loss ... in ... s
```
```python
assert 1 + 1 == 2
```
```console fails slow
$ echo before; false
```
```sh
not run
```
"""


def test_fences_are_found_with_their_lines_and_words():
    found = fences(PAGE, "p.md")
    assert [(f.place, f.language, f.words) for f in found] == [
        ("p.md:2", "console", ()),
        ("p.md:10", "python", ()),
        ("p.md:13", "console", ("fails", "slow")),
    ]
    assert commands(found[0].body)[0] == ("echo one \\\n  two", "one two\n")


def test_good_fences_pass(tmp_path):
    for fence in fences(PAGE, "p.md"):
        run(fence, tmp_path)


@pytest.mark.parametrize(
    ("language", "words", "body", "said"),
    [
        ("console", (), "$ false\n", "exit code 1"),
        ("console", (), "$ exit 3\n$ echo never\n", "exit code 3"),
        ("console", (), "$ echo one\ntwo\n", "--- expected\ntwo\n--- printed\none"),
        ("console", (), "$ echo one two\none\n", "expected"),
        ("console", (), "$ volvelle-has-no-such-command\n", "not found"),
        ("console", ("fails",), "$ true\n", "exit code 0"),
        ("console", (), "\n", "empty"),
        ("python", (), "1 / 0\n", "ZeroDivisionError"),
        ("python", (), 'def f():\n    """\n    >>> 1 + 1\n    3\n    """\n', "Expected"),
    ],
)
def test_a_bad_fence_fails_and_says_where(language, words, body, said, tmp_path):
    with pytest.raises(pytest.fail.Exception, match=r"p\.md:7: ") as caught:
        run(Fence("p.md:7", language, words, body), tmp_path)
    assert said in str(caught.value)


def test_output_before_the_first_command_is_refused():
    with pytest.raises(ValueError, match="starts with"):
        commands("volvelle ls\n")
