"""The recipe `train language` from end to end: tokenizer, fresh model, training, samples, weights."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch

from volvelle.data.loader import Loader
from volvelle.data.text import Corpus
from volvelle.errors import VolvelleError
from volvelle.systems.language import config as c
from volvelle.systems.language.decoder import Decoder
from volvelle.systems.language.huggingface import write_folder
from volvelle.systems.language.huggingface_config import config_to_dict
from volvelle.systems.language.mtp import KINDS, MTP, MultiToken
from volvelle.systems.language.mtp_files import write_mtp
from volvelle.systems.language.tokenizer import TextTokenizer
from volvelle.train.language import LanguageObjective
from volvelle.train.loop import FitResult
from volvelle.train.mtp import MultiTokenObjective, usual_weight
from volvelle.train.observer import Observer
from volvelle.train.outcome import Outcome, Sample
from volvelle.train.random_state import seed_all
from volvelle.train.recipes.choices import ATTENTIONS, POSITIONS, AttentionName, PositionName, embedding_scale
from volvelle.train.recipes.language import ModelShape, TrainLanguage
from volvelle.train.text_run import (
    NUMBERS,
    at_first,
    choose_device,
    export_command,
    finish,
    first_line,
    fresh_context,
    held_out_loader,
    keep_samples,
    own_tokenizer,
    read_split,
    step_memory,
    training_loader,
)
from volvelle.train.training import Ready, Stage, training

END = "<|end|>"


@training
def train_language(recipe: TrainLanguage, stage: Stage) -> Ready:
    """Train a decoder from scratch; leave weights in Hugging Face's layout, metrics and a report in the run folder."""
    run, observer = stage.run, stage.observer
    train, held = read_split(recipe, observer)
    device, where = choose_device(recipe.device)
    tokenizer = own_tokenizer(run, stage.ranks, stage.resume, lambda: _tokenizer(recipe, train))
    context = fresh_context(recipe, recipe.model.context)
    loader = training_loader(train, tokenizer, recipe, context)
    held_loader = held_out_loader(held, tokenizer, recipe, context)
    seed_all(recipe.seed)
    model = Decoder(build_config(recipe.model, tokenizer, recipe.position, recipe.attention)).to(device)
    model.tokenizer, model.gradient_checkpointing = tokenizer, recipe.checkpointing
    multi = _with_modules(recipe, model)
    count = sum(p.numel() for p in (multi or model).parameters())
    memory = step_memory(recipe, model.config, loader, device, mtp=multi.mtp if multi else None)
    subtitle = first_line(where, f"{NUMBERS[recipe.precision]}, from scratch", count, count, memory)
    observer.say(subtitle)
    observer.say(f"{getattr(loader.dataset, 'tokens', 0):,} tokens, a vocabulary of {model.config.vocabulary:,}")
    objective = _objective(recipe, model, multi, held_loader)
    if multi:
        observer.say(f"{recipe.mtp} tokens at each position, {_described(multi.mtp)}")
    return Ready(objective, loader, lambda result: _close(recipe, stage, multi or model, held, result, subtitle))


def build_config(
    shape: ModelShape, tokenizer: Any, position: PositionName = "rope", attention: AttentionName = "softmax"
) -> c.LanguageConfig:
    """A Llama-style configuration of that shape and these parts, with the tokenizer's vocabulary.

    Its family is "llama" where Hugging Face's Llama can hold it, else our own.
    """
    config = c.LanguageConfig(
        "llama",
        vocabulary=tokenizer.vocabulary,
        width=shape.width,
        depth=shape.depth,
        heads=shape.heads,
        kv_heads=shape.kv_heads or shape.heads,
        context=shape.context,
        norm=c.RMSNorm(),
        mlp=c.GatedMLP(shape.inner),
        position=POSITIONS[position],
        attention=ATTENTIONS[attention],
        embedding_scale=embedding_scale(POSITIONS[position], shape.width),
        special=c.SpecialTokens(bos=tokenizer.bos_id, eos=tuple(tokenizer.eos_ids), pad=tokenizer.pad_id),
    )
    try:
        config_to_dict(config)
    except VolvelleError:
        return dataclasses.replace(config, family="volvelle")
    return config


def train_tokenizer(texts: Sequence[str], vocabulary: int) -> TextTokenizer:
    """Byte-level BPE (Sennrich et al. 2016, over bytes as in GPT-2) with an end token; any text can be encoded.

    A small corpus has fewer merges than asked for, and the vocabulary is then smaller.
    """
    tokenizer = byte_level_bpe(texts, vocabulary, [END])
    end = tokenizer.get_vocab()[END]
    return TextTokenizer(tokenizer, eos_ids=(end,), pad_id=end)


def byte_level_bpe(texts: Sequence[str], vocabulary: int, special: Sequence[str]) -> Any:
    """A `tokenizers.Tokenizer` of that many words, the special ones first."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=list(special),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def _with_modules(recipe: TrainLanguage, model: Decoder) -> MultiToken | None:
    """The model with fresh modules for the further tokens, where the recipe asks for any.

    They are drawn after the model, whose weights are those of a run without them.
    """
    if recipe.mtp == 1:
        return None
    return MultiToken(model, KINDS[recipe.mtp_kind](model.config, recipe.mtp - 1).to(model.device))


def _objective(recipe: TrainLanguage, model: Decoder, multi: MultiToken | None, held: Loader) -> LanguageObjective:
    if multi is None:
        return LanguageObjective(model, recipe, held_out=held)
    weight = recipe.mtp_weight or usual_weight(recipe.mtp_kind, multi.mtp.depths)
    return MultiTokenObjective(multi, recipe, weight=weight, held_out=held)


def _described(mtp: MTP) -> str:
    count = sum(p.numel() for p in mtp.parameters())
    return f"the further ones by {mtp.depths} {mtp.kind} modules of {count:,} parameters that plain decoding leaves out"


def _tokenizer(recipe: TrainLanguage, train: Corpus) -> TextTokenizer:
    """The given model's tokenizer, or a new one."""
    if recipe.tokenizer is not None:
        return read_tokenizer(recipe.tokenizer)
    texts = train.documents or [t for e in train.examples for t in (e.prompt, *e.completions)]
    if train.examples and train.examples[0].messages is not None:
        raise VolvelleError(
            f"{train.path}: conversations need a tokenizer with a chat template",
            tip="name a model that has one with tokenizer=",
        )
    return train_tokenizer(texts, recipe.vocabulary)


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
    recipe: TrainLanguage, stage: Stage, trained: Decoder | MultiToken, held: Corpus, result: FitResult, subtitle: str
) -> Outcome:
    """Save the weights and show what the model writes, unless the run was interrupted."""
    run, observer = stage.run, stage.observer
    model = trained.model if isinstance(trained, MultiToken) else trained
    if isinstance(trained, MultiToken) and not result.interrupted:
        write_mtp(trained.mtp, model, run.path / "mtp")
        observer.say(f"saved {run.path / 'mtp'}")
    model.eval()
    samples: list[Sample] = []
    if not result.interrupted:
        write_folder(model, run.path / "weights")
        observer.say(f"saved {run.path / 'weights'}")
        samples = _samples(recipe, model, held, observer)
        keep_samples(run, samples)
    return finish(
        run,
        result,
        before=at_first(run),
        after={} if result.interrupted else result.held_out,
        samples=samples,
        subtitle=subtitle,
        next_commands=(
            f'volvelle generate {run.path} "Once"',
            f"volvelle eval {run.path} data={recipe.held_out or recipe.data}",
            # No other program knows what is written in our own format.
            *(() if model.config.family == "volvelle" else (export_command(run.path),)),
        ),
    )


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
