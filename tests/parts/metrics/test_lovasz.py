"""Lovász-softmax against its definition by sets, against IoU where probabilities are hard, and its gradient."""

from __future__ import annotations

import itertools

import pytest
import torch

from volvelle.functional import class_iou, confusion_matrix, lovasz_softmax


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
    kept = (target != 255).flatten()
    flat, truth = p.movedim(1, -1).reshape(-1, 4)[kept], target.flatten()[kept]
    losses = []
    for c in range(4 if classes == "all" else 3):
        y = (truth == c).tolist()
        losses.append(by_sets([abs(float(a) - q) for a, q in zip(y, flat[:, c].tolist(), strict=True)], y))
    found = lovasz_softmax(p, target, classes=classes)
    assert float(found) == pytest.approx(sum(losses) / len(losses), rel=1e-12)


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


def test_shapes_that_do_not_fit():
    with pytest.raises(ValueError, match=r"got \(1, 2, 3\) and \(1, 4\)"):
        lovasz_softmax(torch.zeros(1, 2, 3), torch.zeros(1, 4, dtype=torch.int64))
