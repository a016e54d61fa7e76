"""`method=compare`: every method at its best rate, chosen beside the held-out data; it goes on exactly when stopped."""

from __future__ import annotations

import json
import os
import signal

import pytest
import torch

from volvelle.adapt import load_run
from volvelle.adapt.methods import Bottleneck, LoRA
from volvelle.adapt.prefix_methods import PrefixTuning
from volvelle.cli.main import main
from volvelle.data.text import Corpus, read_corpus
from volvelle.errors import UsageError
from volvelle.runs import RunFolder
from volvelle.train import resume_run
from volvelle.train.comparison import compare_methods
from volvelle.train.comparison_outcome import Row, with_gains
from volvelle.train.language import held_out_loss
from volvelle.train.observer import Quiet
from volvelle.train.options import from_dict, to_dict
from volvelle.train.recipes.compare import CompareMethods, Comparison
from volvelle.train.recipes.language import ModelShape, TrainLanguage
from volvelle.train.scratch import train_language

PEOPLE = [("Ada", "London"), ("Bo", "Oslo"), ("Cy", "Rome"), ("Di", "Bern"), ("Ed", "Riga"), ("Fay", "Graz")]


class Ear(Quiet):
    """Remembers what was said; sends this process Ctrl-C at the `stop`-th step of all."""

    def __init__(self, stop=None):
        self.said, self.stop, self.steps = [], stop, 0

    def say(self, text):
        self.said.append(text)

    def progress(self, progress):
        self.steps += 1
        if self.steps == self.stop:
            os.kill(os.getpid(), signal.SIGINT)


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A small base model, and examples whose answers follow from their prompts."""
    root = tmp_path_factory.mktemp("compare")
    (root / "text.txt").write_text("".join(f"{n} lives in {c}. " * 6 + "\n" for n, c in PEOPLE * 4))
    shape = ModelShape(width=32, depth=2, heads=2, context=64)
    recipe = TrainLanguage(data=str(root / "text.txt"), model=shape, steps=20, batch=4, samples=0, vocabulary=300)
    train_language(
        recipe, RunFolder.create("base", root=root, kind="language", config=to_dict(recipe)), observer=Quiet()
    )
    rows = [{"who": f"{n} {i}", "text": [f"{n} {i} is from {c}.", f"{c} is home to {n}."]}
            for i in range(8) for n, c in PEOPLE]  # fmt: skip
    (root / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return root


def begin(home, root, name, **changes):
    recipe = CompareMethods(
        model=str(home / "base" / "weights"), data=str(home / "rows.jsonl"), prompt="{{ who }}:",
        completion="{{ text }}", steps=6, batch=4, samples=3, max_tokens=8, held_out_share=0.2,
        lora=LoRA(rank=2, dropout=0.1), adapter=Bottleneck(reduction=8), prefix=PrefixTuning(length=3, hidden=8),
        **{"compare": Comparison(methods=("full", "lora", "prefix"), rates=(1e-4, 1e-2), tuning=8), **changes},
    )  # fmt: skip
    return recipe, RunFolder.create(name, root=root, kind="compare", config=to_dict(recipe))


@pytest.fixture(scope="module")
def whole(home, tmp_path_factory):
    recipe, run = begin(home, tmp_path_factory.mktemp("runs"), "whole")
    ear = Ear()
    return recipe, run, compare_methods(recipe, run, observer=ear), ear.said


def test_every_method_is_shown_with_its_best_rate(whole):
    recipe, _, outcome, said = whole
    assert [row.method for row in outcome.rows] == ["base", "full", "lora", "prefix"]
    assert (outcome.step, outcome.steps, outcome.unit) == (9, 9, "training")
    base, full, lora, prefix = outcome.rows
    for row in (full, lora, prefix):
        assert set(row.tuning) == {"0.0001", "0.01"}
        assert row.rate == float(min(row.tuning, key=lambda rate: row.tuning[rate]))
        assert row.seconds > 0
    assert max(full.loss, lora.loss) < base.loss
    assert full.trained == full.stored == full.gain == 1.0
    assert 0 < lora.stored == lora.trained < 0.1
    # What the prefix's network trains is dropped: 3 keys and values of width 32 in 2 layers are stored.
    total = sum(p.numel() for p in load_run(recipe.model).parameters())
    assert prefix.stored == pytest.approx(3 * 2 * 2 * 32 / total)
    assert prefix.trained > prefix.stored
    assert lora.peak < full.peak
    assert lora.gain == pytest.approx((base.loss - lora.loss) / (base.loss - full.loss))
    assert any("3 methods x 2 learning rates x 6 steps of 4" in line for line in said)
    assert said.index(next(line for line in said if "of training" in line)) < said.index("full, learning rate 0.0001")


def test_only_the_chosen_trainings_are_kept_and_open_as_runs(whole):
    _, run, outcome, _ = whole
    for row in outcome.rows[1:]:
        for rate in ("0.0001", "0.01"):
            folder = run.path / "trials" / f"{row.method}-{rate}"
            kept = any(folder.glob("adapter/*")) or any(folder.glob("weights/*"))
            assert kept == (float(rate) == row.rate), folder
            assert not any(folder.glob("checkpoints/*"))
        assert torch.isfinite(load_run(row.run)(torch.tensor([[1, 2, 3]])).logits).all()
    page = (run.path / "report.html").read_text()
    assert page.count("<svg") == 4
    assert "prefix" in page


def test_the_rate_is_chosen_beside_the_held_out_data(whole):
    """The tuning examples were neither trained on nor held out."""
    recipe, run, outcome, _ = whole
    from volvelle.train.comparison import _Comparison
    from volvelle.train.interrupt import Interrupt

    comparison = _Comparison(recipe, run, Quiet(), Interrupt())
    corpora = [comparison.train, comparison.tuning, comparison.held]
    prompts = [{example.prompt for example in corpus.examples} for corpus in corpora]
    assert sum(map(len, prompts)) == len(set().union(*prompts)) == 48
    assert len(comparison.tuning.examples) == 8
    row = next(row for row in outcome.rows if row.method == "lora")
    model = load_run(row.run)
    assert isinstance(comparison.held, Corpus)
    found = held_out_loss(model, comparison._fixed(comparison.held, model, 200))["loss"]
    assert found == pytest.approx(row.loss, rel=1e-6)
    assert len(read_corpus(recipe.data, prompt=recipe.prompt, completion=recipe.completion).examples) == 48


def test_rates_may_be_compared_at_the_end(home, tmp_path):
    recipe, run = begin(home, tmp_path, "ends", compare=Comparison(("lora",), (1e-4, 1e-2), tuning=8, look=1.0))
    ear = Ear()
    outcome = compare_methods(recipe, run, observer=ear)
    assert ear.steps == 12
    row = outcome.rows[1]
    from volvelle.train.comparison import _Comparison
    from volvelle.train.interrupt import Interrupt

    comparison, model = _Comparison(recipe, run, Quiet(), Interrupt()), load_run(row.run)
    found = held_out_loss(model, comparison._fixed(comparison.tuning, model, 200))["loss"]
    assert found == pytest.approx(min(row.tuning.values()), rel=1e-6)


@pytest.mark.parametrize(("stop", "done"), [(3, 1), (12, 4), (21, 8)])
def test_an_interrupted_comparison_ends_with_the_same_rows(home, whole, tmp_path, stop, done):
    recipe, run = begin(home, tmp_path, "part")
    ear = Ear(stop)
    first = compare_methods(recipe, run, observer=ear)
    assert first.interrupted == "SIGINT"
    assert first.step == done
    assert first.resume == f"volvelle resume {run.path}"
    ear = Ear()
    again = resume_run(run.path, observer=ear)
    assert again.interrupted is None
    assert ear.steps == 24 - stop
    for ours, theirs in zip(again.rows, whole[2].rows, strict=True):
        assert (ours.loss, ours.tuning, ours.bleu, ours.rate) == (theirs.loss, theirs.tuning, theirs.bleu, theirs.rate)


def test_the_command_prints_the_table(home, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    words = ["adapt", str(home / "base" / "weights"), f"data={home / 'rows.jsonl'}", "prompt={{ who }}:",
             "completion={{ text }}", "method=compare", "compare.methods=lora,dora", "compare.rates=0.001",
             "compare.tuning=4", "steps=2", "samples=2", "max_tokens=4"]  # fmt: skip
    assert main([*words, "--json"]) == 0
    out = capsys.readouterr()
    found = json.loads(out.out)
    assert [row["method"] for row in found["rows"]] == ["base", "lora", "dora"]
    assert found["rows"][1]["gain"] is None  # nothing to hold it against
    assert "s/step" in out.err
    assert main([*words, "learning_rate=0.1"]) == 2
    assert "compare.rates" in capsys.readouterr().err
    config = next((tmp_path / "runs").glob("compare-*/config.yaml"))
    again = from_dict(CompareMethods, RunFolder.open(config.parent).config())
    assert again.compare == Comparison(methods=("lora", "dora"), rates=(0.001,), tuning=4)


def test_options_that_make_no_sense_are_refused():
    with pytest.raises(UsageError, match="each once"):
        Comparison(rates=(1e-3, 1e-3))
    with pytest.raises(UsageError, match="above 0"):
        Comparison(rates=(1e-3, 0.0))
    with pytest.raises(UsageError, match="at least 1"):
        Comparison(tuning=0)
    with pytest.raises(UsageError, match="one rank"):
        CompareMethods(model="m", data="d", ranks=2)


def test_gains_need_full_fine_tuning_that_learnt():
    rows = [Row("base", 2.0), Row("full", 2.5), Row("lora", 1.0)]
    assert with_gains(rows) == rows
