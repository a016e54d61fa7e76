"""What detectors cost, against the papers' figures, and that a detector learns a few scenes."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from volvelle.claims import rfcn as rfcn_claim
from volvelle.claims.detect_scenes import counted
from volvelle.claims.thundernet import BACKBONE, PAPER, products
from volvelle.inspect import count_flops
from volvelle.systems.backbone import backbone
from volvelle.systems.detection import RPN, Balanced, DetectorConfig, Post, ThunderNet, detector, thundernet
from volvelle.systems.detection.heads import PositionSensitive
from volvelle.systems.detection.pools import PositionSensitiveAlign


@pytest.mark.parametrize("name", ["snet49", "snet535"])
def test_products_are_the_papers(name):
    """262 and 1300 MFLOPs (multiply-accumulates) at 320 pixels, within a hundredth."""
    assert abs(products(thundernet(name), 320) / 1e6 / PAPER[name] - 1) < 0.01


def test_snet146_differs_by_what_its_backbone_does():
    """Its channels give 161 M at 224 pixels, not the 146 of its name: with these the detector would be the paper's."""
    alone, whole = products(backbone("snet146"), 224) / 1e6, products(thundernet("snet146"), 320) / 1e6
    assert whole / PAPER["snet146"] > 1.05
    assert abs((whole - (alone - BACKBONE["snet146"]) * (320 / 224) ** 2) / PAPER["snet146"] - 1) < 0.01


@pytest.mark.slow
def test_products_are_those_that_inspect_counts():
    """By torch.export of the whole detector, suppression and pooling included."""
    model = thundernet("snet49").eval()
    found = count_flops(model, (1, 3, 320, 320)).by_op()
    assert found["conv2d"].macs + found["linear"].macs == products(model, 320)


def test_a_region_more_costs_rfcn_no_product():
    size = (320, 320)
    few, many = (
        {who: rfcn_claim.products_of(head, size, count) for who, head in rfcn_claim.heads().items()}
        for count in rfcn_claim.REGIONS
    )
    assert few["R-FCN"] == many["R-FCN"] > 0
    each = (many["Faster R-CNN"] - few["Faster R-CNN"]) / 1900
    assert each == 256 * 49 * 1024 + 1024 * 1024 + 1024 * (21 + 4)


def test_counting_by_hooks_is_the_formula():
    model = torch.nn.Sequential(
        torch.nn.Conv2d(4, 6, 3, groups=2, padding=1), torch.nn.Flatten(), torch.nn.Linear(54, 2)
    )
    assert counted(model, lambda: model(torch.zeros(1, 4, 3, 3))) == 9 * 6 * 2 * 9 + 54 * 2


def test_scores_of_parts_tell_where_a_box_lies():
    """Figures 3 and 4 of the paper: maps of parts vote for the object's own box, one map for any box near it."""
    parts = torch.zeros(1, 9, 24, 24)
    for i in range(3):
        for j in range(3):
            parts[0, 3 * i + j, 6 + 4 * i : 10 + 4 * i, 6 + 4 * j : 10 + 4 * j] = 1
    scores = {}
    for k in (1, 3):
        head = PositionSensitive(PositionSensitiveAlign(k, 1), 9, k, 1)
        weight = torch.eye(9) if k == 3 else torch.ones(1, 9)
        with torch.no_grad():
            head.classes.weight.zero_()
            head.classes.weight[: k * k, :, 0, 0] = weight
            moved = torch.tensor([[0.0, 6 + s, 6, 18 + s, 18] for s in (0, 4, 8)])
            scores[k] = head(parts, moved)[0][:, 0]
    assert scores[3][0] > 0.8
    assert scores[3][1:].max() < 0.1
    assert scores[1][1] >= 0.5


@pytest.fixture
def shapes(monkeypatch):
    """A disc, a bar and a cross in place of Fashion-MNIST's garments."""
    y, x = np.mgrid[:28, :28] - 13.5
    drawn = [x**2 + y**2 < 130, (abs(x) < 6) & (abs(y) < 13), (abs(x) < 4) | (abs(y) < 4)]
    found = torch.from_numpy(np.stack([one * 220 for one in drawn]).astype(np.uint8)), torch.arange(3)
    monkeypatch.setattr("volvelle.data.scenes.fetch", lambda name: name)
    monkeypatch.setattr("volvelle.data.scenes.read_idx_folder", lambda folder: (found, found))


def test_a_detector_learns_a_few_scenes(shapes):
    """Four scenes, seen often: afterwards their shapes are found, each once, as what they are."""
    from volvelle.data.scenes import Scenes
    from volvelle.parts.regions.iou import box_iou
    from volvelle.systems.detection.targets import collate

    torch.manual_seed(0)
    scenes = [Scenes(4, size=96, seed=3, garments=(2, 2)).scene(i) for i in range(4)]
    targets = collate(
        [torch.tensor([g.box for g in s.garments]) for s in scenes],
        [torch.tensor([g.label - 1 for g in s.garments]) for s in scenes],
    )
    numbers = RPN(anchors=((24.0, 24.0), (32.0, 32.0), (44.0, 44.0)), before=108, training=50, testing=30, sampled=64)
    composition = ThunderNet(alpha=2, bins=5, proposer=48, hidden=(64,))
    classes = ("disc", "bar", "cross")
    model = detector(
        DetectorConfig("snet49", composition, classes, rpn=numbers, sampling=Balanced(count=32), post=Post(score=0.5))
    )
    pixels = torch.stack([torch.from_numpy(s.image).permute(2, 0, 1) for s in scenes])
    images, sizes = model.preprocessing.normalise(pixels), torch.full((4, 2), 96)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    for step in range(90):
        loss = sum(model.losses(images, sizes, targets).values())
        optimizer.zero_grad()
        loss.backward()  # type: ignore[union-attr]
        torch.nn.utils.clip_grad_norm_(model.parameters(), 10.0)
        optimizer.step()
        first = float(loss.detach()) if not step else first  # type: ignore[union-attr] # noqa: F821
    assert float(loss.detach()) < 0.3 * first  # type: ignore[union-attr]
    found = model.eval()(images, sizes)
    right = 0
    for i in range(4):
        seen = found.mask[i]
        overlap = box_iou(targets.boxes[i], found.boxes[i][seen])
        same = targets.labels[i][:, None] == found.labels[i][seen]
        right += int(((overlap > 0.5) & same)[targets.mask[i]].any(1).sum())
    there = int(targets.mask.sum())
    assert right >= there - 1
    assert int(found.mask.sum()) <= there + 2
