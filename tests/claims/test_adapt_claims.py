"""The claims lora, dora, adapter and svd-extraction on a model that is trained here in seconds."""

from __future__ import annotations

import pytest
import torch

from volvelle.adapt.methods import LoRA
from volvelle.claims import adapt_runs, adapter, dora, lora, svd_extraction
from volvelle.claims.adapt_runs import MethodBench
from volvelle.claims.prefix_runs import Bench, Task
from volvelle.data.text import Example
from volvelle.errors import VolvelleError
from volvelle.runs import RunFolder
from volvelle.systems.language.load import load_language_model
from volvelle.train import train_language
from volvelle.train.observer import Quiet
from volvelle.train.options import to_dict
from volvelle.train.recipes.language import ModelShape, TrainLanguage


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    root = tmp_path_factory.mktemp("claims")
    (root / "text.txt").write_text("Ada lives in Rome and Bo lives in Oslo.\n" * 60)
    shape = ModelShape(width=32, depth=1, heads=2, context=64)
    recipe = TrainLanguage(data=str(root / "text.txt"), model=shape, steps=10, batch=4, samples=0, vocabulary=300)
    run = train_language(
        recipe, RunFolder.create("base", root=root, kind="language", config=to_dict(recipe)), observer=Quiet()
    )
    examples = [Example(f"number {i} =>", (f" it is {i}",)) for i in range(80)]
    task = Task("counting", examples[:60], examples[60:70], examples[70:])
    model = load_language_model(run.run / "weights", dtype=torch.float32)
    return Bench(model, task, counts=(40,), rates=(1e-3, 1e-2), steps=6, held=8, precision="fp32")


@pytest.fixture
def small(bench, monkeypatch):
    monkeypatch.setattr(adapt_runs, "open_bench", lambda budget: bench)
    monkeypatch.setattr(adapt_runs, "N", {"quick": 40, "full": 40})
    monkeypatch.setattr(adapt_runs, "STEPS", {"quick": 6, "full": 6})


@pytest.mark.parametrize("claim", [lora, dora, adapter, svd_extraction])
@pytest.mark.parametrize("budget", ["quick", "full"])
def test_every_claim_measures_what_it_says(claim, budget, small):
    found = claim.measure(budget)
    assert found.verdict in ("held", "not held")
    assert len({finding.what for finding in found.findings}) == len(found.findings)
    assert all(finding.value == finding.value for finding in found.findings)  # no NaN
    exact = [f for f in found.findings if "step 0" in f.what or "the base has not" in f.what]
    assert [f.value for f in exact] == [0.0] * len(exact)
    assert all(f.held for f in found.findings if "merged against beside" in f.what)
    assert bool(exact) == (claim is not svd_extraction)


def test_energy_grows_with_the_rank_and_loss_follows(small):
    found = {f.what: f.value for f in svd_extraction.measure("full").findings}
    assert found["least growth of the energy from rank to rank"] >= 0
    energies = [value for what, value in found.items() if "energy kept" in what]  # of ranks 64, 16, 4
    assert energies == sorted(energies, reverse=True)
    assert energies[-1] < energies[0] >= 90
    assert found["rank 64: fall of the loss over the full fine-tune's"] == pytest.approx(1, abs=0.2)


def test_full_fine_tuning_gains_all_and_a_dead_method_nothing(bench, small):
    ours = adapt_runs.method_bench("quick", {"dead": LoRA(rank=1, alpha=0.0)})
    assert isinstance(ours, MethodBench)
    assert ours.gain("full") == 1.0
    assert ours.gain("dead") == pytest.approx(0, abs=1e-6)
    finding = adapt_runs.against_full(ours, "dead", most=0.5, least=0.95)[0]
    assert finding.held is False


@pytest.mark.parametrize("claim", [lora, dora, adapter, svd_extraction])
def test_without_a_model_nothing_is_claimed(claim, monkeypatch):
    def missing(budget):
        raise VolvelleError("no network")

    monkeypatch.setattr(adapt_runs, "open_bench", missing)
    assert "no network" in claim.measure("quick").unmeasurable
