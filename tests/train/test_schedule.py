from __future__ import annotations

import pytest
import torch

from volvelle.errors import UsageError
from volvelle.train.options import FitOptions, from_dict, to_dict
from volvelle.train.schedule import constant, cosine, linear, poly, schedule


def test_cosine_is_torchs_behind_the_warmup():
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=1.0)
    theirs = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=20, eta_min=0.1)
    ours = cosine(25, warmup=5, floor=0.1)
    for step in range(20):
        assert ours(5 + step) == pytest.approx(optimizer.param_groups[0]["lr"], abs=1e-12)
        optimizer.step()
        theirs.step()


@pytest.mark.parametrize("kind", ["cosine", "linear", "constant", "poly"])
def test_warms_up_to_one_and_never_exceeds_it(kind):
    factors = [schedule(kind, 40, warmup=0.25)(step) for step in range(45)]
    assert factors[:10] == pytest.approx([(i + 1) / 10 for i in range(10)])
    assert max(factors) == 1.0
    assert factors[9] == 1.0
    assert min(factors[10:]) >= 0
    assert schedule(kind, 40, warmup=10)(4) == schedule(kind, 40, warmup=0.25)(4)


def test_ends():
    assert linear(10)(10) == linear(10)(99) == poly(10)(10) == poly(10)(99) == 0
    assert cosine(10, floor=0.2)(10) == pytest.approx(0.2)
    assert constant()(10**6) == 1


@pytest.mark.parametrize(
    ("field", "value"), [("steps", 0), ("batch", 0), ("epochs", 0), ("learning_rate", -1.0), ("clip", -0.1)]
)
def test_options_are_checked(field, value):
    with pytest.raises(UsageError, match=rf"^{field}: must .*got {value}"):
        FitOptions(**{field: value})


def test_options_round_trip_through_plain_data():
    from volvelle.adapt.methods import LoRA
    from volvelle.train.recipes.adapt import AdaptLanguage
    from volvelle.train.recipes.language import ModelShape, TrainLanguage

    for recipe in (
        AdaptLanguage(model="m", data="d", lora=LoRA(rank=3, targets=("a", "b"), layers=(1, 2)), steps=7),
        TrainLanguage(data="d", model=ModelShape(width=64, depth=2), clip=None),
    ):
        assert from_dict(type(recipe), to_dict(recipe)) == recipe
    with pytest.raises(UsageError, match="unknown field rank"):
        from_dict(TrainLanguage, {"data": "d", "rank": 3})
