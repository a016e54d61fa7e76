"""`volvelle generate`: continue a prompt with a model or a run, or draw pictures with a run that does."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field, fields, replace
from pathlib import Path

from tyro.conf import Positional

from volvelle.cli import generating
from volvelle.cli.console import result, say, write
from volvelle.cli.drafts import Answers, DraftOptions, check_drafts, cost_line
from volvelle.cli.models import Precision, open_language_model
from volvelle.decode.options import AskedBeams, AskedRules, Sampling, settle
from volvelle.errors import UsageError

EXAMPLES = (
    'volvelle generate smollm2 "The three primary colours are" max_tokens=32',
    'volvelle generate smollm2 "Once upon a time" sampling.temperature=0.8 sampling.seed=1',
    'volvelle generate smollm2 "Say it again, Sam. Say it" draft=lookup stats=true',
    "volvelle generate runs/prior-1 count=16 class=Dress temperature=0.9",
)


@dataclass(frozen=True)
class Options(DraftOptions, generating.PictureOptions):
    """What to continue, and how; what to draw, with a run of train prior or train gan."""

    model: Positional[str]
    """A known model, a Hugging Face repo id, a folder, or a run."""
    prompt: Positional[str | None] = None
    """The text to continue, as it is; read from standard input when left out. For pictures: a caption."""
    max_tokens: int | None = None
    """The longest answer, in tokens; when left out 256, or what the model's context leaves."""
    stop: tuple[str, ...] = ()
    """Strings before which the answer ends."""
    sampling: Sampling = field(default_factory=Sampling)
    """How tokens are chosen: sampling.temperature=0.8 sampling.top_p=0.95."""
    beams: AskedBeams = field(default_factory=AskedBeams)
    """Beam search, where its width is above 1: beams.width=4 beams.length_penalty=2. Left out: as the model's folder
    says, else none."""
    rules: AskedRules = field(default_factory=AskedRules)
    """What an answer must and must not hold: rules.no_repeat_ngram_size=3 rules.min_tokens=10."""
    precision: Precision = "auto"
    """auto: bf16 where the hardware multiplies it, else fp32."""


FOR_TEXT = {
    "max_tokens": None, "stop": (), "beams": AskedBeams(), "rules": AskedRules(), "precision": "auto", "stats": False,
}  # fmt: skip
"""Options that pictures have no use for, as they are when nobody asks."""


def main(options: Options) -> int:
    """Print the answer as it comes, then what it cost; or write pictures on a sheet."""
    kind = generating.kind_of(options.model)
    if kind is not None:
        known = {field.name: getattr(options, field.name) for field in fields(options)}
        if strange := [name for name, default in FOR_TEXT.items() if known[name] != default]:
            raise UsageError(f"generate: {strange[0]}= is for text, and {options.model} draws pictures")
        shared = {field.name: known[field.name] for field in fields(generating.Asked) if field.name in known}
        return generating.draw(kind, generating.Asked(run=Path(options.model), caption=options.prompt, **shared))
    from volvelle.decode import beam_search
    from volvelle.systems.language import EncoderDecoderConfig

    options = check(options)
    prompt = read_prompt(options.prompt)
    model = open_language_model(options.model, options.precision)
    if model.tokenizer is None:
        raise UsageError(f"{options.model}: has no tokenizer, so it cannot read a prompt")
    ids = model.tokenizer.encode_prompt(prompt)
    begun = 1 if isinstance(model.config, EncoderDecoderConfig) else len(ids)
    max_tokens = min(256, max(1, model.room - begun)) if options.max_tokens is None else options.max_tokens
    beams, rules, own = settle(model.config, wanted_beams(options), options.rules)
    if own:
        say(f"as the model's folder asks: {own}")
    drafts = {}
    if beams.width > 1:
        [answer] = beam_search(model, [ids], beams=beams, max_tokens=max_tokens, rules=rules)
        write(answer.text)
        say()
        say(cost_line(answer))
    else:
        answers = Answers(model, options)
        answer, drafts = answers.write(
            ids, sampling=options.sampling, max_tokens=max_tokens, stop=options.stop, rules=rules
        )
    result({"prompt": prompt, "text": answer.text, "tokens": len(answer.tokens), "finish": answer.finish,
            "prompt_tokens": answer.prompt_tokens, "tokens_per_second": answer.tokens_per_second,
            **drafts})  # fmt: skip
    return 0


def check(options: Options) -> Options:
    """Refuse what does not go together, before a model is opened; the options with temperature= where it belongs."""
    given = [f.name.rstrip("_") for f in fields(generating.PictureOptions) if getattr(options, f.name) != f.default]
    if strange := [name for name in given if name != "temperature"]:
        raise UsageError(f"generate: {strange[0]}= is for runs that draw pictures, and {options.model} writes text")
    if options.temperature is not None:
        options = replace(options, sampling=replace(options.sampling, temperature=options.temperature))
    wide = (options.beams.width or 1) > 1
    if wide and (options.sampling != Sampling() or options.stop):
        raise UsageError("generate: a beam search takes no sampling options and no stop strings", tip="beams.width=1")
    if wide and options.draft is not None:
        raise UsageError("generate: a beam search takes no drafts", tip="beams.width=1, or leave draft= out")
    check_drafts(options)
    return options


def wanted_beams(options: Options) -> AskedBeams:
    """The beams asked for: none where something is asked for that a beam search does not take."""
    alone = options.sampling != Sampling() or options.stop or options.draft is not None
    return replace(options.beams, width=1) if alone and options.beams.width is None else options.beams


def read_prompt(given: str | None) -> str:
    """Return the prompt from the command line, or from standard input when something is piped in."""
    if given is not None:
        return given
    if sys.stdin is None or sys.stdin.isatty():
        raise UsageError("generate: there is no prompt", tip='volvelle generate MODEL "text", or pipe the text in')
    return sys.stdin.read()
