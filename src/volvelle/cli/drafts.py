"""Drafts at the command line: `draft=` as a drafter, answers with their accepted tokens marked, what they gained."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from volvelle import hub
from volvelle.cli.console import say, wants_json, write
from volvelle.decode.options import Rules, Sampling
from volvelle.errors import UsageError, did_you_mean

if TYPE_CHECKING:
    from volvelle.decode import Drafter, Generation, Token
    from volvelle.decode.contract import Acceptance
    from volvelle.decode.policy import Figures
    from volvelle.systems.language.models import LanguageModel

WAYS = {
    "lookup": "lookup",
    "medusa": "medusa:RUN",
    "mtp": "mtp:RUN",
    "ngram": "ngram[:RUN]",
    "skip": "skip:LAYERS",
    "model": "model:NAME",
}
"""What `draft=` begins with, and how it is written in full."""


@dataclass(frozen=True, kw_only=True)
class DraftOptions:
    """Who drafts, and what is shown of it."""

    draft: str | None = None
    """Who proposes tokens that the model checks several at a time: lookup (what followed the last words before),
    ngram (what is likely to follow them, by counts; ngram:RUN: also of a run of `volvelle draft`),
    medusa:RUN, mtp:RUN, skip:N (the model without N of its layers), or a smaller model or a run; lookup+mtp:RUN looks
    for endings of three words or more, and asks the module where it finds none."""
    draft_length: int | None = None
    """The most tokens of a draft; how many are worth it is measured as the answer comes."""
    acceptance: Literal["exact", "typical"] = "exact"
    """exact leaves the answers what they are without drafts; typical, for sampling, keeps likely tokens too: lossy."""
    exact: Literal["default", "bitwise"] = "default"
    """bitwise: all steps are computed alike, so that not even rounding tells an answer with drafts from a plain one."""
    stats: bool = False
    """Mark the accepted draft tokens, and measure the speed against plain decoding of the same prompt."""


class Way(NamedTuple):
    """A `draft=` taken apart: one of WAYS, and what is behind its colon."""

    kind: str
    what: str


def parse_draft(text: str) -> Way:
    """Read `draft=TEXT`; a path or a name without a colon is a model or a run.

    >>> parse_draft("skip:12")
    Way(kind='skip', what='12')
    >>> parse_draft("medsua:runs/heads")
    Traceback (most recent call last):
    volvelle.errors.UsageError: draft=medsua:runs/heads: there is no way to draft called medsua
    """
    kind, colon, what = text.partition(":")
    if Path(text).exists() or text in hub.ASSETS:
        return Way("model", text)
    if kind not in WAYS and colon:
        tip = did_you_mean(kind, WAYS) or f"one of {', '.join(WAYS.values())}"
        raise UsageError(f"draft={text}: there is no way to draft called {kind}", tip=tip)
    if kind not in WAYS:
        _find(text, text)
        return Way("model", text)
    if not what and kind not in ("lookup", "ngram"):
        raise UsageError(f"draft={text}: what drafts is missing", tip=f"draft={WAYS[kind]}")
    if kind == "skip" and not (what.isdecimal() and int(what) > 0):
        raise UsageError(f"draft={text}: a number of layers to leave out is wanted", tip="draft=skip:8")
    if what and kind in ("medusa", "mtp", "ngram", "model", "lookup"):
        _find(what, text)
    return Way(kind, what)


def parse_drafts(text: str) -> list[Way]:
    """Read `draft=TEXT` with several ways, the first of them first: `lookup+mtp:RUN`.

    >>> parse_drafts("lookup+skip:12")
    [Way(kind='lookup', what=''), Way(kind='skip', what='12')]
    """
    first, plus, rest = text.partition("+")
    if not plus or Path(text).exists() or first.partition(":")[0] not in WAYS:
        return [parse_draft(text)]
    return [parse_draft(first), *parse_drafts(rest)]


def check_drafts(options: DraftOptions) -> None:
    """Raise UsageError for what is wrong with the options, before a model is opened."""
    if options.draft is not None:
        parse_drafts(options.draft)
    elif options.stats:
        raise UsageError("stats=true compares drafts with plain decoding, but nothing drafts", tip="draft=lookup")
    if options.draft_length is not None and options.draft_length < 1:
        raise UsageError(f"draft_length must be at least 1, got {options.draft_length}")


def open_draft(options: DraftOptions, model: LanguageModel) -> Drafter | None:
    """The drafter that the options name for this model; None where they name none."""
    if options.draft is None:
        return None
    from volvelle.decode.drafters.first_of import FirstOf

    ways = parse_drafts(options.draft)
    length: dict[str, Any] = {} if options.draft_length is None else {"k": options.draft_length}
    if len(ways) == 1:
        return _open(ways[0], model, length)
    return FirstOf(*(_open(way, model, length | ({"least": 3} if way.kind == "lookup" else {})) for way in ways))


def _open(way: Way, model: LanguageModel, given: Mapping[str, Any]) -> Drafter:
    """The drafter of one way, with the options that were given for it."""
    from volvelle.decode.drafters.early_exit import EarlyExit, without
    from volvelle.decode.drafters.ngram import NGram
    from volvelle.decode.drafters.opening import kind_of, open_drafter
    from volvelle.decode.drafters.prompt_lookup import PromptLookup
    from volvelle.systems.language.encoder_decoder_config import EncoderDecoderConfig

    kind, what = way
    if kind == "lookup":
        return PromptLookup(**given, texts=[_tokens(model, Path(what))] if what else ())
    if kind == "ngram" and not what:
        return NGram(**given)
    if kind == "skip":
        config = model.config.decoder if isinstance(model.config, EncoderDecoderConfig) else model.config
        return EarlyExit(without(config.depth, int(what)), **given)
    folder = hub.resolve(what)
    found = kind_of(folder)
    if kind in ("medusa", "mtp", "ngram") and found != kind:
        raise UsageError(f"draft={kind}:{what}: {folder} holds no {kind}", tip=f"draft={found}:{what}")
    return open_drafter(folder, model, **given)


class Answers:
    """Answers of one model with the draft options of a verb; what the policy learns carries over to the next one."""

    def __init__(self, model: LanguageModel, options: DraftOptions):
        from volvelle.decode.accept_exact import EXACT
        from volvelle.decode.accept_typical import Typical
        from volvelle.decode.policy import Adaptive

        self.model, self.stats = model, options.stats
        self.exact: Literal["default", "bitwise"] = options.exact
        self.drafter = open_draft(options, model)
        self.acceptance: Acceptance = EXACT if options.acceptance == "exact" else Typical()
        self.policy = Adaptive()

    def write(
        self,
        ids: Sequence[int],
        *,
        sampling: Sampling,
        max_tokens: int,
        stop: Sequence[str] = (),
        rules: Rules | None = None,
    ) -> tuple[Generation, dict[str, Any]]:
        """Write the answer as it comes; return it and, with drafts, what --json says of them."""
        from volvelle.decode import generate
        from volvelle.decode.policy import usual_policy

        rules = Rules() if rules is None else rules
        marks = Marks() if self.stats else None
        policy = usual_policy(self.drafter, [sampling], self.policy) if self.drafter else self.policy
        adaptive = policy is self.policy
        answer = generate(
            self.model, ids, sampling=sampling, max_tokens=max_tokens, stop=stop, rules=rules, drafter=self.drafter,
            acceptance=self.acceptance, policy=policy, exact=self.exact,
            on_token=(lambda token: write(token.text)) if marks is None else marks.push,
        )  # fmt: skip
        if marks is not None:
            marks.close()
        say()
        say(cost_line(answer))
        if self.drafter is None:
            return answer, {}
        record = _drafts_record(answer) | (_choices(self.policy.figures) if adaptive else {})
        if marks is not None:
            plain = generate(
                self.model, ids, sampling=sampling, max_tokens=max_tokens, stop=stop, rules=rules, exact=self.exact
            )
            record |= _against(answer, plain, sampling) | {"spans": marks.spans}
            if adaptive:
                record["cost_curve"] = self.policy.steps.ratios(len(ids) + len(answer.tokens))
            say(*_lines(record))
        return answer, record


class Marks:
    """Writes an answer as it comes, tokens that were accepted from drafts underlined on a terminal, else in ⟦⟧.

    `spans` are its pieces: [text, whether it was drafted].
    """

    def __init__(self) -> None:
        stream = sys.stderr if wants_json() else sys.stdout
        plain = not stream.isatty() or "NO_COLOR" in os.environ
        self._open, self._shut = ("⟦", "⟧") if plain else ("\x1b[4;36m", "\x1b[0m")
        self.spans: list[list[Any]] = []

    def push(self, token: Token) -> None:
        """Write the text of a token."""
        if not token.text:
            return
        before = bool(self.spans) and self.spans[-1][1]
        if token.drafted != before:
            write(self._open if token.drafted else self._shut)
        if not self.spans or token.drafted != before:
            self.spans.append(["", token.drafted])
        self.spans[-1][0] += token.text
        write(token.text)

    def close(self) -> None:
        """End the last mark."""
        if self.spans and self.spans[-1][1]:
            write(self._shut)


def cost_line(answer: Generation) -> str:
    """Say how long an answer is, why it ended and how fast it came."""
    rate = f", {answer.tokens_per_second:.1f} tokens/s" if answer.tokens_per_second else ""
    reason = {"eos": "the model ended it", "stop": "at a stop string", "length": "at max_tokens"}[answer.finish]
    prompt = f"prompt of {answer.prompt_tokens} in {answer.prompt_seconds:.2f} s"
    drafts = f", {sum(answer.drafted)} of them drafted" if any(answer.proposed) else ""
    return f"[{len(answer.tokens)} tokens{drafts}, {reason}{rate}; {prompt}]"


def _drafts_record(answer: Generation) -> dict[str, Any]:
    """What came of the drafts."""
    return {
        "accepted_per_step": answer.accepted_per_step,
        "drafted_tokens": sum(answer.drafted),
        "proposed": answer.proposed,
        "accepted": answer.accepted,
        "lossless": answer.lossless,
        "near_ties": answer.near_ties,
    }


def _choices(figures: Figures) -> dict[str, Any]:
    """What the policy chose."""
    return {
        "draft_lengths": {str(k): count for k, count in sorted(figures.chosen.items())},
        "switched_off": figures.switched_off,
    }


def _against(answer: Generation, plain: Generation, sampling: Sampling) -> dict[str, Any]:
    """Rates against plain decoding; whether the tokens are the same can be asked of greedy answers only."""
    both = answer.tokens_per_second and plain.tokens_per_second
    pairs = zip(answer.tokens, plain.tokens, strict=False)
    differs = next((place for place, (ours, theirs) in enumerate(pairs) if ours != theirs), None)
    same = answer.tokens == plain.tokens if sampling.greedy else None
    return {
        "drafting_tokens_per_second": answer.tokens_per_second,
        "plain_tokens_per_second": plain.tokens_per_second,
        "speed_up": answer.tokens_per_second / plain.tokens_per_second if both else None,
        "same_as_plain": same,
        "first_difference": differs if same is False else None,
    }


def _lines(record: dict[str, Any]) -> list[str]:
    """The statistics for people."""
    kept = [f"{100 * hits / tries:.0f} %" for hits, tries in zip(record["accepted"], record["proposed"], strict=True)]
    lines = [
        f"accepted per step   {record['accepted_per_step']:.2f} tokens; kept by place in the draft: "
        f"{', '.join(kept[:8]) or 'nothing was drafted'}{', …' if len(kept) > 8 else ''}"
    ]
    if record["speed_up"]:
        lines.append(
            f"tokens a second     {record['drafting_tokens_per_second']:.1f} with drafts, "
            f"{record['plain_tokens_per_second']:.1f} plain (the same prompt again, just now): "
            f"{record['speed_up']:.2f}x"
        )
    if record["same_as_plain"]:
        lines.append("the answer          token for token that of plain decoding")
    elif record["same_as_plain"] is False:
        at = record["first_difference"]
        where = "one is longer" if at is None else f"from token {at + 1} on"
        lines.append(f"the answer          differs from that of plain decoding: {where}")
    elif not record["lossless"]:
        lines.append("the answer          is lossy: typical acceptance keeps tokens that sampling would not")
    if record["near_ties"] is not None:
        lines.append(f"near ties           {record['near_ties']} tokens, which rounding might decide")
    if "draft_lengths" not in record:
        return [*lines, "draft lengths       the longest: with a seed, drafts that are drawn do not go by the clock"]
    chosen = ", ".join(f"{k}: {count}" for k, count in record["draft_lengths"].items())
    lines.append(f"draft lengths       {chosen} steps; switched off {record['switched_off']} times")
    curve = ", ".join(f"{n}: {ratio:.2f}" for n, ratio in record["cost_curve"].items())
    return [*lines, f"time of n tokens    over that of 1: {curve}"]


def _find(name: str, text: str) -> None:
    """Raise UsageError where a name is neither a path, a known model nor a repository's."""
    path = Path(name)
    here = "/" in name and path.parent.is_dir()  # runs/heads is a path, though it might be a repository's name
    if path.exists() or name in hub.ASSETS or (hub.REPO_ID.fullmatch(name) and not here):
        return
    runs = [str(path) for path in Path("runs").glob("*")] if Path("runs").is_dir() else []
    tip = did_you_mean(name, [*WAYS, *hub.ASSETS, *runs])
    if tip is None:
        tip = f"draft={', '.join(WAYS.values())}, or a smaller model or a run"
    raise UsageError(f"draft={text}: {name} is neither a path here nor a known model", tip=tip)


def _tokens(model: LanguageModel, file: Path) -> list[int]:
    """A text file in the model's tokens."""
    if model.tokenizer is None:
        raise UsageError(f"draft=lookup:{file}: the model has no tokenizer, so it cannot read a text")
    try:
        return model.tokenizer.encode(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"draft=lookup:{file}: not readable as text ({error})") from error
