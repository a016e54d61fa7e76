"""The claim prefix: its tasks, that runs differ in the method only, and (slow) its quick budget."""

import copy
import dataclasses

import pytest
import torch
from tests.claims.letters import letters_model

from volvelle.adapt import adapted
from volvelle.claims import prefix, prefix_runs
from volvelle.claims.prefix_runs import Bench, Task
from volvelle.data.countries import Country
from volvelle.data.text import Example


@pytest.fixture
def bench():
    model = letters_model(128)
    examples = [Example(f"{i} is", (f" {i * i}.",)) for i in range(40)]
    task = Task("squares", examples[:30], examples[30:35], examples[35:])
    return Bench(model, task, counts=(4, 8), rates=(1e-3, 1e-2), steps=3, held=5, precision="fp32", batch=2)


@pytest.mark.parametrize("kind", ["full", "prefix", "random prefix", "prompt", "Say:"])
def test_a_training_leaves_the_model_alone_and_the_rate_is_kept(bench, kind):
    before = copy.deepcopy(bench.model.state_dict())
    few = bench.best(kind, 4)
    tried = []
    trained = bench._trained
    bench._trained = lambda *given: tried.append(given[-1]) or trained(*given)
    many = bench.best(kind, 8)
    assert few.rate in bench.rates
    assert tried == [few.rate] == [many.rate]
    assert bench.best(kind, 8) is many
    assert adapted(bench.model) is None
    assert all(torch.equal(before[key], value) for key, value in bench.model.state_dict().items())


def test_a_rate_is_chosen_on_neither_of_the_held_out_sets(bench):
    seen = []
    loss = bench._loss
    bench._loss = lambda model, examples: seen.append(list(examples)) or loss(model, examples)
    bench.best("prefix", 4)
    assert seen[0] == bench.task.train[4:9]
    assert seen[1:3] == [bench.task.seen, bench.task.unseen]


def test_a_code_is_text_before_the_prompt(bench):
    found = bench.code_loss("Say:")
    task = [dataclasses.replace(example, prompt=f"Say:{example.prompt}") for example in bench.task.seen]
    assert found == pytest.approx(bench._loss(bench.model, task), rel=1e-5)


def test_every_finding_of_the_full_budget_is_made(bench, monkeypatch):
    monkeypatch.setattr(prefix_runs, "open_bench", lambda budget: bench)
    measured = prefix.measure("full")
    assert measured.unmeasurable is None
    assert len([finding for finding in measured.findings if finding.held is not None]) >= 8
    assert "squares" in measured.notes[-1]


def test_topics_of_the_stand_in_are_apart(monkeypatch):
    names = [f"{chr(65 + i)}{chr(97 + j)}land" for i in range(20) for j in range(5)]
    table = [
        Country(name, f"{name} City", ("Africa", "Asia", "Europe")[i % 3], "Mark", 1000 + i, 10.0 + i, ("en",), ())
        for i, name in enumerate(names)
    ]
    monkeypatch.setattr(prefix_runs, "read_countries", lambda: table)
    task = prefix_runs.countries(12)
    africa = {country.name for country in table if country.continent == "Africa"}

    def of(examples):
        return {next(c.name for c in table if f"name: {c.name} " in f"{e.prompt} ") for e in examples}

    assert of(task.unseen) <= africa
    assert not of(task.train + task.seen) & africa
    assert not of(task.train) & of(task.seen)
    assert len(task.seen) == len(task.unseen) == 12


@pytest.mark.shared_data
@pytest.mark.skipif(not (prefix_runs.WEBNLG / "train.jsonl").is_file(), reason="../shared/data/webnlg is absent")
def test_topics_of_webnlg_are_apart():
    task = prefix_runs.webnlg(16)
    texts = {e.prompt for e in task.train}
    assert not texts & {e.prompt for e in task.unseen}
    assert len(task.seen) == len(task.unseen) == 16
    assert len(task.train) > 600


@pytest.mark.slow
def test_the_quick_budget_says_what_was_measured():
    measured = prefix.measure("quick")
    if measured.unmeasurable:
        pytest.skip(measured.unmeasurable)
    assert measured.findings[0].held
    assert all(0 < float(finding.value) < 20 for finding in measured.findings)
