"""Measuring a language model on examples: loss and perplexity of the completions, BLEU of what it writes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from volvelle.data.loader import Loader
from volvelle.data.packing import Windows, collate_windows, tokens_of
from volvelle.data.text import Corpus, Example, OnBad
from volvelle.data.tokens import Tokenizer, collate, encode_corpus, prompt_ids
from volvelle.errors import VolvelleError
from volvelle.train.language import held_out_loss

T = TypeVar("T")


@dataclass(frozen=True)
class Prompted:
    """A prompt with all its right answers: examples that share the prompt are one."""

    example: Example
    references: tuple[str, ...]


@dataclass(frozen=True)
class Evaluation:
    """Metrics (`loss`, `perplexity`, and `bleu` when something was written), and what was written to each prompt."""

    metrics: dict[str, float]
    prompts: list[Prompted] = field(default_factory=list)
    outputs: list[str] = field(default_factory=list)


def prompted(examples: Sequence[Example], limit: int | None = None) -> list[Prompted]:
    """Examples grouped by prompt, in order of first appearance, at most `limit` of them.

    >>> [p.references for p in prompted([Example("a", ("x", "y")), Example("b", ("z",)), Example("a", ("w",))])]
    [('x', 'y', 'w'), ('z',)]
    """
    groups: dict[Any, list[Example]] = {}
    for example in examples:
        turns = None if example.messages is None else tuple((m["role"], m["content"]) for m in example.messages[:-1])
        groups.setdefault((example.prompt, turns), []).append(example)
    found = [
        Prompted(group[0], tuple(dict.fromkeys(text for example in group for text in example.completions)))
        for group in groups.values()
    ]
    return found[:limit]


def spread(items: Sequence[T], count: int) -> list[T]:
    """At most `count` items at even distances: files are often sorted, and their beginning is no sample of them.

    >>> spread("abcdefgh", 3)
    ['a', 'c', 'f']
    """
    count = min(count, len(items))
    return [items[i * len(items) // count] for i in range(count)]


def bleu(outputs: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """Corpus BLEU (Papineni et al. 2002) by sacrebleu, 0 to 100; each output may have its own number of references.

    >>> bleu(["the cat sat on the mat"], [["the cat sat on the mat", "a cat sat"]])
    100.0
    """
    from sacrebleu.metrics.bleu import BLEU

    most = max(map(len, references))
    streams = [[refs[i] if i < len(refs) else None for refs in references] for i in range(most)]
    score = BLEU(effective_order=False).corpus_score(list(outputs), streams).score  # type: ignore[arg-type]
    return round(score, 6)


def write(
    model: Any,
    prompts: Sequence[Prompted],
    *,
    max_tokens: int = 64,
    batch: int = 16,
    sampling: Any = None,
    progress: Callable[[int, int], None] | None = None,
) -> list[str]:
    """What the model writes to each prompt, greedily unless `sampling` is given.

    Surrounding space is dropped; where references exist and all are one line, only the first line counts.
    """
    from volvelle.decode import Sampling, generate_batch

    tokenizer = model.tokenizer
    ids = [prompt_ids(tokenizer, p.example) for p in prompts]
    answers = [text.strip() for p in prompts for text in p.references]
    one_line = bool(answers) and not any("\n" in text for text in answers)
    outputs = [""] * len(prompts)
    # Similar lengths together: less padding, and rows of a batch end closer to each other.
    order = sorted(range(len(prompts)), key=lambda i: len(ids[i]))
    for start in range(0, len(order), batch):
        part = order[start : start + batch]
        found = generate_batch(model, [ids[i] for i in part], sampling=sampling or Sampling(), max_tokens=max_tokens)
        for i, generation in zip(part, found, strict=True):
            text = generation.text.strip()
            outputs[i] = text.split("\n")[0].rstrip() if one_line else text
        if progress:
            progress(min(start + batch, len(order)), len(order))
    return outputs


def evaluation_loader(
    corpus: Corpus, tokenizer: Tokenizer, *, length: int, batch: int, on_bad: OnBad = "stop", limit: int | None = None
) -> Loader:
    """The corpus in a fixed order, samples of similar length together, for measuring a loss.

    `limit` is the most examples (at even distances) or windows of text (from its beginning) that are looked at.
    """
    if corpus.documents:
        tokens = tokens_of(corpus.documents, tokenizer)
        windows = Windows(tokens if limit is None else tokens[: limit * length + 1], length)
        return Loader(windows, batch, seed=0, collate=collate_windows, shuffle=False)
    part = corpus if limit is None else Corpus(corpus.path, examples=spread(corpus.examples, limit))
    dataset = encode_corpus(part, tokenizer, context=length, on_bad=on_bad)
    return Loader(dataset, batch, seed=0, collate=collate, shuffle=False, lengths=dataset.lengths)


def evaluate_language(
    model: Any,
    corpus: Corpus,
    *,
    length: int | None = None,
    batch: int = 8,
    outputs: int | None = None,
    max_tokens: int = 64,
    precision: str = "fp32",
    on_bad: OnBad = "stop",
    progress: Callable[[int, int], None] | None = None,
) -> Evaluation:
    """Completion loss and perplexity over the corpus, and BLEU over the first `outputs` prompts (None: all).

    `model` carries its tokenizer. `length` is the longest sample (None: the model's context). Plain documents have no
    references and get no BLEU.
    """
    if model.tokenizer is None:
        raise VolvelleError("this model has no tokenizer, so it cannot read text")
    was_training = model.training
    model.eval()
    try:
        context = min(length or model.config.context, model.config.context)
        loader = evaluation_loader(corpus, model.tokenizer, length=context, batch=batch, on_bad=on_bad)
        metrics = held_out_loss(model, loader, precision)
        prompts = prompted(corpus.examples, outputs)
        if not prompts:
            return Evaluation(metrics)
        texts = write(model, prompts, max_tokens=max_tokens, progress=progress)
    finally:
        model.train(was_training)
    score = bleu(texts, [p.references for p in prompts])
    return Evaluation(metrics | {"bleu": score}, prompts, texts)
