"""Training what drafts: losses against an oracle, phases, whole runs that stop and go on, what they leave behind."""

from __future__ import annotations

import dataclasses
import json
import math
import signal

import pytest
import torch
from safetensors.torch import load_file
from tests.systems.language.test_decoder import LLAMA, build, some_ids
from tests.train.test_recipes import FACTS, Ear, folder, scratch

from volvelle.adapt import load_run
from volvelle.adapt.methods import LoRA
from volvelle.data.tokens import IGNORE
from volvelle.decode import NGram, open_drafter
from volvelle.errors import UsageError, VolvelleError
from volvelle.systems.language.draft_head import DraftHead, frequent_tokens
from volvelle.systems.language.medusa import MedusaHeads
from volvelle.systems.language.medusa_files import read_medusa
from volvelle.systems.language.mtp import KINDS, ParallelMTP, SequentialMTP
from volvelle.systems.language.mtp_files import read_mtp
from volvelle.train import resume_run, train_draft, train_language
from volvelle.train.ahead import AheadObjective, AheadOfBlocks, AheadOfHidden, Joint, ahead_loss, held_out_ahead
from volvelle.train.draft_data import ANSWERS
from volvelle.train.observer import Quiet
from volvelle.train.options import FitOptions
from volvelle.train.recipes.draft import MedusaOptions, MTPOptions, TrainDraft
from volvelle.train.recipes.language import ModelShape
from volvelle.train.text_run import resume_command

SOME = torch.tensor([0, 3, 4, 5, 7, 9, 11, 12, 30, 31])


def a_batch(model, b=2, n=9):
    ids = some_ids(b, n + 1)
    targets = ids[:, 1:].clone()
    targets[0, :3] = IGNORE
    mask = torch.ones(b, n, dtype=torch.bool)
    mask[1, 6:] = False
    targets[1, 5:] = IGNORE
    return {"ids": ids[:, :-1], "targets": targets, "mask": mask}


def noisy(module):
    with torch.no_grad():
        for p in module.parameters():
            p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())) * 0.2)
    return module


@pytest.fixture
def model():
    torch.manual_seed(0)
    return build(LLAMA).double().eval()


def oracle(model, heads, batch, weights, tokens):
    """L, and hits and counts of every head, position by position."""
    hidden = model.hidden(batch["ids"], mask=batch["mask"])
    listed = list(range(model.config.vocabulary)) if tokens is None else tokens.tolist()
    b, n = batch["ids"].shape
    total, first, counts = 0.0, [], []
    learnt = int((batch["targets"] != IGNORE).sum())
    for k, weight in enumerate(weights, 1):
        right, tried = 0, 0
        for row in range(b):
            for i in range(n - k):
                target = int(batch["targets"][row, i + k])
                if target == IGNORE or not batch["mask"][row, i]:
                    continue
                tried += 1
                state = hidden[row, i]
                for block in list(heads.medusa_head[k - 1])[: heads.layers]:
                    z = block.linear.weight @ state + block.linear.bias
                    state = state + z / (1 + torch.exp(-z))
                matrix = heads.medusa_head[k - 1][-1].weight if heads.own else model.lm_head.weight[listed]
                logits = matrix @ state
                right += listed[int(logits.argmax())] == target
                if target in listed:
                    total += weight * -float(logits.detach().log_softmax(0)[listed.index(target)]) / learnt
        first.append(right)
        counts.append(tried)
    return total, [r / c for r, c in zip(first, counts, strict=True)]


class Once:
    """A loader of one batch."""

    def __init__(self, batch):
        self.batch = batch

    def plan(self, epoch):
        return [0]

    def load(self, plan):
        return self.batch


@pytest.mark.parametrize("tokens", [None, SOME], ids=["all", "some"])
@pytest.mark.parametrize("own", [False, True])
def test_the_loss_is_the_papers(own, tokens, model):
    heads = noisy(MedusaHeads.of(model, 3, layers=2, own=own, tokens=tokens).double())
    batch, weights = a_batch(model), [0.8, 0.64, 0.5]
    model.requires_grad_(False)
    found = ahead_loss(model, AheadOfHidden(heads), batch, DraftHead(model, tokens), weights)
    wanted, shares = oracle(model, heads, batch, weights, tokens)
    assert float(found.value.detach()) == pytest.approx(wanted, rel=1e-6)
    assert found.weight == int((batch["targets"] != IGNORE).sum())
    measured = held_out_ahead(model, AheadOfHidden(heads), Once(batch), DraftHead(model, tokens), ranks=4)
    assert [measured.metrics[f"token_{k}_accuracy"] for k in (2, 3, 4)] == pytest.approx(shares)
    assert measured.acceptance[:, 0].tolist() == pytest.approx(shares, abs=1e-6)
    assert all(measured.metrics[f"token_{k}_top5"] >= measured.metrics[f"token_{k}_accuracy"] for k in (2, 3, 4))
    found.value.backward()
    assert all(p.grad is not None for p in heads.parameters())
    assert all(p.grad is None for p in model.parameters())


def test_the_backbones_own_loss_joins(model):
    heads, batch = noisy(MedusaHeads.of(model, 2).double()), a_batch(model)
    ahead, head = AheadOfHidden(heads, frozen=False), DraftHead(model)
    alone = ahead_loss(model, ahead, batch, head, [1.0, 0.5])
    both = ahead_loss(model, ahead, batch, head, [1.0, 0.5], backbone=0.25)
    own = torch.nn.functional.cross_entropy(
        model(batch["ids"], mask=batch["mask"]).logits.flatten(0, 1), batch["targets"].flatten()
    )
    assert float(both.value) == pytest.approx(float(own) + 0.25 * float(alone.value), rel=1e-6)
    both.value.backward()
    assert model.model.layers[0].self_attn.q_proj.weight.grad is not None


@pytest.mark.parametrize("kind", KINDS)
def test_modules_learn_on_a_model_that_stays(kind, model):
    mtp, batch = noisy(KINDS[kind](model.config, 2, tokens=SOME).double()), a_batch(model)
    model.requires_grad_(False)
    found = ahead_loss(model, AheadOfBlocks(mtp), batch, DraftHead(model, SOME), [1.0, 0.5])
    states = mtp(model, batch["ids"], mask=batch["mask"])
    learnt = (batch["targets"] != IGNORE).sum()
    wanted = 0.0
    for k, weight in ((1, 1.0), (2, 0.5)):
        logits = model.logits(states[k])[..., SOME].log_softmax(-1)
        for row, i in ((batch["targets"][:, k:] != IGNORE) & batch["mask"][:, k:]).nonzero().tolist():
            place = (batch["targets"][row, i + k] == SOME).nonzero()
            if len(place):
                wanted -= weight * float(logits[row, i, int(place)]) / float(learnt)
    assert float(found.value.detach()) == pytest.approx(wanted, rel=1e-6)
    found.value.backward()
    assert all(p.grad is not None for p in mtp.parameters())


def test_phases_of_a_joint_training():
    torch.manual_seed(0)
    model = build(LLAMA)
    from volvelle.adapt import apply

    apply(model, LoRA(rank=2))
    heads = MedusaHeads.of(model, 2)
    options = FitOptions(learning_rate=1e-2, warmup=0)
    objective = AheadObjective(
        model, AheadOfHidden(heads, frozen=False), options, weights=[1, 1], head=DraftHead(model),
        joint=Joint(rate=0.1, warmup=0.4),
    )  # fmt: skip
    first, second = objective.phases(10)
    assert [[phase.plays(step) for step in range(6)] for phase in (first, second)] == [
        [True] * 4 + [False] * 2,
        [False] * 4 + [True] * 2,
    ]
    assert set(first.parameters) == {f"ahead.{name}" for name, _ in heads.named_parameters()}
    optimizer = second.optimizer(second.parameters)
    rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    for name, p in second.parameters.items():
        assert rates[id(p)] == pytest.approx(1e-2 if name.startswith("ahead.") else 1e-3), name
    assert len(rates) == len(second.parameters) > len(first.parameters)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A small model from scratch, as a folder that transformers would read."""
    root = tmp_path_factory.mktemp("base")
    recipe = scratch(root, steps=60, learning_rate=3e-3)
    return train_language(recipe, folder(root, "base", "language", recipe), observer=Quiet()).run / "weights"


def recipe_for(tmp_path, base, **options):
    rows = [{"prompt": f"{n} lives", "completion": f" in {c} and works as a {j}."} for n, c, j in FACTS * 4]
    rows = [row | {"prompt": f"{i} {row['prompt']}"} for i, row in enumerate(rows)]
    data = tmp_path / "facts.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = {"steps": 6, "batch": 4, "samples": 2, "max_tokens": 12, "checkpoint_every": 2, "held_out_share": 0.2}
    return TrainDraft(model=str(base), data=str(data), **(settings | options))


KIND_OPTIONS = {
    "medusa": {"medusa": MedusaOptions(heads=2), "precision": "bf16"},
    "medusa-2": {"medusa": MedusaOptions(heads=2, backbone="lora"), "lora": LoRA(rank=2)},
    "sequential": {"kind": "mtp", "vocabulary": 60, "precision": "bf16"},
    "parallel": {"kind": "mtp", "mtp": MTPOptions(kind="parallel", depths=2), "precision": "bf16"},
    "small": {"kind": "small", "small": ModelShape(width=16, depth=1, heads=2)},
}


@pytest.mark.parametrize("name", KIND_OPTIONS)
def test_a_run_of_each_kind(name, base, tmp_path):
    recipe = recipe_for(tmp_path, base, **KIND_OPTIONS[name])
    run = folder(tmp_path, "run", "draft", recipe)
    ear = Ear()
    outcome = train_draft(recipe, run, observer=ear)
    assert outcome.interrupted is None
    assert outcome.after["accepted_per_step"] >= 1
    assert (run.path / "report.html").is_file()
    assert any("trains" in line for line in ear.said)
    model = load_run(base)
    if name.startswith("medusa"):
        heads = read_medusa(run.path / "medusa", model)
        assert heads.count == 2
        assert heads.acceptance is not None
        assert float(heads.acceptance[0, 0]) == pytest.approx(outcome.after["token_2_accuracy"], abs=1e-3)
        assert (run.path / "adapter" / "adapter_config.json").is_file() == (name == "medusa-2")
        assert any(bool(p.any()) for p in heads.parameters())
    elif name == "small":
        assert load_run(run.path).config.context == model.config.context
        assert outcome.after["loss"] < outcome.before["loss"]
    else:
        mtp = read_mtp(run.path / "mtp", model)
        assert isinstance(mtp, SequentialMTP if name == "sequential" else ParallelMTP)
        assert (mtp.tokens is None) == (name == "parallel")
        assert outcome.after["token_2_loss"] < outcome.before["token_2_loss"]


@pytest.mark.parametrize("distill", [False, True])
def test_ngrams_are_counted_not_trained(distill, base, tmp_path):
    run = folder(tmp_path, "run", "draft", recipe := recipe_for(tmp_path, base, kind="ngram", distill=distill))
    ear, model = Ear(), load_run(base)
    outcome = train_draft(recipe, run, observer=ear)
    assert (outcome.step, outcome.interrupted) == (0, None)
    assert outcome.after["accepted_per_step"] >= 1
    assert (run.path / "report.html").is_file()
    assert any("nothing is trained" in line for line in ear.said)
    drafter = open_drafter(run.path, model)
    assert isinstance(drafter, NGram)
    if distill:
        answers = [json.loads(line) for line in (run.path / "data" / "answers.jsonl").read_text().splitlines()]
        found = {tuple(text) for text in drafter.texts}
        assert found <= {tuple(one["answer"]) for one in answers}
    else:
        assert model.tokenizer is not None
        assert " lives" not in model.tokenizer.decode([token for text in drafter.texts for token in text])
        assert "works as a" in model.tokenizer.decode(drafter.texts[0])


@pytest.mark.parametrize("name", ["medusa", "medusa-2", pytest.param("sequential", marks=pytest.mark.slow)])
def test_stopped_it_goes_on_bit_for_bit(name, base, tmp_path):
    recipe = recipe_for(tmp_path, base, samples=0, **KIND_OPTIONS[name])
    whole, part = (folder(tmp_path, n, "draft", recipe) for n in ("whole", "part"))
    train_draft(recipe, whole, observer=Quiet())
    stopped = train_draft(recipe, part, observer=Ear(stop=3))
    assert (stopped.interrupted, stopped.resume) == ("SIGINT", resume_command(part))
    assert resume_run(part.path, observer=Quiet()).interrupted is None
    for file in ("medusa/medusa_lm_head.safetensors", "adapter/adapter_model.safetensors", "mtp/model.safetensors"):
        assert (whole.path / file).is_file() == (part.path / file).is_file()
        if (whole.path / file).is_file():
            ours, theirs = load_file(whole.path / file), load_file(part.path / file)
            assert ours.keys() == theirs.keys()
            assert all(torch.equal(ours[name], theirs[name]) for name in ours), file


class Impatient(Ear):
    """Stops the run when answers are being made."""

    def work(self, label, done, total):
        import os

        if label.startswith("the model's answers"):
            os.kill(os.getpid(), signal.SIGINT)


def test_its_own_answers_are_made_once(base, tmp_path, monkeypatch):
    monkeypatch.setattr("volvelle.train.draft_data.ROWS", 4)
    recipe = recipe_for(tmp_path, base, distill=True, samples=0, medusa=MedusaOptions(heads=2))
    run = folder(tmp_path, "run", "draft", recipe)
    stopped = train_draft(recipe, run, observer=Impatient())
    assert stopped.interrupted == "SIGINT"
    path = run.path / "data" / ANSWERS
    first = path.read_text()
    assert len(first.splitlines()) == 4
    path.write_text(first + '{"prompt": [1, 2')  # killed while it wrote
    finished = resume_run(run.path, observer=Quiet())
    assert finished.interrupted is None
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert path.read_text().startswith(first)
    assert len(lines) == 16
    model = load_run(base)
    from volvelle.decode import generate

    for record in lines[::5]:
        assert record["answer"] == generate(model, record["prompt"], max_tokens=12).tokens
    assert not math.isnan(finished.after["token_2_loss"])


def test_plain_text_gives_prompts_too(base, tmp_path):
    recipe = recipe_for(tmp_path, base, distill=True, max_tokens=8, steps=2, samples=1, examples=4)
    text = tmp_path / "text.txt"
    text.write_text(" ".join(f"{n} lives in {c}." for n, c, _ in FACTS * 20))
    recipe = dataclasses.replace(recipe, data=str(text), medusa=MedusaOptions(heads=1))
    outcome = train_draft(recipe, folder(tmp_path, "run", "draft", recipe), observer=Quiet())
    assert outcome.samples[0].after is not None


def test_frequent_tokens_are_counted_where_they_are_learnt():
    assert frequent_tokens([torch.tensor([4, 4, 1, 9])], 12, 2, always=[7]).tolist() == [4, 7]
    with pytest.raises(VolvelleError, match="different tokens"):
        DraftHead(build(LLAMA), torch.tensor([1, 1]))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "small", "vocabulary": 50}, "drafts all tokens"),
        ({"kind": "ngram", "vocabulary": 50}, "n-grams draft all tokens"),
        ({"ranks": 2}, "one process"),
        ({"vocabulary": 0}, "at least 1"),
    ],
)
def test_options_that_cannot_be(options, message, tmp_path):
    with pytest.raises(UsageError, match=message):
        recipe_for(tmp_path, "base", **options)
