"""The claims on metrics and on large kernels: their verdicts follow from their figures."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from volvelle.claims import gcn_k, metrics
from volvelle.claims.run import run_claim
from volvelle.hub import status


@pytest.fixture
def garments(monkeypatch):
    """Discs in place of Fashion-MNIST's garments."""
    y, x = np.mgrid[:28, :28]
    disc = (((x - 14) ** 2 + (y - 14) ** 2) < 120) * 200
    found = torch.from_numpy(np.stack([disc] * 20).astype(np.uint8)), torch.arange(20) % 10
    monkeypatch.setattr("volvelle.data.scenes.fetch", lambda name: name)
    monkeypatch.setattr("volvelle.data.scenes.read_idx_folder", lambda folder: (found, found))


def test_metrics_holds_on_drawn_discs_and_a_wrong_metric_breaks_it(garments, monkeypatch):
    every = metrics._masks
    monkeypatch.setattr(metrics, "_masks", lambda count: every(8))
    found = metrics.measure("quick")
    assert found.verdict == "held", [f for f in found.findings if f.held is False]
    from volvelle.parts.metrics import overlap

    monkeypatch.setattr(overlap, "mean_iou", lambda matrix, **options: overlap.pixel_accuracy(matrix))
    assert metrics.measure("quick").verdict == "not held"


def test_a_stack_has_the_field_of_the_large_kernel():
    for k in (3, 7):
        fields = []
        for kind in ("gcn", "stack"):
            layer = gcn_k._decoder(kind, k, (4, 4, 4, 4), 2, 0).context[0].double()
            for parameter in layer.parameters():
                torch.nn.init.ones_(parameter)
            x = torch.zeros(1, 4, 21, 21, dtype=torch.float64, requires_grad=True)
            layer(x)[0, 0, 10, 10].backward()
            seen = (x.grad[0, 0] != 0).nonzero()
            fields.append(tuple((seen.amax(0) - seen.amin(0) + 1).tolist()))
        assert fields[0] == fields[1] == (k, k)


@pytest.mark.slow
@pytest.mark.skipif(status("efficientnet-lite0").state != "ready", reason="efficientnet-lite0 is not stored here")
def test_gcn_k_is_measured(tmp_path):
    record = run_claim("gcn-k", "quick", tmp_path)
    assert record["verdict"] in ("held", "not held")
