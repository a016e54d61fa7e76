"""Runs with `mtp=`: several ranks, resuming bit for bit, what they leave behind and what they report."""

from __future__ import annotations

import dataclasses
import json
import signal

import pytest
import torch
from safetensors.torch import load_file
from tests.systems.language.test_decoder import LLAMA
from tests.train.many import run
from tests.train.mtp_program import train_several
from tests.train.test_recipes import Ear, folder, history, scratch
from tests.train.toys import Folder

from volvelle.adapt import load_run
from volvelle.errors import UsageError
from volvelle.systems.language.decoder import Decoder
from volvelle.systems.language.mtp import KINDS, MultiToken
from volvelle.systems.language.mtp_drafts import drafts_of
from volvelle.systems.language.mtp_files import read_mtp
from volvelle.train import estimate, resume_run, train_language
from volvelle.train.observer import Quiet
from volvelle.train.options import FitOptions
from volvelle.train.ranks import Ranks

BASE = {"steps": 4, "batch": 3, "checkpoint_every": 2, "evaluate_every": 2}


def losses(out, name):
    return [record[name] for record in Folder(out / "run").metrics() if name in record]


def left(out, rank=0):
    return torch.load(out / f"rank-{rank}.pt")


SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    ("kind", "shard"),
    [
        ("parallel", "ddp"),
        ("sequential", "fsdp"),
        pytest.param("sequential", "ddp", marks=SLOW),
        pytest.param("parallel", "fsdp", marks=SLOW),
    ],
)
def test_two_ranks_take_the_steps_of_one(kind, shard, tmp_path):
    alone, out = tmp_path / "alone", tmp_path / "together"
    train_several(Ranks(), alone, FitOptions(accumulate=2, **BASE), kind)
    options = FitOptions(ranks=2, shard=shard, **BASE)
    run(out / "said", 2, options, train_several, out, options, kind)
    for metric in ("loss", "next_token_loss", "token_3_loss", "held_out_loss", "held_out_token_2_loss"):
        assert len(losses(alone, metric)) >= 3
        assert losses(out, metric) == pytest.approx(losses(alone, metric), rel=1e-5), metric
    wanted = left(alone)
    for rank in (0, 1):
        found = left(out, rank)
        assert found["kind"] == "MultiToken"
        for key, weight in wanted["weights"].items():
            torch.testing.assert_close(found["weights"][key], weight, rtol=1e-3, atol=2e-5, msg=key)


@pytest.mark.parametrize(
    ("kind", "precision"),
    [
        ("sequential", "fp32"),
        ("parallel", "fp16"),
        pytest.param("parallel", "fp32", marks=SLOW),
        pytest.param("sequential", "fp16", marks=SLOW),
    ],
)
def test_interrupted_it_resumes_bit_for_bit(kind, precision, tmp_path):
    recipe = scratch(tmp_path, mtp=3, mtp_kind=kind, precision=precision, average=0.9, steps=7)
    whole, part = (folder(tmp_path, name, "language", recipe) for name in ("whole", "part"))
    finished = train_language(recipe, whole, observer=Quiet())
    stopped = train_language(recipe, part, observer=Ear(5, signal.SIGTERM))
    assert (stopped.interrupted, stopped.step) == ("SIGTERM", 5)
    assert not (part.path / "mtp").exists()
    resumed = resume_run(part.path, observer=Quiet())
    assert resumed.after == finished.after
    assert history(part) == history(whole)
    for name in ("weights", "mtp"):
        ours, theirs = (load_file(run.path / name / "model.safetensors") for run in (part, whole))
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_leaves_a_plain_model_modules_and_the_figures_of_each_token(kind, tmp_path):
    recipe, ear = scratch(tmp_path, mtp=3, mtp_kind=kind, steps=25), Ear()
    run = folder(tmp_path, "run", "language", recipe)
    outcome = train_language(recipe, run, observer=ear)
    assert any(f"3 tokens at each position, the further ones by 2 {kind} modules" in line for line in ear.said)
    names = ["loss", "perplexity", "accuracy", "token_2_loss", "token_2_accuracy", "token_3_loss", "token_3_accuracy"]
    assert list(outcome.after) == names
    for name in ("loss", "token_2_loss", "token_3_loss"):
        assert outcome.after[name] < outcome.before[name] - 0.3
    assert "Each token it predicts" in outcome.report.read_text()
    assert json.loads(json.dumps(outcome.record()))["after"] == outcome.after
    model = load_run(run.path)
    mtp = read_mtp(run.path / "mtp", model)
    ids = torch.tensor([model.tokenizer.encode("Ada lives in London and")])
    drafts = drafts_of(mtp, model, 1, 64)
    with torch.no_grad():
        hidden, states = mtp.read(model, ids)
        following = torch.cat((ids[:, 1:], model.logits(hidden)[:, -1:].argmax(-1)), 1)
        drafts.observe(states, following)
    assert drafts.draft(2).tokens.shape == (1, 2)


def test_without_it_nothing_changes(tmp_path):
    """The decoder starts from the same weights with and without modules, and `mtp=1` is a run as ever."""
    plain, several = scratch(tmp_path, steps=1), scratch(tmp_path, steps=1, mtp=2)
    runs = {}
    for name, recipe in {"plain": plain, "several": several}.items():
        runs[name] = folder(tmp_path, name, "language", recipe)
        train_language(recipe, runs[name], observer=Quiet())
    assert not (runs["plain"].path / "mtp").exists()
    first = {name: next(r for r in run.metrics() if r["event"] == "train") for name, run in runs.items()}
    assert first["plain"]["loss"] == first["several"]["next_token_loss"] < first["several"]["loss"]
    assert "next_token_loss" not in first["plain"]


def test_options_that_do_not_fit_are_named(tmp_path):
    with pytest.raises(UsageError, match="mtp: must be at least 1"):
        scratch(tmp_path, mtp=0)
    with pytest.raises(UsageError, match="a window of 4 tokens has no position with 5 tokens"):
        scratch(tmp_path, mtp=5, length=4)
    with pytest.raises(UsageError, match="mtp_weight: must be above 0"):
        scratch(tmp_path, mtp=2, mtp_weight=-1.0)


def test_the_first_line_counts_the_modules(tmp_path):
    lines = {}
    for mtp in (1, 3):
        recipe, ear = scratch(tmp_path, steps=1, mtp=mtp), Ear()
        train_language(recipe, folder(tmp_path, f"run{mtp}", "language", recipe), observer=ear)
        lines[mtp] = next(line for line in ear.said if "memory about" in line)
    assert lines[1] != lines[3]


@pytest.mark.parametrize("kind", KINDS)
def test_the_planned_memory_is_what_a_step_takes(kind):
    from volvelle.inspect.memory_measure import measure_memory

    config = dataclasses.replace(LLAMA, vocabulary=500, width=64, embedding_width=64, head_width=16)
    mtp, batch = KINDS[kind](config, 2), estimate.whole_windows(48)(6)
    planned = estimate.plan_language(config, batch, mtp=mtp)
    measured = measure_memory(lambda: MultiToken(Decoder(config), KINDS[kind](config, 2)), batch, loss=estimate._loss)
    assert planned.peak == pytest.approx(measured.peak, rel=0.03)
    plain = estimate.plan_language(config, batch)
    extra = sum(p.numel() for p in mtp.parameters())
    assert planned.composition["weights"] - plain.composition["weights"] == 4 * extra
    assert planned.peak > plain.peak + 16 * extra
