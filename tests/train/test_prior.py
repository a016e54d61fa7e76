"""`train prior` from end to end: what is learnt, what is kept, what a run that was stopped goes on with."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from tests.small_priors import Patches, grey_pictures

import volvelle.train.prior as recipe_file
from volvelle.data.codes import encode_pictures
from volvelle.data.pictures import read_pictures
from volvelle.decode.drafters.opening import open_drafter
from volvelle.decode.images import draw_images
from volvelle.decode.options import Sampling
from volvelle.errors import UsageError
from volvelle.runs import RunFolder
from volvelle.systems.generation import load
from volvelle.systems.generation.extractor import PixelFeatures
from volvelle.systems.generation.prior import read_prior
from volvelle.train import prior_data
from volvelle.train.draft import train_draft
from volvelle.train.judge import Judge
from volvelle.train.options import from_dict, to_dict
from volvelle.train.prior_measure import measure_prior
from volvelle.train.recipes.draft import MTPOptions, TrainDraft
from volvelle.train.recipes.language import ModelShape
from volvelle.train.recipes.prior import TrainPrior
from volvelle.train.resume import resume_run


@pytest.fixture(autouse=True)
def codec(monkeypatch):
    """Every path is a codec of grey squares, so that what a code means is known."""
    monkeypatch.setattr(recipe_file, "open_codec", lambda path, device=None: Patches())
    monkeypatch.setattr(load, "open_codec", lambda path, device=None: Patches())


def recipe(data, **more):
    options = {
        "data": str(data), "codec": "grey", "steps": 4, "batch": 8, "model": ModelShape(width=32, depth=2, heads=2),
        "samples": 4, "average": None, "evaluate_every": None, "checkpoint_every": 2, "warmup": 1.0,
        "held_out_share": 0.25,
    }  # fmt: skip
    return TrainPrior(**{**options, **more})


def train(tmp_path, options, name="run"):
    run = RunFolder.create(name, root=tmp_path, kind="prior", config=to_dict(options))
    return run, recipe_file.train_prior(options, run)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return grey_pictures(tmp_path_factory.mktemp("grey"))


def test_it_learns_what_classes_look_like(tmp_path, data):
    run, outcome = train(tmp_path, recipe(data, steps=90, learning_rate=5e-3, samples=0, average=0.9, dropped=0.0))
    assert outcome.after["loss"] < 0.8 * outcome.before["loss"]
    prior = read_prior(run.path)
    assert prior.layout.classes == ("bright", "dark")
    drawn = draw_images(prior, [0, 1] * 20, sampling=Sampling(temperature=0.5, seed=0))
    means = prior.pictures(drawn.codes).mean((1, 2, 3)).reshape(20, 2)
    assert (means[:, 0] > 0).float().mean() >= 0.9
    assert (means[:, 1] < 0).float().mean() >= 0.9


def test_what_a_run_leaves(tmp_path, data):
    run, outcome = train(tmp_path, recipe(data, evaluate_every=2))
    assert [file.name for file in sorted((run.path / "samples").glob("*.png"))] == [
        f"step-{step:06d}.png" for step in (0, 2, 4)
    ]
    assert (run.path / "weights" / "config.json").is_file()
    assert json.loads((run.path / "weights" / "config.json").read_text())["architectures"] == ["LlamaForCausalLM"]
    page = (run.path / "report.html").read_text()
    for words in ("What it draws", "after 4 steps", "What the codes keep", "nats a code", "base64"):
        assert words in page, words
    manifest = RunFolder.open(run.path).manifest
    assert (manifest["status"], manifest["codec"]) == ("finished", "grey")
    assert outcome.next[0].startswith(f'volvelle generate {run.path} count=16 class="bright"')
    assert set(outcome.after) == {"loss", "perplexity"}


def test_a_stopped_run_goes_on_bit_for_bit_with_the_codes_it_has(tmp_path, data, monkeypatch):
    run, _ = train(tmp_path, recipe(data, keep_last=9))
    whole = read_prior(run.path).model.state_dict()
    again = tmp_path / "again"
    shutil.copytree(run.path, again)
    shutil.rmtree(again / "checkpoints" / "step-00000004")
    shutil.rmtree(again / "weights")
    stopped = RunFolder.open(again)
    stopped.update_manifest(status="interrupted")

    def never(*args, **kwargs):
        raise AssertionError("the codes are there")

    monkeypatch.setattr(prior_data, "encode_pictures", never)
    outcome = resume_run(again)
    assert outcome.steps == 4
    resumed = read_prior(again).model.state_dict()
    assert all(torch.equal(resumed[name], tensor) for name, tensor in whole.items())
    assert [r["step"] for r in stopped.metrics() if r["event"] == "train"] == [1, 2, 3, 4]


def test_captions_are_read_and_drawn(tmp_path):
    pictures = grey_pictures(tmp_path / "captioned", captions=True)
    run, outcome = train(tmp_path, recipe(pictures, steps=60, learning_rate=5e-3, samples=4, dropped=0.0, words=300))
    prior = read_prior(run.path)
    assert prior.words is not None
    drawn = draw_images(prior, ["a bright square", "a dark square"] * 10, sampling=Sampling(temperature=1.0, seed=0))
    means = prior.pictures(drawn.codes).mean((1, 2, 3)).reshape(10, 2)
    assert (means[:, 0] > means[:, 1]).float().mean() >= 0.9
    assert 'prompt="…"' in outcome.next[0]
    told = measure_prior(prior, read_pictures(pictures)[0]).metrics
    assert told["loss"] < told["loss mistold"]  # the captions of the other half are those of other pictures
    larger = draw_images(prior, ["a bright square"], sampling=Sampling(temperature=1.0, seed=0), size=(5, 4))
    assert prior.pictures(larger.codes).shape == (1, 1, 20, 16)


def test_views_make_more_texts(tmp_path, data):
    options = recipe(data, steps=1, samples=0, views=3, mirror=0.5, zoom=(0.7, 1.0), condition="nothing")
    run, _ = train(tmp_path, options)
    file = run.path / "codes" / "train.safetensors"
    assert prior_data.read_codes(file, {}) is None  # it knows what it was made of
    prior = read_prior(run.path)
    assert (prior.layout.classes, prior.layout.said) == ((), 0)
    from safetensors.torch import load_file

    assert load_file(file)["codes"].shape == (3 * 18, 9)
    assert load_file(run.path / "codes" / "held.safetensors")["codes"].shape == (6, 9)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"condition": "caption"}, "the data does not say it"),
        ({"size": 14}, "a code is 4 x 4 pixels"),
    ],
)
def test_what_the_data_cannot_give(tmp_path, data, options, message):
    with pytest.raises(UsageError, match=message):
        train(tmp_path, recipe(data, **options))


@pytest.mark.parametrize(
    "options",
    [
        {"views": 2}, {"views": 0}, {"mirror": 1.5}, {"dropped": -0.1}, {"zoom": (0.5, 0.2)}, {"words": 100},
        {"samples": -1}, {"held_out_share": 0.0}, {"size": 0},
    ],
)  # fmt: skip
def test_options_that_mean_nothing(options):
    with pytest.raises(UsageError):
        recipe("nowhere", **options)


def test_without_a_codec_the_newest_is_taken_or_asked_for(tmp_path, data, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match="no codec"):
        train(tmp_path, recipe(data, codec=None))
    for name in ("old", "new"):
        run = RunFolder.create(name, kind="vqgan", config={})
        run.update_manifest(status="finished", created=f"2026-01-0{1 + (name == 'new')}")
    _, outcome = train(tmp_path, recipe(data, codec=None, steps=1, samples=0), "chosen")
    assert RunFolder.open(outcome.run).manifest["codec"] == str((tmp_path / "runs" / "new").resolve())


class Grey(Judge):
    """Knows bright from dark, in another order than the data."""

    def __init__(self):
        self.name = "grey"

    def numbers(self, classes):
        return [("dark", "bright").index(name) for name in classes]

    def look(self, pictures, progress=None):
        return (pictures.mean((1, 2, 3)) > 0).long()


def test_samples_are_measured_beside_the_codec_and_real_pictures(tmp_path, data):
    run, _ = train(tmp_path, recipe(data, samples=0))
    prior, pictures = read_prior(run.path), read_pictures(data)[0]
    found = measure_prior(prior, pictures, judge=Grey(), extractor=PixelFeatures(2), samples=12).metrics
    assert found["recognised real"] == found["recognised codec"] == 1.0
    assert 0.0 <= found["recognised"] <= 1.0
    assert found["FD-pixels-2 codec"] < found["FD-pixels-2"]
    assert {"loss", "perplexity", "FD-pixels-2 floor", "precision", "recall"} <= set(found)
    assert set(measure_prior(prior, pictures).metrics) == {"loss", "perplexity", "loss untold", "loss mistold"}
    codes = encode_pictures(pictures, prior_data.Framing(12, 1), Patches().encode)
    with torch.no_grad():
        ids = torch.cat((torch.tensor([prior.prompt(pictures.label(i)) for i in range(24)]), codes), 1)
        logits = prior.model.lm_head(prior.model.hidden(ids))[:, 1:-1]
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), codes.flatten())
    assert found["loss"] == pytest.approx(float(loss), rel=1e-5)


def test_modules_that_draft_image_tokens(tmp_path, data):
    run, _ = train(tmp_path, recipe(data, samples=0))
    options = TrainDraft(
        model=str(run.path), data=str(data), kind="mtp", mtp=MTPOptions(depths=1), steps=2, batch=4, samples=2,
        evaluate_every=None,
    )  # fmt: skip
    assert from_dict(TrainDraft, to_dict(options)) == options
    folder = RunFolder.create("draft", root=tmp_path, kind="draft", config=to_dict(options))
    outcome = train_draft(options, folder)
    assert outcome.after["accepted_per_step"] >= 1
    assert not (folder.path / "codes").exists()  # the prior's own are read
    prior = read_prior(run.path)
    drafter = open_drafter(folder.path, prior.model)
    plain = draw_images(prior, [0, 1, None], sampling=Sampling()).codes
    assert torch.equal(draw_images(prior, [0, 1, None], sampling=Sampling(), drafter=drafter).codes, plain)
    for wrong in ({"kind": "small"}, {"kind": "mtp", "distill": True}):
        with pytest.raises(UsageError):
            train_draft(TrainDraft(model=str(run.path), data=str(data), **wrong), folder)
