"""A rank that dies or is stopped ends the others within the bound, and they name it."""

from __future__ import annotations

import pytest
from tests.parts.collectives import programs
from tests.parts.collectives.ranks import Ranks

from volvelle.parts.collectives.wire import GRACE

TIMEOUT = 2.0


@pytest.mark.parametrize("how", ["dead", "stopped"])
@pytest.mark.parametrize("algorithm", ["ring", "tree"])
def test_survivors_name_the_lost_rank(how, algorithm):
    victim, p = 2, 4
    ranks = Ranks(p)
    try:
        ranks.start(programs.lose, victim, how, algorithm, TIMEOUT)
        for rank in set(range(p)) - {victim}:
            message, lost, seconds = ranks.result(rank)
            assert lost == victim, message
            assert message.startswith(f"all_reduce ({algorithm}): rank {victim} is lost; rank {rank} was waiting for")
            assert seconds <= TIMEOUT + GRACE + 2.0
    finally:
        ranks.close()
    assert not any(process.is_alive() for process in ranks.processes)
