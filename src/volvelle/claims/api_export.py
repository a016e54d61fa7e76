"""Public names apart from the layout: files of a copy of the package are moved, and a user's program runs unchanged."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from volvelle.claims.claim import Budget, Claim, Finding, Measurement, Paper, at_least, at_most

CLAIM = Claim(
    title="Public names by one decorator",
    family="design",
    paper=Paper(
        "TensorFlow authors",
        2018,
        "tf_export: decorators for exporting public API symbols",
        "tensorflow/python/util/tf_export.py",
        "https://github.com/tensorflow/tensorflow/blob/master/tensorflow/python/util/tf_export.py",
    ),
    sentence="a function or a class is exported under its public name by a decorator, whichever file it is defined in",
    measured_by="a copy of this package in which a folder of parts and a file in it get other names: all public names "
    "and signatures before and after, and the output of one program that uses them; then a decorator is taken away",
    summary="@export names what is public; files move without breaking anybody, and a change of the API shows.",
    summary_zh="用 @export 标明公开名称：文件可随意移动而不影响用户，API 的改变则会被发现。",
    seconds={"quick": 60, "full": 120},
)

FOLDER, MOVED = "position", "places"
FILE, RENAMED = "rope", "turning"

PROGRAM = """
import torch
import volvelle.functional as functional
import volvelle.nn as parts
torch.manual_seed(0)
q, k = torch.randn(2, 1, 2, 5, 8, dtype=torch.float64)
turned = functional.apply_rope(q, k, torch.arange(5))[0]
again = parts.RotaryEmbedding(8)(q, k, torch.arange(5))[0]
print(turned.sum().item(), torch.equal(turned, again), functional.alibi_slopes(4).tolist())
print(functional.apply_rope.__module__)
"""


def measure(budget: Budget) -> Measurement:
    """Write the public names of a copy, move its files, write them again; full and quick are the same."""
    with tempfile.TemporaryDirectory() as folder:
        root = copied(Path(folder))
        before = _written(root)
        ran = _run(root, PROGRAM)
        moved = move(root)
        stale = _export(root, "--check").returncode
        after = _written(root)
        again = _run(root, PROGRAM)
        forgotten = _forget(root)
    names = set(before)
    changed = sum(before[name] != after.get(name) for name in names)
    findings = [
        Finding("public names", len(names)),
        at_least("files with other names than before", moved, 10),
        at_most("public names lost or new", len(names ^ set(after)), 0),
        at_most("public names whose signature changed", changed, 0),
        at_most("lines of the user's program that give another result", sum(map(_differ, ran[:-1], again[:-1])), 0),
        Finding("where apply_rope lies, before", ran[-1]),
        Finding("where apply_rope lies, after", again[-1]),
        at_least("the check notices facades that are out of date (exit code)", stale, 1),
        at_least("the check notices a decorator that was taken away (exit code)", forgotten, 1),
    ]
    setting = {"folder": f"parts/{FOLDER} -> parts/{MOVED}", "file": f"{FILE}.py -> {RENAMED}.py"}
    return Measurement(findings, setting=setting, peers={"python": sys.version.split()[0]})


def copied(folder: Path) -> Path:
    """A checkout with the package alone, and the folder of the golden list."""
    import volvelle

    root = folder / "checkout"
    source = Path(volvelle.__file__).parent
    shutil.copytree(source, root / "src" / "volvelle", ignore=shutil.ignore_patterns("__pycache__"))
    (root / "tests" / "cross").mkdir(parents=True)
    return root


def move(root: Path) -> int:
    """Rename the folder and one file in it, with the imports inside the package; how many files lie elsewhere now."""
    package = root / "src" / "volvelle"
    place = package / "parts" / FOLDER
    count = len(list(place.glob("*.py")))
    place.rename(package / "parts" / MOVED)
    (package / "parts" / MOVED / f"{FILE}.py").rename(package / "parts" / MOVED / f"{RENAMED}.py")
    for path in package.rglob("*.py"):
        if path.parent == package and path.stem in {"functional", "nn"}:
            continue  # the facades are written anew by the export, not by hand
        text = path.read_text(encoding="utf-8")
        new = re.sub(rf"volvelle\.parts\.{FOLDER}\b", f"volvelle.parts.{MOVED}", text)
        new = re.sub(rf"volvelle\.parts\.{MOVED}\.{FILE}\b", f"volvelle.parts.{MOVED}.{RENAMED}", new)
        new = re.sub(rf"(from volvelle\.parts\.{MOVED} import .*)\b{FILE}\b", rf"\1{RENAMED} as {FILE}", new)
        if new != text:
            path.write_text(new, encoding="utf-8")
    return count


def _forget(root: Path) -> int:
    """Take one decorator away and return the exit code of the check."""
    file = root / "src" / "volvelle" / "parts" / MOVED / "alibi.py"
    file.write_text(re.sub(r"@export\([^)]*\)\n", "", file.read_text(encoding="utf-8"), count=1), encoding="utf-8")
    return _export(root, "--check").returncode


def _differ(a: str, b: str) -> bool:
    return a != b


def _written(root: Path) -> dict[str, tuple[str, ...]]:
    """Regenerate the facades; every public name with its signatures, as the golden list has them."""
    result = _export(root)
    if result.returncode:
        raise RuntimeError(f"api-export: the export of the copy failed: {result.stderr.strip()[-500:]}")
    return dict(_entries((root / "tests" / "cross" / "public_names.txt").read_text(encoding="utf-8")))


def _entries(text: str) -> Iterator[tuple[str, tuple[str, ...]]]:
    for block in text.split("\n\n")[1:]:
        name, *lines = block.strip().splitlines()
        # The last line says which function a Module wraps, by the place where it lies.
        yield name, tuple(line for line in lines if not line.strip().startswith("since "))


def _export(root: Path, *words: str) -> subprocess.CompletedProcess[str]:
    return _python(root, "-m", "volvelle.export", *words)


def _run(root: Path, program: str) -> list[str]:
    result = _python(root, "-c", program)
    if result.returncode:
        raise RuntimeError(f"api-export: the program failed in the copy: {result.stderr.strip()[-500:]}")
    return result.stdout.strip().splitlines()


def _python(root: Path, *words: str) -> subprocess.CompletedProcess[str]:
    import os

    environment = {**os.environ, "PYTHONPATH": str(root / "src"), "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, *words]
    return subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, check=False)
