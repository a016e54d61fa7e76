"""Exports to ONNX, computed by ONNX Runtime."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn


def exported(
    module: nn.Module, inputs: tuple[Tensor, ...], folder: Path, free: tuple | None = None
) -> Callable[..., list[Tensor]]:
    """The exported module as a call of ONNX Runtime's; skips where onnxscript or onnxruntime is absent.

    `free` says of each input which axes stay open. All operators must be ONNX's own.
    """
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")
    program = torch.onnx.export(module, inputs, dynamo=True, dynamic_shapes=free, verbose=False)
    assert program is not None
    assert {node.domain for node in program.model.graph} == {""}
    program.save(folder / "model.onnx")
    session = runtime.InferenceSession(folder / "model.onnx")
    names = [given.name for given in session.get_inputs()]

    def run(*given: Tensor) -> list[Tensor]:
        found = session.run(None, {name: x.numpy() for name, x in zip(names, given, strict=True)})
        return [torch.from_numpy(one) for one in found]

    return run


def same_in_onnx_runtime(module: nn.Module, x: Tensor, folder: Path) -> None:
    """Assert that the exported module gives what it gives here; skips where onnxscript or onnxruntime is absent."""
    (found,) = exported(module, (x,), folder)(x)
    torch.testing.assert_close(found, module(x).detach())
