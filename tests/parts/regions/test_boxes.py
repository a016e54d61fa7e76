"""Boxes and their overlap: round trips, definitions, degenerate boxes, gradients, pairs, dtypes, bad calls."""

from __future__ import annotations

import math

import pytest
import torch
from tests.parts.regions import loops

from volvelle.functional import (
    box_convert,
    box_iou,
    clip_boxes,
    complete_box_iou,
    decode_boxes,
    distance_box_iou,
    encode_boxes,
    generalized_box_iou,
)

EVERY = [box_iou, generalized_box_iou, distance_box_iou, complete_box_iou]


def boxes(n, seed=0, dtype=torch.float64):
    corner = torch.rand(n, 2, 2, generator=torch.Generator().manual_seed(seed), dtype=dtype) * 40
    return torch.cat((corner[:, 0], corner[:, 0] + corner[:, 1] / 2 + 0.1), dim=1)


def test_iou_is_its_definition():
    a, b = boxes(7), boxes(9, 1)
    a[0] = torch.tensor([9.0, 9, 2, 3])  # reversed
    a[1, 2:] = a[1, :2]  # without area
    expected = torch.tensor([[loops.iou(p, q) for q in b.tolist()] for p in a.tolist()], dtype=torch.float64)
    torch.testing.assert_close(box_iou(a, b), expected, atol=1e-12, rtol=0)
    torch.testing.assert_close(box_iou(a[:, None], b[:7, None])[:, 0, 0], expected.diagonal(), atol=1e-12, rtol=0)


def test_the_extensions_see_distance():
    a, b = boxes(5), boxes(6, 1)
    for i, p in enumerate(a.tolist()):
        for j, q in enumerate(b.tolist()):
            hull = [min(p[0], q[0]), min(p[1], q[1]), max(p[2], q[2]), max(p[3], q[3])]
            area = (hull[2] - hull[0]) * (hull[3] - hull[1])
            both = sum((c[2] - c[0]) * (c[3] - c[1]) for c in (p, q))
            iou = loops.iou(p, q)
            union = both / (1 + iou)
            assert float(generalized_box_iou(a, b)[i, j]) == pytest.approx(iou - (area - union) / area, abs=1e-12)
            apart = sum((p[k] + p[k + 2] - q[k] - q[k + 2]) ** 2 for k in (0, 1)) / 4
            diagonal = (hull[2] - hull[0]) ** 2 + (hull[3] - hull[1]) ** 2
            assert float(distance_box_iou(a, b)[i, j]) == pytest.approx(iou - apart / (diagonal + 1e-7), abs=1e-12)


def test_proportions_lower_the_complete_overlap():
    a, b = boxes(7), boxes(9, 1)
    found, plain, distant = complete_box_iou(a, b), box_iou(a, b), distance_box_iou(a, b)
    for i, j in ((0, 0), (3, 7), (6, 2)):
        (w_a, h_a), (w_b, h_b) = ((box[2:] - box[:2]).tolist() for box in (a[i], b[j]))
        v = 4 / math.pi**2 * (math.atan(w_a / h_a) - math.atan(w_b / h_b)) ** 2
        alpha = v / (1 - float(plain[i, j]) + v + 1e-7)
        assert float(found[i, j]) == pytest.approx(float(distant[i, j]) - alpha * v, abs=1e-12)
    turned = torch.tensor([[0.0, 0, 8, 2], [3, -3, 5, 5]])  # one centre, one shape lying and standing
    assert complete_box_iou(turned, turned)[0, 1] < distance_box_iou(turned, turned)[0, 1]
    torch.testing.assert_close(complete_box_iou(turned, turned).diagonal(), torch.ones(2))


def test_every_form_leads_to_every_other():
    corners = boxes(5)
    low, size = corners[:, :2], corners[:, 2:] - corners[:, :2]
    forms = {"xyxy": corners, "xywh": torch.cat((low, size), 1), "cxcywh": torch.cat((low + size / 2, size), 1)}
    for before, given in forms.items():
        for after, expected in forms.items():
            torch.testing.assert_close(box_convert(given, before, after), expected)  # type: ignore[arg-type]
    assert box_convert(torch.tensor([0, 0, 3, 5]), "xyxy", "cxcywh").tolist() == [1.5, 2.5, 3, 5]
    assert box_convert(corners[None, :0], "xywh", "xyxy").shape == (1, 0, 4)
    kept = box_convert(corners, "xyxy", "xyxy")
    assert kept.data_ptr() != corners.data_ptr()
    with pytest.raises(ValueError, match="box_convert: in_fmt and out_fmt are xyxy, xywh, cxcywh, got xyxy, yolo"):
        box_convert(corners, "xyxy", "yolo")  # type: ignore[arg-type]


@pytest.mark.parametrize("function", EVERY)
def test_degenerate_boxes(function):
    a = boxes(4).requires_grad_()
    odd = torch.tensor([[3.0, 3, 3, 3], [9, 9, 2, 2], [-1e30, -1e30, 1e30, 1e30]], dtype=torch.float64)
    found = function(a, odd)
    assert found.isfinite().all()
    (gradient,) = torch.autograd.grad(found.sum(), a)
    assert gradient.isfinite().all()
    assert function(odd[:1], odd[:1]).isfinite().all()
    point = odd[:1].clone().requires_grad_()  # nothing against nothing: an overlap of 0, whose gradient is no NaN
    (gradient,) = torch.autograd.grad(function(point, odd[:1]).sum(), point)
    assert gradient.isfinite().all()
    odd[1] = torch.nan
    found = function(a, odd)
    assert found[:, 1].isnan().all()
    assert found[:, [0, 2]].isfinite().all()
    assert function(a[:0], odd).shape == (0, 3)


def test_boxes_without_area_share_nothing():
    nothing = torch.tensor([[3.0, 3, 3, 3], [9, 9, 2, 2]])
    assert torch.equal(box_iou(nothing, nothing), torch.zeros(2, 2))
    assert torch.equal(generalized_box_iou(nothing[:1], nothing[:1]), torch.zeros(1, 1))


def test_the_weight_of_proportions_has_no_gradient():
    a, b = boxes(4).requires_grad_(), boxes(5, 1)
    sides = (b[:, 2:] - b[:, :2], a[:, 2:] - a[:, :2])
    (one, other) = (torch.atan2(*side.unbind(1)) for side in sides)
    v = 4 / math.pi**2 * (other[:, None] - one) ** 2
    found, distant = complete_box_iou(a, b), distance_box_iou(a, b)
    weight = ((distant - found) / v).detach()
    expected = torch.autograd.grad((distant - weight * v).sum(), a)[0]
    torch.testing.assert_close(torch.autograd.grad(found.sum(), a)[0], expected)


@pytest.mark.parametrize("function", EVERY[:3])
def test_gradients(function):
    a, b = boxes(3).requires_grad_(), boxes(4, 1).requires_grad_()
    assert torch.autograd.gradcheck(function, (a, b))
    assert torch.autograd.gradgradcheck(function, (a, b))


def test_sixteen_bits_are_taken_to_fp32():
    a, b = boxes(5).bfloat16(), boxes(6, 1).bfloat16()
    assert torch.equal(box_iou(a, b), box_iou(a.float(), b.float()))
    large = torch.tensor([[0.0, 0, 300, 300]], dtype=torch.float16)  # its area is beyond fp16
    assert float(box_iou(large, large)) == 1
    assert decode_boxes(torch.zeros(1, 4, dtype=torch.bfloat16), large).dtype == torch.float32


@pytest.mark.parametrize("weights", [(1.0, 1.0, 1.0, 1.0), (10.0, 10.0, 5.0, 5.0)])
def test_decoding_is_the_inverse_of_encoding(weights):
    a, b = boxes(7), boxes(7, 1)
    deltas = encode_boxes(a, b, weights)
    torch.testing.assert_close(decode_boxes(deltas, b, weights), a, atol=1e-12, rtol=0)
    torch.testing.assert_close(decode_boxes(encode_boxes(a, b), b), a, atol=1e-12, rtol=0)  # as both come
    torch.testing.assert_close(encode_boxes(a[:, None], b)[2, 4], encode_boxes(a[2], b[4]))


def test_wild_deltas_and_boxes_without_area_stay_finite():
    anchor = torch.tensor([[0.0, 0, 20, 40]])
    wild = decode_boxes(torch.tensor([[0.0, 0, 1e9, math.inf]]), anchor)
    torch.testing.assert_close((wild[:, 2:] - wild[:, :2]) / torch.tensor([20.0, 40]), torch.full((1, 2), 62.5))
    point = torch.tensor([[5.0, 5, 5, 5]])
    assert encode_boxes(point, anchor).isfinite().all()
    assert encode_boxes(anchor, point).isfinite().all()
    # a side of nothing counts as 1e-6: 20 and 40 of these, and centres 5 and 15 pixels apart
    expected = torch.tensor([[5e6, 15e6, math.log(20e6), math.log(40e6)]])
    torch.testing.assert_close(encode_boxes(anchor, point), expected)
    deltas = torch.zeros(2, 4)
    deltas[0, 2] = torch.nan
    assert decode_boxes(deltas, anchor)[1].isfinite().all()


def test_clipping():
    found = clip_boxes(torch.tensor([[-5.0, 3, 70, 90], [math.nan, -1, math.inf, 20]]), (40, 60))
    assert found[0].tolist() == [0, 3, 60, 40]
    assert found[1, 0].isnan()
    assert found[1, 1:].tolist() == [0, 60, 20]
    many = torch.full((2, 3, 4), 100.0)
    sizes = torch.tensor([[40, 60], [200, 50]])
    assert clip_boxes(many, sizes[:, None])[:, 0].tolist() == [[60, 40, 60, 40], [50, 100, 50, 100]]
    near = torch.tensor([[-5.0, 0.5, 70, 90]]).expand(3, 4)  # one image's size, and the sizes of three
    assert clip_boxes(near, torch.tensor([40, 60])).tolist() == [[0, 0.5, 60, 40]] * 3
    assert clip_boxes(near, torch.tensor([[40, 60]] * 3)).tolist() == [[0, 0.5, 60, 40]] * 3


def test_bad_calls_are_named():
    with pytest.raises(ValueError, match=r"box_iou: boxes2 must be \(\.\.\., 4\).*got shape \(3, 5\)"):
        box_iou(torch.zeros(2, 4), torch.zeros(3, 5))
    with pytest.raises(ValueError, match=r"sets of boxes must be \(\.\.\., n, 4\), got \(4,\)"):
        box_iou(torch.zeros(4), torch.zeros(3, 4))
    with pytest.raises(ValueError, match=r"sets of boxes must be \(\.\.\., n, 4\), got \(3, 4\) and \(4,\)"):
        generalized_box_iou(torch.zeros(3, 4), torch.zeros(4))
    with pytest.raises(ValueError, match=r"encode_boxes: anchors must be \(\.\.\., 4\).*got shape \(\)"):
        encode_boxes(torch.zeros(4), torch.tensor(1.0))
    for size in (torch.zeros(3), torch.tensor(2.0)):
        with pytest.raises(ValueError, match=r"clip_boxes: size must be \(\.\.\., 2\)"):
            clip_boxes(torch.zeros(2, 4), size)
