"""`volvelle generate`: continue a prompt with a model or a run."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field, replace

from tyro.conf import Positional

from volvelle.cli.console import result, say, write
from volvelle.cli.drafts import Answers, DraftOptions, check_drafts, cost_line
from volvelle.cli.models import Precision, open_language_model
from volvelle.decode.options import AskedBeams, AskedRules, Sampling, settle
from volvelle.errors import UsageError

EXAMPLES = (
    'volvelle generate smollm2 "The three primary colours are" max_tokens=32',
    'volvelle generate smollm2 "Once upon a time" sampling.temperature=0.8 sampling.seed=1',
    'volvelle generate smollm2 "Say it again, Sam. Say it" draft=lookup stats=true',
)


@dataclass(frozen=True)
class Options(DraftOptions):
    """What to continue, and how."""

    model: Positional[str]
    """A known model, a Hugging Face repo id, a folder, or a run."""
    prompt: Positional[str | None] = None
    """The text to continue, as it is; read from standard input when left out."""
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


def main(options: Options) -> int:
    """Print the answer as it comes, then what it cost."""
    from volvelle.decode import beam_search
    from volvelle.systems.language import EncoderDecoderConfig

    check(options)
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


def check(options: Options) -> None:
    """Refuse what does not go together, before a model is opened."""
    wide = (options.beams.width or 1) > 1
    if wide and (options.sampling != Sampling() or options.stop):
        raise UsageError("generate: a beam search takes no sampling options and no stop strings", tip="beams.width=1")
    if wide and options.draft is not None:
        raise UsageError("generate: a beam search takes no drafts", tip="beams.width=1, or leave draft= out")
    check_drafts(options)


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
