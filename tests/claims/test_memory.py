"""The claim memory, measured for real in its quick budget."""

import pytest

from volvelle.claims import memory


@pytest.mark.slow
def test_figures_that_do_not_depend_on_the_clock_hold():
    found = memory.measure("quick")
    failed = [finding for finding in found.findings if finding.held is False and "time" not in finding.what]
    assert failed == []
    assert found.pictures["timeline"].startswith("<svg")
