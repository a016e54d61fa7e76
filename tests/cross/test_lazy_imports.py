"""Help, `ls` and a typo answer before torch could even be loaded; configuration files never load it."""

from __future__ import annotations

import importlib
import json
import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest

import volvelle
from volvelle.cli.table import available

HEAVY = ("torch", "transformers", "scipy", "tokenizers", "gguf", "safetensors", "huggingface_hub")
VERBS = [row.name for row in available()]

# Both scripts do one thing after the other in a fresh process and note, after each, what is loaded by then.
COMMANDS = """
import contextlib, io, json, sys
from volvelle.cli.main import main
for line in json.load(sys.stdin):
    output = io.StringIO()
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
        try:
            code = main(line.split())
        except SystemExit as stop:
            code = stop.code
    print(json.dumps({"code": code or 0, "output": output.getvalue(), "modules": list(sys.modules)}))
"""

MODULES = """
import importlib, json, sys
for name in json.load(sys.stdin):
    importlib.import_module(name)
    print(json.dumps({"modules": list(sys.modules)}))
"""


def reports(script: str, steps: list[str], folder: Path) -> dict[str, dict]:
    """Run the steps in one process; for each one its report, with `heavy`: what is loaded and should not be."""
    result = subprocess.run(
        [sys.executable, "-c", script], input=json.dumps(steps), cwd=folder, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    found = [json.loads(line) for line in result.stdout.splitlines()]
    for report in found:
        report["heavy"] = [name for name in HEAVY if name in report["modules"]]
    return dict(zip(steps, found, strict=True))


def typo(verb: str) -> str:
    """The verb with its last two letters exchanged."""
    return f"{verb[:-2]}{verb[-1]}{verb[-2]}"


def test_help_and_lists_answer_without_torch(tmp_path):
    lines = ["", "--help", "--version", *(f"{verb} --help" for verb in VERBS)]
    lines += ["ls", *(f"ls {section}" for section in ("techniques", "recipes", "claims", "models", "runs"))]
    for line, report in reports(COMMANDS, lines, tmp_path).items():
        assert report["heavy"] == [], f"volvelle {line} loads {report['heavy']}"
        assert report["code"] == 0, f"volvelle {line}: {report['output']}"
        assert report["output"].strip(), f"volvelle {line} prints nothing"


def test_a_typo_suggests_without_torch(tmp_path):
    meant = {typo(verb): verb for verb in VERBS if len(verb) > 3}
    for line, report in reports(COMMANDS, list(meant), tmp_path).items():
        assert report["heavy"] == [], f"volvelle {line} loads {report['heavy']}"
        assert report["code"] == 2, f"volvelle {line}: {report['output']}"
        assert report["output"].startswith("error: "), report["output"]
        assert meant[line].split()[-1] in report["output"].partition("tip: ")[2], report["output"]
        assert "Traceback" not in report["output"]


def test_every_verb_of_the_table_has_its_file():
    from volvelle.cli.table import VERBS as rows

    assert [row.name for row in rows if not row.exists()] == []


def torch_free_modules(repository: Path) -> list[str]:
    """Configurations, options and recipes: what the command line shows before it decides to load anything."""
    source = repository / "src"
    paths = [*source.rglob("config.py"), *source.rglob("options.py"), *source.rglob("recipes/*.py")]
    paths += [source / "volvelle" / f"{name}.py" for name in ("errors", "export", "files", "runs")]
    names = [".".join(path.relative_to(source).with_suffix("").parts) for path in paths]
    return sorted(name.removesuffix(".__init__") for name in names)


def test_configuration_files_are_free_of_torch(repository, tmp_path):
    names = torch_free_modules(repository)
    assert "volvelle.systems.language.config" in names
    for name, report in reports(MODULES, names, tmp_path).items():
        assert report["heavy"] == [], f"import {name} loads {report['heavy']}"


@pytest.mark.parametrize(
    "package", ["systems", "systems.language", "adapt", "decode", "train", "data", "hub", "claims"]
)
def test_packages_are_lazy(package, tmp_path):
    name = f"volvelle.{package}"
    assert reports(MODULES, [name], tmp_path)[name]["heavy"] == []


def test_no_public_name_is_that_of_a_module():
    """A loaded submodule becomes an attribute of its package, and would hide what the package gives by that name."""
    found = 0
    for module in pkgutil.walk_packages(volvelle.__path__, "volvelle."):
        package = importlib.import_module(module.name) if module.ispkg else None
        if package is not None and hasattr(package, "__getattr__"):
            found += 1
            assert not {name for _, name, _ in pkgutil.iter_modules(package.__path__)} & set(dir(package)), package
    assert found > 5


def test_the_measure_can_fail(tmp_path):
    found = reports(MODULES, ["json", "safetensors"], tmp_path)
    assert found["json"]["heavy"] == []
    assert found["safetensors"]["heavy"] == ["safetensors"]
