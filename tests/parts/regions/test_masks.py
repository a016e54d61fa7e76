"""Boxes and stability of masks: loops, empty masks, NaNs, shapes that are none."""

from __future__ import annotations

import math

import pytest
import torch

from volvelle.functional import masks_to_boxes, stability_score


def test_boxes_are_those_of_a_loop():
    masks = torch.rand(40, 9, 12, generator=torch.Generator().manual_seed(0)) > 0.97
    masks[3] = False
    boxes = masks_to_boxes(masks)
    assert boxes.dtype == torch.float32
    for mask, box in zip(masks, boxes.tolist(), strict=True):
        y, x = mask.nonzero(as_tuple=True)
        wanted = [float(v) for v in (x.min(), y.min(), x.max(), y.max())] if len(x) else [0.0] * 4
        assert box == wanted
    assert torch.equal(masks_to_boxes(masks.float() * -2.5), boxes)
    last = next(i for i, box in enumerate(boxes.tolist()) if box[0] > 1)
    assert torch.equal(masks_to_boxes(masks[last : last + 1]), boxes[last : last + 1])  # fewer masks than columns
    for shape in ((0, 4, 5), (2, 0, 5)):
        assert torch.equal(masks_to_boxes(torch.zeros(shape)), torch.zeros(shape[0], 4))
    with pytest.raises(ValueError, match=r"masks_to_boxes: masks must be \(n, y, x\), got shape \(4, 5\)"):
        masks_to_boxes(torch.zeros(4, 5))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_stability_is_the_iou_of_two_masks(dtype):
    z = (torch.randn(2, 3, 16, 20, generator=torch.Generator().manual_seed(1)) * 4).to(dtype)
    high, low = z > 1.5, z > -0.5
    wanted = (high & low).sum((-2, -1)) / (high | low).sum((-2, -1))
    assert torch.equal(stability_score(z, 0.5, 1.0), wanted)
    assert torch.equal(stability_score(z[0, 0], 0.5, 1.0), wanted[0, 0])  # one plane alone
    assert torch.equal(stability_score(z), stability_score(z, 0.0, 1.0))
    assert (stability_score(z, 0.5, 0.0) == 1).all()


def test_a_logit_at_a_threshold_is_outside():
    z = torch.tensor([[-1.0, 0.0], [1.0, 2.0]])
    assert float(stability_score(z)) == pytest.approx(1 / 3)  # 2 is above 1; 0, 1 and 2 are above -1
    assert float(stability_score(z, 0.0, 0.5)) == pytest.approx(2 / 3)


def test_nothing_and_nan():
    z = torch.full((3, 4, 4), -9.0)
    z[1, 0, 0], z[2] = 9.0, math.nan
    z[2, 0, 0] = 9.0
    assert stability_score(z)[0].isnan()
    assert stability_score(z)[1:].tolist() == [1.0, 1.0]
    for bad in (torch.zeros(3), -1.0), (torch.zeros(3), 1.0), (torch.zeros(3, 3), -1.0), (torch.zeros(3, 3), math.nan):
        with pytest.raises(ValueError, match="stability_score: wants"):
            stability_score(bad[0], 0.0, bad[1])
