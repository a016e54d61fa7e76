"""The claim on counting FLOPs holds, and would not if the counter, its names or a network were wrong."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from volvelle.claims import flops
from volvelle.claims.claim import Measurement
from volvelle.inspect import flops_rules
from volvelle.inspect.flops import FlopCount


def broken(findings):
    return [f.what for f in findings if f.held is False]


def test_products_that_run_are_counted_by_their_ones():
    """2 x 3 outputs of 4 x 3 x 3 taps by hand, a matrix product, and both again behind other operations."""
    net = nn.Sequential(nn.Conv2d(4, 1, 3), nn.ReLU(), nn.Flatten(), nn.Linear(6, 5), nn.Softmax(-1))
    assert flops.by_running(net, (1, 4, 4, 5)) == 6 * 36 + 30
    assert flops.by_running(nn.ConvTranspose2d(2, 3, 2, stride=2, padding=1), (1, 2, 3, 3)) == 9 * 2 * 3 * 4
    assert flops.by_running(nn.MaxPool2d(2), (1, 1, 4, 4)) == 0


def test_layers_and_a_decoder_hold():
    assert broken([*flops._layers(), *flops._decoder()]) == []


def test_a_rule_without_groups_would_be_noticed(monkeypatch):
    def wrong(node, args):
        weight, out = flops_rules._shape(args["weight"]), node.meta["val"].numel()
        return flops_rules.Count(out * weight[1] * args.get("groups", 1) * torch.Size(weight[2:]).numel())

    monkeypatch.setitem(flops_rules.RULES, "conv2d", wrong)
    assert len(broken(flops._layers())) == 3


def test_macs_that_are_called_flops_would_be_noticed(monkeypatch):
    monkeypatch.setattr(FlopCount, "flops", property(lambda self: self.macs))
    assert len(broken(flops._layers())) == 2


def test_attention_that_counts_what_is_hidden_would_be_noticed(monkeypatch):
    right = flops_rules._attention
    monkeypatch.setitem(
        flops_rules.RULES, "scaled_dot_product_attention", lambda n, args: right(n, {**args, "is_causal": False})
    )
    assert len(broken(flops._decoder())) == 2


def test_networks_are_those_of_the_tables(monkeypatch):
    few = {
        name: flops.PRINTED[name] for name in ("plain-34", "vgg-19", "resnet-50, stride as in the paper", "resnet-18")
    }
    monkeypatch.setattr(flops, "PRINTED", few)
    found = flops._tables(quick=True)
    assert broken(found) == []
    assert len(found) == len(few) + 3
    monkeypatch.setattr("volvelle.claims.flops_networks.VGG19", (64, 64, 0, 128, 0, 256, 256, 0, 512, 0, 512, 0))
    assert Measurement(flops._tables(quick=True)).verdict == "not held"


def test_a_network_of_ours_by_all_three():
    assert broken(flops._networks(["shufflenet-v2-x1.0"], 64)) == []


def test_names_of_layers_do_not_matter():
    assert flops._digits(3.6) == 1
    assert flops._digits(19.0) == 0
    assert flops._digits(0.39) == flops._digits(0.7) == 2
    assert flops._digits(0.146) == 3


@pytest.mark.slow
def test_it_holds_at_the_quick_budget():
    found = flops.measure("quick")
    assert found.verdict == "held", broken(found.findings)
