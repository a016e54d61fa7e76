"""`volvelle chat`: talk to a model that has a chat template."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from tyro.conf import Positional

from volvelle.cli.console import result, say
from volvelle.cli.drafts import Answers, DraftOptions, check_drafts
from volvelle.cli.models import Precision, open_language_model
from volvelle.decode.options import Sampling
from volvelle.errors import UsageError

if TYPE_CHECKING:
    from volvelle.decode import Generation

EXAMPLES = (
    "volvelle chat smollm2",
    'volvelle chat smollm2 "Why is the sky blue?" max_tokens=128',
    "volvelle chat smollm2 draft=lookup",
)


@dataclass(frozen=True)
class Options(DraftOptions):
    """Whom to talk to."""

    model: Positional[str]
    """A known model, a Hugging Face repo id, a folder, or a run; it needs a chat template."""
    message: Positional[str | None] = None
    """One question to answer; a conversation is opened when left out."""
    system: str | None = None
    """What the model is told first."""
    max_tokens: int = 512
    """The longest answer, in tokens."""
    sampling: Sampling = field(default_factory=Sampling)
    """How tokens are chosen; greedy by default, sampling.temperature=0.7 for variety."""
    precision: Precision = "auto"
    """auto: bf16 where the hardware multiplies it, else fp32."""


def main(options: Options) -> int:
    """Answer one message, or hold a conversation until an empty line or Ctrl-D."""
    check_drafts(options)
    model = open_language_model(options.model, options.precision)
    tokenizer = model.tokenizer
    if tokenizer is None or not tokenizer.chat_template:
        raise UsageError(f"{options.model}: has no chat template", tip=f'volvelle generate {options.model} "…"')
    messages = [] if options.system is None else [{"role": "system", "content": options.system}]
    answers = Answers(model, options)

    def reply(messages: list[dict[str, str]]) -> tuple[Generation, dict[str, Any]]:
        ids = tokenizer.chat_ids(messages)
        return answers.write(ids, sampling=options.sampling, max_tokens=options.max_tokens)

    if options.message is not None:
        answer, drafts = reply([*messages, {"role": "user", "content": options.message}])
        result({"message": options.message, "text": answer.text, "tokens": len(answer.tokens),
                "finish": answer.finish, "tokens_per_second": answer.tokens_per_second, **drafts})  # fmt: skip
        return 0
    say("An empty line or Ctrl-D ends the conversation.")
    while text := _ask():
        messages.append({"role": "user", "content": text})
        answer, _ = reply(messages)
        messages.append({"role": "assistant", "content": answer.text})
    return 0


def _ask() -> str:
    try:
        return input("> ").strip()
    except EOFError:
        say()
        return ""
