"""Imports point downwards through the layers; read from the syntax tree, so lazy imports inside functions count too."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

# From the bottom. Within a row of `VERBS` an import may only point to the right.
ROOT = ("export", "errors", "files", "hub", "lazy", "processes", "processor", "runs")
VERBS = ("train", "decode", "inspect", "adapt")
LAYERS = (ROOT, ("parts",), ("data",), ("systems",), VERBS, ("claims",), ("cli", "serve", "__main__"))
FACADES = ("functional", "nn")
HEIGHT = {unit: height for height, layer in enumerate(LAYERS) for unit in layer}

PARTS_LIBRARIES = frozenset({"torch", "triton"})  # beside the standard library; Triton is optional
SOLVERS = {"parts/transport": frozenset({"scipy"})}  # what docs/architecture.md argues for, folder by folder
PARTS_OF_VOLVELLE = frozenset({"parts", "export"})


@dataclass(frozen=True)
class Import:
    """One imported module, as a full dotted name, and the line that asks for it."""

    module: str
    line: int


def module_name(path: Path, source: Path) -> str:
    parts = path.relative_to(source).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(path: Path, source: Path) -> Iterator[Import]:
    """Every import of a file: statements at any depth, and import_module("constant")."""
    package = module_name(path, source).split(".")
    if path.name != "__init__.py":
        package = package[:-1]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"), str(path))):
        if isinstance(node, ast.Import):
            yield from (Import(alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            stem = ".".join([*base, *([node.module] if node.module else [])])
            yield from (Import(f"{stem}.{alias.name}", node.lineno) for alias in node.names)
        elif isinstance(node, ast.Call) and (name := dynamic_import(node, package)):
            yield Import(name, node.lineno)


def dynamic_import(call: ast.Call, package: list[str]) -> str | None:
    function = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
    if function not in {"import_module", "__import__"} or not call.args or not isinstance(call.args[0], ast.Constant):
        return None
    name = str(call.args[0].value)
    dots = len(name) - len(name.lstrip("."))
    return ".".join([*package[: len(package) - dots + 1], name.lstrip(".")]) if dots else name


def complaint(unit: str, wanted: str) -> str | None:
    """Why a file of `unit` ("parts", "train", ...) may not import the module `wanted`; None when it may."""
    top, _, rest = wanted.partition(".")
    target = rest.split(".")[0]
    if top != "volvelle":
        if unit == "parts" and top not in PARTS_LIBRARIES and top not in sys.stdlib_module_names:
            return "parts import torch, Triton and the standard library only"
        return None
    if target in FACADES:
        return "nothing inside imports the facades"
    if target not in HEIGHT:
        return None  # `import volvelle`, `from volvelle import __version__`
    if unit == "parts" and target not in PARTS_OF_VOLVELLE:
        return "parts import other parts and volvelle.export only"
    if HEIGHT[target] > HEIGHT[unit]:
        return f"{unit} lies below {target}"
    if unit in VERBS and target in VERBS and VERBS.index(target) < VERBS.index(unit):
        return f"{unit} stands to the right of {target} (order: {' > '.join(VERBS)})"
    return None


def violations(source: Path) -> list[str]:
    """Every import in `source`/volvelle that breaks the layers, as `file:line imports module: reason`."""
    found = []
    for path in sorted((source / "volvelle").rglob("*.py")):
        unit = [*module_name(path, source).split("."), ""][1]
        if unit in FACADES or not unit:
            continue  # the facades and the package itself only re-export
        if unit not in HEIGHT:
            found.append(f"{path.relative_to(source)}: {unit} belongs to no layer")
            continue
        solvers = SOLVERS.get(path.parent.relative_to(source / "volvelle").as_posix(), frozenset())
        for item in imports(path, source):
            reason = None if item.module.partition(".")[0] in solvers else complaint(unit, item.module)
            if reason:
                found.append(f"{path.relative_to(source)}:{item.line} imports {item.module}: {reason}")
    return found


def test_the_library_keeps_its_layers(repository):
    assert violations(repository / "src") == []


def test_every_package_has_an_init(repository):
    """Without one, the walk that fills the public names and the doctests would pass it by."""
    folders = {path.parent for path in (repository / "src" / "volvelle").rglob("*.py")}
    parents = {parent for folder in folders for parent in folder.parents if parent.is_relative_to(repository / "src")}
    packages = (folders | parents) - {repository / "src"}
    assert [str(folder) for folder in sorted(packages) if not (folder / "__init__.py").is_file()] == []


def tree(folder: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = folder / "volvelle" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return folder


@pytest.mark.parametrize(
    ("file", "text", "reason"),
    [
        ("parts/a/x.py", "from volvelle.data.text import read", "parts import other parts"),
        ("parts/a/x.py", "from volvelle.errors import VolvelleError", "parts import other parts"),
        ("parts/a/x.py", "import numpy as np", "Triton and the standard library only"),
        ("parts/a/x.py", "def f():\n    import safetensors.torch", "Triton and the standard library only"),
        ("parts/a/x.py", "import scipy", "Triton and the standard library only"),
        ("parts/transport/x.py", "import numpy", "Triton and the standard library only"),
        ("parts/a/x.py", "from ...systems import language", "parts import other parts"),
        ("parts/__init__.py", "from ..systems import language", "parts import other parts"),
        ("data/x.py", "from volvelle import systems", "data lies below systems"),
        (
            "data/x.py",
            "if TYPE_CHECKING:\n    from volvelle.systems.language import decoder",
            "data lies below systems",
        ),
        ("systems/language/x.py", "import volvelle.train.loop", "systems lies below train"),
        ("adapt/x.py", "from volvelle.inspect import plan", "adapt stands to the right of inspect"),
        ("adapt/x.py", "from volvelle.train import fit", "adapt stands to the right of train"),
        ("inspect/x.py", "from volvelle.decode import generate", "inspect stands to the right of decode"),
        ("decode/x.py", "import importlib\nimportlib.import_module('volvelle.train')", "decode stands to the right"),
        (
            "train/x.py",
            "from importlib import import_module\nimport_module('..claims', 'volvelle.train')",
            "below claims",
        ),
        ("claims/x.py", "def f():\n    from volvelle.cli import main", "claims lies below cli"),
        ("hub.py", "from volvelle.parts.position import rope", "hub lies below parts"),
        ("hub/x.py", "from ..parts import position", "hub lies below parts"),
        ("cli/x.py", "from volvelle.functional import apply_rope", "nothing inside imports the facades"),
        ("cli/x.py", "from volvelle import nn", "nothing inside imports the facades"),
        ("cli/x.py", "from .. import nn", "nothing inside imports the facades"),
        ("utils/x.py", "", "utils belongs to no layer"),
    ],
)
def test_a_seeded_violation_is_caught(tmp_path, file, text, reason):
    found = violations(tree(tmp_path, {file: text, "parts/good.py": "import torch"}))
    assert len(found) == 1, found
    assert reason in found[0]
    assert f"volvelle/{file}" in found[0]


def test_what_the_layers_allow_passes(tmp_path):
    allowed = {
        "__init__.py": "from volvelle import systems",
        "functional.py": "from volvelle.parts.a.x import f as f",
        "parts/a/x.py": "import math\nimport torch.nn as n\nfrom volvelle.export import export\nfrom . import y",
        "parts/transport/x.py": "def f():\n    from scipy.optimize import linprog",
        "parts/a/__init__.py": "from .x import f\nfrom volvelle.parts.b import g",
        "hub/x.py": "import tqdm\nfrom volvelle import __version__\nfrom volvelle.errors import VolvelleError",
        "systems/x.py": "from volvelle.data import text\nfrom volvelle import parts, hub",
        "train/x.py": "from volvelle import decode, inspect, adapt\nfrom .loop import fit\nimport importlib",
        "train/loop.py": "def fit(name):\n    import_module(name)",
        "decode/x.py": "from volvelle.adapt import lora",
        "claims/x.py": "from volvelle.train import fit\nfrom volvelle.runs import RunFolder",
        "cli/x.py": "from volvelle.serve import app\nfrom volvelle.claims import lora",
        "serve/x.py": "from volvelle.cli import table",
        "__main__.py": "from volvelle.cli.main import main",
    }
    assert violations(tree(tmp_path, allowed)) == []
