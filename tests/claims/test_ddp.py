"""The claim on data parallelism holds here, and its measurement can tell a wrong average."""

import pytest

from volvelle.claims import ddp
from volvelle.claims.rank_runs import relative


@pytest.mark.slow
def test_the_claim_holds():
    found = ddp.measure("quick")
    assert [f.what for f in found.findings if f.held is False] == []
    assert found.verdict == "held"


def test_a_wrong_average_is_far_off():
    right = ddp.alone(ddp.Setting(2, 2, moves=False))
    wrong = ddp.alone(ddp.Setting(2, 2, moves=False, weighted=False))
    assert relative(right.gradients[0], right.gradients[0]) == 0
    assert relative(wrong.gradients[0], right.gradients[0]) > 1e-3
