"""The claims on R-FCN and ThunderNet: their verdicts follow from their figures."""

from __future__ import annotations

import pytest
import torch

from volvelle.claims import rfcn, thundernet
from volvelle.claims.claim import Measurement
from volvelle.claims.run import run_claim
from volvelle.hub import status


def test_a_wrong_cost_breaks_the_claim(monkeypatch):
    found = {"snet49": (51.2, 260.9), "snet146": (161.1, 499.7), "snet535": (535.4, 1296.7)}
    monkeypatch.setattr(thundernet, "costs", lambda: found)
    assert Measurement(thundernet._costs()).verdict == "held"
    for name, wrong in (("snet49", (51.2, 265.0)), ("snet146", (146.0, 499.7)), ("snet535", (535.4, 1280.0))):
        monkeypatch.setattr(thundernet, "costs", lambda name=name, wrong=wrong: {**found, name: wrong})
        assert Measurement(thundernet._costs()).verdict == "not held"


def test_moved_boxes_are_those_of_the_objects():
    """A head that says how far each box lies from its object: the curve is that of the shifts."""
    from volvelle.claims.detect_scenes import Part
    from volvelle.systems.detection.heads import Scored
    from volvelle.systems.detection.targets import collate

    boxes = torch.tensor([[10.0, 10, 30, 50], [40, 40, 60, 60]])
    targets = collate([boxes, boxes[:1]], [torch.tensor([0, 1]), torch.tensor([1])])

    class Told:
        def look(self, maps, sizes, image):
            return type("Found", (), {"features": None})

        def roi_head(self, features, moved):
            owner = targets.boxes.repeat_interleave(4, 1)
            side = (owner[..., 2:] - owner[..., :2]).clamp(min=1)
            apart = ((moved - owner)[..., :2].abs() / side).sum(-1)
            assert torch.equal((moved - owner)[..., :2], (moved - owner)[..., 2:])
            own = (1 - apart).clamp(1e-6, 1 - 1e-6)
            # Two classes that share the score, by label: the object's own gets it all.
            label = targets.labels.repeat_interleave(4, 1)
            logits = torch.stack([torch.where(label == k, own.log(), -99.0) for k in (0, 1)], -1)
            return Scored(torch.cat((logits, (1 - own).log().unsqueeze(-1)), -1), moved)

    curve = rfcn.scores_of_shifted(Told(), Part([torch.zeros(2, 1, 1, 1)], targets), (0.0, 0.25, 0.5))  # type: ignore[arg-type]
    torch.testing.assert_close(torch.tensor(curve), torch.tensor([1.0, 0.75, 0.5]), atol=1e-5, rtol=0)


@pytest.mark.slow
@pytest.mark.skipif(status("efficientnet-lite0").state != "ready", reason="efficientnet-lite0 is not stored here")
@pytest.mark.parametrize("name", ["rfcn", "thundernet"])
def test_the_claims_are_measured(name, tmp_path):
    record = run_claim(name, "quick", tmp_path)
    assert record["verdict"] in ("held", "not held")
