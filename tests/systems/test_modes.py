"""Modes come back as they were, whatever happens in between."""

import pytest
from torch import nn

from volvelle.systems.modes import evaluating


def modes(*modules):
    return [part.training for module in modules for part in module.modules()]


def test_every_part_is_in_its_mode_again_after_an_error_too():
    one = nn.Sequential(nn.Dropout(), nn.Sequential(nn.Dropout(), nn.Linear(2, 2)).eval())
    other = nn.Linear(2, 2)
    before = modes(one, other)
    assert before == [True, True, False, False, False, True]

    def fails():
        with evaluating(one, other, one):  # the same one twice, as models with shared parts are
            assert not any(modes(one, other))
            other.train()
            one[1].train()
            raise KeyError

    with pytest.raises(KeyError):
        fails()
    assert modes(one, other) == before
