"""The claim amp in pieces: what it draws, what it counts, and that it can fail."""

from __future__ import annotations

import xml.etree.ElementTree as ET

import pytest
import torch
from torch import nn

from volvelle.claims import amp
from volvelle.claims.amp_drawing import histogram, layouts


def test_the_scaler_agrees_with_gradscaler_and_a_wrong_one_is_caught(monkeypatch):
    assert amp._against_gradscaler().held
    from volvelle.nn import LossScaler

    monkeypatch.setattr(LossScaler, "update", lambda self, found: None)
    assert not amp._against_gradscaler().held


def test_formats_hold_and_a_wrong_decoder_is_caught(monkeypatch):
    findings, svg = amp._formats()
    assert [f.what for f in findings[:4]] == ["fp64", "fp32", "fp16", "bf16"]
    assert "65504" in str(findings[2].value)
    assert findings[-1].held
    ET.fromstring(svg)
    from volvelle.parts.precision.formats import NumberFormat

    right = NumberFormat.decode
    monkeypatch.setattr(NumberFormat, "decode", lambda self, pattern: right(self, pattern) * (pattern != 1))
    assert not amp._formats()[0][-1].held


def test_what_is_kept_is_counted_once_without_parameters():
    net, x = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 4)), torch.randn(10, 8)
    # x (for the first weight) and the tanh's result (for itself and for the second weight).
    assert amp._kept(net, lambda: net(x).sum()) == 4 * (10 * 8 + 10 * 16)


def test_half_precision_gradients_vanish_and_survive_scaled():
    torch.manual_seed(0)
    model = amp._model(0, width=32, depth=1)
    batch = amp._batch(torch.randint(256, (20 * amp.LENGTH,), dtype=torch.int32), 16)
    findings, svg = amp._gradients(model, batch)
    unscaled, scaled = findings[:2]
    assert unscaled.value > 10 * scaled.value
    assert scaled.held
    ET.fromstring(svg)


def test_shares_add_up_and_pictures_name_their_zones():
    shares = amp._shares([torch.tensor([1.0, -1.5, 2.0, 0.0, 2.0**-30])], 1.0)
    assert shares == {0: 0.5, 1: 0.25, -30: 0.25}
    picture = histogram([("a < b", shares)])
    ET.fromstring(picture)
    for text in ("zero 25.0%", "normal 75.0%", "infinite 0.0%", "a &lt; b"):
        assert text in picture
    with pytest.raises(ValueError, match="zip"):
        layouts([("fp16", "0 1", "too few fields")])
