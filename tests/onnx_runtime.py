"""Exports to ONNX, computed by ONNX Runtime."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn


def same_in_onnx_runtime(module: nn.Module, x: Tensor, folder: Path) -> None:
    """Assert that the exported module gives what it gives here; skips where onnxscript or onnxruntime is absent."""
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")
    torch.onnx.export(module, (x,), dynamo=True, verbose=False).save(folder / "model.onnx")
    session = runtime.InferenceSession(folder / "model.onnx")
    (found,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    torch.testing.assert_close(torch.from_numpy(found), module(x).detach())
