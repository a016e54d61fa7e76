"""What is answered, as the OpenAPI document says it: bodies, statuses and the key.

The paths write their answers themselves; tests hold these forms against what arrives.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel, ConfigDict, Field

Finish = Literal["stop", "length"]


class Reply(BaseModel):
    """A body with these fields and no others."""

    model_config = ConfigDict(extra="forbid", protected_namespaces=())


class Problem(Reply):
    """What went wrong: the kind of error, the field it is about, and a code where OpenAI has one."""

    message: str
    type: str
    param: str | None
    code: str | None


class Failure(Reply):
    """Every error."""

    error: Problem


class ModelEntry(Reply):
    """A model, or an adapter of it."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str


class ModelList(Reply):
    """GET /v1/models."""

    object: Literal["list"]
    data: list[ModelEntry]


class UsageDetails(Reply):
    """Tokens that came from drafts."""

    accepted_prediction_tokens: int
    rejected_prediction_tokens: int


class Usage(Reply):
    """Tokens that were read and written."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    completion_tokens_details: UsageDetails


class CompletionLogprobs(Reply):
    """Of each token its text, its log-probability, the likeliest tokens in its place, and where its text begins."""

    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]]
    text_offset: list[int]


class CompletionChoice(Reply):
    """One continuation."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: Finish


class Completion(Reply):
    """POST /v1/completions without stream."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage
    system_fingerprint: str | None


class CompletionPiece(Reply):
    """What a continuation gained, or how it ended."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: Finish | None


class CompletionChunk(Reply):
    """An event of a streamed completion; `usage` is there where it is asked for, and filled in the last one."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[CompletionPiece]
    usage: Usage | None = None


class TopLogprob(Reply):
    """A token that might stand here; `bytes` is null where it is a part of a character."""

    token: str
    logprob: float
    bytes: list[int] | None


class TokenLogprob(TopLogprob):
    """A token that does, and the likeliest."""

    top_logprobs: list[TopLogprob]


class ChatLogprobs(Reply):
    """Log-probabilities of a message's tokens."""

    content: list[TokenLogprob]
    refusal: None


class Said(Reply):
    """The message of the model."""

    role: Literal["assistant"]
    content: str
    refusal: None


class ChatChoice(Reply):
    """One answer."""

    index: int
    message: Said
    logprobs: ChatLogprobs | None
    finish_reason: Finish


class ChatCompletion(Reply):
    """POST /v1/chat/completions without stream."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage
    system_fingerprint: str | None


class Delta(Reply):
    """What a message gained."""

    role: Literal["assistant"] = "assistant"
    content: str = ""


class ChatPiece(Reply):
    """What an answer gained, or how it ended."""

    index: int
    delta: Delta
    logprobs: ChatLogprobs | None
    finish_reason: Finish | None


class ChatChunk(Reply):
    """An event of a streamed chat; `usage` is there where it is asked for, and filled in the last one."""

    id: str
    object: Literal["chat.completion.chunk"]
    created: int
    model: str
    choices: list[ChatPiece]
    usage: Usage | None = None


class Health(Reply):
    """GET /health: since when the process answers."""

    status: Literal["ok"]
    seconds: float


class Ready(Reply):
    """GET /ready."""

    ready: bool


class RunLength(Reply):
    """A mask as COCO's compressed run lengths; `size` is height and width."""

    size: list[int]
    counts: str


class Mask(Reply):
    """An object: `bbox` is x, y, width, height in pixels."""

    segmentation: RunLength
    area: int
    bbox: list[float]
    predicted_iou: float
    stability_score: float
    polygons: list[list[float]] = Field(default_factory=list)


class Masks(Reply):
    """POST /v1/segment: a mask for each object that was asked for."""

    image_id: str
    width: int
    height: int
    masks: list[Mask]
    seconds: dict[str, float]


class Found(Reply):
    """An object: its box is x1, y1, x2, y2 in pixels."""

    kind: str = Field(alias="class")
    score: float
    box: list[float]


class Objects(Reply):
    """POST /v1/detect: surest first."""

    image_id: str
    width: int
    height: int
    objects: list[Found]
    seconds: dict[str, float]


STATUSES = {
    400: "The request is not one that is served; `param` names the field",
    401: "The API key is missing or wrong",
    404: "There is no such thing here",
    408: "The body did not arrive in time",
    413: "The body is larger than this server takes",
    500: "The model failed",
    503: "As many requests wait as may, or the server ends",
    504: "The answer took longer than it may",
}
OF_A_MODEL = (400, 404, 500, 503, 504)
"""How an answer may fail that a model writes."""
OF_A_PICTURE = (400, 404, 503)
"""How one about a picture may."""


def failures(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """These errors, for a path's `responses`."""
    retry = {"Retry-After": {"description": "seconds", "schema": {"type": "string"}}}
    found: dict[int | str, dict[str, Any]] = {}
    for status in statuses:
        found[status] = {"model": Failure, "description": STATUSES[status]}
        if status == 503:
            found[status]["headers"] = retry
    return found


def streamed(chunk: type[Reply], *statuses: int) -> dict[int | str, dict[str, Any]]:
    """The same for a path that streams chunks where the request says so; its last event is `[DONE]`."""
    forms = [{"$ref": f"#/components/schemas/{model.__name__}"} for model in (chunk, Failure)]
    data = [
        {"const": "[DONE]"},
        {"type": "string", "contentMediaType": "application/json", "contentSchema": {"anyOf": forms}},
    ]
    event = {"type": "object", "required": ["data"], "properties": {"data": {"anyOf": data}}}
    return {200: {"content": {"text/event-stream": {"itemSchema": event}}}, **failures(*statuses)}


def document(app: FastAPI, *, open: tuple[str, ...], key: bool) -> None:
    """Let the app's OpenAPI document say what holds for all paths: sizes, times, and a key except for `open` ones."""

    def made() -> dict[str, Any]:
        if app.openapi_schema is None:
            found = get_openapi(title=app.title, version=app.version, routes=app.routes)
            for path, operations in found["paths"].items():
                for operation in operations.values():
                    _common(operation, key and path not in open)
            schemas = found.setdefault("components", {}).setdefault("schemas", {})
            for name in ("HTTPValidationError", "ValidationError"):
                schemas.pop(name, None)
            for model in (Failure, CompletionChunk, ChatChunk):
                schemas |= _schemas(model)
            if key:
                found["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
            app.openapi_schema = found
        return app.openapi_schema

    app.openapi = made


def _common(operation: dict[str, Any], key: bool) -> None:
    responses = operation["responses"]
    responses.pop("422", None)  # FastAPI's own form, which `errors.install` replaces
    for status in (*((401,) if key else ()), 413, *((408,) if "requestBody" in operation else ())):
        schema = {"$ref": f"#/components/schemas/{Failure.__name__}"}
        said = {"description": STATUSES[status], "content": {"application/json": {"schema": schema}}}
        responses.setdefault(str(status), said)
    if key:
        operation["security"] = [{"key": []}]


def _schemas(model: type[BaseModel]) -> Mapping[str, Any]:
    found = model.model_json_schema(ref_template="#/components/schemas/{model}")
    return {**found.pop("$defs", {}), model.__name__: found}
