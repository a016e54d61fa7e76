"""`--help`, `ls` and a typo answer before torch could even be loaded; configuration files never load it."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

HEAVY = ("torch", "transformers", "scipy", "tokenizers", "gguf", "safetensors", "huggingface_hub")

CLI = """
import json, sys
from volvelle.cli.main import main
sys.argv = ["volvelle", *json.loads(sys.argv[1])]
try:
    code = main()
except SystemExit as stop:
    code = stop.code
print(json.dumps({"code": code or 0, "modules": sorted(m for m in sys.modules if "." not in m)}), file=sys.stderr)
"""

MODULES = """
import importlib, json, sys
for name in json.loads(sys.argv[1]):
    importlib.import_module(name)
print(json.dumps({"modules": sorted(m for m in sys.modules if "." not in m)}), file=sys.stderr)
"""


def loaded(script: str, arguments: list[str], cwd) -> dict:
    result = subprocess.run(
        [sys.executable, "-c", script, json.dumps(arguments)], cwd=cwd, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    report = json.loads(result.stderr.splitlines()[-1])
    report["output"] = result.stdout + "\n".join(result.stderr.splitlines()[:-1])
    report["heavy"] = [name for name in HEAVY if name in report["modules"]]
    return report


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["--help"], 0),
        (["ls"], 0),
        (["ls", "recipes"], 0),
        (["ls", "models"], 0),
        (["train", "--help"], 0),
        (["adapt", "--help"], 0),
        (["generate", "--help"], 0),
        (["genrate"], 2),
        (["train", "langauge"], 2),
    ],
    ids=str,
)
def test_the_command_line_answers_without_torch(arguments, code, tmp_path):
    report = loaded(CLI, arguments, tmp_path)
    assert report["heavy"] == [], f"volvelle {' '.join(arguments)} loads {report['heavy']}"
    assert report["code"] == code, report["output"]


@pytest.mark.parametrize(("typo", "meant"), [(["genrate"], "generate"), (["train", "langauge"], "language")])
def test_a_typo_suggests(typo, meant, tmp_path):
    output = loaded(CLI, typo, tmp_path)["output"]
    assert "error: " in output
    assert meant in output
    assert "Traceback" not in output


def torch_free_modules(repository) -> list[str]:
    """Configurations, options and recipes: what the command line shows before it decides to load anything."""
    source = repository / "src"
    paths = [*source.rglob("config.py"), *source.rglob("options.py"), *source.rglob("recipes/*.py")]
    names = [".".join(path.relative_to(source).with_suffix("").parts) for path in paths]
    return sorted(name.removesuffix(".__init__") for name in names)


def test_configuration_files_are_free_of_torch(repository, tmp_path):
    names = torch_free_modules(repository)
    assert "volvelle.systems.language.config" in names
    everything = loaded(
        MODULES, [*names, "volvelle.errors", "volvelle.files", "volvelle.export", "volvelle.runs"], tmp_path
    )
    if everything["heavy"]:  # say which
        guilty = {name: heavy for name in names if (heavy := loaded(MODULES, [name], tmp_path)["heavy"])}
        pytest.fail(f"these load heavy modules: {guilty}")


def test_the_measure_can_fail(tmp_path):
    assert loaded(MODULES, ["torch"], tmp_path)["heavy"] == ["torch"]
