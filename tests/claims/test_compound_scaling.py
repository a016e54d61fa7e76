"""The claim on compound scaling: equal arithmetic, and a verdict that follows from the figures."""

from __future__ import annotations

import pytest
import torch

from volvelle.claims import compound_scaling, garments
from volvelle.claims.compound_scaling import GROWN, SINGLE, accuracy, macs, measure, network, scaling


def test_all_ways_to_grow_cost_about_the_same():
    found = {name: macs(network(scaling(*factors))) for name, factors in GROWN.items()}
    for name in (*SINGLE, "compound"):
        assert found[name] / found["unscaled"] == pytest.approx(4, rel=0.2), found
    assert network(scaling(*GROWN["compound"])).preprocessing.size == 20


@pytest.mark.parametrize(("compound", "verdict"), [(0.9, "held"), (0.7, "not held")])
def test_the_verdict_is_that_of_the_accuracies(monkeypatch, compound, verdict):
    grown = network(scaling(*GROWN["compound"]))
    empty = torch.zeros(1, 1, 28, 28), torch.zeros(1, dtype=torch.long)
    monkeypatch.setattr(garments, "garments", lambda train, test: (empty, empty))
    monkeypatch.setattr(compound_scaling, "macs", lambda config: 1)
    monkeypatch.setattr(compound_scaling, "accuracy", lambda config, *rest: compound if config == grown else 0.8)
    found = measure("full")
    assert found.verdict == verdict
    assert found.setting["seeds"] == 3


def test_a_network_learns_what_it_is_shown():
    torch.manual_seed(0)
    labels = torch.arange(200) % 2
    images = torch.rand(200, 1, 28, 28) * 0.2 + 0.6 * labels.view(-1, 1, 1, 1)
    assert accuracy(network(scaling(1, 1, 1)), ((images, labels), (images, labels)), 0, 25) > 0.9
