"""OpenAI's requests for texts, as far as they are served, and what is answered to them.

Fields that are known and do nothing here are taken; fields that would change the answer and are not served are refused,
and so are unknown ones: nothing that somebody asks for is left out in silence.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, field_validator, model_validator

from volvelle.decode.options import Sampling
from volvelle.decode.request import Generation, Scored
from volvelle.systems.language.tokenizer import TextTokenizer

MOST_CHOICES, MOST_LOGPROBS, MOST_STOPS = 8, 20, 4
FINISH = {"eos": "stop", "stop": "stop", "length": "length"}

STRICT = ConfigDict(extra="forbid", strict=True, protected_namespaces=())
"""No field that is not known, and no "1" or true for a number."""


def _whole(number: Any) -> Any:
    """JSON's 2.0 is as whole a number as its 2."""
    return int(number) if isinstance(number, float) and number.is_integer() else number


Whole = BeforeValidator(_whole)
Count = Annotated[int, Field(ge=1, le=2**31), Whole]
NONE_OF_IT: Any = {"maxItems": 0, "maxProperties": 0}
"""For the schema of what is known and not served: as good as left out, it is taken."""
STOPS: Any = {"minLength": 1, "maxLength": 256}
PROMPTS: Any = {"minItems": 1, "items": {"minItems": 1, "minimum": 0}}


class StreamOptions(BaseModel):
    """What a stream tells besides its tokens."""

    model_config = STRICT
    include_usage: bool = False
    include_obfuscation: bool = False


class Asked(BaseModel):
    """What requests of both kinds may say."""

    model_config = STRICT

    model: Annotated[str, Field(max_length=512)]
    stream: bool = False
    stream_options: StreamOptions | None = None
    n: Annotated[int, Field(ge=1, le=MOST_CHOICES), Whole] = 1
    temperature: Annotated[float, Field(ge=0, le=2, allow_inf_nan=False)] = 1.0
    top_p: Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)] = 1.0
    top_k: Annotated[int, Field(ge=-1, le=2**31), Whole] | None = None
    min_p: Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2, allow_inf_nan=False)] = 0.0
    frequency_penalty: Annotated[float, Field(ge=-2, le=2, allow_inf_nan=False)] = 0.0
    repetition_penalty: Annotated[float, Field(gt=0, le=10, allow_inf_nan=False)] = 1.0
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63), Whole] | None = None
    stop: str | list[str] | None = Field(None, json_schema_extra={**STOPS, "maxItems": MOST_STOPS, "items": STOPS})
    max_tokens: Count | None = None
    user: str | None = None
    metadata: dict[str, Any] | None = None
    store: bool | None = None
    service_tier: str | None = None

    @field_validator("stop")
    @classmethod
    def _few_stops(cls, stop: str | list[str] | None) -> str | list[str] | None:
        listed = [stop] if isinstance(stop, str) else stop or []
        if len(listed) > MOST_STOPS or any(not 0 < len(one) <= 256 for one in listed):
            raise ValueError(f"up to {MOST_STOPS} strings of 1 to 256 characters are wanted")
        return stop

    @model_validator(mode="after")
    def _options_of_a_stream(self) -> Asked:
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options: only with stream=true")
        return self

    @property
    def stops(self) -> tuple[str, ...]:
        """The stop strings."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    def sampling(self, choice: int) -> Sampling:
        """How tokens of the choice of this number are chosen: with a seed, each has its own."""
        return Sampling(
            temperature=0.0 if self.temperature < 1e-6 else self.temperature,
            top_k=self.top_k if self.top_k is not None and self.top_k > 0 else None,
            top_p=self.top_p if self.top_p < 1 else None,
            min_p=self.min_p,
            repetition_penalty=self.repetition_penalty,
            presence_penalty=self.presence_penalty,
            frequency_penalty=self.frequency_penalty,
            seed=None if self.seed is None else (self.seed + choice) % 2**63,
        )

    @property
    def usage_wanted(self) -> bool:
        """Whether a stream ends with the number of its tokens."""
        return self.stream_options is not None and self.stream_options.include_usage


class CompletionAsked(Asked):
    """POST /v1/completions."""

    prompt: str | list[str] | list[int] | list[list[int]] = Field(json_schema_extra=PROMPTS)
    logprobs: Annotated[int, Field(ge=0, le=MOST_LOGPROBS), Whole] | None = None
    max_tokens: Count | None = 16
    echo: Literal[False] = False
    best_of: Literal[1] | None = None
    suffix: None = None
    logit_bias: dict[str, Any] | None = Field(None, json_schema_extra=NONE_OF_IT)

    @field_validator("logit_bias")
    @classmethod
    def _no_bias(cls, bias: Mapping[str, Any] | None) -> None:
        return _nothing("logit_bias", bias)


class Part(BaseModel):
    """A part of a message's content; texts are the only ones here."""

    model_config = STRICT
    type: Literal["text"]
    text: str


class Message(BaseModel):
    """A message of a conversation."""

    model_config = STRICT
    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[Part]
    name: str | None = None

    def plain(self) -> dict[str, str]:
        """Role and text, as chat templates know them."""
        text = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return {"role": "system" if self.role == "developer" else self.role, "content": text}


class ResponseFormat(BaseModel):
    """The form of an answer: plain text is the only one here."""

    model_config = STRICT
    type: Literal["text"]


class ChatAsked(Asked):
    """POST /v1/chat/completions."""

    messages: Annotated[list[Message], Field(min_length=1, max_length=4096)]
    max_completion_tokens: Count | None = None
    logprobs: bool = False
    top_logprobs: Annotated[int, Field(ge=0, le=MOST_LOGPROBS), Whole] | None = None
    response_format: ResponseFormat | None = None
    tools: list[Any] | None = Field(None, json_schema_extra=NONE_OF_IT)
    logit_bias: dict[str, Any] | None = Field(None, json_schema_extra=NONE_OF_IT)

    @field_validator("tools", "logit_bias")
    @classmethod
    def _not_here(cls, given: Any, info: Any) -> None:
        return _nothing(info.field_name, given)

    @model_validator(mode="after")
    def _logprobs_with_their_top(self) -> ChatAsked:
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs: only with logprobs=true")
        return self

    @property
    def most(self) -> int | None:
        """The longest answer, in tokens; None: what there is room for."""
        return self.max_completion_tokens if self.max_completion_tokens is not None else self.max_tokens


def _nothing(name: str, given: Any) -> None:
    if given:
        raise ValueError(f"{name} is not served here")


def new_id(kind: str) -> str:
    """An id for an answer."""
    return f"{kind}-{uuid.uuid4().hex}"


def usage(prompt_tokens: int, answers: Sequence[Generation]) -> dict[str, Any]:
    """How many tokens were read and written, with those that came from drafts."""
    written = sum(len(answer.tokens) for answer in answers)
    accepted = sum(sum(answer.drafted) for answer in answers)
    proposed = sum(sum(answer.proposed) for answer in answers)
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": written,
        "total_tokens": prompt_tokens + written,
        "completion_tokens_details": {
            "accepted_prediction_tokens": accepted,
            "rejected_prediction_tokens": max(proposed - accepted, 0),
        },
    }


def head(kind: str, answer_id: str, model: str, created: int | None = None) -> dict[str, Any]:
    """What every answer and every chunk begins with."""
    return {"id": answer_id, "object": kind, "created": created or int(time.time()), "model": model}


def token_text(tokenizer: TextTokenizer, token: int) -> str:
    """The text of a token; of one that is a part of a character the vocabulary's own name for it."""
    text = tokenizer.decode([token], skip_special=False)
    return text if "\ufffd" not in text else tokenizer.tokenizer.id_to_token(token) or text


def chat_logprobs(tokenizer: TextTokenizer, tokens: Sequence[int], scored: Sequence[Scored]) -> dict[str, Any]:
    """Log-probabilities in the form of chat completions."""

    def entry(token: int, logprob: float) -> dict[str, Any]:
        text, whole = token_text(tokenizer, token), tokenizer.decode([token], skip_special=False)
        octets = None if "\ufffd" in whole else list(whole.encode())
        return {"token": text, "logprob": max(logprob, -9999.0), "bytes": octets}

    pairs = zip(tokens, scored, strict=True)
    return {
        "content": [
            {**entry(token, one.logprob), "top_logprobs": [entry(*best) for best in one.top]} for token, one in pairs
        ],
        "refusal": None,
    }


def completion_logprobs(
    tokenizer: TextTokenizer, tokens: Sequence[int], scored: Sequence[Scored], start: int = 0
) -> dict[str, Any]:
    """Log-probabilities in the form of completions; `start` is where the first token's text begins."""
    texts = [token_text(tokenizer, token) for token in tokens]
    offsets = [start + sum(map(len, texts[:i])) for i in range(len(texts))]
    return {
        "tokens": texts,
        "token_logprobs": [max(one.logprob, -9999.0) for one in scored],
        "top_logprobs": [
            {token_text(tokenizer, token): max(value, -9999.0) for token, value in one.top} for one in scored
        ],
        "text_offset": offsets,
    }
