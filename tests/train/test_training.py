import inspect

import pytest
from tests.train.toys import Regression, loader

from volvelle import train
from volvelle.runs import RunFolder
from volvelle.train import FitOptions, FitResult
from volvelle.train.observer import Observer, Quiet
from volvelle.train.outcome import Outcome
from volvelle.train.ranks import Ranks
from volvelle.train.training import Ready, Stage, training

RECIPES = [name for name in dir(train) if name.startswith("train_")]


@training
def train_regression(recipe: FitOptions, stage: Stage) -> Ready:
    """Train a regression."""
    assert isinstance(stage.observer, Observer)
    assert isinstance(stage.ranks, Ranks)
    if recipe.batch == 7:
        raise RuntimeError("seven")

    def close(result: FitResult) -> Outcome:
        stage.run.update_manifest(status="finished")
        return Outcome(stage.run.path, result.step, result.steps, after={"resumed": float(stage.resume)})

    return Ready(Regression(), loader(recipe.batch), close)


def started(folder) -> RunFolder:
    return RunFolder.create("run", root=folder, kind="regression", config={})


def test_a_recipe_is_made_ready_trained_and_closed(tmp_path):
    run = started(tmp_path)
    outcome = train_regression(FitOptions(steps=3, batch=2), run, observer=Quiet())
    assert (outcome.step, outcome.after) == (3, {"resumed": 0.0})
    assert run.status == "finished"
    again = train_regression(FitOptions(steps=5, batch=2), run, observer=Quiet(), resume=True)
    assert (again.step, again.after) == (5, {"resumed": 1.0})


def test_what_fails_before_the_first_step_is_a_failed_run(tmp_path):
    run = started(tmp_path)
    with pytest.raises(RuntimeError, match="seven"):
        train_regression(FitOptions(batch=7), run)
    assert (run.status, run.manifest["error"]) == ("failed", "seven")


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_is_called_alike_and_says_what_it_does(name):
    called = getattr(train, name)
    assert list(inspect.signature(called).parameters) == ["recipe", "run", "observer", "resume", "ranks"]
    assert called.__name__ == name
    assert called.__doc__.startswith("Train ")
