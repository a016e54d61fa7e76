"""The claims on convolutions and upsampling hold here, and would not if what they measure were broken."""

from __future__ import annotations

from xml.etree import ElementTree

import pytest
import torch
from torch import nn

from volvelle.claims import bias, dilation, inception_1x1, upsampling
from volvelle.claims.garments import scenes
from volvelle.parts.convolution import gridding, hybrid_dilation


def broken(found):
    return [f.what for f in found.findings if f.held is False]


def test_dilation_holds_with_its_picture():
    found = dilation.measure("quick")
    assert found.verdict == "held", broken(found)
    picture = ElementTree.fromstring(found.pictures["gridding"])
    squares = [node for node in picture.iter() if node.get("fill") == "#20558a"]
    assert len(squares) == 49 + 13**2 + 49 + 25**2, "one for each input that is seen"


def test_rates_with_a_common_factor_would_be_noticed(monkeypatch):
    monkeypatch.setattr(hybrid_dilation, "hybrid_dilation_rates", lambda depth, field: ((field - 1) // 6,) * depth)
    found = dilation.measure("quick")
    assert broken(found) == [
        "the same of rates 2, 2, 2, equal weights and field",
        "the same of rates 4, 4, 4, equal weights and field",
    ]


def test_a_miscounted_path_would_be_noticed(monkeypatch):
    real = gridding.gridding
    monkeypatch.setattr(
        gridding, "gridding", lambda rates: real(rates)._replace(paths=(1, *real(rates).paths[1:-1], 2))
    )
    assert broken(dilation.measure("quick")) == ["inputs for which `gridding` counts other paths than the gradient"]


def test_its_garments_lie_where_their_classes_say():
    images, labels = torch.rand(30, 1, 28, 28), torch.arange(30) % 10
    images[:, :, :5] = 0
    x, y = scenes(images, labels, 7, seed=0)
    assert x.shape == (7, 1, 56, 56)
    assert y.shape == (7, 56, 56)
    assert not y[:, :5].any()
    assert not y[:, 28:33].any()
    assert y[:, 5:28].gt(0).float().mean() > 0.8
    quarters = y.view(7, 2, 28, 2, 28).amax((2, 4))
    assert (y.view(7, 2, 28, 2, 28) > 0).eq(y.view(7, 2, 28, 2, 28) == quarters[:, :, None, :, None]).all()


def test_bias_holds():
    found = bias.measure("quick")
    assert found.verdict == "held", broken(found)
    assert len(found.findings) >= 13


def test_a_norm_that_does_not_subtract_the_mean_would_be_noticed(monkeypatch):
    class Scaled(nn.BatchNorm2d):
        def forward(self, x):
            return x / x.square().mean((0, 2, 3), keepdim=True).sqrt()

    monkeypatch.setattr(nn, "BatchNorm2d", Scaled)
    assert [f.held for f in bias._before_a_norm()][:2] == [False, False]


def test_a_perceptron_counts_as_rosenblatt_does():
    """By hand: from 0, the points (1, +) and (3, -) are both mistakes in the first epoch."""
    x, y = torch.tensor([[1.0], [3.0]]), torch.tensor([1.0, -1.0])
    w, b, _ = bias.perceptron(x, y, bias=True, epochs=1)
    assert (w.tolist(), b) == ([-2.0], 0.0)
    w, b, wrong = bias.perceptron(x, y, bias=True)
    assert wrong == 0
    assert 1 < -b / float(w) < 3
    assert bias.perceptron(x, y, bias=False)[2] == 1


def test_the_counts_of_inception():
    found = inception_1x1._counts()
    assert all(f.held is not False for f in found), [f.what for f in found]


def test_both_networks_are_trained(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    x, y = torch.rand(64, 1, 28, 28, generator=generator), torch.randint(10, (64,), generator=generator)
    widths = [inception_1x1.network(kind, 0)[-1].in_features for kind in (True, False)]
    assert widths == [48 + 64 + 24 + 24, 48 + 64 + 24 + (32 + 48 + 16 + 16 + 32 + 8 + 32)]
    assert 0 <= inception_1x1.accuracy(True, ((x, y), (x, y)), 2, 0) <= 100


def test_kinds_of_upsampling_differ_in_the_last_layer_alone():
    nets = {kind: upsampling.network(kind, 3) for kind in upsampling.KINDS}
    for net in nets.values():
        for ours, theirs in zip(net[:4].parameters(), nets["icnr"][:4].parameters(), strict=True):
            assert torch.equal(ours, theirs)
    x = torch.rand(2, 1, 6, 6)
    assert {tuple(net(x).shape) for net in nets.values()} == {(2, 1, 12, 12)}
    assert not torch.equal(nets["icnr"][4].weight, nets["drawn one by one"][4].weight)
    weights = {kind: net[4].weight.numel() for kind, net in nets.items()}
    assert weights["icnr"] == weights["transposed"] == 4 * weights["nearest"]


def run(claim):
    found = claim.measure("quick")
    if found.unmeasurable or any("nothing was trained" in note for note in found.notes):
        pytest.skip(str(found.unmeasurable or found.notes))
    return found


@pytest.mark.slow
@pytest.mark.parametrize("claim", [inception_1x1, upsampling])
def test_it_holds_at_the_quick_budget(claim):
    found = run(claim)
    assert found.verdict == "held", broken(found)


@pytest.mark.slow
def test_an_initialisation_without_phases_would_be_noticed(monkeypatch):
    from volvelle.parts.resampling import upsample

    monkeypatch.setattr(upsample, "icnr_init", lambda weight, factor, init: init(weight.data))
    assert "checkerboard at the start with ICNR" in broken(run(upsampling))


@pytest.mark.slow
def test_one_network_of_the_dilation_claim_learns():
    from volvelle.claims.garments import garments
    from volvelle.errors import VolvelleError

    try:
        data, others = garments(2000, 200)
    except VolvelleError as error:
        pytest.skip(str(error))
    held = scenes(*others, 20, seed=0)
    assert dilation.iou((1, 3, 8), data, held, 40, 0) > 100 / 11
