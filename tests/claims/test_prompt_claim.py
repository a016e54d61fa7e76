"""The claim prompt-tuning on a model of letters: every finding is made; a prompt that learns nothing is not held."""

from __future__ import annotations

import copy

import pytest
import torch
from tests.claims.letters import letters_model

from volvelle.adapt import adapted
from volvelle.adapt.prefix_methods import PromptTuning
from volvelle.claims import prompt_runs, prompt_tuning
from volvelle.claims.prefix_runs import Task
from volvelle.claims.prompt_runs import PromptBench
from volvelle.data.text import Example
from volvelle.errors import VolvelleError


@pytest.fixture
def bench():
    model = letters_model(256)
    examples = [Example(f"{i} is", (" fine fine fine.",)) for i in range(40)]
    task = Task("praise", examples[:30], examples[30:35], examples[35:])
    return PromptBench(model, task, (8,), (1e-2,), steps=12, held=5, precision="fp32", batch=2, length=4)


@pytest.fixture
def small(bench, monkeypatch):
    monkeypatch.setattr(prompt_runs, "prompt_bench", lambda budget, length: bench)
    monkeypatch.setattr(prompt_runs, "gain_of_size", lambda width, length: width / 1000)
    monkeypatch.setattr(prompt_tuning, "RATES", {"prompt": (3e-2, 1e-1), "full": (1e-3, 1e-2)})


def bounds(found):
    return {finding.what: finding.held for finding in found.findings if finding.bound}


def test_every_finding_of_the_full_budget_is_made(small, bench):
    before = copy.deepcopy(bench.model.state_dict())
    found = prompt_tuning.measure("full")
    assert len(bounds(found)) == 4
    assert bounds(found)["trained prompt over the best written one"]
    assert bounds(found)["share of full fine-tuning's fall of the loss: at this size a gap is left"]
    assert all(finding.value == finding.value for finding in found.findings)  # no NaN
    assert found.findings[-1].value == pytest.approx(0.096)
    assert adapted(bench.model) is None
    assert all(torch.equal(before[key], value) for key, value in bench.model.state_dict().items())


def test_a_prompt_that_learns_nothing_is_not_held(small, monkeypatch):
    """A mutant: the prompt stays the words at which it begins."""
    monkeypatch.setattr(prompt_tuning, "RATES", {"prompt": (0.0,), "full": (1e-2,)})
    found = prompt_tuning.measure("quick")
    assert found.verdict == "not held"
    assert not bounds(found)["trained prompt over the best written one"]


def test_the_share_is_that_of_the_embeddings(bench):
    assert bench.share == 4 * 16 / sum(p.numel() for p in bench.model.parameters())


def test_a_rate_is_chosen_on_examples_that_are_not_held_out(bench):
    seen = []
    loss = bench._loss
    bench._loss = lambda model, examples: seen.append(list(examples)) or loss(model, examples)
    losses = {rate: bench._losses("prompt", rate, 0) for rate in (0.0, 1e-1)}
    assert seen == [bench.task.train[8:13], bench.task.seen] * 2
    best = min(losses, key=lambda rate: losses[rate][0])
    assert bench.best_rate("prompt", (0.0, 1e-1)) == (best, losses[best][1])


def test_examples_before_the_prompt_are_of_the_training_data(bench):
    text = bench.shots(2)
    assert text == "28 is fine fine fine.\n29 is fine fine fine.\n"
    assert bench.code_loss(text) != pytest.approx(bench.base_loss, rel=1e-4)


def test_beginnings_differ_by_their_seed(bench):
    assert bench.loss("random prompt", 0.0) != bench.loss("random prompt", 0.0, seed=1)
    assert isinstance(bench._method("random prompt"), PromptTuning)


def test_the_gap_of_a_tiny_decoder():
    gain = prompt_runs.gain_of_size(16, 4, steps=6, tuning=4)
    assert gain == gain  # no NaN
    assert abs(gain) < 50


def test_without_a_model_nothing_is_claimed(monkeypatch):
    def missing(budget, length):
        raise VolvelleError("no network")

    monkeypatch.setattr(prompt_runs, "prompt_bench", missing)
    assert "no network" in prompt_tuning.measure("quick").unmeasurable
