"""`volvelle adapt method=…` for every method: it learns, goes on bit for bit when interrupted, and opens again."""

from __future__ import annotations

import json
import os
import signal

import pytest
import torch
from safetensors.torch import load_file

from volvelle.adapt import load_run
from volvelle.adapt.methods import Bottleneck, DoRA, LoRA
from volvelle.adapt.prefix_methods import PrefixTuning, PromptTuning
from volvelle.runs import RunFolder
from volvelle.train import adapt_language, resume_run, train_language
from volvelle.train.observer import Quiet
from volvelle.train.options import from_dict, to_dict
from volvelle.train.recipes.adapt import AdaptLanguage
from volvelle.train.recipes.language import ModelShape, TrainLanguage

FACTS = [("Ada", "London", "poet"), ("Bo", "Oslo", "cook"), ("Cy", "Rome", "smith"), ("Di", "Bern", "judge")]
METHODS = {
    "lora": {"lora": LoRA(rank=2, dropout=0.1)},
    "dora": {"dora": DoRA(rank=2, dropout=0.1)},
    "adapter": {"adapter": Bottleneck(reduction=8, dropout=0.1)},
    "prefix": {"prefix": PrefixTuning(length=3, hidden=8)},
    "prompt": {"prompt_tuning": PromptTuning(length=3)},
    "full": {},
}


class Stop(Quiet):
    """Sends this process the signal of Ctrl-C at a step."""

    def __init__(self, step):
        self.step = step

    def progress(self, progress):
        if progress.step == self.step:
            os.kill(os.getpid(), signal.SIGINT)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    root = tmp_path_factory.mktemp("base")
    (root / "text.txt").write_text(
        "".join(f"{n} lives in {c} and works as a {j}. " * 6 + "\n" for n, c, j in FACTS * 4)
    )
    shape = ModelShape(width=32, depth=2, heads=2, context=96)
    recipe = TrainLanguage(data=str(root / "text.txt"), model=shape, steps=20, batch=4, samples=0, vocabulary=300)
    run = RunFolder.create("base", root=root, kind="language", config=to_dict(recipe))
    return train_language(recipe, run, observer=Quiet()).run / "weights"


def begin(root, name, base, method):
    data = root / "facts.jsonl"
    data.write_text(
        "".join(
            json.dumps({"who": f"{n}{i}", "text": f"{n} is from {c}."}) + "\n" for i, (n, c, _) in enumerate(FACTS * 3)
        )
    )
    recipe = AdaptLanguage(
        model=str(base), data=str(data), prompt="{{ who }}:", completion="{{ text }}", steps=8, batch=4, samples=0,
        evaluate_every=4, checkpoint_every=3, held_out_share=0.2, length=None, method=method, **METHODS[method],
    )  # fmt: skip
    return recipe, RunFolder.create(name, root=root, kind="adapt", config=to_dict(recipe))


def weights(run):
    [path] = [*run.path.glob("adapter/*.safetensors"), *run.path.glob("weights/*.safetensors")]
    return load_file(path)


@pytest.mark.parametrize("method", METHODS)
def test_an_interrupted_run_goes_on_bit_for_bit(method, base, tmp_path):
    recipe, whole = begin(tmp_path, "whole", base, method)
    finished = adapt_language(recipe, whole, observer=Quiet())
    # A fresh prefix disturbs the model it stands before: it has to learn from where it starts.
    steps = [record["loss"] for record in whole.metrics() if "loss" in record]
    assert finished.after["loss"] < (steps[0] if method == "prefix" else finished.before["loss"])
    recipe, part = begin(tmp_path, "part", base, method)
    assert adapt_language(recipe, part, observer=Stop(5)).interrupted == "SIGINT"
    [checkpoint, *_] = sorted(part.path.glob("checkpoints/step-*"), reverse=True)
    saved = load_file(checkpoint / "tensors.safetensors")
    base_tensors = {name for name in saved if name.endswith(("embed_tokens.weight", "mlp.up_proj.weight"))}
    assert bool(base_tensors) == (method == "full"), sorted(saved)
    resumed = resume_run(part.path, observer=Quiet())
    assert resumed.after == finished.after
    ours, theirs = weights(part), weights(whole)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    model = load_run(part.path)
    assert torch.isfinite(model(torch.tensor([[1, 2, 3]])).logits).all()


def test_options_of_every_method_survive_the_configuration_file():
    recipe = AdaptLanguage(
        model="m", data="d", method="adapter", adapter=Bottleneck(form="parallel", targets=("mlp",), layers=(1, 2)),
        dora=DoRA(rank=3, targets=("a", "b")),
    )  # fmt: skip
    again = from_dict(AdaptLanguage, json.loads(json.dumps(to_dict(recipe))))
    assert again == recipe
    assert again.adaptation == recipe.adapter
    assert type(again.dora) is DoRA


def test_each_method_has_its_own_learning_rate():
    rates = {method: AdaptLanguage(model="m", data="d", method=method).learning_rate for method in ("lora", "full")}
    assert rates == {"lora": 1e-3, "full": 3e-5}
    assert AdaptLanguage(model="m", data="d", method="prompt").learning_rate == 1e-2
    assert AdaptLanguage(model="m", data="d", method="full", learning_rate=0.5).learning_rate == 0.5
