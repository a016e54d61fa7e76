"""Measuring a language model on examples: loss and perplexity of the completions, BLEU and ROUGE of what it writes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from volvelle.data.loader import Loader
from volvelle.data.packing import Windows, collate_windows, tokens_of
from volvelle.data.pairs import pairs
from volvelle.data.text import Corpus, Example, OnBad, spread
from volvelle.data.tokens import ONE_TEXT, Layout, Tokenizer, prompt_ids
from volvelle.errors import VolvelleError
from volvelle.parts.metrics.rouge import rouge_l, rouge_n
from volvelle.systems.language.encoder_decoder_config import EncoderDecoderConfig
from volvelle.train.language import held_out_loss

if TYPE_CHECKING:
    from volvelle.decode.options import Beams


@dataclass(frozen=True)
class Prompted:
    """A prompt with all its right answers: examples that share the prompt are one."""

    example: Example
    references: tuple[str, ...]


@dataclass(frozen=True)
class Evaluation:
    """Metrics (`loss`, `perplexity`, and those of `text_scores` when something was written), and the texts."""

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


def rouge(outputs: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, float]:
    """Mean F of ROUGE-1, ROUGE-2 and ROUGE-L (Lin 2004), 0 to 100, each output by the reference that it fits best.

    >>> rouge(["the cat sat"], [["a dog", "the cat sat down"]])["rouge1"]
    85.714286
    """
    kinds = {
        "rouge1": lambda one, other: rouge_n(one, other, 1).f,
        "rouge2": lambda one, other: rouge_n(one, other, 2).f,
        "rougeL": lambda one, other: rouge_l(one, other).f,
    }
    pairs_of_texts = list(zip(outputs, references, strict=True))
    sums = {
        name: sum(max(score(text, right) for right in rights) for text, rights in pairs_of_texts)
        for name, score in kinds.items()
    }
    return {name: round(100 * total / max(1, len(outputs)), 6) for name, total in sums.items()}


def text_scores(outputs: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, float]:
    """All measures of texts by their right answers: `bleu`, `rouge1`, `rouge2` and `rougeL`, 0 to 100."""
    return {"bleu": bleu(outputs, references), **rouge(outputs, references)}


def layout_of(config: Any) -> Layout:
    """How a model of this configuration wants its examples."""
    return pairs(config.start) if isinstance(config, EncoderDecoderConfig) else ONE_TEXT


def answerable(model: Any, prompts: Sequence[Prompted], max_tokens: int, on_bad: OnBad = "stop") -> list[Prompted]:
    """The prompts; with `on_bad="skip"` those of them that leave room for an answer of `max_tokens`."""
    if on_bad == "stop":
        return list(prompts)  # one that is too long stops the run when it is asked
    # An encoder-decoder's answers take no room from their prompts.
    apart = isinstance(model.config, EncoderDecoderConfig)
    room = model.config.context if apart else model.room - max_tokens
    return [p for p in prompts if len(prompt_ids(model.tokenizer, p.example)) <= room]


def write(
    model: Any,
    prompts: Sequence[Prompted],
    *,
    max_tokens: int = 64,
    batch: int = 16,
    sampling: Any = None,
    beams: Beams | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> list[str]:
    """What the model writes to each prompt, greedily unless `sampling` or `beams` are given.

    Surrounding space is dropped; where references exist and all are one line, only the first line counts.
    """
    from volvelle.decode import Sampling, beam_search, generate_batch

    tokenizer = model.tokenizer
    ids = [prompt_ids(tokenizer, p.example) for p in prompts]
    answers = [text.strip() for p in prompts for text in p.references]
    one_line = bool(answers) and not any("\n" in text for text in answers)
    outputs = [""] * len(prompts)
    # Similar lengths together: less padding, and rows of a batch end closer to each other.
    order = sorted(range(len(prompts)), key=lambda i: len(ids[i]))
    for start in range(0, len(order), batch):
        part = order[start : start + batch]
        asked = [ids[i] for i in part]
        if beams is None:
            found = generate_batch(model, asked, sampling=sampling or Sampling(), max_tokens=max_tokens)
        else:
            found = beam_search(model, asked, beams=beams, max_tokens=max_tokens)
        for i, generation in zip(part, found, strict=True):
            text = generation.text.strip()
            outputs[i] = text.split("\n")[0].rstrip() if one_line else text
        if progress:
            progress(min(start + batch, len(order)), len(order))
    return outputs


def evaluation_loader(
    corpus: Corpus,
    tokenizer: Tokenizer,
    *,
    length: int,
    batch: int,
    on_bad: OnBad = "stop",
    limit: int | None = None,
    layout: Layout = ONE_TEXT,
) -> Loader:
    """The corpus in a fixed order, samples of similar length together, for measuring a loss.

    `limit` is the most examples (at even distances) or windows of text (from its beginning) that are looked at;
    `layout` is how the model wants them.
    """
    if corpus.documents and layout is ONE_TEXT:
        tokens = tokens_of(corpus.documents, tokenizer)
        windows = Windows(tokens if limit is None else tokens[: limit * length + 1], length)
        return Loader(windows, batch, seed=0, collate=collate_windows, shuffle=False)
    part = corpus if limit is None else replace(corpus, examples=spread(corpus.examples, limit))
    dataset = layout.encode(part, tokenizer, context=length, on_bad=on_bad)
    return Loader(dataset, batch, seed=0, collate=layout.collate, shuffle=False, lengths=dataset.lengths)


def evaluate_language(
    model: Any,
    corpus: Corpus,
    *,
    length: int | None = None,
    batch: int = 8,
    outputs: int | None = None,
    max_tokens: int = 64,
    beams: Beams | None = None,
    precision: str = "fp32",
    on_bad: OnBad = "stop",
    progress: Callable[[int, int], None] | None = None,
) -> Evaluation:
    """Completion loss and perplexity over the corpus; BLEU and ROUGE over the first `outputs` prompts (None: all).

    `model` carries its tokenizer. `length` is the longest sample (None: the model's context); `beams` searches for the
    answers, which are greedy without. Plain documents have no references and get no scores of texts.
    """
    if model.tokenizer is None:
        raise VolvelleError("this model has no tokenizer, so it cannot read text")
    was_training = model.training
    model.eval()
    try:
        context = min(length or model.room, model.room)
        layout = layout_of(model.config)
        loader = evaluation_loader(corpus, model.tokenizer, length=context, batch=batch, on_bad=on_bad, layout=layout)
        metrics = held_out_loss(model, loader, precision)
        prompts = answerable(model, prompted(corpus.examples), max_tokens, on_bad)[:outputs]
        if not prompts:
            return Evaluation(metrics)
        texts = write(model, prompts, max_tokens=max_tokens, beams=beams, progress=progress)
    finally:
        model.train(was_training)
    return Evaluation(metrics | text_scores(texts, [p.references for p in prompts]), prompts, texts)
