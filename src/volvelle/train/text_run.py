"""What the recipes on text share: reading and splitting the data, batches, the first line, and closing a run."""

from __future__ import annotations

import contextlib
import json
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import torch

from volvelle.adapt.files import peft_reads, peft_type
from volvelle.data.loader import Loader
from volvelle.data.packing import PackedExamples, Windows, collate_packed, collate_windows
from volvelle.data.text import Corpus, read_corpus
from volvelle.data.tokens import ONE_TEXT, Layout, Tokenizer
from volvelle.errors import UsageError, VolvelleError
from volvelle.files import write_atomic
from volvelle.inspect.threads_peek import answer_threads
from volvelle.runs import RunFolder
from volvelle.systems.language.encoder_decoder_config import ModelConfig
from volvelle.systems.language.mtp import MTP
from volvelle.systems.language.tokenizer import TextTokenizer
from volvelle.train.estimate import MemoryEstimate, estimate_memory, largest_batch
from volvelle.train.evaluate import evaluation_loader
from volvelle.train.loop import FitResult
from volvelle.train.mtp import TOKEN_HEADER, token_rows
from volvelle.train.observer import Observer, say_first
from volvelle.train.outcome import Outcome, Sample, settled
from volvelle.train.ranks import Ranks
from volvelle.train.recipes.text import TextOptions
from volvelle.train.report import begun, ended, tiles_of_work, training_curves


class OnPictures(Protocol):
    """What a recipe on pictures says of them."""

    @property
    def data(self) -> str:
        """What it trains on."""
        ...

    @property
    def held_out(self) -> str | None:
        """What it measures on, where that is given."""
        ...


SHOWN = 8
"""Samples in the report; all are in samples.json."""


def read_split(recipe: TextOptions, observer: Observer) -> tuple[Corpus, Corpus]:
    """The training and the held-out corpus: two files, or one file split."""
    options = {"prompt": recipe.prompt, "completion": recipe.completion, "on_bad": recipe.on_bad}
    corpus = read_corpus(recipe.data, **options)
    observer.say(str(corpus))
    say_first(observer, corpus.skipped)
    if recipe.held_out is None:
        return split(corpus, recipe.held_out_share, recipe.seed)
    held = read_corpus(recipe.held_out, **options)
    if bool(held.documents) != bool(corpus.documents):
        raise UsageError(f"{recipe.held_out}: plain text and examples cannot be measured against each other")
    observer.say(f"{held} (held out)")
    return corpus, held


def split(corpus: Corpus, share: float, seed: int) -> tuple[Corpus, Corpus]:
    """Set a share aside: whole prompts with all their completions, or the end of a text.

    No prompt is on both sides. Raises VolvelleError when there is too little to split.
    """
    if corpus.documents:
        train, held = _split_documents(corpus.documents, share)
        return replace(corpus, documents=train), replace(corpus, documents=held, skipped=[])
    groups: dict[Any, list[int]] = {}
    for i, example in enumerate(corpus.examples):
        key = json.dumps(example.messages[:-1]) if example.messages else example.prompt
        groups.setdefault(key, []).append(i)
    if len(groups) < 2:
        raise VolvelleError(
            f"{corpus.path}: {len(corpus.examples)} examples with {len(groups)} prompt cannot be split",
            tip="give a second file with held_out=",
        )
    order = list(groups.values())
    random.Random(f"split/{seed}").shuffle(order)
    count = min(len(order) - 1, max(1, round(share * len(order))))
    held = {i for group in order[:count] for i in group}
    train = [example for i, example in enumerate(corpus.examples) if i not in held]
    return (
        replace(corpus, examples=train),
        replace(corpus, examples=[corpus.examples[i] for i in sorted(held)], skipped=[]),
    )


def _split_documents(documents: Sequence[str], share: float) -> tuple[list[str], list[str]]:
    if len(documents) > 1:
        count = min(len(documents) - 1, max(1, round(share * len(documents))))
        return list(documents[:-count]), list(documents[-count:])
    text = documents[0]
    at = int(len(text) * (1 - share))
    # At the end of a line, when one is near.
    line = text.rfind("\n", max(1, at - 2000), at)
    at = line + 1 if line > 0 else max(1, min(at, len(text) - 1))
    return [text[:at]], [text[at:]]


def training_loader(
    corpus: Corpus, tokenizer: Tokenizer, recipe: TextOptions, context: int, *, layout: Layout = ONE_TEXT
) -> Loader:
    """Seeded batches: windows of plain text, padded examples of similar length, or packed rows of examples.

    `layout` is how the model wants examples. Raises UsageError for packing where a batch is not one text a row.
    """
    lengths = None
    if corpus.documents and layout is ONE_TEXT:
        dataset, joined = Windows.of(corpus.documents, tokenizer, context), collate_windows
    else:
        examples = layout.encode(corpus, tokenizer, context=context, on_bad=recipe.on_bad)
        if recipe.pack:
            if layout is not ONE_TEXT:
                raise UsageError("pack: an encoder-decoder's sources cannot share a row", tip="leave pack out")
            dataset, joined = PackedExamples(examples, context), collate_packed
        else:
            dataset, joined, lengths = examples, layout.collate, examples.lengths
    return Loader(
        dataset,
        recipe.batch,
        seed=recipe.seed,
        collate=joined,
        lengths=lengths,
        workers=recipe.worker_kind,
        num_workers=recipe.workers,
    )


def held_out_loader(
    corpus: Corpus,
    tokenizer: Tokenizer,
    recipe: TextOptions,
    context: int,
    *,
    layout: Layout = ONE_TEXT,
    limit: int | None = None,
) -> Loader:
    """The corpus in a fixed order, for measuring a loss: at most `limit` examples, by default `held_out_size`."""
    return evaluation_loader(
        corpus,
        tokenizer,
        length=context,
        batch=recipe.batch,
        on_bad=recipe.on_bad,
        limit=recipe.held_out_size if limit is None else limit,
        layout=layout,
    )


def fresh_context(recipe: TextOptions, most: int) -> int:
    """Tokens of the longest sample for a new model whose context is `most`; UsageError where the recipe wants more."""
    if recipe.length is not None and recipe.length > most:
        raise UsageError(f"length={recipe.length}: the model's context is {most} tokens")
    return recipe.length or most


def own_tokenizer(run: RunFolder, ranks: Ranks, resume: bool, make: Callable[[], TextTokenizer]) -> TextTokenizer:
    """The run's own tokenizer: what `make` gives, unless a run that goes on has one already.

    Of many ranks one makes it, and all read what it wrote.
    """
    folder = run.path / "tokenizer"
    if ranks.leads and not (resume and (folder / "tokenizer.json").is_file()):
        tokenizer = make()
        folder.mkdir(exist_ok=True)
        tokenizer.save(folder)
    ranks.share(None)
    return TextTokenizer.from_folder(folder)


def step_memory(
    recipe: TextOptions,
    config: ModelConfig,
    loader: Loader,
    device: torch.device,
    *,
    method: Any = "full",
    stored: torch.dtype = torch.float32,
    mtp: MTP | None = None,
) -> MemoryEstimate:
    """What a step on the loader's largest batch takes on one of the recipe's ranks.

    `method`, `stored` and `mtp` are those of `estimate_memory`.
    """
    return estimate_memory(
        config,
        largest_batch(loader),
        method=method,
        autocast=recipe.precision != "fp32",
        stored=stored,
        checkpointing=recipe.checkpointing,
        average=recipe.average is not None,
        device=device.type,
        mtp=mtp,
        ranks=recipe.ranks,
        shard=recipe.shard,
        accumulate=recipe.accumulate,
    )


def choose_device(name: str | None) -> tuple[torch.device, str]:
    """The device, and why it."""
    if name is not None:
        try:
            device = torch.device(name)
        except RuntimeError:
            raise UsageError(f"device={name}: no such kind of device", tip="cpu, cuda or cuda:1") from None
        if device.type == "cuda" and not torch.cuda.is_available():
            raise UsageError(f"device={name}: no CUDA device here", tip="device=cpu")
        return device, f"{device} (as asked)"
    if torch.cuda.is_available():
        return torch.device("cuda"), f"cuda ({torch.cuda.get_device_name()})"
    return torch.device("cpu"), f"cpu (no CUDA device), {torch.get_num_threads()} threads"


NUMBERS = {"fp32": "fp32", "bf16": "bf16 autocast over fp32 weights", "fp16": "fp16 autocast over fp32 weights"}
"""Number formats as the first line names them."""


def first_line(where: str, numbers: str, trainable: int, total: int, memory: MemoryEstimate) -> str:
    """What was decided: device, number format, what is trained, memory."""
    share = f"{trainable:,} of {total:,} parameters ({100 * trainable / total:.2g} %)"
    return f"{where}; {numbers}; trains {share if trainable < total else f'all {total:,} parameters'}; memory {memory}"


@contextlib.contextmanager
def closing(run: RunFolder) -> Iterator[None]:
    """Mark the run failed when an error or a second Ctrl-C leaves the block; `inspect threads` may look inside."""
    answer_threads()
    run.update_manifest(status="running")
    try:
        yield
    except BaseException as error:
        status = "interrupted" if isinstance(error, KeyboardInterrupt) else "failed"
        # The disk may be what failed; the first error matters more than this note.
        with contextlib.suppress(OSError):
            run.update_manifest(status=status, error=str(error) or type(error).__name__)
        raise


def keep_samples(run: RunFolder, samples: Sequence[Sample]) -> None:
    """Write samples.json, so that a resumed run still knows the outputs from before training."""
    write_atomic(run.path / "samples.json", json.dumps([vars(sample) for sample in samples], indent=1))


def kept_samples(run: RunFolder) -> list[Sample] | None:
    """What `keep_samples` wrote, or None."""
    path = run.path / "samples.json"
    if not path.is_file():
        return None
    return [Sample(**{**s, "references": tuple(s["references"])}) for s in json.loads(path.read_text())]


def at_first(run: RunFolder) -> dict[str, float]:
    """What the loop measured before the first step."""
    records = (record for record in run.metrics() if record.get("event") == "evaluate" and record["step"] == 0)
    first = next(records, {})
    return {k.removeprefix("held_out_"): v for k, v in first.items() if k.startswith("held_out_")}


def resume_command(run: RunFolder) -> str:
    """The command that continues a run."""
    return f"volvelle resume {run.path}"


def eval_command(run: RunFolder, recipe: OnPictures) -> str:
    """The command that measures a finished run on pictures: on those drawn for it, those held out, or all."""
    data = run.path / "data"
    return f"volvelle eval {run.path} data={data if data.is_dir() else recipe.held_out or recipe.data}"


def export_command(run: Path) -> str:
    """The command that gives other programs what a finished run holds: whole weights, or an adapter."""
    adapter = run / "adapter"
    to = "hf" if peft_type(adapter) is None else "peft" if peft_reads(adapter) else "adapter"
    return f"volvelle export {run} to={to}"


def finish(
    run: RunFolder,
    result: FitResult,
    *,
    before: dict[str, float],
    after: dict[str, float],
    samples: list[Sample],
    subtitle: str,
    next_commands: tuple[str, ...],
) -> Outcome:
    """Write the report and the manifest's last words."""
    commands = (resume_command(run),) if result.interrupted else next_commands
    report = _report(run, result, before, after, samples, subtitle, commands)
    return settled(run, result, before=before, after=after, samples=samples, report=report, commands=commands)


def _report(
    run: RunFolder,
    result: FitResult,
    before: dict[str, float],
    after: dict[str, float],
    samples: list[Sample],
    subtitle: str,
    commands: tuple[str, ...],
) -> Path:
    report = begun(run, result, subtitle)
    left_out = sum(result.skipped.values())
    if left_out:
        report.text(f"{left_out} updates were left out: their gradients overflowed, or were NaN.")
    report.tiles(tiles(before, after, result))
    records = run.metrics()
    training_curves(report.heading("Training"), records)
    tokens = token_rows(before, after)
    if tokens:
        report.heading("Each token it predicts").table(TOKEN_HEADER, tokens)
    if samples:
        many = f"{SHOWN} of {len(samples)}; all are in samples.json" if len(samples) > SHOWN else ""
        report.heading("What it writes, on held-out prompts").text(many).samples(samples[:SHOWN])
    return ended(report, run, commands)


def tiles(before: dict[str, float], after: dict[str, float], result: FitResult) -> list[tuple[str, str, str]]:
    """The main figures with what they were before."""
    names = {
        "accepted_per_step": "tokens a step",
        "loss": "held-out loss",
        "perplexity": "held-out perplexity",
        "bleu": "BLEU",
        "rougeL": "ROUGE-L",
    }
    found = after or before
    shown = []
    for name, label in names.items():
        if name not in found:
            continue
        note = f"before: {before[name]:.4g}" if after and name in before else "" if after else "before training"
        shown.append((label, f"{found[name]:.4g}", note))
    return [*shown, *tiles_of_work(result)]
