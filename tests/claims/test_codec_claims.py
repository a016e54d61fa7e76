"""Claims on codecs: their measurements see what they should, and would see if it were otherwise."""

from __future__ import annotations

import pytest
import torch

from volvelle.claims import codebook, vqgan
from volvelle.data.images_labelled import Arrays
from volvelle.data.pictures import PictureSet
from volvelle.parts.quantization import nearest


def held(findings):
    return [finding.what for finding in findings if finding.held is False] == []


def test_formats_agree_and_a_sum_in_bf16_is_seen(monkeypatch):
    vectors, codes = codebook._beginning(256)
    assert held(codebook._formats(vectors[:64], codes))
    usual = lambda z, e: ((z**2).sum(1, keepdim=True) + (e**2).sum(1) - 2 * z @ e.T).argmin(1)  # noqa: E731
    monkeypatch.setattr(nearest, "nearest_code", usual)
    assert not held(codebook._formats(vectors[:64], codes))


def test_restarts_are_what_keeps_codes_in_use():
    kept, lost = (codebook.drifted(kind, 0, steps=40) for kind in ("restarted with their sums", "never restarted"))
    assert kept > lost + 10


def garments(count=4):
    draw = torch.Generator().manual_seed(0)
    values = torch.randint(0, 256, (count, 28, 28), generator=draw, dtype=torch.uint8)
    return PictureSet(Arrays(values, "x"), range(count))


def test_detail_is_all_kept_by_pixels_and_lost_by_blur():
    whole = vqgan.Greys()
    assert vqgan.detail_kept(whole, garments()) == pytest.approx(1, abs=0.02)

    class Blurred(vqgan.Greys):
        def decode(self, codes):
            return torch.nn.functional.avg_pool2d(super().decode(codes), 3, 1, 1)

    assert vqgan.detail_kept(Blurred(), garments()) < 0.2
    x = torch.linspace(-1, 1, 16).view(1, 1, 4, 4)
    torch.testing.assert_close(whole.decode(whole.encode(x)), x)


@pytest.mark.slow
@pytest.mark.parametrize("claim", [codebook, vqgan])
def test_the_quick_measurement_holds(claim):
    found = claim.measure("quick")
    assert found.verdict == "held", [finding for finding in found.findings if finding.held is False]
