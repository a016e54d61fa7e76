"""The claim on data parallelism holds here, and its measurement can tell a wrong average."""

import pytest

from volvelle.claims import ddp


@pytest.mark.slow
def test_the_claim_holds():
    found = ddp.measure("quick")
    assert [f.what for f in found.findings if f.held is False] == []
    assert found.verdict == "held"


def test_a_wrong_average_is_far_off():
    right = ddp.alone(ddp.Setting(2, 2, moves=False))
    wrong = ddp.alone(ddp.Setting(2, 2, moves=False, weighted=False))
    assert ddp._relative(right.gradients[0], right.gradients[0]) == 0
    assert ddp._relative(wrong.gradients[0], right.gradients[0]) > 1e-3
