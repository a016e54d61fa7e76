"""The table of what is supported: it covers every public function, its trials tell errors apart, and some run again."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import pytest
import torch

from volvelle import functional
from volvelle.export import PUBLIC, import_parts

ROOT = Path(__file__).resolve().parents[2]
AGAIN = ("apply_rope", "box_iou", "nms", "gan_loss", "transport_cost", "lora_linear")


@pytest.fixture(scope="module")
def tool():
    sys.path.insert(0, str(ROOT))
    yield importlib.import_module("benchmarks.supported")
    sys.path.remove(str(ROOT))
    for name in [name for name in sys.modules if name.partition(".")[0] == "benchmarks"]:
        del sys.modules[name]


def examples(tool):
    return {name: example for family in tool.FAMILIES.values() for name, example in family.items()}


def test_every_public_function_is_tried_or_said_to_be_outside(tool):
    import_parts()
    outside = importlib.import_module("benchmarks.support.supported_examples").OUTSIDE
    public = {e.name.partition(".")[2] for e in PUBLIC if e.name.startswith("functional.")}
    tried = {name.partition(",")[0] for name in examples(tool)}
    assert tried | set(outside) == public
    assert not tried & set(outside)


def test_the_stored_table_has_a_row_of_each(tool):
    stored = tool.protocol.read("supported")
    if stored:
        assert [row["name"] for row in stored["rows"]] == list(examples(tool))


@pytest.mark.parametrize("name", AGAIN)
def test_formats_and_derivatives_are_what_the_table_says(tool, name):
    stored = {row["name"]: row for row in tool.protocol.read("supported").get("rows", [])}
    function, example = getattr(functional, name), examples(tool)[name]
    found = {
        key: tool.answer(lambda dtype=dtype: tool.plain(function, example, dtype)) for key, dtype in tool.DTYPES.items()
    }
    found["gradient"] = tool.answer(lambda: tool.gradient(function, example))
    found["second"] = tool.answer(lambda: tool.second(function, example))
    assert found["fp32"] == "yes"
    if stored:
        assert found == {key: stored[name][key] for key in found}


def test_one_function_is_compiled_and_exported_as_the_table_says(tool):
    assert tool.compiled(functional.box_iou, examples(tool)["box_iou"]) == "yes"
    assert tool.exported(functional.box_iou, examples(tool)["box_iou"]) == "yes"


def _named(x):
    raise ValueError("f: x must be something else, got this")


def _unnamed(x):
    raise NotImplementedError("the derivative for '_cdist_backward' is not implemented.")


@pytest.mark.parametrize(
    ("function", "answers"),
    [
        (lambda x: x.square(), ("yes", "yes")),
        (lambda x: x / 0, ("not finite", "not finite")),
        (lambda x: x > 0, ("yes", "-")),
        (_named, ("refused", "refused")),
        (_unnamed, ("fails", "fails")),
    ],
)
def test_answers(tool, function, answers):
    def example(f):
        return (f(3),), {}

    assert tool.answer(lambda: tool.plain(function, example, torch.float64)) == answers[0]
    assert tool.answer(lambda: tool.gradient(function, example)) == answers[1]


def test_a_program_that_gives_other_numbers_is_found(tool):
    flat = tool.Flat(lambda x: x.square(), lambda f: ((f(3),), {}), torch.float32)
    assert tool._alike(flat, lambda x: [x.square()]) == "yes"
    assert tool._alike(flat, lambda x: [x.abs()]) == "differs"
    assert tool._alike(flat, lambda x: []) == "differs"
