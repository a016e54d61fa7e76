"""Average precision: by hand, by loops over detections, and against pycocotools, table by table."""

from __future__ import annotations

import contextlib
import io

import numpy as np
import pytest
import torch
import torch.distributed as dist

from volvelle.functional import average_precision, precision_recall
from volvelle.nn import MeanAveragePrecision
from volvelle.parts.metrics import box_matching
from volvelle.parts.metrics.average_precision import recall_levels
from volvelle.parts.metrics.mean_average_precision import coco_thresholds

HITS = torch.tensor([True, False, True, True, False])
SCORES = torch.tensor([0.9, 0.8, 0.7, 0.6, 0.5])


# The curve.


def test_precision_and_recall_by_hand():
    precision, recall = precision_recall(SCORES, HITS, 4)
    assert precision.tolist() == pytest.approx([1, 1 / 2, 2 / 3, 3 / 4, 3 / 5])
    assert recall.tolist() == pytest.approx([1 / 4, 1 / 4, 2 / 4, 3 / 4, 3 / 4])
    order = torch.tensor([3, 0, 4, 2, 1])
    shuffled = precision_recall(SCORES[order], HITS[order], 4)
    assert all(torch.equal(a, b) for a, b in zip(shuffled, (precision, recall), strict=True))


def test_areas_by_hand():
    # Monotone precision is 1 up to a recall of 1/4, 3/4 up to 3/4, then 0.
    assert float(average_precision(SCORES, HITS, 4)) == pytest.approx(1 / 4 + 2 / 4 * 3 / 4)
    eleven = average_precision(SCORES, HITS, 4, interpolation="11-point")
    assert float(eleven) == pytest.approx((3 * 1 + 5 * 0.75) / 11)  # 0, .1, .2 and .3 … .7
    fine = average_precision(SCORES, HITS, 4, interpolation="101-point")
    assert float(fine) == pytest.approx((26 * 1 + 50 * 0.75) / 101)


def test_ignored_detections_count_on_neither_side():
    ignored = torch.tensor([False, True, False, False, True])
    with_them = average_precision(SCORES, HITS, 4, ignored=ignored)
    without = average_precision(SCORES[~ignored], HITS[~ignored], 4)
    assert float(with_them) == float(without)
    first = precision_recall(SCORES, HITS, 4, ignored=torch.tensor([True, False, False, False, False]))[0]
    assert first.tolist() == pytest.approx([0, 0, 1 / 2, 2 / 3, 1 / 2])


def test_eleven_recalls_are_reached_exactly():
    # 3 hits of 10 are a recall of 0.3: i * 0.1 would be a bit above it and lose a level.
    for n in range(1, 11):
        value = average_precision(torch.ones(n), torch.ones(n, dtype=torch.bool), 10, interpolation="11-point")
        assert float(value) == pytest.approx((n + 1) / 11)


@pytest.mark.parametrize("interpolation", ["area", "11-point", "101-point"])
def test_nothing_found_and_nothing_there(interpolation):
    none = torch.zeros(0, dtype=torch.bool)
    assert float(average_precision(torch.zeros(0), none, 3, interpolation=interpolation)) == 0
    assert average_precision(torch.zeros(0), none, 0, interpolation=interpolation).isnan()
    assert average_precision(SCORES, HITS & False, 0, interpolation=interpolation).isnan()
    rows = average_precision(torch.zeros(0), none.expand(2, 0), torch.tensor([3, 0]), interpolation=interpolation)
    assert rows[0] == 0
    assert rows[1].isnan()
    many = average_precision(SCORES, HITS.expand(2, 3, 5), torch.tensor([[3], [0]]), interpolation=interpolation)
    assert many.shape == (2, 3)
    assert many[0].isfinite().all()
    assert many[1].isnan().all()


def test_one_object_and_none():
    """The least there can be of positives, and recall where there are none."""
    yes = torch.tensor([True])
    for interpolation in ("area", "11-point", "101-point"):
        assert float(average_precision(torch.ones(1), yes, 1, interpolation=interpolation)) == pytest.approx(1.0)
    precision, recall = precision_recall(SCORES, HITS, torch.tensor([0, 1]))
    assert recall[0].isnan().all()
    assert recall[1].tolist() == [1, 1, 2, 3, 3]
    assert precision.tolist() == pytest.approx([1, 1 / 2, 2 / 3, 3 / 4, 3 / 5])


def test_equal_scores_keep_their_order():
    precision, _ = precision_recall(torch.ones(40), torch.arange(40) % 3 == 0, 14)
    assert precision.tolist() == pytest.approx([(i // 3 + 1) / (i + 1) for i in range(40)])


def test_wrong_arguments_are_named():
    for scores, hits, options, message in (
        (SCORES, HITS[:3], {}, r"hits \(…, n\), got \(5,\) and \(3,\)"),
        (SCORES * torch.nan, HITS, {}, "5 of 5 scores are NaN"),
        (SCORES, HITS, {"interpolation": "12-point"}, "got '12-point'"),
        (SCORES, HITS, {"ignored": HITS[:2]}, "ignored must be"),
    ):
        with pytest.raises(ValueError, match=message):
            average_precision(scores, hits, 3, **options)
    with pytest.raises(TypeError, match=r"hits must be bool, got torch\.int64"):
        average_precision(SCORES, HITS.long(), 3)
    with pytest.raises(TypeError, match=r"average_precision: ignored must be bool, got torch\.int64"):
        average_precision(SCORES, HITS, 3, ignored=HITS.long())
    for scores, hits in ((SCORES[None], HITS[None]), (SCORES[:1], HITS[0]), (SCORES, HITS[:3])):
        with pytest.raises(ValueError, match=r"precision_recall: scores must be \(n,\) and hits"):
            precision_recall(scores, hits, 3)


def test_levels_and_thresholds_are_numpys():
    assert recall_levels(101).tolist() == np.linspace(0, 1, 101).tolist()
    assert coco_thresholds().tolist() == np.linspace(0.5, 0.95, 10).tolist()


# Whole data sets.


def picture(draw, classes=3, size=200, ties=False):
    """Objects (some crowds), and detections that are shaken objects, copies of them, and inventions."""
    m = int(draw.integers(0, 9))
    corner = draw.uniform(0, size, (m, 2))
    side = np.exp(draw.uniform(np.log(4), np.log(size), (m, 2)))
    boxes, labels = np.concatenate([corner, corner + side], 1), draw.integers(0, classes, m)
    again = draw.integers(0, max(m, 1), int(draw.integers(0, 12)) if m else 0)
    shaken = boxes[again] + draw.normal(0, 1, (len(again), 4)) * 0.08 * np.tile(side[again], 2)
    wild = np.sort(draw.uniform(0, size, (int(draw.integers(0, 4)), 2, 2)), 1).reshape(-1, 4)
    found = np.concatenate([shaken, wild])
    found[:, 2:] = np.maximum(found[:, 2:], found[:, :2] + 1)
    kinds = np.concatenate([labels[again], draw.integers(0, classes, len(wild))])
    wrong = draw.random(len(kinds)) < 0.1
    kinds[wrong] = draw.integers(0, classes, wrong.sum())
    scores = draw.random(len(found))
    if ties:
        boxes, found, scores = boxes.round(), found.round(), (scores * 4).round() / 4
        found[:, 2:] = np.maximum(found[:, 2:], found[:, :2] + 1)
    target = {"boxes": boxes, "labels": labels, "iscrowd": draw.random(m) < 0.15}
    target["area"] = side.prod(1) * draw.uniform(0.4, 1, m)  # an object's area is seldom that of its box
    return {"boxes": found, "scores": scores, "labels": kinds}, target


def data_set(count, seed=0, **options):
    draw = np.random.default_rng(seed)
    pairs = [picture(draw, **options) for _ in range(count)]
    return [({k: torch.from_numpy(v) for k, v in pred.items()}, {k: torch.from_numpy(v) for k, v in target.items()})
            for pred, target in pairs]  # fmt: skip


def figures_of(pairs, **options):
    figures = MeanAveragePrecision(**options)
    for pred, target in pairs:
        figures.update([pred], [target])
    return figures


def pycocotools(pairs, *, labels, max_dets=None):
    """COCOeval after summarize."""
    coco = pytest.importorskip("pycocotools.coco")
    from pycocotools.cocoeval import COCOeval

    notes, results = [], []
    for image, (pred, target) in enumerate(pairs, 1):
        for box, label, crowd, area in zip(
            *(target[k].tolist() for k in ("boxes", "labels", "iscrowd", "area")), strict=True
        ):
            place = {"image_id": image, "category_id": label, "bbox": [*box[:2], box[2] - box[0], box[3] - box[1]]}
            notes.append({"id": len(notes) + 1, "iscrowd": int(crowd), "area": area, **place})
        for box, label, score in zip(*(pred[k].tolist() for k in ("boxes", "labels", "scores")), strict=True):
            place = {"image_id": image, "category_id": label, "bbox": [*box[:2], box[2] - box[0], box[3] - box[1]]}
            results.append({"score": score, **place})
    with contextlib.redirect_stdout(io.StringIO()):
        truth = coco.COCO()
        truth.dataset = {
            "images": [{"id": i} for i in range(1, len(pairs) + 1)],
            "annotations": notes,
            "categories": [{"id": label} for label in labels],
        }
        truth.createIndex()
        evaluation = COCOeval(truth, truth.loadRes(results), "bbox")
        if max_dets:
            evaluation.params.maxDets = list(max_dets)
        evaluation.evaluate()
        evaluation.accumulate()
        if not max_dets:
            evaluation.summarize()
    return evaluation


NAMES = ("map", "map_50", "map_75", "map_small", "map_medium", "map_large",
         "mar_1", "mar_10", "mar_100", "mar_small", "mar_medium", "mar_large")  # fmt: skip


@pytest.mark.peer
@pytest.mark.parametrize("options", [{}, {"ties": True}, {"classes": 1}, {"size": 60, "classes": 8}])
def test_all_twelve_figures_are_those_of_pycocotools(options):
    pairs = data_set(30, seed=3, **options)
    figures = figures_of(pairs)
    peer = pycocotools(pairs, labels=figures.classes().tolist())
    found = figures.compute()
    assert [float(found[name]) for name in NAMES] == pytest.approx(peer.stats.tolist(), abs=1e-9, rel=0)
    precision, recall, _ = figures.tables()
    assert np.abs(precision.numpy() - peer.eval["precision"][..., -1]).max() <= 1e-9
    assert np.abs(recall.numpy() - peer.eval["recall"]).max() <= 1e-9


@pytest.mark.peer
def test_few_detections_a_picture_are_those_of_pycocotools():
    pairs = data_set(20, seed=5, classes=2)
    figures = figures_of(pairs, max_detection_thresholds=(1, 2, 4))
    peer = pycocotools(pairs, labels=figures.classes().tolist(), max_dets=(1, 2, 4))
    precision, recall, _ = figures.tables()
    assert np.abs(precision.numpy() - peer.eval["precision"][..., -1]).max() <= 1e-9
    assert np.abs(recall.numpy() - peer.eval["recall"]).max() <= 1e-9


@pytest.mark.peer
def test_a_box_without_area_finds_nothing():
    there = {"boxes": torch.tensor([[5.0, 5, 5, 9]]), "labels": torch.tensor([0])}
    there |= {"iscrowd": torch.tensor([False]), "area": torch.tensor([0.0])}
    for box in ([5.0, 5, 5, 9], [90.0, 70, 90, 75], [0.0, 0, 10, 10]):
        found = {"boxes": torch.tensor([box]), "labels": torch.tensor([0]), "scores": torch.tensor([1.0])}
        assert float(figures_of([(found, there)]).compute()["map"]) == 0.0
        assert float(pycocotools([(found, there)], labels=[0]).stats[0]) == 0.0


def voc_by_loops(pairs, label, threshold):
    """(average precision by area and at 11 points) of a class, from the definition."""
    found, objects = [], []
    for image, (pred, there) in enumerate(pairs):
        mine, wanted = pred["labels"] == label, there["labels"] == label
        scores, boxes = pred["scores"][mine].tolist(), pred["boxes"][mine].tolist()
        found += [(score, image, box) for score, box in zip(scores, boxes, strict=True)]
        objects.append(list(zip(there["boxes"][wanted].tolist(), there["iscrowd"][wanted].tolist(), strict=True)))
    taken, marks = set(), []
    for _, image, box in sorted(found, key=lambda entry: -entry[0]):
        best, which = -1.0, None
        for number, (other, _) in enumerate(objects[image]):
            w, h = min(box[2], other[2]) - max(box[0], other[0]), min(box[3], other[3]) - max(box[1], other[1])
            inside = max(w, 0) * max(h, 0)
            size = [(b[2] - b[0]) * (b[3] - b[1]) for b in (box, other)]
            if inside / (sum(size) - inside) > best:
                best, which = inside / (sum(size) - inside), number
        if best >= threshold and objects[image][which][1]:
            continue
        marks.append(best >= threshold and (image, which) not in taken)
        if marks[-1]:
            taken.add((image, which))
    positives = sum(not hard for row in objects for _, hard in row)
    if not positives:
        return -1.0, -1.0
    points = [(sum(marks[: i + 1]), sum(marks[: i + 1]) / (i + 1)) for i in range(len(marks))]
    area = sum(max((p for hits, p in points if hits >= k), default=0) for k in range(1, positives + 1)) / positives
    eleven = sum(max((p for hits, p in points if 10 * hits >= k * positives), default=0) for k in range(11)) / 11
    return area, eleven


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("threshold", [0.0, 0.5, 0.75])
def test_voc_equals_the_loop(threshold, ties):
    pairs = data_set(25, seed=7, ties=ties)
    figures = figures_of(pairs)
    labels = figures.classes().tolist()
    expected = [voc_by_loops(pairs, label, threshold) for label in labels]
    for column, how in enumerate(("area", "11-point")):
        found = figures.voc(threshold, interpolation=how)
        each = [row[column] for row in expected]
        assert found["map_per_class"].tolist() == pytest.approx(each, abs=1e-12)
        assert float(found["map"]) == pytest.approx(sum(v for v in each if v >= 0) / sum(v >= 0 for v in each))


def one(boxes, labels, scores=None, **more):
    found = {"boxes": torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4), "labels": torch.tensor(labels).long()}
    return found | ({"scores": torch.tensor(scores)} if scores is not None else {}) | more


def test_two_detections_of_one_object_are_a_hit_and_a_false_alarm():
    there = one([[0, 0, 10, 10], [50, 50, 60, 60]], [0, 0])
    found = one([[0, 0, 10, 10], [0, 0, 10, 9]], [0, 0], [0.5, 0.9])
    figures = figures_of([(found, there)])
    # COCO and VOC alike: the surer one is the hit at 0.5; at 0.95 it is none, and the other is.
    assert float(figures.voc()["map"]) == pytest.approx(0.5)
    assert float(figures.compute()["map_50"]) == pytest.approx(51 / 101)
    assert float(figures.voc(0.95)["map"]) == pytest.approx(0.25)


def test_what_only_coco_gives_a_second_chance():
    # Both detections overlap the first object most; the second detection reaches the second object too.
    there = one([[0, 0, 10, 10], [0, 3, 10, 13]], [0, 0])
    found = one([[0, 0, 10, 10], [0, 1, 10, 11]], [0, 0], [0.9, 0.8])
    figures = figures_of([(found, there)])
    assert float(figures.compute()["map_50"]) == pytest.approx(1.0)
    assert float(figures.voc()["map"]) == pytest.approx(0.5)


def test_a_crowd_takes_many_and_misses_none():
    there = one([[0, 0, 100, 100], [200, 0, 210, 10]], [0, 0], iscrowd=torch.tensor([True, False]))
    found = one([[5, 5, 15, 15], [40, 40, 60, 60], [200, 0, 210, 10]], [0, 0, 0], [0.9, 0.8, 0.7])
    figures = figures_of([(found, there)])
    assert float(figures.compute()["map"]) == pytest.approx(1.0)
    # To VOC a difficult object is a box like others: small boxes inside it do not find it.
    assert float(figures.voc()["map"]) == pytest.approx(1 / 3)


def test_empty_pictures():
    nothing, nowhere = one([], [], torch.zeros(0).tolist()), one([], [])
    figures = figures_of([(nothing, nowhere)])
    assert all(float(figures.compute()[name]) == -1 for name in NAMES)
    assert float(figures.voc()["map"]) == -1
    assert float(MeanAveragePrecision().compute()["map"]) == -1
    assert MeanAveragePrecision().compute()["classes"].shape == (0,)
    figures.update([nothing], [one([[0, 0, 9, 9]], [4])])
    assert float(figures.compute()["map"]) == 0
    figures.update([one([[0, 0, 9, 9]], [4], [0.9])], [nowhere])  # a false alarm where nothing is
    figures.update([one([[0, 0, 9, 9]], [4], [0.8])], [one([[0, 0, 9, 9]], [4])])
    assert float(figures.voc()["map"]) == pytest.approx(0.25)
    assert figures.compute()["classes"].tolist() == [4]
    figures.reset()
    assert len(figures) == 0


def test_blocks_of_cells_change_nothing(monkeypatch):
    pairs = data_set(12, seed=11)
    whole = figures_of(pairs).compute()
    for size in (1, 40):
        monkeypatch.setattr(box_matching, "BLOCK", size)
        cut = figures_of(pairs).compute()
        assert all(torch.equal(whole[name], cut[name]) for name in whole)


def test_reduced_precision_and_order_of_pictures():
    pairs = data_set(12, seed=13)
    whole = figures_of(pairs)
    assert torch.allclose(whole.compute()["map"], figures_of(pairs[::-1]).compute()["map"], atol=1e-12)
    halves = [({k: v.bfloat16() if k == "scores" else v for k, v in p.items()}, t) for p, t in pairs]
    assert figures_of(halves).compute()["map"].dtype == torch.float64


@pytest.mark.parametrize(("side", "field"), [(0, "scores"), (0, "labels"), (1, "labels"), (1, "iscrowd"), (1, "area")])
def test_a_field_of_another_length_than_the_boxes_is_named(side, field):
    pair = [one([[0, 0, 9, 9]] * 2, [0, 0], [0.5, 0.4]), one([[0, 0, 9, 9]] * 2, [0, 0])]
    pair[1] |= {"iscrowd": torch.tensor([False, False]), "area": torch.tensor([81.0, 81.0])}
    MeanAveragePrecision().update([pair[0]], [pair[1]])
    pair[side] |= {field: pair[side][field][:1]}
    names = {(1, "labels"): "classes", (1, "iscrowd"): "ignored", (1, "area"): "areas"}
    with pytest.raises(ValueError, match=f"2 boxes, and {names.get((side, field), field)} of shape"):
        MeanAveragePrecision().update([pair[0]], [pair[1]])


def test_bad_pictures_leave_nothing_behind():
    figures, good = MeanAveragePrecision(), one([[0, 0, 9, 9]], [0])
    for pred, message in (
        (one([[0, 0, 9, 9]], [0], [float("nan")]), "1 scores are NaN"),
        (one([[0, 0, 9, 9]], [0, 1], [0.5]), "1 boxes, and labels of shape"),
        (one([[0, 0, 9, 9]], [0]), "a picture of preds lacks scores"),
    ):
        with pytest.raises(ValueError, match=message):
            figures.update([one([[0, 0, 9, 9]], [0], [0.5]), pred], [good, good])
    with pytest.raises(ValueError, match="1 pictures of detections and 2 of objects"):
        figures.update([one([], [], [])], [good, good])
    assert len(figures) == 0
    for thresholds in ([0.5, 1.5], [0.0, 0.5], []):
        with pytest.raises(ValueError, match=r"iou_thresholds must lie in \(0, 1\]"):
            MeanAveragePrecision(iou_thresholds=thresholds)
    for limits in ((10, 1), (1, 1), (0, 1), ()):
        with pytest.raises(ValueError, match="max_detection_thresholds must rise from 1 or more"):
            MeanAveragePrecision(max_detection_thresholds=limits)


def test_ranks_together_are_the_whole(monkeypatch):
    pairs = data_set(10, seed=17)
    parts = [figures_of(pairs[:6]), figures_of(pairs[6:])]

    def gather(into, own, group=None):
        assert own is parts[0]._pictures
        into[:] = [part._pictures for part in parts]

    assert torch.equal(parts[0].over_ranks().compute()["map"], parts[0].compute()["map"])
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_world_size", lambda group=None: 2)
    monkeypatch.setattr(dist, "all_gather_object", gather)
    together, whole = parts[0].over_ranks().compute(), figures_of(pairs).compute()
    assert all(torch.equal(together[name], whole[name]) for name in whole)
    assert len(parts[0]) == 6
