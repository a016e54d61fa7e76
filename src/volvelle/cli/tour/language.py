"""The language stages: a chat answer of the real model, and an adapter trained, judged and merged."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from volvelle.cli.console import say
from volvelle.cli.models import choose_dtype, open_language_model
from volvelle.cli.tour.frame import Tour
from volvelle.files import write_atomic

if TYPE_CHECKING:
    from volvelle.train.outcome import Outcome

MODEL = "smollm2"
PROMPT = "{{ prompt }}\nIn a sentence:"
QUESTION = "Why does the sea look blue? Answer in two sentences."


def chat(tour: Tour) -> None:
    """Ask the instruction-tuned model a question, greedily."""
    from volvelle.decode import generate
    from volvelle.errors import VolvelleError

    model = open_language_model(MODEL)
    tokenizer = model.tokenizer
    if tokenizer is None:
        raise VolvelleError(f"{MODEL}: came without a tokenizer")
    ids = tokenizer.chat_ids([{"role": "user", "content": QUESTION}])
    answer = generate(model, ids, max_tokens=24 if tour.quick else 72)
    say(f"      you    {QUESTION}", f"      model  {answer.text}")
    say(f"      {len(answer.tokens)} tokens, {answer.tokens_per_second:.1f} a second")
    tour.report.text(f"SmolLM2-135M-Instruct, 4-bit weights from its GGUF file opened as {model.dtype}.")
    tour.report.table(("", "text"), [("you", QUESTION), ("model", answer.text)])
    tour.tiles.append(("chat", f"{answer.tokens_per_second:.1f} tokens/s", f"{len(answer.tokens)} tokens, batch 1"))
    tour.results["chat"] = {"text": answer.text, "tokens_per_second": answer.tokens_per_second}
    tour.next.append(f"volvelle chat {MODEL}")


def adapt(tour: Tour) -> None:
    """Train a LoRA adapter on sentences about countries; judge it on countries and phrasings it never saw."""
    from volvelle.cli.training import console
    from volvelle.runs import RunFolder
    from volvelle.train.adaptation import adapt_language
    from volvelle.train.options import to_dict
    from volvelle.train.recipes.adapt import AdaptLanguage

    train, held_out = _write_data(tour.path / "data")
    reduced = str(choose_dtype("auto")[0]) == "torch.bfloat16"
    recipe = AdaptLanguage(
        model=MODEL,
        data=str(train),
        held_out=str(held_out),
        prompt=PROMPT,
        completion="{{ completion }}",
        held_out_size=24 if tour.quick else 200,
        steps=4 if tour.quick else 60,
        batch=8,
        precision="bf16" if reduced else "fp32",
        samples=2 if tour.quick else 6,
        max_tokens=40,
        checkpoint_every=None,
    )
    run = RunFolder.create("adapt", root=tour.path, kind="adapt", config=to_dict(recipe))
    with console() as observer:
        outcome = adapt_language(recipe, run, observer=observer)
    if outcome.interrupted is not None:
        raise KeyboardInterrupt
    merged = _merged_loss(run, held_out, recipe.held_out_size)
    _show(tour, run, outcome, merged)
    tour.next += [f"volvelle eval {run.path} data={held_out}", f"volvelle export {run.path} to=peft"]


def _write_data(folder: Path) -> tuple[Path, Path]:
    from volvelle.data.countries import country_examples, read_countries

    countries = read_countries()
    paths = []
    for split in ("train", "heldout"):
        examples = country_examples(countries, split=split)
        path = folder / f"{split}.jsonl"
        write_atomic(path, "".join(json.dumps(example, ensure_ascii=False) + "\n" for example in examples))
        paths.append(path)
    return paths[0], paths[1]


def _merged_loss(run, held_out: Path, size: int) -> dict[str, float]:
    """Held-out loss with the adapter beside the weights and folded into them, both in fp32."""
    import dataclasses

    import torch

    from volvelle import adapt
    from volvelle.data.text import read_corpus
    from volvelle.train.evaluate import evaluate_language

    corpus = read_corpus(held_out, prompt=PROMPT, completion="{{ completion }}")
    part = dataclasses.replace(corpus, examples=corpus.examples[:size])
    losses = {}
    model = adapt.load_run(run.path, dtype=torch.float32)
    losses["beside"] = evaluate_language(model, part, outputs=0).metrics["loss"]
    adapt.merge(model, keep=False)
    losses["merged"] = evaluate_language(model, part, outputs=0).metrics["loss"]
    return losses


def _show(tour: Tour, run, outcome: Outcome, merged: dict[str, float]) -> None:
    from volvelle.train.report import training_curves

    before, after = outcome.before["loss"], outcome.after["loss"]
    say(
        f"      held-out loss a token: {before:.3f} before, {after:.3f} after; "
        f"in fp32 {merged['beside']:.5f} with the adapter beside the weights, {merged['merged']:.5f} merged"
    )
    for sample in outcome.samples[:2]:
        say(f"      {sample.prompt}", f"        before  {sample.before}", f"        after   {sample.after}")
    tour.report.text(
        "A table row in, a sentence out: sentences made from templates over GeoNames' country table (CC BY 4.0). The "
        "held-out countries, and the held-out templates, occur nowhere in the training data."
    )
    tour.report.table(
        ("held-out loss a token", "value"),
        [
            ("before", before),
            ("after", after),
            ("after, fp32, adapter beside the weights", merged["beside"]),
            ("after, fp32, adapter merged into the weights", merged["merged"]),
        ],
    )
    training_curves(tour.report, run.metrics())
    tour.report.samples(outcome.samples)
    tour.tiles.append(("held-out loss", f"{after:.3f}", f"before: {before:.3f}"))
    tour.results["adapt"] = {"before": outcome.before, "after": outcome.after, "fp32": merged, "run": str(run.path)}
