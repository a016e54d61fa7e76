"""The peer's faults: what holds for ours is bounded, the rest is reported; without the peer there is no verdict."""

from __future__ import annotations

import pytest
from tests.parts.regions.peer import torchvision

from volvelle.claims import peer_bugs, peer_ops


@pytest.mark.peer
def test_the_claim_holds():
    torchvision()
    found = peer_bugs.measure("quick")
    assert found.verdict == "held", [f for f in found.findings if f.held is False]
    assert found.peers["torchvision"] != "unknown"


def test_without_the_peer_it_is_not_measurable(monkeypatch):
    def absent():
        raise ImportError("not installed")

    monkeypatch.setattr(peer_ops, "torchvision_ops", absent)
    assert peer_bugs.measure("quick").verdict == "not measurable here"
