"""The claim on separable convolutions: its counts, and a verdict that follows from them and from the accuracies."""

from __future__ import annotations

import pytest
import torch

from volvelle.claims import garments, separable_convolution
from volvelle.claims.claim import Measurement
from volvelle.claims.separable_convolution import MOBILENET, accuracy, measure, network
from volvelle.parts.convolution import separable


def test_layers_and_both_mobilenets_have_the_papers_counts(monkeypatch):
    found = Measurement([*separable_convolution._layers(), *separable_convolution._mobilenets()])
    assert found.verdict == "held", [f for f in found.findings if f.held is False]
    monkeypatch.setattr(separable_convolution, "MOBILENET", (*MOBILENET[:-2], (1024, 1), (1024, 1)))
    assert Measurement(separable_convolution._mobilenets()).verdict == "not held"


def test_a_depthwise_layer_that_mixes_channels_would_be_noticed(monkeypatch):
    right = separable.AtrousConv2d
    monkeypatch.setattr(separable, "AtrousConv2d", lambda *sizes, groups=1, **options: right(*sizes, **options))
    assert separable_convolution._layers()[0].held is False


@pytest.mark.parametrize(("lost", "verdict"), [(1.0, "held"), (1.2, "not held")])
def test_the_verdict_is_that_of_the_accuracies(monkeypatch, lost, verdict):
    empty = torch.zeros(1, 1, 28, 28), torch.zeros(1, dtype=torch.long)
    monkeypatch.setattr(garments, "garments", lambda train, test: (empty, empty))
    monkeypatch.setattr(separable_convolution, "_mobilenets", list)
    monkeypatch.setattr(separable_convolution, "_times", lambda rounds: separable_convolution.Finding("time", rounds))
    told = {"full": 90.0, "separable": 90.0 - lost}
    monkeypatch.setattr(separable_convolution, "accuracy", lambda kind, *rest: told[kind])
    assert measure("full").verdict == verdict
    assert measure("quick").verdict == "held", "one short run judges nothing"


def test_both_networks_learn_what_they_are_shown():
    labels = torch.arange(128) % 2
    noise = torch.rand(128, 1, 28, 28, generator=torch.Generator().manual_seed(0))
    images = noise * 0.2 + 0.6 * labels.view(-1, 1, 1, 1)
    for kind, steps in (("full", 12), ("separable", 40)):
        assert accuracy(kind, ((images, labels), (images, labels)), steps, 0) > 90
    sizes = {
        kind: sum(p.numel() for p in network(kind, ((8, 1),), (1, 4, 3), 0).parameters())
        for kind in ("full", "separable")
    }
    assert sizes["full"] - sizes["separable"] == 4 * 8 * 9 - (4 * 9 + 2 * 4 + 4 * 8)
