"""The claims on receptive fields, Modules and public names hold, and would not if what they measure were broken."""

import pytest
import torch
from torch import nn

from volvelle.claims import api_export, nn_functional, rf
from volvelle.inspect import receptive_field_space as space


def test_a_small_backbone_reads_what_the_analysis_says_and_a_wrong_rule_would_be_noticed(monkeypatch):
    net = nn.Sequential(nn.Conv2d(3, 4, 3, 2, 1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 5, 2, 2))
    assert rf.extents(net) == (11, 11)
    units, wrong = rf.compared(net, 32)
    assert units >= 8
    assert wrong == 0
    right = space.sliding
    monkeypatch.setattr(space, "sliding", lambda n, k, s=1, p=0, d=1: right(n, k, s, p, 1 + d))
    assert rf.compared(net, 32)[1] > 0
    says, sees = rf.extents(net)
    assert says != sees


def test_chains_are_counted_when_they_differ(monkeypatch):
    assert rf._chains(20) == 0
    monkeypatch.setattr("volvelle.inspect.chain_field", lambda layers: sum(k for k, _ in layers))
    assert rf._chains(20) > 10


@pytest.mark.slow
@pytest.mark.parametrize("claim", [rf, nn_functional, api_export])
def test_it_holds(claim):
    found = claim.measure("quick")
    assert found.verdict == "held", [f for f in found.findings if f.held is False]


def test_every_pair_is_equal_and_a_different_one_would_be_noticed():
    from volvelle.export import import_parts

    import_parts()
    pairs = list(nn_functional.pairs(torch.float32))
    assert len({pair.name for pair in pairs}) == len(pairs)
    for pair in pairs:
        assert torch.equal(pair.module(), pair.function())
        assert pair.module().any()


def test_a_slow_module_would_be_noticed():
    def slow():
        for _ in range(20):
            torch.zeros(1000).sum()

    added, _ = nn_functional.extra(nn_functional.Pair("slow", slow, lambda: None), rounds=1, calls=20)
    assert added > 0


def test_names_and_signatures_are_read_from_the_golden_list():
    head, last = (
        "# head\n\nfunctional.f\n    (x: Tensor)\n    since 0.1\n\n",
        "nn.F\n    (a)\n    forward(x)\n    since 0.1\n",
    )
    text = head + last
    assert dict(api_export._entries(text)) == {
        "functional.f": ("    (x: Tensor)",),
        "nn.F": ("    (a)", "    forward(x)"),
    }


def test_moving_changes_every_import_and_leaves_the_facades(tmp_path):
    root = api_export.copied(tmp_path)
    assert api_export.move(root) >= 10
    package = root / "src" / "volvelle"
    assert not (package / "parts" / "position").exists()
    assert (package / "parts" / "places" / "turning.py").is_file()
    left = [p.name for p in package.rglob("*.py") if "volvelle.parts.position" in p.read_text()]
    assert sorted(left) == ["api_export.py", "functional.py", "nn.py"] or sorted(left) == ["functional.py", "nn.py"]
