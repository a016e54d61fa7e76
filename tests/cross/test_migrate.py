"""docs/migrate.md: each old line is a call that the other library takes. Its new lines run with the other fences."""

from __future__ import annotations

import ast
import functools
import importlib
import inspect
import re
from pathlib import Path
from typing import Any

import pytest

from volvelle.claims.peer_ops import compiled

PAGE = Path(__file__).resolve().parents[2] / "docs" / "migrate.md"
LINE = re.compile(r"^# before: (?P<call>\S.*?\))(?:  # an? (?P<owner>[\w.]+))?$", re.MULTILINE)
LINES = [(match["call"], match["owner"]) for match in LINE.finditer(PAGE.read_text(encoding="utf-8"))]


def function(call: ast.Call, owner: str | None) -> Any:
    """What is called: a dotted name from its package, or a method of `owner`."""
    dotted = ast.unparse(call.func)
    path = f"{owner}.{dotted.partition('.')[2]}" if owner else dotted
    root, *names = path.split(".")
    if root == "torchvision":
        return from_source(names[-1])
    found = pytest.importorskip(root, reason=f"{root} is not installed")
    for i, name in enumerate(names):
        if inspect.ismodule(found) and not hasattr(found, name):
            importlib.import_module(".".join((root, *names[: i + 1])))
        found = getattr(found, name)
    return found


def from_source(name: str) -> Any:
    """A function of torchvision.ops, or a class's __init__, without its body: an import would load its libraries."""
    try:
        folder = compiled().parent / "ops"
    except ImportError as error:
        pytest.skip(str(error))
    for file in sorted(folder.glob("[a-z]*.py")):
        for node in ast.parse(file.read_text(encoding="utf-8")).body:
            if getattr(node, "name", None) != name:
                continue
            inits = [each for each in getattr(node, "body", []) if getattr(each, "name", None) == "__init__"]
            made = inits[0] if isinstance(node, ast.ClassDef) else node
            assert isinstance(made, ast.FunctionDef)
            stub = f"lambda {ast.unparse(without_values(made.args))}: None"
            found = eval(stub)
            return functools.partial(found, None) if inits else found
    raise AttributeError(f"torchvision.ops has no {name}")


def without_values(arguments: ast.arguments) -> ast.arguments:
    """The arguments without annotations, with None for every default."""
    for argument in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs):
        argument.annotation = None
    arguments.defaults = [ast.Constant(None) for _ in arguments.defaults]
    arguments.kw_defaults = [default and ast.Constant(None) for default in arguments.kw_defaults]
    return arguments


def fits(call: ast.Call, target: Any, *, method: bool) -> None:
    """Raise TypeError where the arguments do not fit the signature."""
    places = [object()] * (len(call.args) + method)
    inspect.signature(target).bind(*places, **{str(keyword.arg): object() for keyword in call.keywords})


@pytest.mark.peer
@pytest.mark.parametrize(("line", "owner"), LINES, ids=[line for line, _ in LINES])
def test_the_old_line_fits_the_other_library(line, owner):
    call = ast.parse(line, mode="eval").body
    assert isinstance(call, ast.Call)
    fits(call, function(call, owner), method=owner is not None)


def test_there_are_lines_of_each_library():
    roots = {(owner or line).partition(".")[0] for line, owner in LINES}
    assert roots == {"torchvision", "mmcv", "peft", "taming"}


def test_an_argument_that_does_not_exist_is_found():
    call = ast.parse("f(1, 2, nms_threshold=3)", mode="eval").body
    assert isinstance(call, ast.Call)
    with pytest.raises(TypeError, match="nms_threshold"):
        fits(call, lambda boxes, iou_threshold: None, method=False)
