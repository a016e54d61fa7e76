"""Anchors, matching, sampling and losses of detectors, against loops."""

from __future__ import annotations

import math

import pytest
import torch

from volvelle.systems.detection.anchors import centred_within, grid_anchors, mean_within
from volvelle.systems.detection.config import RPN, Balanced, DetectorConfig, Hardest, ThunderNet, anchor_shapes
from volvelle.systems.detection.losses import box_losses, mean_over
from volvelle.systems.detection.matching import Matches, covered, match
from volvelle.systems.detection.necks import ContextEnhancement
from volvelle.systems.detection.sampling import BalancedSampler, HardestSampler, draw, lowest, turns
from volvelle.systems.detection.suppression import first_kept, keep_mask
from volvelle.systems.detection.targets import Targets, collate, pick, rois


def boxes_of(*shape, seed=0, side=60.0):
    generator = torch.Generator().manual_seed(seed)
    corner = torch.rand(*shape, 2, generator=generator) * 100
    return torch.cat((corner, corner + torch.rand(*shape, 2, generator=generator) * side + 4), -1)


def iou(a, b):
    """Of two boxes, by hand."""
    wide = min(a[2], b[2]) - max(a[0], b[0])
    high = min(a[3], b[3]) - max(a[1], b[1])
    both = max(wide, 0.0) * max(high, 0.0)
    total = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - both
    return both / total if total > 0 else 0.0


def targets_of(b=3, m=5, seed=1):
    """Ragged: image i has m - i objects; the last image has none; one object is ignored and one has no area."""
    counts = [*(m - i for i in range(b - 1)), 0]
    boxes = [boxes_of(count, seed=seed + i) for i, count in enumerate(counts)]
    boxes[0][1, 2:] = boxes[0][1, :2]
    labels = [torch.arange(count) % 3 for count in counts]
    ignored = [torch.zeros(count, dtype=torch.bool) for count in counts]
    ignored[0][0] = True
    return collate(boxes, labels, ignored)


def test_anchors_lie_around_the_places_of_a_map():
    shapes = torch.tensor([[8.0, 4.0], [20.0, 20.0]])
    found = grid_anchors(shapes, (16, 8), (2, 3))
    expected = [
        (x - w / 2, y - h / 2, x + w / 2, y + h / 2)
        for y in (8.0, 24.0)
        for x in (4.0, 12.0, 20.0)
        for w, h in shapes.tolist()
    ]
    assert torch.equal(found, torch.tensor(expected))
    inside = centred_within(found, torch.tensor([[32, 24], [16, 12]]))
    assert inside[0].all()
    assert inside[1].view(2, 3, 2)[..., 0].tolist() == [[True, False, False], [False, False, False]]


def test_anchor_shapes_keep_the_area():
    shapes = anchor_shapes((32, 64), (0.5, 1, 2))
    assert [round(math.sqrt(w * h)) for w, h in shapes] == [32] * 3 + [64] * 3
    assert [round(h / w, 6) for w, h in shapes[:3]] == [0.5, 1, 2]


@pytest.mark.parametrize(("best", "floor"), [(0, 0.0), (1, 0.0), (3, 0.25)])
def test_match_is_the_rule_in_loops(best, floor):
    targets = targets_of()
    boxes = boxes_of(40, seed=9)
    found = match(boxes, targets, positive=0.5, negative=0.3, best=best, floor=floor)
    for i in range(3):
        wanted = [j for j in range(targets.mask.shape[1]) if targets.wanted[i, j]]
        table = {(n, j): iou(boxes[n].tolist(), targets.boxes[i, j].tolist()) for n in range(40) for j in wanted}
        claims = {n: [] for n in range(40)}
        for j in wanted:
            order = sorted(range(40), key=lambda n: -table[n, j])[:best]
            for n in order:
                if table[n, j] >= max(floor, 1e-9):
                    claims[n].append(j)
        for n in range(40):
            highest = max((table[n, j] for j in wanted), default=-1.0)
            owner = max(wanted, key=lambda j: table[n, j], default=None)
            if highest < 0.5 and claims[n]:
                owner = max(claims[n], key=lambda j: table[n, j])
            positive = highest >= 0.5 or bool(claims[n])
            shielded = bool(
                covered(boxes[None, n : n + 1], targets.boxes[i : i + 1], (targets.ignored & targets.mask)[i : i + 1])
            )
            assert bool(found.positive[i, n]) == positive, (i, n)
            assert bool(found.negative[i, n]) == (highest < 0.3 and not positive and not shielded), (i, n)
            if positive:
                assert int(found.index[i, n]) == owner


def test_objects_without_area_and_ignored_ones_own_no_box():
    targets = targets_of()
    found = match(targets.boxes, targets, positive=0.5, negative=0.5, best=3)
    owners = found.index[0][found.positive[0]].tolist()
    assert 0 not in owners
    assert 1 not in owners
    assert not found.negative[0, 0]  # the ignored object's own place is not background
    assert not found.positive[2].any()


def test_a_box_inside_a_crowd_is_not_background():
    boxes = torch.tensor([[[0.0, 0, 10, 10], [0, 0, 10, 10], [30, 30, 40, 40]]])
    crowd = torch.tensor([[[0.0, 0, 10, 5.5]]])
    assert covered(boxes, crowd, torch.tensor([[True]])).tolist() == [[True, True, False]]
    assert not covered(boxes, crowd, torch.tensor([[False]])).any()
    assert not covered(boxes, crowd * torch.tensor([1, 1, 1, 0.8]), torch.tensor([[True]])).any()


def test_sampling_fills_up_with_negatives():
    positive = torch.rand(4, 500, generator=torch.Generator().manual_seed(0)) < 0.3
    positive[3] = False
    matches = Matches(torch.zeros(4, 500, dtype=torch.int64), positive, ~positive)
    usable = torch.arange(500).expand(4, -1) < 400
    some, others = draw(matches, 100, 0.5, usable)
    assert some.sum(1).tolist() == [50, 50, 50, 0]
    assert others.sum(1).tolist() == [50, 50, 50, 100]
    assert not (some & ~positive).any()
    assert not (others & positive).any()
    assert not ((some | others) & ~usable).any()
    torch.manual_seed(1)
    again, _ = draw(matches, 100, 0.5, usable)
    assert not torch.equal(some, again)


def test_objects_take_turns():
    """Of 90 regions of one object and 3 of another, a third of 30 is shared out evenly as far as it goes."""
    index = torch.tensor([[0] * 90 + [1] * 3 + [0] * 200])
    positive = torch.arange(293)[None] < 93
    keys = turns(Matches(index, positive, ~positive))
    assert sorted(keys[0, 90:93].long().tolist()) == [0, 1, 2]
    assert sorted(keys[0, :90].long().tolist()) == list(range(90))
    chosen = BalancedSampler(Balanced(count=30)).before(Matches(index, positive, ~positive))
    assert chosen.index.shape == (1, 30)
    taken = chosen.index[chosen.mask]
    assert int((taken < 90).sum()) == 7
    assert int(((taken >= 90) & (taken < 93)).sum()) == 3
    assert int((taken >= 93).sum()) == 20


def test_few_regions_are_filled_up_and_masked():
    none = torch.zeros(2, 5, dtype=torch.bool)
    matches = Matches(
        torch.zeros(2, 5, dtype=torch.int64), none, torch.tensor([[1, 0, 1, 0, 0], [0, 0, 0, 0, 0]]).bool()
    )
    chosen = BalancedSampler(Balanced(count=128)).before(matches)
    assert chosen.index.shape == (2, 5)
    assert chosen.mask.sum(1).tolist() == [2, 0]
    assert sorted(chosen.index[0][chosen.mask[0]].tolist()) == [0, 2]
    empty = Matches(torch.zeros(2, 0, dtype=torch.int64), none[:, :0], none[:, :0])
    assert BalancedSampler(Balanced()).before(empty).mask.shape == (2, 0)


def test_the_hardest_are_those_of_the_highest_loss():
    sampler = HardestSampler(Hardest(count=2))
    losses = torch.tensor([[1.0, 5.0, 3.0, 9.0], [1.0, 2.0, 0.5, 0.0]])
    mask = torch.tensor([[True, True, True, False], [True, False, False, False]])
    assert sampler.after(losses, mask).tolist() == [[False, True, True, False], [True, False, False, False]]
    assert torch.equal(BalancedSampler(Balanced()).after(losses, mask), mask)


def test_lowest_breaks_ties_by_place():
    assert lowest(torch.zeros(1, 4), torch.ones(1, 4, dtype=torch.bool), 2).tolist() == [[True, True, False, False]]


def test_box_losses_are_zero_for_the_right_moves_alone():
    from volvelle.parts.regions.boxes import encode_boxes

    objects, boxes = boxes_of(2, 6, seed=3), boxes_of(2, 6, seed=4)
    boxes[0, 0, 2:] = boxes[0, 0, :2]  # without area: cannot be encoded, and is not positive
    positive = torch.ones(2, 6, dtype=torch.bool)
    positive[0, 0] = False
    weights = (10.0, 10.0, 5.0, 5.0)
    right = torch.where(positive.unsqueeze(-1), encode_boxes(objects, boxes, weights), 7.0).nan_to_num(0.0)
    deltas = right.clone().requires_grad_()
    losses = box_losses(deltas, boxes, objects, positive, weights=weights, beta=1.0)
    assert losses.isfinite().all()
    torch.testing.assert_close(losses, torch.zeros(2, 6), atol=1e-5, rtol=0)
    (box_losses(deltas + 3.0, boxes, objects, positive, weights=weights, beta=1.0)).sum().backward()
    assert deltas.grad[0, 0].tolist() == [0.0] * 4
    torch.testing.assert_close(deltas.grad[positive], torch.ones(11, 4))
    moved = box_losses(right + 0.5, boxes, objects, positive, weights=weights, beta=1.0)
    torch.testing.assert_close(moved[positive], torch.full((11,), 4 * 0.5 * 0.25), atol=1e-4, rtol=0)


def test_means_over_nothing_have_gradients_of_zero():
    x = torch.ones(2, 3, requires_grad=True)
    loss = mean_over(x * 2, torch.zeros(2, 3, dtype=torch.bool))
    loss.backward()
    assert float(loss.detach()) == 0
    assert torch.equal(x.grad, torch.zeros(2, 3))


def test_the_mean_of_a_picture_is_not_that_of_its_padding():
    features = torch.randn(2, 4, 3, 4)
    found = mean_within(features, torch.tensor([[48, 64], [20, 33]]), (48, 64))
    torch.testing.assert_close(found[0, :, 0, 0], features[0].mean((1, 2)))
    torch.testing.assert_close(found[1, :, 0, 0], features[1, :, :2, :3].mean((1, 2)))


def test_context_enhancement_is_the_sum_of_three_maps():
    torch.manual_seed(0)
    neck = ContextEnhancement((6, 8), 5).double()
    c4, c5 = torch.randn(2, 6, 5, 4).double(), torch.randn(2, 8, 3, 2).double()
    sizes = torch.tensor([[80, 64], [80, 64]])
    found, same = neck((torch.zeros(1), c4, c5), sizes, (80, 64))
    assert found is same
    first, second = neck.lateral
    whole = neck.whole(c5.mean((2, 3), keepdim=True))
    up = torch.stack(
        [torch.stack([second(c5)[..., y * 3 // 5, x * 2 // 4] for x in range(4)], -1) for y in range(5)], -2
    )
    torch.testing.assert_close(found, first(c4) + up + whole)


def test_suppression_by_masks_is_greedy_suppression():
    boxes, labels = boxes_of(3, 30, seed=5), torch.randint(0, 2, (3, 30))
    valid = torch.rand(3, 30) < 0.8
    for groups in (None, labels):
        found = keep_mask(boxes, valid, 0.3, groups)
        for i in range(3):
            kept = []
            for n in range(30):
                rivals = [k for k in kept if groups is None or groups[i, k] == groups[i, n]]
                if valid[i, n] and all(iou(boxes[i, k].tolist(), boxes[i, n].tolist()) <= 0.3 for k in rivals):
                    kept.append(n)
            assert found[i].nonzero().flatten().tolist() == kept
    none = keep_mask(boxes[:, :0], valid[:, :0], 0.3)
    assert none.shape == (3, 0)
    assert first_kept(none, 4).index.shape == (3, 0)


def test_rows_and_picks():
    boxes = boxes_of(2, 3)
    assert rois(boxes)[:, 0].tolist() == [0, 0, 0, 1, 1, 1]
    assert torch.equal(rois(boxes)[3:, 1:], boxes[1])
    index = torch.tensor([[2, 0], [1, 1]])
    assert torch.equal(pick(boxes, index)[1], boxes[1, [1, 1]])
    assert torch.equal(pick(boxes[..., 0], index)[0], boxes[0, [2, 0], 0])


def test_collate_pads_and_says_what_counts():
    found = targets_of()
    assert found.boxes.shape == (3, 5, 4)
    assert found.mask.sum(1).tolist() == [5, 4, 0]
    assert found.wanted.sum(1).tolist() == [3, 4, 0]
    assert collate([], []).mask.shape == (0, 0)
    assert collate([torch.zeros(0, 4)], [torch.zeros(0)], least=2).mask.tolist() == [[False, False]]
    assert isinstance(found.to("cpu"), Targets)


def test_configurations_refuse_what_cannot_be():
    from volvelle.errors import UsageError

    for make, message in (
        (lambda: RPN(anchors=()), "one pair at least"),
        (lambda: RPN(anchors=((3.0, -1.0),)), "widths and heights above 0"),
        (lambda: RPN(positive=0.2, negative=0.4), "negative <= positive"),
        (lambda: RPN(testing=0), "at least 1"),
        (lambda: ThunderNet(maps=4), "maps must be 2 or 3, got 4"),
        (lambda: DetectorConfig("snet49", ThunderNet(), ()), "at least one class"),
    ):
        with pytest.raises(UsageError, match=message):
            make()
