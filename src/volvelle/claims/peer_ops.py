"""torchvision's compiled operators, also beside a torch without CUDA.

Its wheels on the package index are made for CUDA and miss some symbols beside a CPU build of torch. None of them is
called by what runs on a CPU, so three empty libraries that have them are enough for its operators to load, as
`torch.ops.torchvision`; its Python package is not imported.
"""

from __future__ import annotations

import ctypes
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from functools import cache
from importlib import util
from pathlib import Path
from types import ModuleType
from typing import Any

LIBRARIES = ("libcudart.so.13", "libc10_cuda.so", "libtorch_cuda.so")
ASIDE = Path(sysconfig.get_paths()["data"]) / "lib" / "torchvision-aside"
"""Where `tools/environment.sh` keeps torchvision: outside the packages, for transformers fails where it half loads."""


@cache
def torchvision_ops() -> Any:
    """The operators as `torch.ops.torchvision`. Raises ImportError with the reason where they do not load."""
    import torch

    library = compiled()
    try:
        torch.ops.load_library(library)
    except OSError as missing:
        _with_stand_ins(library, missing)
    _derivatives(library.parent / "_autograd_registrations.py")
    return torch.ops.torchvision


def _derivatives(file: Path) -> None:
    """Newer versions state their operators' derivatives in a file of Python, which asks only whether they are there."""
    if "torchvision" in sys.modules or not file.is_file():
        return
    spec = util.spec_from_file_location("torchvision_derivatives", file)
    if spec is None or spec.loader is None:
        return
    package, extension = ModuleType("torchvision"), ModuleType("torchvision.extension")
    vars(extension)["_has_ops"] = lambda: True
    vars(package)["extension"] = extension
    names = {"torchvision": package, "torchvision.extension": extension}
    sys.modules.update(names)
    try:
        spec.loader.exec_module(util.module_from_spec(spec))
    finally:
        for name in names:
            del sys.modules[name]


def compiled() -> Path:
    """The library of torchvision's operators. Raises ImportError where there is none."""
    spec = util.find_spec("torchvision")
    folders = [Path(place) for place in (spec.submodule_search_locations or [])] if spec else []
    for folder in (*folders, ASIDE / "torchvision"):
        if (folder / "_C.so").is_file():
            return folder / "_C.so"
    raise ImportError("torchvision's compiled operators are not installed")


def version() -> str:
    """The version of the torchvision that was found."""
    for folder in compiled().parent.parent.glob("torchvision-*.dist-info"):
        return folder.name.removeprefix("torchvision-").removesuffix(".dist-info")
    return "unknown"


def _with_stand_ins(library: Path, missing: Exception) -> None:
    import torch

    compiler, reader = shutil.which("cc"), shutil.which("nm")
    if sys.platform != "linux" or not compiler or not reader:
        raise ImportError(f"torchvision's operators do not load: {missing}") from missing
    listed = subprocess.run([reader, "-D", "--undefined-only", library], capture_output=True, text=True, check=True)
    symbols = {line.split()[-1] for line in listed.stdout.splitlines() if line.strip()}
    runtime = {name.partition("@")[0] for name in symbols if "cuda" in name and "@" in name}
    others = {name for name in symbols if "cuda" in name and "@" not in name} - runtime
    with tempfile.TemporaryDirectory() as folder:
        for library_name, names in zip(LIBRARIES, (runtime, others, ()), strict=True):
            _build(Path(folder), library_name, sorted(names))
            ctypes.CDLL(str(Path(folder) / library_name), mode=ctypes.RTLD_GLOBAL)
    try:
        torch.ops.load_library(library)
    except OSError as still:
        raise ImportError(f"torchvision's operators do not load: {still}") from still


def _build(folder: Path, name: str, symbols: list[str]) -> None:
    """A library of that name whose functions do nothing."""
    source, versions = folder / "none.c", folder / "versions"
    source.write_text("".join(f"long {symbol}(void) {{ return 0; }}\n" for symbol in symbols) or "int none;\n")
    versions.write_text(f"{name} {{ global: *; }};\n")
    command = ["cc", "-shared", "-fPIC", f"-Wl,-soname,{name}", str(source), "-o", str(folder / name)]
    if name == LIBRARIES[0]:  # CUDA's runtime has versions on its symbols
        command.insert(1, f"-Wl,--version-script,{versions}")
    subprocess.run(command, capture_output=True, check=True)
