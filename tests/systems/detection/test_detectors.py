"""Detectors: every composition in use and in training, ragged batches, nothing to find, files, export, figures."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from torch import nn

from volvelle.errors import UsageError, VolvelleError
from volvelle.inspect import receptive_field
from volvelle.systems.detection import (
    RFCN,
    RPN,
    Balanced,
    Detections,
    DetectorConfig,
    FasterRCNN,
    Hardest,
    Post,
    ThunderNet,
    deformify,
    detector,
    named,
    read_detector,
    write_detector,
)
from volvelle.systems.detection.config import RELEASED, RELEASED_POST, anchor_shapes
from volvelle.systems.detection.deforming import DeformedConv2d
from volvelle.systems.detection.heads import Scored
from volvelle.systems.detection.load import carry_over, is_detector
from volvelle.systems.detection.model import Detector
from volvelle.systems.detection.post import PostProcess
from volvelle.systems.detection.targets import Regions, Targets, collate

CLASSES = ("red", "white", "blue")
NUMBERS = RPN(anchors=anchor_shapes((16, 32), (0.5, 1, 2)), before=120, training=40, testing=30, sampled=64)


def config_of(composition, backbone="snet49", **changes) -> DetectorConfig:
    return DetectorConfig(backbone, composition, CLASSES, rpn=NUMBERS, sampling=Balanced(count=24), **changes)


COMPOSITIONS = {
    "thundernet": config_of(ThunderNet(bins=3, alpha=4, hidden=(32,), proposer=24)),
    "thundernet, stride 8, no attention": config_of(
        ThunderNet(bins=3, alpha=4, hidden=(32,), proposer=24, maps=3, attention=False), "mobilenet-v2"
    ),
    "thundernet as released": config_of(replace(RELEASED, bins=3, alpha=4, hidden=(32, 32)), post=RELEASED_POST),
    "rfcn": replace(config_of(RFCN(bins=3, width=24, proposer=24), "resnet-18"), sampling=Hardest(count=24)),
    "faster rcnn": config_of(FasterRCNN(bins=3, width=8, hidden=(32, 16), proposer=24), "resnet-18"),
}


def small(name="thundernet", seed=0) -> Detector:
    torch.manual_seed(seed)
    model = detector(COMPOSITIONS[name])
    # Fresh heads score everything alike: give them opinions.
    for layer in (model.proposer.objectness, model.roi_head.scorer.classes):
        nn.init.normal_(layer.weight, 0, 0.5)  # type: ignore[arg-type]
    return model


def some_targets(b=2) -> Targets:
    boxes = torch.tensor([[10.0, 12, 40, 44], [30, 20, 60, 50], [5, 5, 21, 21]])
    every = [boxes, boxes[:1] + 3, *[boxes[:0]] * b][:b]
    return collate(every, [torch.arange(len(one)) for one in every])


@pytest.mark.parametrize("name", COMPOSITIONS)
def test_every_composition_finds_and_learns(name):
    model = small(name)
    images, sizes = torch.randn(3, 3, 70, 90), torch.tensor([[70, 90], [50, 61], [64, 64]])
    losses = model.losses(images, sizes, some_targets(3))
    assert set(losses) == {"objectness", "proposal_boxes", "classes", "boxes"}
    assert all(loss.dim() == 0 and loss.isfinite() and loss > 0 for loss in losses.values())
    sum(losses.values()).backward()  # type: ignore[union-attr]
    assert not [n for n, p in model.named_parameters() if p.grad is None]
    assert not [n for n, p in model.named_parameters() if not p.grad.isfinite().all()]  # type: ignore[union-attr]
    found = model.eval()(images, sizes)
    check(found, sizes)
    assert found.mask.any()


def check(found: Detections, sizes) -> None:
    """The contract: shapes, types, padding of zeros, best first, inside each picture."""
    b, n = found.scores.shape
    assert found.boxes.shape == (b, n, 4)
    assert found.labels.shape == found.mask.shape == (b, n)
    assert (found.labels.dtype, found.mask.dtype) == (torch.int64, torch.bool)
    assert not found.boxes[~found.mask].any()
    assert not found.scores[~found.mask].any()
    for i in range(b):
        count = int(found.mask[i].sum())
        assert found.mask[i, :count].all()
        scores = found.scores[i, :count]
        assert (scores[:-1] >= scores[1:]).all()
        assert ((found.labels[i] >= 0) & (found.labels[i] < 3)).all()
        y, x = sizes[i].tolist()
        assert (found.boxes[i, :count] >= 0).all()
        assert (found.boxes[i, :count] <= torch.tensor([x, y, x, y])).all()


@pytest.mark.parametrize("name", COMPOSITIONS)
def test_nothing_to_find_gives_gradients_of_zero(name):
    """Images without objects, and no proposals at all: finite losses, and every weight has a gradient."""
    model = small(name)
    images, sizes = torch.randn(2, 3, 64, 64), torch.tensor([[64, 64], [64, 40]])
    for targets, size in (
        (some_targets(4), sizes),
        (collate([torch.zeros(0, 4)] * 2, [torch.zeros(0)] * 2), sizes * 0),
    ):
        nothing = Targets(*(part[-2:] for part in targets))
        assert not nothing.mask.any()
        model.zero_grad()
        losses = model.losses(images, size, nothing)
        assert all(loss.isfinite() for loss in losses.values())
        assert float(losses["boxes"].detach()) == float(losses["proposal_boxes"].detach()) == 0
        sum(losses.values()).backward()  # type: ignore[union-attr]
        assert not [n for n, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()]
        if not size.any():
            # No anchor lies on a picture of no size: nothing was sampled at all.
            assert not any(p.grad.any() for p in model.parameters())  # type: ignore[union-attr]
    found = model.eval()(images, sizes * 0)
    check(found, sizes)
    assert not found.mask.any()


def test_a_picture_is_seen_alike_alone_and_in_a_batch():
    model = small().eval()
    images = torch.randn(3, 3, 64, 96)
    together = model(images)
    for i in range(3):
        alone = model(images[i : i + 1])
        count = int(alone.mask.sum())
        assert int(together.mask[i].sum()) == count > 0
        torch.testing.assert_close(together.boxes[i, :count], alone.boxes[0, :count], rtol=1e-3, atol=1e-2)
        assert torch.equal(together.labels[i, :count], alone.labels[0, :count])


def test_padding_changes_no_proposal_beside_the_picture():
    """All regions and detections lie on the valid part, whatever the rest of the batch's image holds."""
    model = small().eval()
    images = torch.randn(2, 3, 96, 96) * 3
    sizes = torch.tensor([[33, 96], [96, 20]])
    found = model.look(model.backbone.features(images), sizes, (96, 96))
    regions = model.proposer.propose(found, sizes, 30)
    assert regions.mask.any(1).all()
    for i, (y, x) in enumerate(sizes.tolist()):
        boxes = regions.boxes[i][regions.mask[i]]
        assert (boxes <= torch.tensor([x, y, x, y])).all()
        assert (boxes[:, 2:] - boxes[:, :2] >= 1).all()
    check(model(images, sizes), sizes)


def test_a_nan_in_one_image_stays_there():
    model = small().eval()
    images = torch.randn(2, 3, 64, 64)
    clean = model(images)
    images[1] = float("nan")
    found = model(images)
    assert torch.equal(found.boxes[0][found.mask[0]], clean.boxes[0][clean.mask[0]])
    assert not found.mask[1].any()


def test_perfect_answers_have_almost_no_loss():
    """The proposer's loss sees anchors, objects and deltas in one order: exact answers give none, shifted ones do."""
    from volvelle.parts.regions.boxes import encode_boxes
    from volvelle.systems.detection.matching import match

    model, sizes, targets = small(), torch.tensor([[64, 80]] * 2), some_targets()
    found = model.look(model.backbone.features(torch.randn(2, 3, 64, 80)), sizes, (64, 80))
    o = NUMBERS
    matches = match(found.anchors, targets, positive=o.positive, negative=o.negative, best=o.best, floor=o.floor)
    assert matches.positive.any(1).all()
    objects = torch.stack([targets.boxes[i, matches.index[i]] for i in range(2)])
    deltas = encode_boxes(objects, found.anchors)
    deltas = deltas.nan_to_num(0.0)
    logits = torch.where(matches.positive, 20.0, -20.0)
    losses = model.proposer.losses(found._replace(objectness=logits, deltas=deltas), sizes, targets)
    assert float(losses["objectness"]) < 1e-6
    assert float(losses["proposal_boxes"]) < 1e-6
    wrong = model.proposer.losses(found._replace(objectness=-logits, deltas=deltas + 0.1), sizes, targets)
    assert float(wrong["objectness"]) > 15
    assert float(wrong["proposal_boxes"]) > 1e-3


def test_a_head_learns_from_the_objects_themselves():
    """Without any proposal the objects are the regions: their labels are learnt, and their boxes must stay."""
    model, targets = small(), some_targets()
    features = torch.randn(2, 36, 4, 5)
    none = Regions(torch.zeros(2, 0, 4), torch.zeros(2, 0), torch.zeros(2, 0, dtype=torch.bool))
    seen = {}

    class Told(nn.Module):
        def forward(self, features, regions):
            seen["regions"] = regions
            labels = torch.tensor([0, 1, 2, 0, 1, 1])[: len(regions)]
            return 30.0 * nn.functional.one_hot(labels, 4).float(), torch.zeros(len(regions), 4)

    model.roi_head.scorer = Told()
    losses = model.roi_head.losses(features, none, targets)
    assert seen["regions"].shape == (6, 5)
    assert float(losses["classes"]) < 1e-6
    assert float(losses["boxes"]) < 1e-6


def test_post_processing_is_the_rule_in_loops():
    """Against loops over images, classes and boxes, for random scores and boxes."""
    torch.manual_seed(3)
    b, n, classes = 2, 20, 3
    corner = torch.rand(b, n, 2) * 60
    regions = Regions(
        torch.cat((corner, corner + 10 + 30 * torch.rand(b, n, 2)), 2), torch.rand(b, n), torch.rand(b, n) < 0.9
    )
    scored = Scored(torch.randn(b, n, classes + 1) * 2, torch.randn(b, n, 4))
    sizes, options = torch.tensor([[80, 90], [70, 60]]), Post(score=0.1, overlap=0.4, top=12)
    found = PostProcess(options)(scored, regions, sizes)
    check(found, sizes)
    for i in range(b):
        y, x = sizes[i].tolist()
        boxes = []
        for r in range(n):
            x1, y1, x2, y2 = regions.boxes[i, r].double().tolist()
            dx, dy, dw, dh = (scored.deltas[i, r].double() / torch.tensor([10.0, 10, 5, 5]).double()).tolist()
            w, h = x2 - x1, y2 - y1
            cx, cy = x1 + w / 2 + dx * w, y1 + h / 2 + dy * h
            w, h = w * 2.718281828459045**dw, h * 2.718281828459045**dh
            corners = cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2
            boxes.append([min(max(v, 0), m) for v, m in zip(corners, (x, y, x, y), strict=True)])
        everything = []
        for label in range(classes):
            scores = scored.logits[i].double().softmax(-1)[:, label].tolist()
            kept: list[int] = []
            for r in sorted(range(n), key=lambda r: -scores[r]):
                if not regions.mask[i, r] or scores[r] <= options.score:
                    continue
                if all(overlap_of(boxes[r], boxes[k]) <= options.overlap for k in kept):
                    kept.append(r)
            everything += [(scores[r], label, boxes[r]) for r in kept]
        everything.sort(key=lambda one: -one[0])
        expected = everything[: options.top]
        count = len(expected)
        assert int(found.mask[i].sum()) == count
        assert found.labels[i, :count].tolist() == [label for _, label, _ in expected]
        torch.testing.assert_close(
            found.boxes[i, :count].double(), torch.tensor([box for *_, box in expected]).double(), rtol=1e-4, atol=1e-3
        )


def overlap_of(a, b):
    both = max(min(a[2], b[2]) - max(a[0], b[0]), 0) * max(min(a[3], b[3]) - max(a[1], b[1]), 0)
    return both / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - both)


def test_soft_suppression_lowers_scores_and_drops_little():
    box = torch.tensor([10.0, 10, 50, 50])
    regions = Regions(
        torch.stack([box, box + 4, box + 60]).expand(1, 3, 4), torch.ones(1, 3), torch.ones(1, 3, dtype=torch.bool)
    )
    logits = torch.tensor([[[3.0, 0, 0, 0], [2, 0, 0, 0], [1, 0, 0, 0]]])
    sizes = torch.tensor([[120, 120]])
    scored = Scored(logits, torch.zeros(1, 3, 4))
    hard = PostProcess(Post(score=0.2))(scored, regions, sizes)
    soft = PostProcess(Post(score=0.2, decay=0.5))(scored, regions, sizes)
    assert hard.mask.sum() == 2
    probabilities = logits.softmax(-1)[0, :, 0]
    both = 36 * 36 / (2 * 40 * 40 - 36 * 36)
    expected = torch.stack(
        [probabilities[0], probabilities[2], probabilities[1] * torch.tensor(-(both**2) / 0.5).exp()]
    )
    expected = expected[expected > 0.2].sort(descending=True).values
    torch.testing.assert_close(soft.scores[0][soft.mask[0]], expected)
    # Another class is another matter.
    apart = torch.stack([logits[0, 0], logits[0, 1].roll(1), logits[0, 2]])[None]
    kept = PostProcess(Post(score=0.2, decay=0.5))(Scored(apart, scored.deltas), regions, sizes)
    torch.testing.assert_close(kept.scores[0].max(), probabilities[0])
    assert (kept.scores[0] - probabilities[1]).abs().min() < 1e-6


@pytest.mark.parametrize("name", ["thundernet", "thundernet as released", "rfcn"])
def test_deformable_parts_change_nothing_at_first_and_then_learn(name, tmp_path):
    plain = small(name).eval()
    images = torch.randn(2, 3, 64, 80)
    expected = plain(images)
    model = deformify(plain, 2)
    assert model.config.deformable == 2
    found = model(images)
    torch.testing.assert_close(found.scores, expected.scores, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found.boxes, expected.boxes, rtol=1e-3, atol=1e-2)
    sum(model.train().losses(images, torch.tensor([[64, 80]] * 2), some_targets()).values()).backward()  # type: ignore[union-attr]
    offsets = {n: p for n, p in model.named_parameters() if "offset" in n}
    assert len(offsets) >= 2 * 2 + 2
    assert all(p.grad is not None and p.grad.any() for p in offsets.values())
    write_detector(model, tmp_path)
    again = read_detector(tmp_path)
    with torch.no_grad():
        for p in offsets.values():
            p += 0.1 * torch.randn_like(p)
    assert again.config == model.config
    assert not torch.equal(again(images).scores, model.eval()(images).scores)
    with pytest.raises(UsageError, match="already"):
        deformify(model, 2)


def test_a_deformable_convolution_may_read_the_whole_picture():
    """Offsets have no bound, and the receptive field says so."""
    layers = [nn.Conv2d(3, 4, 3, padding=1), DeformedConv2d(nn.Conv2d(4, 4, 3, padding=1)), nn.Conv2d(4, 2, 3)]
    found = receptive_field(nn.Sequential(*layers), (1, 3, 12, 14))
    assert found["0"].size == (3, 3)
    assert found["1.offset"].size == (5, 5)
    assert found.size == ("whole", "whole")
    assert not found.unknown
    assert "deformable convolution" in str(found)


@pytest.mark.parametrize("name", COMPOSITIONS)
def test_files_bring_back_the_same_detector(name, tmp_path):
    model = small(name).eval()
    write_detector(model, tmp_path)
    assert is_detector(tmp_path)
    again = read_detector(tmp_path)
    assert again.config == model.config
    images = torch.randn(1, 3, 64, 64)
    assert torch.equal(again(images).boxes, model(images).boxes)


@pytest.mark.parametrize("deformable", [0, 1])
def test_a_detector_begins_with_another_one(tmp_path, deformable):
    first = replace(named("thundernet-snet49", ("thing",)), rpn=NUMBERS)
    torch.manual_seed(0)
    source = detector(first)
    write_detector(source, tmp_path / "first")
    wanted = replace(named("thundernet-snet49", CLASSES), rpn=replace(NUMBERS, anchors=((9.0, 9.0),)))
    model = detector(replace(wanted, deformable=deformable), weights=tmp_path / "first")
    own = ("roi_head.scorer.classes.", "proposer.objectness.", "proposer.deltas.")
    theirs = source.state_dict()
    ours = model.state_dict()
    for name, value in theirs.items():
        layer, _, last = name.rpartition(".")
        now = ours[name] if name in ours else ours[f"{layer}.conv.{last}"]
        assert (now.shape == value.shape and torch.equal(now, value)) != name.startswith(own), name
    assert model.training
    assert model.config == replace(wanted, deformable=deformable)
    # The same classes and anchors: all of it. As many anchors of other shapes: not what speaks of them.
    assert carry_over(source, detector(first)) == []
    others = replace(NUMBERS, anchors=anchor_shapes((17, 33), (0.5, 1, 2)))
    assert carry_over(source, detector(replace(first, rpn=others))) == [
        f"proposer.{layer}.{what}" for layer in ("objectness", "deltas") for what in ("weight", "bias")
    ]
    # Of a model of another stride, what both have.
    finer = replace(first, composition=replace(first.composition, maps=3))
    assert "neck.lateral.0.weight" in carry_over(source, detector(finer))
    if deformable:
        write_detector(model, tmp_path / "deformed")
        again = detector(replace(wanted, deformable=1), weights=tmp_path / "deformed").state_dict()
        assert all(torch.equal(again[name], value) for name, value in model.state_dict().items())
    with pytest.raises(VolvelleError, match="on snet49 cannot begin one on snet146"):
        detector("thundernet-snet146", 3, weights=tmp_path / "first")


def test_broken_files_say_so(tmp_path):
    assert not is_detector(tmp_path)
    with pytest.raises(VolvelleError, match="no such file"):
        read_detector(tmp_path)
    write_detector(small(), tmp_path)
    values = json.loads((tmp_path / "config.json").read_text())
    for change, message in (
        ({"composition": {"type": "thundernett"}}, "unknown composition 'thundernett'"),
        ({"composition": {"type": "thundernet", "bin": 3}}, "unknown field bin"),
        ({"composition": None}, "composition must be an object"),
        ({"sampling": {"type": "hard"}}, "unknown sampling 'hard'"),
        ({"type": "segmenter"}, "not the configuration of a detector"),
        ({"classes": ["a"]}, "does not fit"),
        ({"rpn": {"anchors": []}}, "one pair at least"),
    ):
        (tmp_path / "config.json").write_text(json.dumps({**values, **change}))
        with pytest.raises(VolvelleError, match=message):
            read_detector(tmp_path)


def test_wrong_targets_say_so():
    model, images, sizes = small(), torch.zeros(2, 3, 64, 64), torch.tensor([[64, 64]] * 2)
    targets = some_targets()
    with pytest.raises(UsageError, match="labels are 0 to 2 here, got 7"):
        model.losses(images, sizes, targets._replace(labels=targets.labels + 7))
    with pytest.raises(UsageError, match="for 2 images wanted are"):
        model.losses(images, sizes[:1], targets)


def test_one_composed_by_hand_has_no_configuration(tmp_path):
    model = small()
    by_hand = Detector(model.backbone, model.neck, model.proposer, model.roi_head, model.post)
    assert by_hand.classes == ("0", "1", "2")
    assert by_hand.eval()(torch.zeros(1, 3, 64, 64)).mask.dtype == torch.bool
    with pytest.raises(VolvelleError, match="composed by hand"):
        write_detector(by_hand, tmp_path)


def test_names():
    assert named("thundernet-lite0", 3).backbone == "efficientnet-lite0"
    assert isinstance(named("rfcn-resnet-101").sampling, Hardest)
    assert named("faster-rcnn-resnet-50", ("a",)).classes == ("a",)
    with pytest.raises(UsageError, match="not a detector") as error:
        named("thundernet snet49")
    assert "thundernet-snet49" in str(error.value.tip)
    with pytest.raises(UsageError, match="snet50"):
        named("thundernet-snet50")


def test_the_use_of_a_detector_can_be_exported():
    model = small().eval()
    images, sizes = torch.randn(2, 3, 64, 64), torch.tensor([[64, 64], [40, 64]])
    program = torch.export.export(model, (images, sizes))
    found, expected = program.module()(images, sizes), model(images, sizes)
    check(Detections(*found), sizes)
    for i in range(2):
        count = int(expected.mask[i].sum())
        assert int(found.mask[i].sum()) == count
        torch.testing.assert_close(found.boxes[i, :count], expected.boxes[i, :count])


def test_bf16_autocast_trains():
    model = small()
    with torch.autocast("cpu", torch.bfloat16):
        losses = model.losses(torch.randn(2, 3, 64, 64), torch.tensor([[64, 64]] * 2), some_targets())
    sum(losses.values()).backward()  # type: ignore[union-attr]
    assert all(loss.dtype == torch.float32 and loss.isfinite() for loss in losses.values())
    assert not [n for n, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()]
