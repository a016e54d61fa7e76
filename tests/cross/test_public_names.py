"""The public API changes only on purpose: golden names, fresh facades, a runnable example for each object."""

from __future__ import annotations

import doctest
import importlib
import inspect

import pytest

from volvelle.export import FACADES, PUBLIC, generated_files, import_parts, stale_diff

import_parts()
ENTRIES = list(PUBLIC)


def test_there_is_a_public_api():
    assert {entry.name.partition(".")[0] for entry in ENTRIES} == set(FACADES)


@pytest.mark.parametrize("name", ["functional.py", "nn.py", "public_names.txt"])
def test_the_generated_file_is_fresh(name, repository):
    [(path, content)] = [
        (path, content) for path, content in generated_files(PUBLIC, repository).items() if path.name == name
    ]
    diff = stale_diff(path, content)
    assert not diff, f"when this change of the API is meant, run ./check fix\n{diff}"


@pytest.mark.parametrize("facade", FACADES)
def test_the_facade_serves_each_recorded_object(facade):
    module = importlib.import_module(f"volvelle.{facade}")
    served = {name for entry in ENTRIES for name in (entry.name, *entry.aliases) if name.startswith(f"{facade}.")}
    assert {f"{facade}.{name}" for name in module.__all__} == served
    for name in served:
        assert getattr(module, name.partition(".")[2]) is PUBLIC[name].target


@pytest.mark.parametrize("facade", FACADES)
def test_deprecated_names_still_work(facade):
    module = importlib.import_module(f"volvelle.{facade}")
    old = [name for entry in ENTRIES for name in entry.deprecated if name.startswith(f"{facade}.")]
    for name in old:
        with pytest.warns(DeprecationWarning, match=name):
            assert getattr(module, name.partition(".")[2]) is PUBLIC[name].target


@pytest.mark.parametrize("entry", ENTRIES, ids=lambda entry: entry.name)
def test_every_public_object_is_documented_by_an_example(entry):
    text = inspect.getdoc(entry.target) or ""
    assert text, f"{entry.origin}: no docstring"
    assert doctest.DocTestParser().get_examples(text), f"{entry.origin}: the docstring has no doctest (>>>)"


@pytest.mark.parametrize("entry", ENTRIES, ids=lambda entry: entry.name)
def test_public_signatures_keep_the_rules(entry):
    targets = [entry.target, *([entry.target.forward] if inspect.isclass(entry.target) else [])]
    for target in targets:
        parameters = [p for p in inspect.signature(target).parameters.values() if p.name != "self"]
        positional = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
        assert not any(p.kind is p.VAR_KEYWORD for p in parameters), f"{target.__qualname__}: **kwargs hide the options"
        untyped = [p.name for p in parameters if p.annotation is p.empty]
        assert not untyped, f"{target.__qualname__}: no type for {', '.join(untyped)}"
        assert len(positional) <= 7 or drop_in(entry.name), f"{target.__qualname__}: more than 7 positional parameters"


def drop_in(name: str) -> bool:
    """What keeps a peer's longer argument list, order included (drop-in first)."""
    return name in {"functional.deform_conv2d", "nn.DeformConv2d"}
