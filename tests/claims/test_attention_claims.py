"""The claims on attention hold here, and would not if what they measure were broken."""

import pytest
import torch

from volvelle.claims import flash, position_zoo, precision, rope
from volvelle.parts.attention import tiled
from volvelle.systems.language.config import ALiBi, Learned


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
    found = position_zoo.run(ALiBi(), train, held, seed=0, steps=25)
    assert set(found) == {1, 2, 4}
    assert all(value < 100 for value in found.values())  # 256 bytes, so 256 before it has learnt anything
    assert set(position_zoo.run(Learned(), train, held, seed=0, steps=1)) == {1}
