"""The recipe `train language` from end to end: tokenizer, fresh model, training, samples, weights."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from volvelle.data.text import Corpus
from volvelle.errors import UsageError, VolvelleError
from volvelle.runs import RunFolder
from volvelle.systems.language import config as c
from volvelle.systems.language.decoder import Decoder
from volvelle.systems.language.huggingface import write_folder
from volvelle.systems.language.tokenizer import TextTokenizer
from volvelle.train.estimate import estimate_memory, largest_batch
from volvelle.train.evaluate import evaluation_loader
from volvelle.train.language import LanguageObjective
from volvelle.train.loop import FitResult, fit
from volvelle.train.observer import Observer
from volvelle.train.outcome import Outcome, Sample
from volvelle.train.random_state import seed_all
from volvelle.train.ranks import Ranks
from volvelle.train.recipes.language import ModelShape, PositionName, TrainLanguage
from volvelle.train.text_run import (
    NUMBERS,
    choose_device,
    closing,
    finish,
    first_line,
    keep_samples,
    read_split,
    training_loader,
)

END = "<|end|>"


def train_language(
    recipe: TrainLanguage,
    run: RunFolder,
    *,
    observer: Observer | None = None,
    resume: bool = False,
    ranks: Ranks | None = None,
) -> Outcome:
    """Train a decoder from scratch and leave weights in Hugging Face's layout, metrics and a report in the run folder.

    `resume=True` continues an interrupted run. Of many `ranks` all call this, and only rank 0 writes.
    """
    observer, ranks = observer or Observer(), ranks or Ranks()
    with closing(run):
        train, held = read_split(recipe, observer)
        device, where = choose_device(recipe.device)
        # One rank trains the tokenizer, and the others read what it wrote.
        tokenizer = _tokenizer(recipe, run, train, resume) if ranks.leads else None
        ranks.share(None)
        tokenizer = tokenizer or TextTokenizer.from_folder(run.path / "tokenizer")
        context = min(recipe.length or recipe.model.context, recipe.model.context)
        if recipe.length is not None and recipe.length > recipe.model.context:
            raise UsageError(f"length={recipe.length}: the model's context is {recipe.model.context} tokens")
        loader = training_loader(train, tokenizer, recipe, context)
        limit = recipe.held_out_size
        held_loader = evaluation_loader(
            held, tokenizer, length=context, batch=recipe.batch, on_bad=recipe.on_bad, limit=limit
        )
        seed_all(recipe.seed)
        model = Decoder(build_config(recipe.model, tokenizer, recipe.position)).to(device)
        model.tokenizer, model.gradient_checkpointing = tokenizer, recipe.checkpointing
        count = sum(p.numel() for p in model.parameters())
        memory = estimate_memory(
            model.config,
            largest_batch(loader),
            autocast=recipe.precision != "fp32",
            checkpointing=recipe.checkpointing,
            average=recipe.average is not None,
            device=device.type,
        )
        subtitle = first_line(where, f"{NUMBERS[recipe.precision]}, from scratch", count, count, memory)
        observer.say(subtitle)
        observer.say(f"{getattr(loader.dataset, 'tokens', 0):,} tokens, a vocabulary of {model.config.vocabulary:,}")
        objective = LanguageObjective(model, recipe, held_out=held_loader)
        result = fit(objective, loader, options=recipe, run=run, observer=observer, resume=resume, ranks=ranks)
        if not ranks.leads:
            return Outcome(run.path, result.step, result.steps, interrupted=result.interrupted)
        return _close(recipe, run, model, held, result, subtitle, observer)


POSITIONS: dict[PositionName, c.Position] = {
    "rope": c.Rope(), "none": c.NoPosition(), "learned": c.Learned(), "hierarchical": c.Hierarchical(),
    "sinusoidal": c.Sinusoidal(), "recurrent": c.Recurrent(), "multiplicative": c.Multiplicative(),
    "complex": c.Complex(), "convolutional": c.Convolutional(), "shaw": c.Shaw(), "transformer-xl": c.TransformerXL(),
    "t5": c.T5(), "alibi": c.ALiBi(),
}  # fmt: skip


def embedding_scale(position: c.Position, width: int) -> float:
    """What token embeddings are multiplied by: as much as makes them as large as position vectors of size 1."""
    return width**0.5 if isinstance(position, c.Sinusoidal | c.Recurrent | c.Convolutional) else 1.0


def build_config(shape: ModelShape, tokenizer: Any, position: PositionName = "rope") -> c.LanguageConfig:
    """A Llama-style configuration of that shape and position encoding, with the tokenizer's vocabulary."""
    return c.LanguageConfig(
        "llama" if position == "rope" else "volvelle",
        vocabulary=tokenizer.vocabulary,
        width=shape.width,
        depth=shape.depth,
        heads=shape.heads,
        kv_heads=shape.kv_heads or shape.heads,
        context=shape.context,
        norm=c.RMSNorm(),
        mlp=c.GatedMLP(shape.inner),
        position=POSITIONS[position],
        embedding_scale=embedding_scale(POSITIONS[position], shape.width),
        special=c.SpecialTokens(bos=tokenizer.bos_id, eos=tuple(tokenizer.eos_ids), pad=tokenizer.pad_id),
    )


def train_tokenizer(texts: Sequence[str], vocabulary: int) -> TextTokenizer:
    """Byte-level BPE (Sennrich et al. 2016, over bytes as in GPT-2) with an end token; any text can be encoded.

    A small corpus has fewer merges than asked for, and the vocabulary is then smaller.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    end = tokenizer.get_vocab()[END]
    return TextTokenizer(tokenizer, eos_ids=(end,), pad_id=end)


def _tokenizer(recipe: TrainLanguage, run: RunFolder, train: Corpus, resume: bool) -> TextTokenizer:
    """The given model's tokenizer, the one this run trained before, or a new one."""
    folder = run.path / "tokenizer"
    if resume and (folder / "tokenizer.json").is_file():
        return TextTokenizer.from_folder(folder)
    if recipe.tokenizer is not None:
        tokenizer = read_tokenizer(recipe.tokenizer)
    else:
        texts = train.documents or [t for e in train.examples for t in (e.prompt, *e.completions)]
        if train.examples and train.examples[0].messages is not None:
            raise VolvelleError(
                f"{train.path}: conversations need a tokenizer with a chat template",
                tip="name a model that has one with tokenizer=",
            )
        tokenizer = train_tokenizer(texts, recipe.vocabulary)
    folder.mkdir(exist_ok=True)
    tokenizer.save(folder)
    return tokenizer


def read_tokenizer(model: str) -> TextTokenizer:
    """The tokenizer of a GGUF file, a Hugging Face folder, or a known model."""
    from volvelle.hub import resolve
    from volvelle.systems.language.load import load_language_model

    path = resolve(model)
    if path.is_dir() and (path / "tokenizer.json").is_file():
        return TextTokenizer.from_folder(path)
    tokenizer = load_language_model(model).tokenizer
    if tokenizer is None:
        raise VolvelleError(f"{model}: has no tokenizer")
    return tokenizer


def _close(
    recipe: TrainLanguage,
    run: RunFolder,
    model: Decoder,
    held: Corpus,
    result: FitResult,
    subtitle: str,
    observer: Observer,
) -> Outcome:
    """Save the weights and show what the model writes, unless the run was interrupted."""
    model.eval()
    samples: list[Sample] = []
    before: dict[str, float] = next(
        (_held(record) for record in run.metrics() if record.get("event") == "evaluate" and record["step"] == 0), {}
    )
    if not result.interrupted:
        write_folder(model, run.path / "weights")
        observer.say(f"saved {run.path / 'weights'}")
        samples = _samples(recipe, model, held, observer)
        keep_samples(run, samples)
    return finish(
        run,
        result,
        before=before,
        after={} if result.interrupted else result.held_out,
        samples=samples,
        subtitle=subtitle,
        next_commands=(
            f'volvelle generate {run.path} "Once"',
            f"volvelle eval {run.path} data={recipe.held_out or recipe.data}",
            f"volvelle export {run.path} to=safetensors",
        ),
    )


def _held(record: dict[str, Any]) -> dict[str, float]:
    return {k.removeprefix("held_out_"): v for k, v in record.items() if k.startswith("held_out_")}


def _samples(recipe: TrainLanguage, model: Decoder, held: Corpus, observer: Observer) -> list[Sample]:
    """Continuations of held-out beginnings, sampled at temperature 0.8 with the run's seed."""
    from volvelle.data.text import Example
    from volvelle.decode import Sampling
    from volvelle.train.evaluate import Prompted, prompted, spread, write

    prompts = spread(prompted(held.examples), recipe.samples)
    if held.documents:
        lines = [line for text in held.documents for line in text.splitlines() if len(line.split()) >= 4]
        stride = max(1, len(lines) // max(1, recipe.samples))
        prompts = [Prompted(Example(" ".join(line.split()[:4]), ()), ()) for line in lines[::stride][: recipe.samples]]

    def progress(done: int, total: int) -> None:
        observer.work("samples", done, total)

    room = model.config.context // 2
    tokens = min(recipe.max_tokens, room)
    with torch.random.fork_rng():
        outputs = write(
            model,
            prompts,
            max_tokens=tokens,
            sampling=Sampling(temperature=0.8, seed=recipe.seed),
            progress=progress,
        )
    return [Sample(p.example.prompt, p.references, after=text) for p, text in zip(prompts, outputs, strict=True)]
