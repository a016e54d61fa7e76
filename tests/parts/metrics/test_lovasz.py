"""Lovász-softmax against its definition by sets, against IoU where probabilities are hard, and its gradient."""

from __future__ import annotations

import itertools
import re

import pytest
import torch

from volvelle.functional import class_iou, confusion_matrix, lovasz_softmax
from volvelle.parts.metrics import lovasz


def by_sets(errors, truth):
    """The extension by its definition: sorted errors times the growth of the Jaccard loss of the worst i pixels."""
    order = sorted(range(len(errors)), key=lambda i: -errors[i])
    positive = {i for i in range(len(truth)) if truth[i]}

    def jaccard(wrong):
        union = positive | wrong
        return 1 - len(positive - wrong) / len(union) if union else 0.0

    total, before, wrong = 0.0, 0.0, set()
    for i in order:
        wrong.add(i)
        after = jaccard(wrong)
        total += errors[i] * (after - before)
        before = after
    return total


@pytest.mark.parametrize("classes", ["present", "all"])
def test_equals_the_definition(classes):
    generator = torch.Generator().manual_seed(0)
    scores = torch.rand(2, 4, 3, 5, generator=generator, dtype=torch.float64)
    p = scores / scores.sum(1, keepdim=True)
    target = torch.randint(0, 3, (2, 3, 5), generator=generator)  # class 3 is absent
    target[0, 0, :2] = 255
    target[1, 1, :2] = 9  # no class: whatever is seen there is wrong
    kept = (target != 255).flatten()
    flat, truth = p.movedim(1, -1).reshape(-1, 4)[kept], target.flatten()[kept]
    losses = []
    for c in range(4 if classes == "all" else 3):
        y = (truth == c).tolist()
        losses.append(by_sets([abs(float(a) - q) for a, q in zip(y, flat[:, c].tolist(), strict=True)], y))
    found = lovasz_softmax(p, target, classes=classes)
    assert float(found) == pytest.approx(sum(losses) / len(losses), rel=1e-12)


@pytest.mark.parametrize("classes", ["present", "all"])
def test_target_may_hold_integers_of_any_width(classes):
    p = torch.rand(1, 3, 6, generator=torch.Generator().manual_seed(0)).softmax(1)
    target = torch.tensor([[0, 0, 1, 1, 9, 127]])
    wanted = lovasz_softmax(p, target, ignore_index=127, classes=classes)
    for dtype in (torch.uint8, torch.int8, torch.int16, torch.int32):
        assert lovasz_softmax(p, target.to(dtype), ignore_index=127, classes=classes) == wanted


def test_on_hard_predictions_it_is_one_minus_the_mean_iou_of_the_present_classes():
    for seen, there in itertools.product(itertools.product(range(2), repeat=4), repeat=2):
        preds, target = torch.tensor([seen]), torch.tensor([there])
        p = torch.nn.functional.one_hot(preds, 2).movedim(-1, 1).double()
        ious = class_iou(confusion_matrix(preds, target, 2))[torch.tensor(sorted(set(there)))]
        assert float(lovasz_softmax(p, target)) == pytest.approx(1 - float(ious.mean()), abs=1e-12)


def test_gradients():
    generator = torch.Generator().manual_seed(3)
    scores = torch.randn(2, 3, 7, generator=generator, dtype=torch.float64, requires_grad=True)
    target = torch.randint(0, 3, (2, 7), generator=generator)
    assert torch.autograd.gradcheck(lambda x: lovasz_softmax(x.softmax(1), target), scores)


def test_nothing_but_void_is_zero_and_keeps_the_graph():
    scores = torch.randn(1, 3, 4, requires_grad=True)
    loss = lovasz_softmax(scores.softmax(1), torch.full((1, 4), 255))
    loss.backward()
    assert float(loss) == 0
    assert scores.grad is not None
    assert not scores.grad.any()


def test_fp32_and_bf16_stay_near():
    generator = torch.Generator().manual_seed(3)
    p = torch.randn(2, 5, 40, 50, generator=generator, dtype=torch.float64).softmax(1)
    target = torch.randint(0, 5, (2, 40, 50), generator=generator)
    exact = float(lovasz_softmax(p, target))
    assert float(lovasz_softmax(p.float(), target)) == pytest.approx(exact, rel=1e-5)
    assert float(lovasz_softmax(p.bfloat16(), target)) == pytest.approx(exact, rel=0.02)


def test_more_pixels_than_fp32_can_count():
    """Where every pixel is of the class, each wrong one costs 1 / n; fp32 would skip some, and count others twice."""
    n = (1 << 24) + 2
    least, most = lovasz._steps(torch.ones(n, 1)).aminmax()
    assert float(least) == float(most) == pytest.approx(1 / n)


def test_a_batch_of_single_pixels_has_no_axis_of_pixels():
    p, target = torch.rand(5, 3, generator=torch.Generator().manual_seed(0)).softmax(1), torch.tensor([0, 1, 2, 1, 0])
    assert lovasz_softmax(p, target) == lovasz_softmax(p[:, :, None], target[:, None])


@pytest.mark.parametrize(("shape", "other"), [((1, 2, 3), (1, 4)), ((3,), (3,)), ((2, 3), (3,))])
def test_shapes_that_do_not_fit(shape, other):
    with pytest.raises(ValueError, match=re.escape(f"got {shape} and {other}")):
        lovasz_softmax(torch.zeros(shape), torch.zeros(other, dtype=torch.int64))
