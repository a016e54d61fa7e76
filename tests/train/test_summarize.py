"""`train summarize`: it learns, leaves a model that every later verb opens, resumes exactly, and is adapted."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

from volvelle.adapt import load_run
from volvelle.adapt.methods import LoRA
from volvelle.adapt.prefix_methods import PrefixTuning
from volvelle.cli.main import main
from volvelle.data.text import Corpus, Example, read_corpus
from volvelle.decode import Beams, beam_search, generate
from volvelle.errors import UsageError
from volvelle.runs import RunFolder
from volvelle.systems.language import EncoderDecoder
from volvelle.train import adapt_language, evaluate_language, resume_run, train_summarize
from volvelle.train.evaluate import bleu, prompted, rouge, text_scores
from volvelle.train.observer import Quiet
from volvelle.train.options import from_dict, to_dict
from volvelle.train.recipes.adapt import AdaptLanguage
from volvelle.train.recipes.summarize import SPECIAL, PairShape, TrainSummarize

ACTS = {"adds": "sum", "counts": "number", "sorts": "order", "finds": "place"}
THINGS = ("files", "lines", "words", "pages", "names")


class Ear(Quiet):
    """Remembers what was said; at step `stop` sends this process the signal a user would."""

    def __init__(self, stop=None):
        self.said, self.stop = [], stop

    def say(self, text):
        self.said.append(text)

    def progress(self, progress):
        if progress.step == self.stop:
            os.kill(os.getpid(), signal.SIGINT)


def write_data(folder):
    """Texts whose summary follows from two of their words."""
    draw, records = random.Random(0), []
    for number in range(240):
        act, thing = draw.choice(list(ACTS)), draw.choice(THINGS)
        filler = " ".join(draw.choices(("slowly", "again", "often", "here"), k=draw.randrange(1, 6)))
        text = f"Case {number}: it {filler} {act} all {thing} it is given."
        records.append({"prompt": text, "completion": f"The {ACTS[act]} of {thing}."})
    path = folder / "pairs.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def recipe(tmp_path, **options):
    shape = PairShape(width=48, depth=1, heads=4, context=64, dropout=0.0)
    settings = {
        "steps": 12, "batch": 16, "samples": 3, "vocabulary": 360, "evaluate_every": 5, "checkpoint_every": 4,
        "held_out_size": 20, "max_tokens": 16, "learning_rate": 5e-3, "model": shape, "beams": Beams(2),
    }  # fmt: skip
    return TrainSummarize(**({"data": str(write_data(tmp_path))} | settings | options))


def folder(root, name, kind, options):
    return RunFolder.create(name, root=root, kind=kind, config=to_dict(options))


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    root = tmp_path_factory.mktemp("summarize")
    options, ear = recipe(root, steps=150), Ear()
    return train_summarize(options, folder(root, "base", "summarize", options), observer=ear), ear.said


def test_it_learns_and_leaves_a_model_and_a_report(finished):
    outcome, said = finished
    assert outcome.after["loss"] < outcome.before["loss"] - 2
    assert outcome.after["rougeL"] > 60 > outcome.after["rougeL_of_beginning"]
    assert {"bleu", "rouge1", "rouge2", "rougeL"} < outcome.after.keys()
    assert len(outcome.samples) == 3
    page = outcome.report.read_text()
    assert "ROUGE-L" in page
    assert outcome.samples[0].after in page
    assert any("BART from scratch, trains all" in line.replace(";", ",") and "memory about" in line for line in said)
    model = load_run(outcome.run)
    assert isinstance(model, EncoderDecoder)
    text = model.tokenizer.encode_prompt("Case 7: it often sorts all pages it is given.")
    [answer] = beam_search(model, [text], max_tokens=16)
    assert answer.finish == "eos"
    assert answer.text.startswith("The ")


@pytest.mark.peer
def test_transformers_opens_it_with_its_tokenizer(finished):
    transformers = pytest.importorskip("transformers")
    path = finished[0].run / "weights"
    peer = transformers.AutoModelForSeq2SeqLM.from_pretrained(path).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(path)
    text = "Case 7: it often sorts all pages it is given."
    model = load_run(finished[0].run)
    ids = tokenizer(text, return_tensors="pt").input_ids
    assert ids[0].tolist() == model.tokenizer.encode_prompt(text)
    theirs = peer.generate(ids, max_new_tokens=16, num_beams=1, do_sample=False)
    assert tokenizer.decode(theirs[0], skip_special_tokens=True) == generate(model, ids[0], max_tokens=16).text


@pytest.mark.parametrize("denoise", [0.0, 1.5])
def test_an_interrupted_run_resumes_bit_for_bit(denoise, tmp_path):
    options = recipe(tmp_path, samples=0, held_out_size=4, denoise=denoise)
    whole, part = (folder(tmp_path, name, "summarize", options) for name in ("whole", "part"))
    train_summarize(options, whole, observer=Quiet())
    stopped = train_summarize(options, part, observer=Ear(stop=7))
    assert (stopped.interrupted, stopped.step) == ("SIGINT", 7)
    resumed = resume_run(part.path, observer=Quiet())
    assert resumed.step == 12
    one, other = (load_file(run.path / "weights" / "model.safetensors") for run in (whole, part))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_gapped_texts_teach_to_write_texts_out(tmp_path):
    held = write_data(tmp_path)
    losses = {}
    for denoise in (0.0, 2.0):
        options = recipe(tmp_path, steps=80, samples=0, held_out_size=4, denoise=denoise, data=str(held))
        run = folder(tmp_path, f"noisy-{denoise:g}", "summarize", options)
        train_summarize(options, run, observer=Quiet())
        model = load_run(run.path)
        text = model.tokenizer.encode_prompt("Case 7: it often sorts all pages it is given.")
        gapped = torch.tensor([[*text[:6], SPECIAL.index("<mask>"), *text[8:]]])
        with torch.no_grad():
            logits = model(torch.tensor([[2, *text[:-1]]]), source=gapped).logits
        losses[denoise] = float(torch.nn.functional.cross_entropy(logits[0], torch.tensor(text)))
    assert losses[2.0] < losses[0.0] / 2


@pytest.mark.parametrize("method", ["lora", "prefix", "full"])
def test_a_run_is_adapted_and_opened_again(finished, tmp_path, method):
    outcome, _ = finished
    path = tmp_path / "other.jsonl"
    examples = read_corpus(write_data(tmp_path)).examples[:80]
    path.write_text(
        "".join(json.dumps({"prompt": e.prompt, "completion": e.completions[0].upper()}) + "\n" for e in examples)
    )
    options = AdaptLanguage(
        model=str(outcome.run), data=str(path), method=method, lora=LoRA(rank=8, targets="all-linear"), steps=60,
        batch=16, learning_rate=3e-3 if method == "full" else 1e-2, prefix=PrefixTuning(length=8), samples=6,
        max_tokens=24, held_out_share=0.2, evaluate_every=30,
    )  # fmt: skip
    run = folder(tmp_path, "adapted", "adapt", options)
    adapted = adapt_language(options, run, observer=Quiet())
    assert adapted.after["loss"] < adapted.before["loss"] - 0.5
    assert adapted.after.keys() == {"loss", "perplexity", "bleu", "rouge1", "rouge2", "rougeL"}
    model = load_run(run.path, merged=True)
    source = model.tokenizer.encode_prompt(adapted.samples[0].prompt)
    assert generate(model, source, max_tokens=24).text.strip().split("\n")[0] == adapted.samples[0].after
    before = load_run(outcome.run)
    assert generate(before, source, max_tokens=24).text.strip() == adapted.samples[0].before


def test_evaluation_scores_what_is_written(finished):
    outcome, _ = finished
    model = load_run(outcome.run)
    corpus = Corpus("x", examples=[
        Example("Case 1: it here counts all words it is given.", ("The number of words.", "How many words.")),
        Example("Case 2: it here finds all lines it is given.", ("The place of lines.",)),
    ])  # fmt: skip
    found = evaluate_language(model, corpus, max_tokens=16, beams=Beams(3))
    prompts = prompted(corpus.examples)
    ids = [model.tokenizer.encode_prompt(p.example.prompt) for p in prompts]
    outputs = [a.text.strip() for a in beam_search(model, ids, beams=Beams(3), max_tokens=16)]
    assert found.outputs == outputs
    assert found.metrics | text_scores(outputs, [p.references for p in prompts]) == found.metrics
    long = Corpus("x", examples=[*corpus.examples, Example("word " * 70, ("Long.",), source="x:3")])
    assert evaluate_language(model, long, max_tokens=16, beams=Beams(3), on_bad="skip").outputs == outputs


def test_scores_of_texts():
    outputs, references = ["the cat sat", "a dog"], [["the cat sat down", "no"], ["a dog"]]
    assert rouge(outputs, references) == {"rouge1": 92.857143, "rouge2": 90.0, "rougeL": 92.857143}
    assert text_scores(outputs, references)["bleu"] == bleu(outputs, references)


def test_the_verbs_take_the_run(finished, capsys):
    run = str(finished[0].run)
    assert main(["generate", run, "Case 3: it adds all pages it is given.", "max_tokens=12", "beams.width=3"]) == 0
    beams = capsys.readouterr().out
    assert main(["generate", run, "Case 3: it adds all pages it is given."]) == 0
    greedy = capsys.readouterr().out
    assert "The " in beams
    assert "The " in greedy
    data = finished[0].run.parent.parent / "pairs.jsonl"
    data = next(finished[0].run.parent.glob("pairs.jsonl"), data)
    assert main(["eval", run, f"data={data}", "outputs=4", "max_tokens=12", "--json"]) == 0
    record = json.loads(capsys.readouterr().out.strip().splitlines()[-1])
    assert record["rougeL"] > 50
    out = finished[0].run.parent / "exported"
    assert main(["export", run, f"out={out}"]) == 0
    assert "AutoModelForSeq2SeqLM" in capsys.readouterr().out


@pytest.mark.slow
def test_two_ranks_take_the_steps_of_one(tmp_path):
    words = [f"data={write_data(tmp_path)}", "steps=4", "batch=8", "held_out_size=4", "samples=1", "vocabulary=300"]
    words += ["max_tokens=8", "beams.width=1", "model.width=32", "model.depth=1", "model.context=64", "model.dropout=0"]
    losses = []
    for options in (["accumulate=2"], ["ranks=2"], ["ranks=2", "shard=fsdp"]):
        name = "-".join(options).replace("=", "")
        command = [sys.executable, "-m", "volvelle", "train", "summarize", *words, *options, f"run={name}"]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        losses.append(RunFolder.open(tmp_path / "runs" / name).manifest["after"]["loss"])
    assert losses[1:] == pytest.approx([losses[0]] * 2, rel=1e-5)


def test_docstrings_are_collected_once_and_recorded(tmp_path):
    options = recipe(
        tmp_path, data="docstrings", packages=("asyncio", "email", "json", "logging", "zipfile", "unittest"), steps=2,
        held_out_share=0.3, held_out_size=3, samples=1, model=PairShape(width=16, depth=1, heads=2, dropout=0.0),
        checkpoint_every=1, vocabulary=300, beams=Beams(1), max_tokens=8, batch=4,
    )  # fmt: skip
    run = folder(tmp_path, "docs", "summarize", options)
    ear = Ear(stop=1)
    assert train_summarize(options, run, observer=ear).interrupted
    listed = json.loads((run.path / "data" / "packages.json").read_text())
    assert {p["split"] for p in listed["packages"]} == {"train", "held_out"}
    before = (run.path / "data" / "train.jsonl").stat().st_mtime_ns
    outcome = resume_run(run.path, observer=Quiet())
    assert (run.path / "data" / "train.jsonl").stat().st_mtime_ns == before
    assert "rougeL" in outcome.after
    assert any("installed packages" in line for line in ear.said)


def begin(tmp_path, changes):
    options = recipe(tmp_path, **changes)
    train_summarize(options, folder(tmp_path, None, "summarize", options), observer=Quiet())


def test_wrong_options_are_named(tmp_path):
    for changes, message in (
        ({"vocabulary": 200}, "at least 261 words, got 200"),
        ({"packages": ("json",)}, "packages: are for data=docstrings"),
        ({"max_tokens": 64}, "max_tokens: must be below model.context = 64, got 64"),
        ({"length": 65}, "length=65: the model's context is 64 tokens"),
        ({"pack": True}, "pack: an encoder-decoder's sources cannot share a row"),
    ):
        with pytest.raises(UsageError, match=message):
            begin(tmp_path, changes)
    with pytest.raises(UsageError, match=r"model.width: must be a multiple of heads = 4, got 50"):
        PairShape(width=50)


def test_the_recipe_survives_its_file(tmp_path):
    options = recipe(tmp_path, beams=Beams(3, 0.5, "never"))
    assert from_dict(TrainSummarize, to_dict(options)) == options
