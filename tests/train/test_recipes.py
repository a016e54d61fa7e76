from __future__ import annotations

import json
import os
import signal
import subprocess

import pytest
import torch
from safetensors.torch import load_file

from volvelle.adapt.methods import LoRA
from volvelle.data.text import Corpus, Example
from volvelle.errors import UsageError, VolvelleError
from volvelle.runs import RunFolder
from volvelle.train import adapt_language, resume_run, train_language
from volvelle.train.evaluate import bleu, prompted
from volvelle.train.observer import Quiet
from volvelle.train.options import to_dict
from volvelle.train.recipes.adapt import AdaptLanguage
from volvelle.train.recipes.language import ModelShape, TrainLanguage
from volvelle.train.resume import give_up, recipe_of_run
from volvelle.train.text_run import split

FACTS = [("Ada", "London", "poet"), ("Bo", "Oslo", "cook"), ("Cy", "Rome", "smith"), ("Di", "Bern", "judge")]
TEXT = "".join(f"{n} lives in {c} and works as a {j}. " * 6 + "\n" for n, c, j in FACTS * 4)


class Ear(Quiet):
    """Remembers what was said; at step `stop` sends this process the signal a user would."""

    def __init__(self, stop=None, number=signal.SIGINT):
        self.said, self.stop, self.number = [], stop, number

    def say(self, text):
        self.said.append(text)

    def progress(self, progress):
        if progress.step == self.stop:
            os.kill(os.getpid(), self.number)


def folder(root, name, kind, recipe):
    return RunFolder.create(name, root=root, kind=kind, config=to_dict(recipe))


def scratch(tmp_path, **options):
    data = tmp_path / "text.txt"
    data.write_text(TEXT)
    shape = ModelShape(width=32, depth=2, heads=2, context=96)
    settings = {"steps": 12, "batch": 4, "samples": 0, "vocabulary": 300, "evaluate_every": 5, "checkpoint_every": 4}
    return TrainLanguage(data=str(data), model=shape, **(settings | options))


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A small model from scratch, as a folder that transformers would read."""
    root = tmp_path_factory.mktemp("base")
    recipe = scratch(root, steps=30)
    return train_language(recipe, folder(root, "base", "language", recipe), observer=Quiet()).run / "weights"


def adaptation(tmp_path, base, **options):
    records = [
        {"who": n, "facts": [[n, "city", c], [n, "job", j]], "texts": [f"{n} is from {c}.", f"{c} is where {n} lives."]}
        for n, c, j in FACTS * 3
    ]
    data = tmp_path / "facts.jsonl"
    data.write_text(
        "".join(json.dumps(record | {"who": f"{record['who']}{i}"}) + "\n" for i, record in enumerate(records))
    )
    settings = {
        "prompt": "{{ who }} {{ facts }}:",
        "completion": "{{ texts }}",
        "steps": 10,
        "batch": 4,
        "samples": 0,
        "lora": LoRA(rank=2, dropout=0.1),
        "evaluate_every": 4,
        "checkpoint_every": 3,
        "accumulate": 2,
        "length": None,
        "held_out_share": 0.2,
    }
    return AdaptLanguage(model=str(base), data=str(data), **(settings | options))


def history(run):
    return [
        {k: v for k, v in record.items() if k != "seconds"} for record in run.metrics() if record["event"] != "resume"
    ]


def test_train_language_learns_and_leaves_a_model_and_a_report(tmp_path):
    recipe, ear = scratch(tmp_path, steps=40), Ear()
    run = folder(tmp_path, "run", "language", recipe)
    outcome = train_language(recipe, run, observer=ear)
    assert outcome.after["loss"] < outcome.before["loss"] - 0.5
    assert (run.path / "weights" / "model.safetensors").is_file()
    assert (run.path / "weights" / "tokenizer.json").is_file()
    assert outcome.report == run.path / "report.html"
    assert run.status == "finished"
    assert any("trains all" in line and "memory about" in line for line in ear.said)
    json.dumps(outcome.record())
    from volvelle.adapt import load_run

    model = load_run(run.path)
    assert model.tokenizer.decode(model.tokenizer.encode("Zoë?")) == "Zoë?"


@pytest.mark.parametrize(("stop", "number"), [(3, signal.SIGINT), (10, signal.SIGTERM)])
def test_train_language_interrupted_resumes_from_its_folder_bit_for_bit(tmp_path, stop, number):
    recipe = scratch(tmp_path)
    whole, part = (folder(tmp_path, name, "language", recipe) for name in ("whole", "part"))
    finished = train_language(recipe, whole, observer=Quiet())
    stopped = train_language(recipe, part, observer=Ear(stop, number))
    assert stopped.interrupted == number.name
    assert stopped.step == stop
    assert str(part.path) in stopped.resume
    assert RunFolder.open(part.path).status == "interrupted"
    resumed = resume_run(part.path, observer=Quiet())
    assert resumed.after == finished.after
    assert history(part) == history(whole)
    ours, theirs = (load_file(run.path / "weights" / "model.safetensors") for run in (part, whole))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    with pytest.raises(VolvelleError, match="already finished"):
        resume_run(part.path)


HALF = {"precision": "fp16", "average": 0.9, "workers": 2, "worker_kind": "processes"}


@pytest.mark.parametrize("options", [{}, {"pack": True}, {"checkpointing": True}, {"precision": "bf16"}, HALF])
def test_adapt_interrupted_resumes_bit_for_bit(tmp_path, base, options):
    recipe = adaptation(tmp_path, base, **options)
    whole, part = (folder(tmp_path, name, "adapt", recipe) for name in ("whole", "part"))
    finished = adapt_language(recipe, whole, observer=Quiet())
    assert finished.after["loss"] < finished.before["loss"]
    stopped = adapt_language(recipe, part, observer=Ear(5))
    assert stopped.interrupted == "SIGINT"
    assert not (part.path / "adapter" / "adapter_model.safetensors").exists()
    resumed = resume_run(part.path, observer=Quiet())
    assert resumed.before == finished.before
    assert resumed.after == finished.after
    assert history(part) == history(whole)
    ours, theirs = (load_file(run.path / "adapter" / "adapter_model.safetensors") for run in (part, whole))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    size = sum(f.stat().st_size for f in (part.path / "checkpoints" / "step-00000010").glob("*.safetensors"))
    assert size < 60_000, "only the adapter is in the checkpoint"


def test_a_run_answers_for_its_threads_and_says_what_it_left_out(tmp_path):
    from volvelle.inspect import live_threads

    recipe, ear = scratch(tmp_path, steps=6, precision="fp16", workers=2, evaluate_every=None), Ear()
    seen = []

    def progress(progress):
        seen.append({thread.name for thread in live_threads()})

    ear.progress = progress
    outcome = train_language(recipe, folder(tmp_path, "run", "language", recipe), observer=ear)
    assert {"volvelle-threads", "loader-0", "loader-1"} <= seen[2]
    assert any("fp16 autocast over fp32 weights" in line for line in ear.said)
    assert outcome.after["loss"] < outcome.before["loss"]
    assert not any(thread.name.startswith("loader") for thread in live_threads())


def test_packing_and_padding_train_on_the_same_loss(tmp_path, base):
    from volvelle.data.packing import PackedExamples, collate_packed
    from volvelle.data.text import read_corpus
    from volvelle.data.tokens import collate, encode_corpus
    from volvelle.systems.language.load import load_language_model
    from volvelle.train.language import completion_loss

    recipe = adaptation(tmp_path, base)
    model = load_language_model(base).double()
    corpus = read_corpus(recipe.data, prompt=recipe.prompt, completion=recipe.completion)
    dataset = encode_corpus(corpus, model.tokenizer, context=96)
    padded = completion_loss(model, collate([dataset[i] for i in range(len(dataset))]))
    packed = PackedExamples(dataset, 96)
    assert len(packed) < len(dataset)
    rows = completion_loss(model, collate_packed([packed[i] for i in range(len(packed))]))
    assert rows.weight == padded.weight
    torch.testing.assert_close(rows.value, padded.value, rtol=1e-10, atol=1e-10)


@pytest.mark.peer
def test_loss_is_transformers_masked_loss(tmp_path, base):
    transformers = pytest.importorskip("transformers")
    from volvelle.data.tokens import collate, encode_corpus
    from volvelle.systems.language.load import load_language_model
    from volvelle.train.language import completion_loss

    model = load_language_model(base).double()
    peer = transformers.AutoModelForCausalLM.from_pretrained(base).double()
    corpus = Corpus("f", [Example("Ada lives", (" in London.",)), Example("Bo", (" works as a cook. Bo",))])
    dataset = encode_corpus(corpus, model.tokenizer, context=96)
    batch = collate([dataset[0], dataset[1]])
    labels = torch.cat([torch.full((2, 1), -100), batch["targets"][:, :-1]], dim=1)
    theirs = peer(batch["ids"], attention_mask=batch["mask"].long(), labels=labels).loss
    # transformers takes the softmax in fp32 whatever the model is in
    torch.testing.assert_close(completion_loss(model, batch).value, theirs.double(), rtol=1e-6, atol=1e-6)


def test_full_fine_tuning_leaves_weights(tmp_path, base):
    recipe = adaptation(tmp_path, base, method="full", steps=3)
    assert recipe.learning_rate == 3e-5
    run = folder(tmp_path, "full", "adapt", recipe)
    adapt_language(recipe, run, observer=Quiet())
    before, after = load_file(base / "model.safetensors"), load_file(run.path / "weights" / "model.safetensors")
    assert all(not torch.equal(before[name], after[name]) for name in before)


def test_bad_data_stops_before_a_model_is_loaded(tmp_path):
    recipe = adaptation(tmp_path, tmp_path / "no-model")
    with open(recipe.data, "a") as file:
        file.write("{broken\n")
    run = folder(tmp_path, "run", "adapt", recipe)
    with pytest.raises(VolvelleError, match=r"facts\.jsonl:13: not JSON"):
        adapt_language(recipe, run, observer=Quiet())
    assert RunFolder.open(run.path).status == "failed"


def test_examples_longer_than_the_length_are_named(tmp_path, base):
    recipe = adaptation(tmp_path, base, length=20)
    with pytest.raises(VolvelleError, match=r"facts\.jsonl:\d+: \d+ tokens, more than the context of 20"):
        adapt_language(recipe, folder(tmp_path, "run", "adapt", recipe), observer=Quiet())
    recipe = adaptation(tmp_path, base, length=4096)
    with pytest.raises(UsageError, match="has a context of 96"):
        adapt_language(recipe, folder(tmp_path, "run2", "adapt", recipe), observer=Quiet())


def test_split_puts_no_prompt_on_both_sides():
    examples = [Example(f"p{i % 10}", (f"c{i}",)) for i in range(40)]
    train, held = split(Corpus("f", examples), 0.2, seed=1)
    assert not {e.prompt for e in train.examples} & {e.prompt for e in held.examples}
    assert len(train.examples) == 32
    assert split(Corpus("f", examples), 0.2, seed=1) == (train, held)
    with pytest.raises(VolvelleError, match="cannot be split"):
        split(Corpus("f", [Example("p", ("a",)), Example("p", ("b",))]), 0.5, seed=1)


@pytest.mark.parametrize("documents", [["one line\n" * 50], ["a", "b", "c", "d"], ["xy"]])
def test_split_text_keeps_every_character(documents):
    train, held = split(Corpus("f", documents=documents), 0.1, seed=0)
    assert "".join(train.documents + held.documents) == "".join(documents)
    assert train.documents
    assert held.documents


def test_bleu_is_sacrebleus_and_takes_ragged_references():
    import sacrebleu

    outputs = ["the cat sat on the mat", "there is a dog in the garden"]
    references = [["the cat sat on a mat", "a cat is on the mat"], ["a dog is in the garden"]]
    assert bleu(outputs, [r[:1] for r in references]) == pytest.approx(
        sacrebleu.corpus_bleu(outputs, [[r[0] for r in references]]).score, abs=1e-5
    )
    assert bleu(outputs, references) >= bleu(outputs, [r[:1] for r in references])
    assert bleu(outputs, [[o] for o in outputs]) == pytest.approx(100)


def test_prompts_are_grouped_with_all_their_references():
    talk = ({"role": "user", "content": "q"}, {"role": "assistant", "content": "x"})
    other = (talk[0], {"role": "assistant", "content": "y"})
    found = prompted([Example("", ("x",), talk), Example("", ("x",)), Example("", ("y",), other)])
    assert [p.references for p in found] == [("x", "y"), ("x",)]


def test_a_run_of_another_kind_or_one_still_running_is_not_resumed(tmp_path):
    run = RunFolder.create("tour", root=tmp_path, kind="tour", config={})
    with pytest.raises(VolvelleError, match="kind tour cannot be resumed"):
        resume_run(run.path)
    run = RunFolder.create("busy", root=tmp_path, kind="adapt", config={})
    with subprocess.Popen(["sleep", "60"]) as other:
        run.update_manifest(pid=other.pid)
        with pytest.raises(VolvelleError, match="still running"):
            resume_run(run.path)
        other.kill()
    assert RunFolder.open(run.path).status == "interrupted"


def test_a_run_of_a_lost_machine_can_be_taken_over(tmp_path):
    run = RunFolder.create("far", root=tmp_path, kind="adapt", config={})
    run.update_manifest(pid=1, host="another-machine", born="")
    with pytest.raises(VolvelleError, match="process 1 of another-machine") as caught:
        recipe_of_run(run.path)
    assert f"volvelle resume {run.path} lost=true" in caught.value.tip
    give_up(run.path)
    assert RunFolder.open(run.path).status == "interrupted"
    run.update_manifest(pid=os.getpid(), status="running")
    with pytest.raises(UsageError, match="ran on this machine"):
        give_up(run.path)


def test_a_pid_that_is_another_process_by_now_is_not_the_runs(tmp_path):
    run = RunFolder.create("reborn", root=tmp_path, kind="adapt", config={})
    assert RunFolder.open(run.path).status == "running"
    run.update_manifest(pid=os.getpid(), born="an earlier boot/17")
    assert RunFolder.open(run.path).status == "interrupted"


def test_answers_before_and_after_are_kept_and_shown(tmp_path, base):
    recipe = adaptation(tmp_path, base, samples=3, max_tokens=5, steps=4)
    run = folder(tmp_path, "run", "adapt", recipe)
    stopped = adapt_language(recipe, run, observer=Ear(2))
    assert [s.after for s in stopped.samples] == [None] * len(stopped.samples)
    outcome = resume_run(run.path, observer=Quiet())
    assert len(outcome.samples) == min(3, len({s.prompt for s in outcome.samples}))
    assert [s.before for s in outcome.samples] == [s.before for s in stopped.samples]
    assert all(len(s.references) == 2 and s.after is not None for s in outcome.samples)
    assert outcome.after.keys() == outcome.before.keys() == {"loss", "perplexity", "bleu", "rouge1", "rouge2", "rougeL"}
    page = outcome.report.read_text()
    assert "What it writes" in page
    assert outcome.samples[0].references[0] in page
    assert json.loads((run.path / "samples.json").read_text())[0]["prompt"] == outcome.samples[0].prompt


def test_evaluation_writes_what_greedy_decoding_writes_one_by_one(base):
    from volvelle.decode import generate
    from volvelle.systems.language.load import load_language_model
    from volvelle.train.evaluate import evaluate_language

    model = load_language_model(base)
    examples = [Example(f"{n} lives", (f" in {c}.",)) for n, c, _ in FACTS] + [
        Example("A much longer beginning", ("x",))
    ]
    found = evaluate_language(model, Corpus("f", examples), max_tokens=6, batch=2)
    alone = [
        generate(model, model.tokenizer.encode_prompt(e.prompt), max_tokens=6).text.strip().split("\n")[0].rstrip()
        for e in examples
    ]
    assert found.outputs == alone
    assert found.metrics["bleu"] == bleu(alone, [e.completions for e in examples])
