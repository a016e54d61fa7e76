"""Docstrings of the installed Python packages as a summarisation task: from a docstring's body to its first line.

Real text that every Python installation carries, the standard library at least. PEP 257 asks for a one-line summary,
a blank line, and the rest; what follows the blank line is the text, the line before it is its summary. Files are
parsed, never imported. No package is on both sides of the split, and no summary or body occurs twice. The result
depends on nothing but the installation: packages.json lists its packages, their versions and their side.
"""

from __future__ import annotations

import ast
import hashlib
import importlib.metadata
import json
import os
import platform
import sysconfig
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from volvelle.data.text import spread
from volvelle.errors import UsageError, VolvelleError, did_you_mean
from volvelle.files import write_atomic

TRAIN, HELD_OUT, PACKAGES = "train.jsonl", "held_out.jsonl", "packages.json"
LONGEST = 800
"""Characters of a body; a longer one is cut behind its last whole line."""
MOST_FILES, MOST_EXAMPLES = 400, 2000
"""Files read and examples taken of one package, at even distances, so that no giant drowns the rest."""
_SUMMARY_WORDS, _BODY_WORDS = range(3, 26), 12
# Tests, copies of other packages, and folders that are no part of the library.
_LEFT_OUT = frozenset({"test", "tests", "testing", "idle_test", "_vendor", "vendor", "_vendored", "third_party"})
_LEFT_OUT |= {"site-packages", "dist-packages", "lib-dynload", "__pycache__", "_bundled", "volvelle"}


@dataclass(frozen=True)
class Package:
    """An importable name, the version of what brought it, the folder it lies in, and its source files in order."""

    name: str
    version: str
    root: Path
    files: tuple[Path, ...]


@dataclass(frozen=True)
class Docstring:
    """The body of a docstring, its first line, and "file:line" where it stands."""

    body: str
    summary: str
    source: str


@dataclass(frozen=True)
class Docstrings:
    """Both sides of the task, and for every package with examples its version, side and number of them."""

    train: list[Docstring]
    held_out: list[Docstring]
    packages: list[dict[str, object]]

    def __str__(self) -> str:
        held = sum(package["split"] == "held_out" for package in self.packages)
        return (
            f"{len(self.train):,} docstrings of {len(self.packages) - held} installed packages, "
            f"{len(self.held_out):,} of {held} others held out"
        )


def installed(names: Sequence[str] = ()) -> list[Package]:
    """The standard library's modules and all installed packages, by name; with `names` only these.

    Raises UsageError for a name that is not installed.
    """
    found = {package.name: package for package in [*_distributed(), *_standard()]}
    wrong = next((name for name in names if name not in found), None)
    if wrong is not None:
        raise UsageError(f"packages: {wrong} is not installed here", tip=did_you_mean(wrong, found))
    return [found[name] for name in sorted(names or found)]


def read_docstring(text: str) -> tuple[str, str] | None:
    r"""Body and summary of a docstring, or None when it is not one short line, a blank line and a text.

    >>> read_docstring("Return the sum.\n\nAdds numbers up, one after the other, until none is left to add.")
    ('Adds numbers up, one after the other, until none is left to add.', 'Return the sum.')
    >>> read_docstring("Return the sum.") is None
    True
    """
    lines = text.strip().splitlines()
    if len(lines) < 3 or lines[1].strip():
        return None
    summary, body = lines[0].strip(), "\n".join(line.rstrip() for line in lines[2:]).strip()
    if len(body) > LONGEST:
        body = body[: body.rfind("\n", 0, LONGEST + 1)].rstrip() if "\n" in body[: LONGEST + 1] else ""
    if len(summary.split()) not in _SUMMARY_WORDS or len(body.split()) < _BODY_WORDS:
        return None
    # A summary that stands in the text, or is code or markup, is no summary of it.
    if summary in body or summary.startswith((">>>", "..", ":", "@", "#", "=")) or "\ufffd" in summary + body:
        return None
    return body, summary


def docstrings_of(package: Package) -> Iterator[Docstring]:
    """All docstrings of a package that make an example, in the order of its files."""
    for file in spread(package.files, MOST_FILES):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # other people's invalid escapes
                tree = ast.parse(file.read_bytes())
        except (SyntaxError, ValueError, RecursionError, OSError):
            continue  # sources for other Pythons, and templates of sources
        where = file.relative_to(package.root).as_posix()
        for node in ast.walk(tree):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                found = read_docstring(ast.get_docstring(node) or "")
                if found is not None:
                    yield Docstring(*found, f"{where}:{getattr(node, 'lineno', 1)}")


def collect(
    packages: Iterable[Package],
    *,
    held_out_share: float = 0.1,
    progress: Callable[[int, int], None] | None = None,
) -> Docstrings:
    """Read the packages, drop what occurs twice, and set whole packages aside, about `held_out_share` of the examples.

    Raises VolvelleError when fewer than two packages have any.
    """
    packages, seen = list(packages), set[str]()
    examples: dict[Package, list[Docstring]] = {}
    for number, package in enumerate(packages, 1):
        found = []
        for item in docstrings_of(package):
            keys = {" ".join(text.lower().split()) for text in (item.body, item.summary)}
            if not keys & seen:
                seen |= keys
                found.append(item)
        if found:
            examples[package] = spread(found, MOST_EXAMPLES)
        if progress:
            progress(number, len(packages))
    if len(examples) < 2:
        raise VolvelleError(
            f"docstrings: {len(examples)} of {len(packages)} packages have docstrings with a summary and a text, "
            "and at least 2 are needed to hold one out"
        )
    held = set_aside({package.name: len(items) for package, items in examples.items()}, held_out_share)
    listed = [
        {
            "name": package.name,
            "version": package.version,
            "split": "held_out" if package.name in held else "train",
            "examples": len(items),
        }
        for package, items in examples.items()
    ]
    sides = ([], [])
    for package, items in examples.items():
        sides[package.name in held].extend(items)
    return Docstrings(*sides, listed)


def set_aside(sizes: dict[str, int], share: float) -> set[str]:
    """Choose packages that hold about `share` of all examples: by the hash of their names, none too large to fit.

    >>> sorted(set_aside({"ast": 5, "json": 3, "torch": 90, "wave": 2}, 0.1))
    ['ast', 'json', 'wave']
    """
    room = max(share * sum(sizes.values()), min(sizes.values()))
    order = sorted(sizes, key=lambda name: hashlib.sha256(name.encode()).hexdigest())
    chosen: set[str] = set()
    for name in order:
        if sizes[name] <= room and len(chosen) < len(sizes) - 1:
            chosen.add(name)
            room -= sizes[name]
    return chosen


def write_docstrings(docstrings: Docstrings, folder: str | os.PathLike[str]) -> Path:
    """Write train.jsonl and held_out.jsonl, as `read_corpus` takes them, and packages.json; returns the folder."""
    path = Path(folder)
    path.mkdir(parents=True, exist_ok=True)
    for name, items in ((TRAIN, docstrings.train), (HELD_OUT, docstrings.held_out)):
        records = ({"prompt": item.body, "completion": item.summary, "source": item.source} for item in items)
        write_atomic(path / name, "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records))
    listed = {"python": platform.python_version(), "packages": docstrings.packages}
    write_atomic(path / PACKAGES, json.dumps(listed, indent=1) + "\n")
    return path


def _standard() -> Iterator[Package]:
    root = Path(sysconfig.get_path("stdlib"))
    for entry in sorted(root.iterdir()):
        name = entry.name.removesuffix(".py")
        if entry.suffix in {"", ".py"} and name.isidentifier() and name not in _LEFT_OUT:
            yield Package(name, f"Python {platform.python_version()}", root, _files(entry))


def _distributed() -> Iterator[Package]:
    for name, distributions in sorted(importlib.metadata.packages_distributions().items()):
        if name in _LEFT_OUT or not name.isidentifier():
            continue
        first = importlib.metadata.distribution(min(distributions))
        at = Path(str(first.locate_file(name)))
        files = _files(at if at.is_dir() else at.with_suffix(".py"))
        if files:
            yield Package(name, f"{first.metadata['Name']} {first.version}", at.parent, files)


def _files(entry: Path) -> tuple[Path, ...]:
    """The sources of a package or module, in order, without what is left out."""
    if entry.is_file():
        return (entry,)
    kept = [path for path in entry.rglob("*.py") if not _LEFT_OUT & set(path.relative_to(entry).parts[:-1])]
    return tuple(sorted(kept))
