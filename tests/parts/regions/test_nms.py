"""Suppression: the greedy loop, both forms of it, exact groups, ties of the threshold, NaNs, graphs, the peer."""

from __future__ import annotations

import math

import pytest
import torch
from tests.parts.regions import loops
from tests.parts.regions.peer import torchvision

from volvelle.functional import batched_nms, nms, soft_nms
from volvelle.parts.regions import nms as file


def crowd(n, seed=0, span=50.0, dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)
    corner, size = (
        torch.rand(n, 2, generator=g, dtype=dtype) * span,
        torch.rand(n, 2, generator=g, dtype=dtype) * 30 + 1,
    )
    scores = (torch.rand(n, generator=g, dtype=dtype) * 20).round() / 20  # many are equal
    return torch.cat((corner, corner + size), dim=1), scores, torch.randint(0, 4, (n,), generator=g) * 601 - 300


def fixed_point(boxes, scores, groups, threshold):
    order = file.by_score(scores)
    return order[file.fixed_point(boxes[order], groups[order], threshold).nonzero()[:, 0]]


@pytest.fixture(params=[0, file.RUN], ids=["blocks", "runs"])
def both_ways(request, monkeypatch):
    monkeypatch.setattr(file, "RUN", request.param)


@pytest.mark.parametrize("n", [0, 1, 63, 64, 65, 150])
@pytest.mark.parametrize("threshold", [0.0, 0.3, 0.7, 1.0])
def test_the_greedy_loop(n, threshold, both_ways):
    boxes, scores, groups = crowd(n)
    plain = loops.nms(boxes.tolist(), scores.tolist(), threshold)
    assert nms(boxes, scores, threshold).tolist() == plain
    apart = loops.nms(boxes.tolist(), scores.tolist(), threshold, groups.tolist())
    assert batched_nms(boxes, scores, groups, threshold).tolist() == apart
    assert fixed_point(boxes, scores, groups, threshold).tolist() == apart
    assert fixed_point(boxes, scores, groups * 0, threshold).tolist() == plain


@pytest.mark.parametrize("block", [1, 2, 3, 5])
@pytest.mark.parametrize("run", [0, file.RUN])
def test_few_boxes_in_many_groups(block, run, monkeypatch):
    """Groups begin and end at every place of a block, and many have one box."""
    monkeypatch.setattr(file, "BLOCK", block)
    monkeypatch.setattr(file, "RUN", run)
    for seed in range(60):
        boxes, scores, groups = crowd(2 + seed % 11, seed, span=10.0)
        found = batched_nms(boxes, scores, groups, 0.3).tolist()
        assert found == loops.nms(boxes.tolist(), scores.tolist(), 0.3, groups.tolist())


def test_groups_are_exact_at_any_number_and_place(both_ways):
    """Boxes of 8 pixels, class 1202, in an image of 4000: moving classes apart in fp32 loses their overlaps."""
    boxes, scores, _ = crowd(600, span=3960.0, dtype=torch.float32)
    boxes[:, 2:] = boxes[:, :2] + 8
    boxes[300:] = boxes[:300] + torch.rand(300, 4, generator=torch.Generator().manual_seed(2)) * 3
    alone = nms(boxes, scores, 0.5)
    for group in (0, 1202, -(2**62), 2**62):
        assert torch.equal(batched_nms(boxes, scores, torch.full((600,), group), 0.5), alone)
    moved = boxes + 1202 * (boxes.max() + 1)  # what the trick does
    assert not torch.equal(nms(moved, scores, 0.5), alone), "the case shows nothing"


def test_the_threshold_itself_does_not_strike(both_ways):
    """IoU 0.3 rounds up in fp32: compared as numbers it is above 0.3; 0.5 is exact and is not above."""
    boxes, scores = torch.tensor([[0.0, 0, 10, 10], [0, 0, 10, 3], [0, 0, 10, 5]]), torch.tensor([0.9, 0.8, 0.7])
    assert nms(boxes[:2], scores[:2], 0.3).tolist() == [0]
    assert nms(boxes[[0, 2]], scores[:2], 0.5).tolist() == [0, 1]
    assert fixed_point(boxes[:2], scores[:2], torch.zeros(2), 0.3).tolist() == [0]


def test_odd_boxes_neither_fall_nor_strike(both_ways):
    boxes, scores, groups = crowd(20)
    kept = set(nms(boxes, scores, 0.4).tolist())
    odd = torch.tensor([[5.0, 5, 5, 5], [9, 9, 2, 2], [math.nan, 0, 9, 9], [0, 0, math.inf, math.inf]]).double()
    found = nms(torch.cat((boxes, odd)), torch.cat((scores, torch.ones(4))), 0.4)
    assert set(found.tolist()) == kept | {20, 21, 22, 23}
    scores[3] = math.nan
    found = nms(boxes, scores, 0.4)
    assert found[-1] == 3 or 3 not in found.tolist(), "a NaN score comes last"
    assert batched_nms(boxes[:0], scores[:0], groups[:0], 0.4).dtype == torch.int64


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_sixteen_bits(dtype, both_ways):
    boxes, scores, _ = crowd(80)
    boxes, scores = boxes.to(dtype), scores.to(dtype)
    assert torch.equal(nms(boxes, scores, 0.4), nms(boxes.float(), scores.float(), 0.4))


def test_soft_nms_is_its_loop():
    boxes, scores, _ = crowd(40, 3)
    scores += torch.arange(40) * 1e-4  # no ties
    for method, factor in (
        ("gaussian", lambda overlap: math.exp(-(overlap**2) / 0.5)),
        ("linear", lambda overlap: 1 - overlap if overlap >= 0.3 else 1.0),
    ):
        order, final = loops.soft_nms(boxes.tolist(), scores.tolist(), factor, 0.05)
        found, left = soft_nms(boxes, scores, score_threshold=0.05, method=method)
        assert found.tolist() == order
        torch.testing.assert_close(left, torch.tensor(final, dtype=torch.float64), atol=1e-12, rtol=0)
    found, left = soft_nms(boxes, scores, idxs=torch.arange(40))
    assert torch.equal(left, scores[found]), "every box alone keeps its score"
    scores[5] = math.nan
    assert 5 not in soft_nms(boxes, scores)[0].tolist()
    assert soft_nms(boxes[:0], scores[:0])[0].shape == (0,)


def test_one_graph_for_every_number_of_boxes():
    class Both(torch.nn.Module):
        def forward(self, boxes, scores, groups):
            return batched_nms(boxes, scores, groups, 0.4), *soft_nms(boxes, scores, score_threshold=0.05)

    torch.compiler.reset()
    case = crowd(40)
    compiled = torch.compile(Both(), fullgraph=True, dynamic=True, backend="aot_eager")
    n = torch.export.Dim("n")
    program = torch.export.export(Both(), case, dynamic_shapes=({0: n}, {0: n}, {0: n})).module()
    for size in (40, 23):
        inputs = tuple(x[:size] for x in case)
        for ours, expected in zip((*compiled(*inputs), *program(*inputs)), (*Both()(*inputs),) * 2, strict=True):
            assert torch.equal(ours, expected)


@pytest.mark.peer
def test_torchvision_keeps_the_same(both_ways):
    peer = torchvision()
    for seed in range(5):
        boxes, scores, _ = crowd(300, seed, dtype=torch.float32)
        for threshold in (0.3, 0.5, 0.7):
            assert torch.equal(nms(boxes, scores, threshold), peer.nms(boxes, scores, threshold))


def test_bad_calls_are_named():
    boxes, scores, groups = crowd(4)
    with pytest.raises(ValueError, match=r"nms: iou_threshold must be in \[0, 1\], got 1\.5"):
        nms(boxes, scores, 1.5)
    with pytest.raises(ValueError, match=r"nms: iou_threshold must be in \[0, 1\], got -0\.1"):
        nms(boxes, scores, -0.1)
    with pytest.raises(ValueError, match=r"nms: boxes must be \(n, 4\) and scores \(n\), got \(1, 4, 4\)"):
        nms(boxes[None], scores[:1], 0.5)
    with pytest.raises(ValueError, match=r"nms: boxes must be \(n, 4\) and scores \(n\), got \(4, 4\) and \(3,\)"):
        nms(boxes, scores[:3], 0.5)
    with pytest.raises(ValueError, match="batched_nms: idxs must be"):
        batched_nms(boxes, scores, groups.double(), 0.5)
    with pytest.raises(ValueError, match="batched_nms: idxs must be"):
        batched_nms(boxes, scores, groups.to(torch.complex64), 0.5)
    with pytest.raises(ValueError, match=r"batched_nms: idxs must be \(4,\) integers, got torch.int64 of shape \(3,\)"):
        batched_nms(boxes, scores, groups[:3], 0.5)
    for sizes in ({"scores": scores[:3]}, {"idxs": groups[:3]}, {"boxes": boxes[None]}):
        with pytest.raises(ValueError, match=r"soft_nms: boxes must be \(n, 4\), scores and idxs \(n\), got"):
            soft_nms(**{"boxes": boxes, "scores": scores, **sizes})
    with pytest.raises(ValueError, match="and sigma above 0, got 'gaussian', 0"):
        soft_nms(boxes, scores, sigma=0.0)
    with pytest.raises(ValueError, match='soft_nms: method must be "gaussian" or "linear"'):
        soft_nms(boxes, scores, method="cubic")  # pyright: ignore[reportArgumentType]


def test_a_form_that_looks_at_fallen_boxes_is_found_out(monkeypatch):
    """A mutant: fallen boxes strike too."""
    boxes, scores, _ = crowd(60)
    monkeypatch.setattr(file, "RUN", 0)
    monkeypatch.setattr(file, "_walk", lambda pairs: (~pairs.triu(1).any(0)).nonzero()[:, 0].tolist())
    assert nms(boxes, scores, 0.3).tolist() != loops.nms(boxes.tolist(), scores.tolist(), 0.3)
