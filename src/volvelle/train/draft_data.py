"""What a drafter is trained on: the user's text, or the model's own greedy answers to the prompts in it.

Answers are made once, batch by batch, and kept in the run folder as token ids: what a drafter is to guess are the
model's tokens, which its text need not give back. A run that was stopped goes on behind the last whole batch.
"""

from __future__ import annotations

import dataclasses
import json
import os
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from volvelle.data.docstrings import installed
from volvelle.data.loader import Loader
from volvelle.data.packing import PackedExamples, Windows, collate_packed, tokens_of
from volvelle.data.prompts import HELD_OUT, TRAIN, write_prompts
from volvelle.data.text import Corpus, spread
from volvelle.data.tokens import Encoded, TokenDataset, collate, prompt_ids
from volvelle.errors import VolvelleError
from volvelle.runs import RunFolder
from volvelle.systems.language.decoder import Decoder
from volvelle.train.evaluate import prompted
from volvelle.train.interrupt import Interrupt
from volvelle.train.observer import Observer
from volvelle.train.recipes.draft import MANY, PROMPTS, TrainDraft
from volvelle.train.text_run import held_out_loader, training_loader

ANSWERS = "answers.jsonl"
PACKAGES = 60
"""Installed packages, at even distances, whose docstrings prompts are made from."""
ROWS = 32
"""Prompts answered together."""
BEGINNING = 32
"""Tokens of plain text that stand as a prompt."""


def with_prompts(recipe: TrainDraft, run: RunFolder, observer: Observer) -> TrainDraft:
    """The recipe with files as its data: prompts that it does not bring are made in the run folder, once."""
    if recipe.data != PROMPTS:
        return recipe
    folder = run.path / "data"
    if not (folder / HELD_OUT).is_file():
        made = write_prompts(
            folder, recipe.examples or MANY, recipe.held_out_size, spread(installed(), PACKAGES),
            progress=lambda done, total: observer.work("packages", done, total),
        )  # fmt: skip
        observer.say(made)
    return dataclasses.replace(recipe, data=str(folder / TRAIN), held_out=recipe.held_out or str(folder / HELD_OUT))


class Stopped(Exception):
    """A signal was heard while answers were made; its name, and how many there are of how many."""

    def __init__(self, name: str, done: int, total: int):
        super().__init__(name)
        self.name, self.done, self.total = name, done, total


class DraftData(NamedTuple):
    """Batches to train on and to measure with, and held-out prompts as token ids."""

    train: Loader
    held: Loader
    prompts: list[list[int]]


def user_data(recipe: TrainDraft, model: Decoder, train: Corpus, held: Corpus, context: int) -> DraftData:
    """The user's text as it is."""
    assert model.tokenizer is not None
    loader = training_loader(train, model.tokenizer, recipe, context)
    held_loader = held_out_loader(held, model.tokenizer, recipe, context)
    return DraftData(loader, held_loader, prompts_of(held, model, context - recipe.max_tokens))


def own_answers(
    recipe: TrainDraft, model: Decoder, train: Corpus, held: Corpus, context: int, run: RunFolder, observer: Observer
) -> DraftData:
    """The model's greedy answers to the prompts of both sides.

    Raises Stopped when a signal is heard, and VolvelleError where no prompt leaves room for an answer.
    """
    room = context - recipe.max_tokens
    asked = prompts_of(train, model, room)
    asked = asked if recipe.examples is None else spread(asked, recipe.examples)
    sides = [asked, spread(prompts_of(held, model, room), recipe.held_out_size)]
    if not all(sides):
        raise VolvelleError(
            f"{train.path}: no prompt leaves room for an answer of {recipe.max_tokens} tokens in {context}",
            tip="a smaller max_tokens, or a larger length",
        )
    (run.path / "data").mkdir(exist_ok=True)
    answers = _answered(run.path / "data" / ANSWERS, [p for side in sides for p in side], model, recipe, observer)
    count, total = len(sides[0]), sum(map(len, answers))
    observer.say(f"{len(answers):,} answers of the model, {total:,} tokens, in {run.path / 'data' / ANSWERS}")
    encoded = [
        Encoded([*prompt, *answer], [False] * len(prompt) + [True] * len(answer))
        for prompt, answer in zip([p for side in sides for p in side], answers, strict=True)
    ]
    parts = [TokenDataset(part, ["an answer"] * len(part)) for part in (encoded[:count], encoded[count:])]
    if recipe.pack:
        loader = Loader(PackedExamples(parts[0], context), recipe.batch, seed=recipe.seed, collate=collate_packed)
    else:
        loader = Loader(parts[0], recipe.batch, seed=recipe.seed, collate=collate, lengths=parts[0].lengths)
    measured = Loader(parts[1], recipe.batch, seed=0, collate=collate, shuffle=False, lengths=parts[1].lengths)
    return DraftData(loader, measured, sides[1])


def prompts_of(corpus: Corpus, model: Decoder, room: int) -> list[list[int]]:
    """The prompts of a corpus that have at most `room` tokens; of plain text, beginnings at even distances."""
    assert model.tokenizer is not None
    if not corpus.documents:
        found = (prompt_ids(model.tokenizer, p.example) for p in prompted(corpus.examples))
        return [ids for ids in found if len(ids) <= room]
    tokens = tokens_of(corpus.documents, model.tokenizer).tolist()
    length = min(BEGINNING, room)
    return [tokens[at : at + length] for at in range(0, max(1, len(tokens) - length), 4 * BEGINNING) if length > 0]


def fewer(corpus: Corpus, most: int | None) -> Corpus:
    """At most so many examples, or documents, at even distances."""
    if most is None:
        return corpus
    examples, documents = spread(corpus.examples, most), spread(corpus.documents, most)
    return dataclasses.replace(corpus, examples=examples, documents=documents)


def learnt_tokens(dataset: Any) -> Iterator[Tensor]:
    """The tokens that each sample of a data set is to teach."""
    if isinstance(dataset, PackedExamples):
        dataset = dataset.dataset
    for i in range(len(dataset)):
        ids, other = dataset[i]
        yield other[other >= 0] if isinstance(dataset, Windows) else ids[other]


def _answered(
    path: Path, prompts: Sequence[list[int]], model: Decoder, recipe: TrainDraft, observer: Observer
) -> list[list[int]]:
    """The answers to all prompts; those that the file holds are not made again."""
    from volvelle.decode import generate_batch

    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))  # similar lengths together: less padding
    known = _read(path)
    if [prompt for prompt, _ in known] != [prompts[i] for i in order[: len(known)]]:
        raise VolvelleError(f"{path}: holds answers to other prompts", tip="delete it, and the run begins anew")
    began, fresh, already = time.monotonic(), 0, len(known)
    with Interrupt() as interrupt, open(path, "a", encoding="utf-8") as file:
        for start in range(len(known), len(order), ROWS):
            asked = [prompts[i] for i in order[start : start + ROWS]]
            found = [list(g.tokens) for g in generate_batch(model, asked, max_tokens=recipe.max_tokens)]
            known += zip(asked, found, strict=True)
            lines = (json.dumps({"prompt": p, "answer": a}) + "\n" for p, a in zip(asked, found, strict=True))
            file.write("".join(lines))
            file.flush()
            os.fsync(file.fileno())
            fresh += sum(map(len, found))
            seconds = time.monotonic() - began
            left = seconds * (len(order) - len(known)) / (len(known) - already)
            observer.work(_label(fresh / seconds, left), len(known), len(order))
            if interrupt.name is not None:
                raise Stopped(interrupt.name, len(known), len(order))
    answers: list[list[int]] = [[] for _ in prompts]
    for place, (_, answer) in zip(order, known, strict=True):
        answers[place] = answer
    return answers


def _read(path: Path) -> list[tuple[list[int], list[int]]]:
    """The whole lines of the file; a torn one behind them is cut off."""
    if not path.is_file():
        return []
    content = path.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    if len(whole) < len(content):
        with open(path, "r+b") as file:
            file.truncate(len(whole))
    records = [json.loads(line) for line in whole.splitlines()]
    return [(record["prompt"], record["answer"]) for record in records]


def _label(rate: float, left: float) -> str:
    minutes, seconds = divmod(int(left), 60)
    return f"the model's answers, {rate:,.0f} tokens/s, {minutes}:{seconds:02d} left"
