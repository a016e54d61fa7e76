"""What holds for every game of two players, whatever they play."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from tests.train.test_loop import same

from volvelle.train.isolation import Isolation
from volvelle.train.player import Player
from volvelle.train.precision import Precision
from volvelle.train.ranks import Ranks


class Ready(NamedTuple):
    """A batch as a loader hands it over."""

    value: Any
    ids: tuple = (0,)


def turns_leave_the_other_untouched(both, phases, names, batch):
    """Each player's turn moves its own numbers and none of the other's, and leaves no gradient behind.

    `names` are those of the two modules, the first of which plays the first of the two phases.
    """
    isolation = Isolation(phases, both.modules())
    for phase, mine, other in zip(phases, names, reversed(names), strict=True):
        player = Player(phase, isolation, Precision("fp32", torch.device("cpu")), Ranks())
        before = {name: {k: v.clone() for k, v in m.state_dict().items()} for name, m in both.modules().items()}
        player.update([Ready(batch)], str)
        after = {name: m.state_dict() for name, m in both.modules().items()}
        same(before[other], after[other])
        assert any(not torch.equal(before[mine][k], after[mine][k]) for k in before[mine])
        assert all(p.grad is None and p.requires_grad for m in both.modules().values() for p in m.parameters())
