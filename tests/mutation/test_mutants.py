"""Mutation testing's own tests: which mutants there are, and that a mutant really takes the place of its module."""

from __future__ import annotations

import dataclasses
import sys
import types

import pytest
from tests.mutation import exchange as exchanging
from tests.mutation import mutants as making
from tests.mutation.exchange import NotApplied, exchange
from tests.mutation.mutants import Mutant, mutants

SOURCE = '''from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

MOST, LEAST = 8, 2


@dataclass
class Box:
    """A box of 3."""

    size: int = 3

    def grown(self, by: int | None = 1) -> int:
        return self.size + (by or 0)


@functools.cache
def total(rows: Sequence[int]) -> int:
    found = 0
    for a, b in zip(rows, rows, strict=True):
        if a is not None and a < MOST:
            found += max(x * b for x in [a])
    return found
'''


@pytest.fixture
def running(tmp_path, monkeypatch):
    """The module of SOURCE, as an import would leave it."""
    path = tmp_path / "sample.py"
    path.write_text(SOURCE)
    module = types.ModuleType("volvelle.sample")
    module.__file__ = str(path)
    monkeypatch.setitem(sys.modules, module.__name__, module)
    exec(compile(SOURCE, str(path), "exec", dont_inherit=True), module.__dict__)
    monkeypatch.setattr(exchanging, "path_of", lambda file: path)
    return module


def found() -> dict[str, Mutant]:
    return {mutant.now: mutant for mutant in mutants("sample", SOURCE)}


def test_each_meaning_once_and_none_that_cannot_matter():
    lines = [(mutant.function, mutant.now) for mutant in mutants("sample", SOURCE)]
    assert len(set(lines)) == len(lines)
    assert ("total", "if a is not None and a <= MOST:") in lines
    assert ("total", "if a is not None or a < MOST:") in lines
    assert ("total", "found += max(x / b for x in [a])") in lines
    assert ("Box", "size: int = 4") in lines
    assert ("Box.grown", "def grown(self, by: int | None = 0) -> int:") in lines
    assert ("", "MOST, LEAST = 9, 2") in lines
    # one that is turned round as a whole is the same as one with the other comparison
    assert sum("is None" in now for _, now in lines) == 1
    assert not any("strict=False" in now or "&" in now or "A box" in now for _, now in lines)


def test_a_statement_and_no_more_of_it_than_its_head_is_where_a_mutant_lies():
    loop = found()["for a, b in []:"]
    assert SOURCE.splitlines()[loop.lines[0] - 1].strip() == loop.was
    assert loop.lines[0] == loop.lines[1]
    assert (loop.file, loop.function) == ("sample", "total")


def test_functions_methods_defaults_and_constants_are_exchanged(running):
    total, box = running.total, running.Box()
    assert total((1, 2, 9)) == 5
    running.total.cache_clear()
    exchange(found()["found += max(x / b for x in [a])"])
    assert total((1, 2, 9)) == 2, "the function that others hold is the mutant"
    exchange(found()["MOST, LEAST = 9, 2"])
    assert (running.MOST, running.LEAST) == (9, 2)
    exchange(found()["def grown(self, by: int | None = 0) -> int:"])
    assert box.grown() == 3
    exchange(found()["return self.size - (by or 0)"])
    assert box.grown(1) == 2
    exchange(found()["size: int = 4"])
    assert running.Box().size == 4
    assert dataclasses.fields(running.Box)[0].name == "size"


def test_a_mutant_that_changes_nothing_is_not_taken_for_a_survivor(running):
    running.total.cache_clear()
    same = found()["found = 1"]._replace(source=SOURCE)
    with pytest.raises(NotApplied):
        exchange(same)


def test_numbers_and_operators_are_read_back_as_they_are_written():
    assert making._one(["    x = a[ -2]", "    y = f( 3, - 0)"]) == "x = a[-2] y = f(3, -0)"
    assert making._one(["    x = a - 2"]) == "x = a - 2"
