"""The recipe `train summarize` from end to end: data, tokenizer, fresh BART, training, scored answers, weights."""

from __future__ import annotations

import dataclasses
import shlex

from volvelle.data.denoising import denoised
from volvelle.data.docstrings import HELD_OUT, PACKAGES, TRAIN, collect, installed, write_docstrings
from volvelle.data.text import Corpus, spread
from volvelle.runs import RunFolder
from volvelle.systems.language import config as c
from volvelle.systems.language.encoder_decoder import EncoderDecoder
from volvelle.systems.language.encoder_decoder_config import EncoderDecoderConfig, Stack
from volvelle.systems.language.huggingface import write_folder
from volvelle.systems.language.tokenizer import TextTokenizer
from volvelle.train.evaluate import Prompted, answerable, layout_of, prompted, rouge, text_scores, write
from volvelle.train.language import LanguageObjective
from volvelle.train.loop import FitResult
from volvelle.train.observer import Observer
from volvelle.train.outcome import Outcome, Sample
from volvelle.train.random_state import seed_all
from volvelle.train.ranks import Ranks
from volvelle.train.recipes.summarize import DOCSTRINGS, SPECIAL, PairShape, TrainSummarize
from volvelle.train.scratch import byte_level_bpe
from volvelle.train.text_run import (
    NUMBERS,
    at_first,
    choose_device,
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


@training
def train_summarize(recipe: TrainSummarize, stage: Stage) -> Ready:
    """Train a BART from scratch and leave weights in Hugging Face's layout, metrics and a report in the run folder."""
    run, observer = stage.run, stage.observer
    recipe = _with_data(recipe, run, observer, stage.ranks)
    train, held = read_split(recipe, observer)
    device, where = choose_device(recipe.device)
    tokenizer = own_tokenizer(run, stage.ranks, stage.resume, lambda: train_tokenizer(train, recipe.vocabulary))
    context = fresh_context(recipe, recipe.model.context)
    config = build_config(recipe.model, tokenizer)
    layout = layout_of(config)
    noisy = denoised(layout, mask=SPECIAL.index("<mask>"), copies=recipe.denoise, seed=recipe.seed)
    loader = training_loader(train, tokenizer, recipe, context, layout=noisy)
    held_loader = held_out_loader(held, tokenizer, recipe, context, layout=layout)
    seed_all(recipe.seed)
    model = EncoderDecoder(config).to(device)
    model.tokenizer, model.gradient_checkpointing = tokenizer, recipe.checkpointing
    count = sum(p.numel() for p in model.parameters())
    memory = step_memory(recipe, config, loader, device)
    subtitle = first_line(where, f"{NUMBERS[recipe.precision]}, BART from scratch", count, count, memory)
    observer.say(subtitle)
    observer.say(f"{getattr(loader.dataset, 'tokens', 0):,} tokens, a vocabulary of {config.vocabulary:,}")
    objective = LanguageObjective(model, recipe, held_out=held_loader)
    return Ready(objective, loader, lambda result: _close(recipe, stage, model, held, result, subtitle))


def build_config(shape: PairShape, tokenizer: TextTokenizer) -> EncoderDecoderConfig:
    """A BART of that shape with the tokenizer's vocabulary; its answers begin and end as BART's do."""
    side = Stack(shape.depth, shape.heads, c.MLP(shape.mlp_width or 4 * shape.width, "gelu"))
    first, pad, end = (SPECIAL.index(token) for token in ("<s>", "<pad>", "</s>"))
    return EncoderDecoderConfig(
        "bart",
        vocabulary=tokenizer.vocabulary,
        width=shape.width,
        encoder=side,
        decoder=side,
        context=shape.context,
        start=end,
        dropout=c.Dropout(shape.dropout, shape.dropout),
        special=c.SpecialTokens(bos=first, eos=(end,), pad=pad),
        forced_first=first,
        forced_last=end,
    )


def train_tokenizer(corpus: Corpus, vocabulary: int) -> TextTokenizer:
    """Byte-level BPE with BART's control tokens; a text stands between `<s>` and `</s>`.

    A small corpus has fewer merges than asked for, and the vocabulary is then smaller.
    """
    from tokenizers import processors

    texts = [text for example in corpus.examples for text in (example.prompt, *example.completions)]
    tokenizer = byte_level_bpe(texts, vocabulary, SPECIAL)
    first, pad, end = (SPECIAL.index(token) for token in ("<s>", "<pad>", "</s>"))
    around = [(SPECIAL[first], first), (SPECIAL[end], end)]
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=around)
    return TextTokenizer(tokenizer, eos_ids=(end,), bos_id=first, pad_id=pad)


def _with_data(recipe: TrainSummarize, run: RunFolder, observer: Observer, ranks: Ranks) -> TrainSummarize:
    """The recipe with files as its data: docstrings are collected into the run folder, once."""
    if recipe.data != DOCSTRINGS:
        return recipe
    folder = run.path / "data"
    if ranks.leads and not (folder / PACKAGES).is_file():
        found = collect(
            installed(recipe.packages),
            held_out_share=recipe.held_out_share,
            progress=lambda done, total: observer.work("packages", done, total),
        )
        write_docstrings(found, folder)
        observer.say(f"{found}: listed in {folder / PACKAGES}")
    ranks.share(None)
    held_out = recipe.held_out or str(folder / HELD_OUT)
    return dataclasses.replace(recipe, data=str(folder / TRAIN), held_out=held_out, packages=())


def _close(
    recipe: TrainSummarize, stage: Stage, model: EncoderDecoder, held: Corpus, result: FitResult, subtitle: str
) -> Outcome:
    """Save the weights and score what the model writes, unless the run was interrupted."""
    run, observer = stage.run, stage.observer
    model.eval()
    samples: list[Sample] = []
    after: dict[str, float] = {}
    if not result.interrupted:
        write_folder(model, run.path / "weights")
        observer.say(f"saved {run.path / 'weights'}")
        after, samples = _score(recipe, model, held, observer)
        after = result.held_out | after
        keep_samples(run, samples)
    shown = shlex.quote(" ".join(held.examples[0].prompt.split())[:60])
    return finish(
        run,
        result,
        before=at_first(run),
        after=after,
        samples=samples,
        subtitle=subtitle,
        next_commands=(
            f"volvelle generate {run.path} {shown} max_tokens={recipe.max_tokens} beams.width=4",
            f"volvelle eval {run.path} data={recipe.held_out or recipe.data} on_bad=skip",
            f"volvelle adapt {run.path} data={recipe.data} on_bad=skip",
        ),
    )


def _score(
    recipe: TrainSummarize, model: EncoderDecoder, held: Corpus, observer: Observer
) -> tuple[dict[str, float], list[Sample]]:
    """Scores of the model's answers, beside that of taking each text's beginning, and some answers to show."""
    prompts = answerable(model, prompted(held.examples), recipe.max_tokens, recipe.on_bad)
    prompts = spread(prompts, recipe.held_out_size)
    if not prompts:
        return {}, []
    outputs = write(
        model,
        prompts,
        max_tokens=recipe.max_tokens,
        beams=recipe.beams if recipe.beams.width > 1 else None,
        progress=lambda done, total: observer.work("answers", done, total),
    )
    references = [p.references for p in prompts]
    lead = rouge([beginning(p) for p in prompts], references)["rougeL"]
    scores = text_scores(outputs, references) | {"rougeL_of_beginning": lead}
    shown = spread(list(zip(prompts, outputs, strict=True)), recipe.samples)
    return scores, [Sample(p.example.prompt, p.references, after=text) for p, text in shown]


def beginning(prompt: Prompted) -> str:
    """The first dozen words: what a summary must be better than."""
    return " ".join(prompt.example.prompt.split()[:12])
