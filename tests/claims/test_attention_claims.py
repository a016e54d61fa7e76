"""The claims on attention hold here, and would not if what they measure were broken."""

from xml.etree import ElementTree

import pytest
import torch

from volvelle.claims import flash, position_zoo, precision, rope
from volvelle.parts.attention import tiled


@pytest.mark.parametrize("claim", [flash, rope])
def test_it_holds(claim):
    found = claim.measure("quick")
    assert found.verdict == "held", [f for f in found.findings if f.held is False]


def test_the_decay_is_the_papers_curve():
    """Figure 2 of the paper draws about 32, 20 and 6.5 at distances 0, 8 and 256."""
    bound = rope.decay(128, 257)
    assert [round(float(bound[d]), 1) for d in (0, 1, 8, 32, 64, 128, 256)] == [32.5, 31.5, 19.8, 13.4, 10.1, 9.3, 6.5]


def test_a_wrong_softmax_would_be_noticed(monkeypatch):
    monkeypatch.setattr(tiled, "seen", lambda tile, shift, *rest, real=tiled.seen: real(tile, shift + 1, *rest))
    assert flash._error() > 1e-3


def test_a_table_of_all_scores_would_be_noticed():
    assert flash._largest(256, "reference") >= flash.HEADS * 256 * 256


def test_an_absolute_rotation_would_be_noticed(monkeypatch):
    monkeypatch.setattr(
        "volvelle.parts.position.rope.apply_rope", lambda q, k, at: (q * torch.cos(at[:, None] / 100.0), k)
    )
    assert rope._shift(20) > 0.1


def test_precision_holds_and_a_rounded_table_would_be_noticed(monkeypatch):
    found = precision.measure("quick")
    assert found.verdict == "held", [f for f in found.findings if f.held is False]
    monkeypatch.setattr(precision, "ours", lambda positions, dtype: precision._in_fp32(positions).to(dtype))
    assert precision.measure("quick").verdict == "not held"


def test_one_run_of_the_zoo_learns_and_reads_longer_windows():
    train, held = position_zoo.corpus()
    assert not set(bytes(train.tolist()).split(b"\n\n")) >= set(bytes(held.tolist()).split(b"\n\n"))
    found = position_zoo.run("alibi", (train, held), seed=0, steps=25)
    assert set(found["alibi"]) == {1, 2, 4}
    assert all(value < 100 for value in found["alibi"].values())  # 256 bytes, so 256 before it has learnt anything
    assert position_zoo.run("learned", (train, held), seed=0, steps=1)["learned"].keys() == {1}


def test_the_zoo_reads_what_rope_learnt_with_every_scaling_and_has_linear_attention(monkeypatch):
    texts = position_zoo.corpus()
    texts = texts[0], texts[1][: 64 * 16]
    found = position_zoo.run("rope", texts, seed=0, steps=2, stretched=True)
    assert set(found) == {"rope", *position_zoo.STRETCHED}
    assert found["rope-dynamic"][1] == pytest.approx(found["rope"][1])  # it waits for longer texts
    assert len({round(values[4], 9) for values in found.values()}) == len(found)
    name = f"rope{position_zoo.LINEAR}"
    assert set(position_zoo.run(name, texts, seed=0, steps=2)[name]) == {1, 2, 4}
    drawing = position_zoo._chart({f"encoding {i}": [{1: 3.0 + i, 2: 4.0, 4: 5.0}] for i in range(23)})
    assert ElementTree.fromstring(drawing).tag.endswith("svg")
    assert drawing.count("<circle") == 69
    assert all(f">encoding {i}</text>" in drawing for i in range(23))
