"""The language stages: a chat answer of the real model, drafts for it, and an adapter trained, judged and merged."""

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
DRAFTED = {
    "a copy": "Repeat this text word for word:\n\nThe harbour was built by the engineer Clara Whitmore. Its stone pier "
    "shelters forty fishing boats from the western storms.",
    "code": "Rename the variable result to amount and print the whole function again:\n\ndef total(prices, rate):\n"
    "    result = 0\n    for price in prices:\n        result = result + price * rate\n    return result\n",
    "a question": QUESTION,
}
"""Prompts to draft for: answers that repeat themselves or the prompt, and one that does not."""


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


def draft(tour: Tour) -> None:
    """Answer prompts plainly and with drafts by counts, and compare the answers token for token."""
    from volvelle.decode import NGram, generate
    from volvelle.decode.policy import Adaptive

    model = open_language_model(MODEL)
    tokenizer, policy = model.tokenizer, Adaptive()
    assert tokenizer is not None
    rows, pieces = [], []
    for kind, text in DRAFTED.items():
        ids, most = tokenizer.chat_ids([{"role": "user", "content": text}]), 16 if tour.quick else 96
        plain = generate(model, ids, max_tokens=most)
        drafted = generate(model, ids, max_tokens=most, drafter=NGram(), policy=policy)
        rates = plain.tokens_per_second, drafted.tokens_per_second
        same = drafted.tokens == plain.tokens
        rows.append((kind, f"{rates[0]:.1f}", f"{rates[1]:.1f}", f"{drafted.accepted_per_step:.2f}", same))
        pieces.append((kind, drafted.text))
        say(f"      {kind}: {rates[0]:.1f} tokens/s plainly, {rates[1]:.1f} with drafts, {rows[-1][3]} tokens a step")
    equal = sum(same for *_, same in rows)
    say(f"      {equal} of {len(rows)} answers with drafts are the plain ones, token for token")
    tour.report.text(
        "Greedy answers. What followed the last tokens before, in prompt and answer, is drafted; the model checks it "
        "in one step and keeps what it would have written itself. Where drafts do not pay they are left out."
    )
    heads = ("prompt", "tokens/s plainly", "with drafts", "tokens a step", "the same answer")
    tour.report.table(heads, [(*row, "yes" if same else "no: a near tie") for *row, same in rows])
    tour.report.table(("prompt", "answer"), pieces)
    tour.tiles.append(("drafts", f"{equal} of {len(rows)} equal", f"up to {max(row[3] for row in rows)} tokens a step"))
    tour.results["draft"] = {kind: {"tokens_a_step": float(step), "same": same} for kind, _, _, step, same in rows}
    tour.next.append(f'volvelle generate {MODEL} "List the planets." draft=ngram stats=true')


def adapt(tour: Tour) -> None:
    """Train a LoRA adapter on sentences about countries; judge it on countries and phrasings it never saw."""
    from volvelle.train.adaptation import adapt_language
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
    run, outcome = tour.train("adapt", "adapt", recipe, adapt_language)
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
