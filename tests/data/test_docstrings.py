"""Docstrings as a summarisation task: what makes an example, the split by package, and that nothing leaks."""

from __future__ import annotations

import json
import platform
import sys
import sysconfig

import pytest

from volvelle.data.docstrings import (
    LONGEST,
    MOST_EXAMPLES,
    Package,
    collect,
    docstrings_of,
    installed,
    read_docstring,
    set_aside,
    write_docstrings,
)
from volvelle.data.text import read_corpus
from volvelle.errors import UsageError, VolvelleError

BODY = "Numbers are added one after the other, and the rounding errors of all of them are kept apart."


def docstring(summary, body=BODY):
    return f"{summary}\n\n    {body}\n    "


def package(tmp_path, name, **files):
    for file, text in files.items():
        path = tmp_path / name / f"{file}.py"
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    return Package(name, "1.0", tmp_path, tuple(sorted((tmp_path / name).glob("*.py"))))


def function(name, summary, body=BODY):
    return f'def {name}():\n    """{docstring(summary, body)}"""\n'


@pytest.mark.parametrize(
    "text",
    [
        "",
        "Return the sum.",
        "Return the sum of numbers.\n\nToo short to be summarised.",
        f"Return the sum\nof all numbers.\n\n{BODY}",
        f"Sum.\n\n{BODY}",
        f">>> add some numbers\n\n{BODY}",
        f":param x: some numbers\n\n{BODY}",
        f"{'a very ' * 20} long summary.\n\n{BODY}",
        f"Numbers are added one after\n\n{BODY}",
        "Return the sum of it.\n\n" + "x" * (LONGEST + 1),
    ],
)
def test_what_makes_no_example(text):
    assert read_docstring(text) is None


def test_a_long_body_is_cut_at_a_line():
    body, summary = read_docstring("Return the sum of it.\n\n" + "\n".join([BODY] * 40))
    assert summary == "Return the sum of it."
    assert len(body) <= LONGEST < len(body) + len(BODY) + 1
    assert set(body.splitlines()) == {BODY}


def test_every_kind_of_docstring_is_found_and_nothing_is_imported(tmp_path):
    text = f'''"""{docstring("What the module holds.", BODY + " In it.")}"""
raise SystemExit("imported!")
{function("one", "What the first function does.")}
class Two:
    """{docstring("What the class is.", BODY + " Twice.")}"""
    async def three(self):
        """{docstring("What the method waits for.", BODY + " Thrice.")}"""
'''
    found = list(docstrings_of(package(tmp_path, "library", inside=text, broken="def (", bytes_="x = '\\udc80'")))
    assert {item.summary for item in found} == {
        "What the module holds.", "What the first function does.", "What the class is.", "What the method waits for.",
    }  # fmt: skip
    assert {item.source.split(":")[0] for item in found} == {"library/inside.py"}
    assert "library" not in sys.modules


def three_packages(tmp_path):
    def many(name, count):
        return "".join(function(f"f{i}", f"Do thing {i} of {name} now.", f"{name} {i}: {BODY}") for i in range(count))

    same = function("same", "What is said in all of them.")
    return [
        package(tmp_path, "alpha", a=many("alpha", 30) + same),
        package(tmp_path, "beta", b=many("beta", 4) + same, c=function("copy", "Another word for it.")),
        package(
            tmp_path, "gamma", c=many("gamma", 3) + function("again", "What is said in all of them.", "Else: " + BODY)
        ),
    ]


def test_nothing_occurs_twice_and_no_package_is_on_both_sides(tmp_path):
    found = collect(three_packages(tmp_path), held_out_share=0.2)
    everything = found.train + found.held_out
    assert len(everything) == 30 + 4 + 3 + 1
    assert len({item.summary for item in everything}) == len({item.body for item in everything}) == len(everything)
    sides = [{item.source.split("/")[0] for item in side} for side in (found.train, found.held_out)]
    assert not sides[0] & sides[1]
    assert sides[0]
    assert sides[1]
    assert {p["name"] for p in found.packages} == sides[0] | sides[1]
    for listed in found.packages:
        side = found.held_out if listed["split"] == "held_out" else found.train
        assert listed["examples"] == sum(item.source.startswith(f"{listed['name']}/") for item in side)


def test_the_same_installation_gives_the_same_files(tmp_path):
    packages = three_packages(tmp_path)
    folders = [write_docstrings(collect(packages), tmp_path / name) for name in ("one", "two")]
    for file in ("train.jsonl", "held_out.jsonl", "packages.json"):
        assert (folders[0] / file).read_bytes() == (folders[1] / file).read_bytes()
    assert json.loads((folders[0] / "packages.json").read_text())["python"] == platform.python_version()
    corpus = read_corpus(folders[0] / "train.jsonl")
    assert corpus.examples[0].completions[0].startswith(("Do thing", "What is", "Another"))


def test_the_split_is_about_the_share_and_never_everything():
    sizes = {f"p{i}": 10 + i for i in range(50)}
    held = set_aside(sizes, 0.1)
    assert 0.05 < sum(sizes[name] for name in held) / sum(sizes.values()) <= 0.1
    assert set_aside({"a": 3, "b": 900}, 0.01) == {"a"}
    assert len(set_aside({"a": 3, "b": 3}, 0.9)) == 1
    # a package that comes or goes leaves most others where they were
    fewer = {name: size for name, size in sizes.items() if name != min(held)}
    assert len(set_aside(fewer, 0.1) & held) >= len(held) - 2


def test_one_package_cannot_be_split(tmp_path):
    with pytest.raises(VolvelleError, match="1 of 1 packages have docstrings"):
        collect([package(tmp_path, "alone", a=function("f", "What the function does."))])


def test_a_giant_gives_a_share_of_its_examples(tmp_path, monkeypatch):
    monkeypatch.setattr("volvelle.data.docstrings.MOST_EXAMPLES", 10)
    found = collect(three_packages(tmp_path))
    assert max(p["examples"] for p in found.packages) == 10 < MOST_EXAMPLES


def test_the_installation_has_its_standard_library():
    everything = {package.name: package for package in installed()}
    assert {"ast", "email", "json"} <= everything.keys()
    assert everything["json"].version == f"Python {platform.python_version()}"
    assert str(everything["json"].files[0]).startswith(sysconfig.get_path("stdlib"))
    assert everything["pytest"].version.startswith("pytest ")
    assert not {"volvelle", "test"} & everything.keys()
    assert not [
        f for p in everything.values() for f in p.files if {"tests", "_vendor"} & set(f.relative_to(p.root).parts)
    ]
    with pytest.raises(UsageError, match="nunpy is not installed here") as error:
        installed(["json", "nunpy"])
    assert "numpy" in error.value.tip


def test_real_docstrings():
    found = collect(installed(["asyncio", "email", "json", "logging", "zipfile"]), held_out_share=0.3)
    assert len(found.train) > 20
    assert found.held_out
    assert all(item.summary and item.summary not in item.body for item in found.train)
