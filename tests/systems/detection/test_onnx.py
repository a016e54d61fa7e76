"""detector.onnx, computed by ONNX Runtime, finds what the detector finds."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from tests.systems.detection.test_detectors import CLASSES, COMPOSITIONS, small

from volvelle.errors import VolvelleError
from volvelle.systems.detection import deformify
from volvelle.systems.detection.onnx import OUTPUTS, FromBytes, export_onnx


def opened(path):
    runtime = pytest.importorskip("onnxruntime")
    session = runtime.InferenceSession(path)

    def run(pixels, sizes):
        found = session.run(list(OUTPUTS), {"pixels": pixels.numpy(), "sizes": sizes.numpy()})
        return [torch.from_numpy(one) for one in found]

    return run, session.get_modelmeta().custom_metadata_map


def pictures(b, high, wide):
    return torch.randint(0, 256, (b, 3, high, wide), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


@pytest.mark.slow
@pytest.mark.peer
@pytest.mark.parametrize("name", [*COMPOSITIONS, "deformable"])
def test_onnx_runtime_finds_the_same(name, tmp_path):
    pytest.importorskip("onnxscript")
    model = small(name) if name in COMPOSITIONS else deformify(small(), 2)
    for layer in (m for n, m in model.named_modules() if n.endswith("offset")):
        torch.nn.init.normal_(layer.weight, 0, 0.1)
    model = model.eval()
    model.config = replace(model.config, stretch=False)
    run, facts = opened(export_onnx(model, tmp_path, image=(64, 96), batch=2))
    assert (json.loads(facts["classes"]), facts["stretch"]) == (list(CLASSES), "false")
    pixels = pictures(2, 64, 96)
    for sizes in (torch.tensor([[64, 96], [64, 96]]), torch.tensor([[40, 96], [64, 50]]), torch.tensor([[1, 1]] * 2)):
        with torch.no_grad():
            expected = FromBytes(model)(pixels, sizes)
        found = run(pixels, sizes)
        most = expected[0].shape[1]  # behind it there is padding alone, which an exported detector keeps
        for ours, theirs in zip(found, expected, strict=True):
            torch.testing.assert_close(ours[:, :most], theirs, atol=1e-3, rtol=1e-4)
            assert not ours[:, most:].any()
    assert expected[3].sum() < 200


def test_weights_of_another_kind_are_refused(tmp_path):
    pytest.importorskip("onnxscript")
    with pytest.raises(VolvelleError, match="wants weights in fp32"):
        export_onnx(small().half(), tmp_path)
