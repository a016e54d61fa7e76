"""Peers of the vision families, weights and pictures, or a skip with the reason."""

from __future__ import annotations

import importlib
import re
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from benchmarks.support.timm_peer import load_timm

from volvelle.data.images import read_image
from volvelle.hub import status

needs_lite0 = pytest.mark.skipif(
    status("efficientnet-lite0").state != "ready", reason="volvelle get efficientnet-lite0 has not run here"
)


def timm() -> Any:
    """The module timm."""
    try:
        return load_timm()
    except ImportError as error:
        pytest.skip(f"timm does not load: {error}")


def torchvision_models() -> Any:
    """The module torchvision.models. Operators that did not load are declared: its classifiers use none of them."""
    declared = torch.library.Library("torchvision", "FRAGMENT")
    while True:
        try:
            return importlib.import_module("torchvision.models")
        except (ImportError, OSError) as error:
            pytest.skip(f"torchvision does not load: {error}")
        except RuntimeError as error:
            missing = re.search(r"operator torchvision::(\w+) does not exist", str(error))
            if missing is None:
                pytest.skip(f"torchvision does not load: {error}")
            declared.define(f"{missing[1]}() -> Tensor")
            for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
                del sys.modules[name]


def photo(name: str) -> Any:
    """One of scikit-image's pictures, chelsea or coffee, as it is read from its file."""
    package = find_spec("skimage")
    if package is None or package.origin is None:
        pytest.skip("scikit-image, whose pictures these are, is not installed")
    return read_image(Path(package.origin).parent / "data" / f"{name}.png")
