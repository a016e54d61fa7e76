from __future__ import annotations

import html.parser
import re
import xml.etree.ElementTree as ElementTree

import pytest

from volvelle.train.charts import Series, line_chart, ticks
from volvelle.train.outcome import Sample
from volvelle.train.report import Report, training_curves

VOID = {"meta", "img", "br"}


class Balanced(html.parser.HTMLParser):
    def __init__(self):
        super().__init__()
        self.open, self.seen = [], []

    def handle_starttag(self, tag, attrs):
        self.seen.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.seen.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def records(steps=60):
    train = [
        {"event": "train", "step": s, "loss": 5 / s, "gradient_norm": 1 / s, "learning_rate": 1e-3}
        for s in range(1, steps)
    ]
    return [*train, *({"event": "evaluate", "step": s, "held_out_loss": 6 / (s + 1)} for s in (0, 30, 59))]


def page():
    report = Report("run <1>", subtitle="cpu & fp32")
    report.tiles([("loss", "1.2", "before: 3.4")]).heading("A").text("b < c").table(["n", "v"], [["x", 1.23456]])
    report.samples([Sample("<script>alert(1)</script>", ("r1", "r2"), before="b", after="")])
    report.figure(b"\x89PNG", "picture").details("Options", {"a": None, "b": [1, 2]}).commands(["volvelle ls"])
    return training_curves(report, records()).render()


def test_page_is_well_formed_self_contained_and_escapes_text():
    text = page()
    parser = Balanced()
    parser.feed(text)
    assert not parser.open
    tags = [tag for tag, _ in parser.seen]
    assert "script" not in tags
    assert "link" not in tags
    for _, attributes in parser.seen:
        for name in ("src", "href"):
            assert attributes.get(name, "data:").startswith("data:")
    assert not re.search(r"url\(|@import|https?://", text)
    assert "&lt;script&gt;" in text
    assert "prefers-color-scheme: dark" in text


def test_curves_show_every_phase_and_the_held_out_points():
    two = [
        {"event": "train", "step": s, "critic_loss": -s, "generator_loss": s, "critic_gradient_norm": 1.0}
        for s in (1, 2)
    ]
    text = training_curves(Report("x"), two).render()
    assert "critic loss" in text
    assert "generator loss" in text
    chart = training_curves(Report("x"), records()).render()
    assert chart.count("<circle") == 3
    assert training_curves(Report("x"), []).render()


def test_chart_maps_values_onto_the_axes_and_leaves_out_what_is_not_finite():
    svg = line_chart([Series("a", [(0, 1.0), (1, float("nan")), (2, 3.0)], dots=True)])
    root = ElementTree.fromstring(svg)
    circles = [(float(c.get("cx")), float(c.get("cy"))) for c in root.iter("circle")]
    assert len(circles) == 2
    assert circles[0][0] < circles[1][0]
    assert circles[0][1] > circles[1][1]
    assert line_chart([Series("a", [(0, float("inf"))])]) == ""
    assert line_chart([Series("a", [(0, 0.0), (1, 0.0)])])


@pytest.mark.parametrize(("low", "high"), [(0, 1), (0.3, 0.31), (-5, 12345), (1e-9, 3e-9), (2, 2)])
def test_ticks_are_round_and_inside(low, high):
    found = ticks(low, high)
    assert len(found) <= 7
    assert all(low - 1e-12 <= t <= high + 1e-12 for t in found)


def test_long_curves_stay_small():
    svg = line_chart([Series("a", [(i, i % 7) for i in range(200_000)], smooth=True)])
    assert len(svg) < 60_000
