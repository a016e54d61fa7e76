"""Writing a module as an ONNX file: what all exports of systems share."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from volvelle.errors import VolvelleError
from volvelle.files import atomic_path

LARGE = 1 << 30
"""Bytes of weights from which a file of their own holds them: one of protobuf's cannot exceed 2 GB."""


def check_exports(*modules: nn.Module) -> None:
    """Raise VolvelleError where onnxscript is missing, and for weights that are not fp32."""
    try:
        import onnxscript  # noqa: F401  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise VolvelleError("export to ONNX needs onnxscript", tip="pip install 'volvelle[onnx]'") from error
    if any(p.dtype != torch.float32 for module in modules for p in module.parameters()):
        raise VolvelleError("export to ONNX wants weights in fp32", tip="model.float()")


def write_onnx(
    module: nn.Module,
    inputs: tuple[Tensor, ...],
    path: Path,
    *,
    free: tuple | None = None,
    names: tuple[tuple[str, ...], tuple[str, ...]],
    facts: Mapping[str, str] | None = None,
) -> Path:
    """Write a module, called with `inputs`, and return the path; `names` are those of its inputs and outputs.

    `free` says of each input which axes stay open (torch.export's dynamic_shapes); `facts` travel in the file.
    """
    program = torch.onnx.export(
        module,
        inputs,
        dynamo=True,
        dynamic_shapes=free,
        input_names=names[0],
        output_names=names[1],
        verbose=False,
    )
    assert program is not None
    program.model.metadata_props.update(facts or {})
    size = sum(p.numel() * p.element_size() for p in module.parameters())
    if size > LARGE:  # two files belong together by name, so they are not renamed into place
        program.save(str(path), external_data=True)
        return path
    with atomic_path(path) as temporary:
        program.save(str(temporary))
    return path
