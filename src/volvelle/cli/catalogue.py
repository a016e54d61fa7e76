"""What `volvelle ls` lists, read from the source files themselves, without importing them (or torch)."""

from __future__ import annotations

import ast
import re
from dataclasses import dataclass
from pathlib import Path

import volvelle

PACKAGE = Path(volvelle.__file__).parent


@dataclass(frozen=True)
class Technique:
    """One file in parts/: its family, title (the first line of its docstring), file and public names."""

    family: str
    title: str
    file: str
    names: tuple[str, ...]


@dataclass(frozen=True)
class ClaimEntry:
    """One file in claims/: its name and the first line of its docstring."""

    name: str
    title: str


def techniques(package: Path = PACKAGE) -> list[Technique]:
    """Return the files of parts/ that hold public names, by family and file."""
    found = []
    for path in sorted((package / "parts").glob("*/*.py")):
        source = path.read_text(encoding="utf-8")
        if "@export(" not in source:
            continue
        tree = ast.parse(source)
        names = tuple(name for node in tree.body for name in _exported(node))
        if names:
            found.append(Technique(path.parent.name, _title(tree), path.relative_to(package).as_posix(), names))
    return found


def claims(package: Path = PACKAGE) -> list[ClaimEntry]:
    """Return the claim files: modules of claims/ that define CLAIM."""
    found = []
    for path in sorted((package / "claims").glob("*.py")):
        source = path.read_text(encoding="utf-8")
        if "\nCLAIM" in source:
            found.append(ClaimEntry(path.stem.replace("_", "-"), _title(ast.parse(source))))
    return found


def _exported(node: ast.stmt) -> list[str]:
    """Return the public names in a definition's `@export("functional.name", aliases=("functional.other",))`."""
    if not isinstance(node, (ast.FunctionDef, ast.ClassDef)):
        return []
    found = []
    for call in node.decorator_list:
        if isinstance(call, ast.Call) and isinstance(call.func, ast.Name) and call.func.id == "export":
            aliases = [keyword.value for keyword in call.keywords if keyword.arg == "aliases"]
            named = [*call.args[:1], *(name for value in aliases for name in getattr(value, "elts", ()))]
            found += [name.value for name in named if isinstance(name, ast.Constant) and isinstance(name.value, str)]
    return found


def _title(tree: ast.Module) -> str:
    """Return the first sentence of the module's docstring."""
    lines = (ast.get_docstring(tree) or "").split("\n\n")[0].split("\n")
    # "et al. 2021" and "2.1" do not end a sentence.
    return re.split(r"(?<!\bal)\. (?=[A-Z`\"])", " ".join(" ".join(lines).split()))[0].rstrip(".:")
