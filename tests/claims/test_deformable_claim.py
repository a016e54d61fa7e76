"""The claim on deformable convolution: its pictures, its measure of the taps, its costs, and its verdict."""

from __future__ import annotations

import pytest
import torch

from volvelle.claims import deformable
from volvelle.claims.claim import Measurement
from volvelle.claims.deformable import Found
from volvelle.claims.run import run_claim
from volvelle.hub import status


def test_the_box_holds_all_of_the_garment_and_no_more():
    images = torch.zeros(40, 1, 28, 28)
    images[:, :, 6:22, 4:24] = 1
    pictures, boxes, scales = deformable.views(images, torch.Generator().manual_seed(0))
    assert pictures.shape == (40, 1, 48, 48)
    for picture, box, scale in zip(pictures[:, 0] > 0.1, boxes.long().tolist(), scales, strict=True):
        x1, y1, x2, y2 = box
        assert picture[y1:y2, x1:x2].sum() == picture.sum() > 0
        for line in (picture[y1, x1:x2], picture[y2 - 1, x1:x2], picture[y1:y2, x1], picture[y1:y2, x2 - 1]):
            assert line.any()
        # 16 x 20 pixels, scaled; edges are blurred by the reading between pixels.
        assert float(picture.sum()) == pytest.approx(320 * float(scale) ** 2, rel=0.35)
    assert scales.min() >= 0.5
    assert scales.max() <= 1.5
    assert scales.std() > 0.1


def test_the_wide_network_costs_as_much_and_the_next_narrower_one_less():
    wide, wanted = deformable.equal_width(), deformable.cost("deformable", deformable.WIDTH)
    assert deformable.cost("atrous", wide) >= wanted > deformable.cost("atrous", wide - 2)


def test_distances_of_the_taps_are_the_dilation_until_they_move():
    net = deformable.network("deformable", 8, 0).eval()
    pictures = torch.rand(3, 1, 48, 48, generator=torch.Generator().manual_seed(0))
    boxes = torch.tensor([[0.0, 0, 10, 10], [20, 20, 48, 48], [46, 46, 48, 48]])
    assert deformable.effective_dilation(net, pictures, boxes).tolist() == [2.0, 2.0, 2.0]
    for layer in net.layers:  # pyright: ignore[reportGeneralTypeIssues]
        taps = torch.stack(torch.meshgrid(*[torch.tensor([-2.0, 0.0, 2.0])] * 2, indexing="ij"), -1)
        layer.offset.bias.data = taps.flatten() * 0.5  # every tap half as far again from the middle
    torch.testing.assert_close(deformable.effective_dilation(net, pictures, boxes), torch.full((3,), 3.0))


@pytest.mark.parametrize(
    ("strict", "small", "verdict"), [(60.0, 2.0, "held"), (50.0, 2.0, "not held"), (60.0, 2.6, "not held")]
)
def test_the_verdict_follows_from_the_figures(strict, small, verdict):
    runs = {
        ("atrous", "one view"): [Found(70.0, 52.0, 2.0, 2.0)],
        ("deformable", "one view"): [Found(72.0, strict, small, 2.5)],
    }
    assert Measurement(deformable.findings(runs)).verdict == verdict


@pytest.mark.parametrize("views", ["one view", "new views"])
def test_training_moves_the_taps_of_the_deformable_kind_alone(views, monkeypatch):
    images = torch.zeros(64, 1, 28, 28)
    images[:, :, 6:22, 4:24] = 1
    labels = torch.zeros(64, dtype=torch.int64)
    monkeypatch.setattr(deformable, "equal_width", lambda: 8)
    monkeypatch.setattr(deformable, "WIDTH", 8)
    for kind in ("atrous", "deformable"):
        found = deformable.run(kind, views, (images, labels), (images, labels), 2, 0)
        assert ((found.small, found.large) == (2.0, 2.0)) == (kind == "atrous")


@pytest.mark.slow
@pytest.mark.skipif(status("fashion-mnist").state != "ready", reason="fashion-mnist is not stored here")
def test_the_claim_is_measured(tmp_path):
    record = run_claim("deformable", "quick", tmp_path)
    assert record["verdict"] in ("held", "not held")
    found = {finding["what"]: finding["value"] for finding in record["findings"]}
    assert min(found[f"{kind}, one view: found at IoU 0.5"] for kind in ("atrous", "deformable")) > 15
