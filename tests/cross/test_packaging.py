"""The package: the same bytes from the same source, nothing missing from the wheel, only what was tried is claimed."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import tomllib
import zipfile
from pathlib import Path

import pytest

SOURCE = ("src", "README.md", "LICENSE", "pyproject.toml")


def project(repository: Path) -> dict:
    return tomllib.loads((repository / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def test_only_pythons_that_were_tried_are_named(repository):
    found = [text.rpartition(" :: ")[2] for text in project(repository)["classifiers"] if "Python :: 3." in text]
    assert found == ["3.11"]
    assert project(repository)["requires-python"] == ">=3.11"


def test_the_package_is_typed_and_its_extras_are_used(repository):
    assert (repository / "src" / "volvelle" / "py.typed").is_file()
    setup = (repository / "tools" / "environment.sh").read_text(encoding="utf-8")
    extras = project(repository)["optional-dependencies"]
    for extra in ("dev", "peers", "serve", "docs"):
        assert extra in extras
        assert extra in setup


@pytest.fixture(scope="module")
def built(tmp_path_factory, repository) -> list[Path]:
    """Wheel and source archive, built twice from two copies of the source, at another time and place."""
    pytest.importorskip("build", reason="the package build is not installed")
    pytest.importorskip("hatchling", reason="hatchling is not installed")
    made = []
    for number in range(2):
        copy = tmp_path_factory.mktemp(f"copy{number}") / f"deeper{number}"
        copy.mkdir()
        for name in SOURCE:
            path = repository / name
            shutil.copytree(path, copy / name) if path.is_dir() else shutil.copy(path, copy)
        for path in copy.rglob("*.py"):
            os.utime(path, (1_600_000_000 + number, 1_600_000_000 + number))
        command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", "dist", "."]
        environment = os.environ | {"SOURCE_DATE_EPOCH": "1700000000"}
        done = subprocess.run(command, cwd=copy, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        made.append(copy / "dist")
    return made


@pytest.mark.slow
def test_the_same_source_gives_the_same_bytes(built):
    names = sorted(path.name for path in built[0].iterdir())
    assert [Path(name).suffix for name in names] == [".whl", ".gz"]
    for name in names:
        assert (built[0] / name).read_bytes() == (built[1] / name).read_bytes(), name


@pytest.mark.slow
def test_every_file_of_the_package_is_in_the_wheel(built, repository):
    [wheel] = built[0].glob("*.whl")
    there = set(zipfile.ZipFile(wheel).namelist())
    source = repository / "src"
    files = [path for path in (source / "volvelle").rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    assert {path.relative_to(source).as_posix() for path in files} <= there


@pytest.mark.slow
def test_the_wheel_runs_without_the_checkout(built, tmp_path):
    [wheel] = built[0].glob("*.whl")
    venv = tmp_path / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(venv)], check=True)
    python, volvelle = venv / "bin" / "python", venv / "bin" / "volvelle"
    place = subprocess.run(
        [python, "-c", "import site; print(site.getsitepackages()[0])"], capture_output=True, text=True
    )
    # What volvelle depends on is there; the checkout itself, which a .pth file of ours would add, is not.
    (Path(place.stdout.strip()) / "dependencies.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    pip = [sys.executable, "-m", "pip", "--python", str(python), "install", "--no-deps", "--quiet", str(wheel)]
    subprocess.run([*pip, "--no-index", "--ignore-installed"], check=True)

    def run(*words: str) -> str:
        done = subprocess.run([volvelle, *words], cwd=tmp_path, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout

    where = subprocess.run([python, "-c", "import volvelle; print(volvelle.__file__)"], capture_output=True, text=True)
    assert str(venv) in where.stdout
    assert "usage: volvelle VERB" in run("--help")
    assert "apply_rope" in run("ls", "techniques")
    assert "autograd" in run("ls", "claims")
    assert "held" in run("claim", "bias")
