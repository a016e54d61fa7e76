"""Chat: an answer as it is written, step by step, with what was drafted for it and what became of the drafts."""

from __future__ import annotations

import contextlib
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Annotated, Any

from fastapi import APIRouter, FastAPI
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import StreamingResponse
from pydantic import BaseModel, ConfigDict, Field

from volvelle import hub
from volvelle.decode.request import Generation
from volvelle.errors import VolvelleError
from volvelle.serve.engine import Piece
from volvelle.serve.errors import Refused
from volvelle.serve.figures import Figures
from volvelle.serve.protocol import Asked, token_text
from volvelle.serve.studio.chat_speaker import PLAIN, Speaker
from volvelle.serve.studio.jobs import Jobs
from volvelle.serve.studio.streams import event
from volvelle.serve.studio.turns import Turns
from volvelle.serve.texts import Answers, Texts
from volvelle.systems.language.tokenizer import TextTokenizer

SECONDS = 300.0
"""The longest that an answer may take."""


class Message(BaseModel):
    """One message of the conversation."""

    model_config = ConfigDict(extra="forbid")
    role: Annotated[str, Field(pattern="^(system|user|assistant)$")]
    content: Annotated[str, Field(max_length=32_768)]


class Said(BaseModel):
    """POST /studio/api/chat/answer."""

    model_config = ConfigDict(extra="forbid")
    messages: Annotated[list[Message], Field(min_length=1, max_length=64)]
    draft: Annotated[str, Field(max_length=200)] = PLAIN
    temperature: Annotated[float, Field(ge=0, le=2, allow_inf_nan=False)] = 0.0
    seed: Annotated[int, Field(ge=0, lt=2**32)] | None = None
    max_tokens: Annotated[int, Field(ge=1, le=1024)] = 160


def router(
    jobs: Jobs, *, runs: Path = Path("runs"), model: str = "smollm2", speaker: Speaker | None = None
) -> APIRouter:
    """The room's routes; the model's engines end with the studio."""
    who, turns, figures = speaker or Speaker(model, runs), Turns("chat"), Figures()

    @contextlib.asynccontextmanager
    async def life(_: FastAPI) -> AsyncIterator[None]:
        yield
        await run_in_threadpool(who.close)

    routes = APIRouter(prefix="/studio/api/chat", lifespan=life)

    @routes.get("")
    def facts() -> dict[str, Any]:
        """The model, where it stands, and the ways to draft."""
        return who.facts()

    @routes.post("/open")
    def begin() -> dict[str, Any]:
        """Begin to open the model; `facts` says when it is open."""
        who.open()
        return who.facts()

    @routes.post("/fetch")
    async def fetch() -> dict[str, Any]:
        """Fetch the model, as a job."""
        if who.name not in hub.ASSETS:
            raise Refused(400, f"{who.name} is not a model that can be fetched by name")
        return jobs.start(f"fetch {who.name}", ["get", who.name]).told()

    @routes.post("/answer")
    async def answer(said: Said) -> StreamingResponse:
        """The answer as server-sent events: begin, a step at a time, end; or error."""
        turns.check()
        engine = await run_in_threadpool(who.engine, said.draft)
        prompt = await run_in_threadpool(who.prompt, [message.model_dump() for message in said.messages])
        asked = Asked(model=who.name, temperature=said.temperature, seed=said.seed, stream=True, stop=None)
        texts = Texts(engine, who.tokenizer, {who.name: None}, figures, SECONDS)
        most = max(1, min(said.max_tokens, who.room - len(prompt)))  # where not even one fits, the engine says so

        async def written() -> AsyncIterator[str]:
            try:
                async with turns.take():
                    yield event("begin", {"prompt_tokens": len(prompt), "draft": said.draft, "exact": who.exact})
                    async for told in _steps(Answers(texts, asked, [prompt], most, None), who.tokenizer):
                        yield told
            except (VolvelleError, Refused) as error:
                tip = getattr(error, "tip", None)
                yield event("error", {"message": f"{error} (tip: {tip})" if tip else str(error)})

        return StreamingResponse(written(), media_type="text/event-stream", headers={"X-Accel-Buffering": "no"})

    return routes


async def _steps(answers: Answers, tokenizer: TextTokenizer) -> AsyncIterator[str]:
    """The events of one answer; its job is left when nobody listens any more."""
    first: float | None = None
    try:
        async for _, told in answers:
            now = time.monotonic()
            first = first or now
            if isinstance(told, Piece):
                yield event("step", {"at": round(now - first, 4), **step(told, tokenizer)})
            elif isinstance(told, Generation):
                yield event("end", summary(told))
    finally:
        answers.leave()


def step(piece: Piece, tokenizer: TextTokenizer) -> dict[str, Any]:
    """What the page draws of a step: tokens that stay, each drafted or not, and the texts of those that did not."""
    checked = piece.checked
    rejected = [] if checked is None else [t for t, kept in zip(checked.tokens, checked.kept, strict=True) if not kept]
    return {
        "tokens": [{"text": token.text, "drafted": token.drafted} for token in piece.tokens],
        "rejected": [token_text(tokenizer, token) for token in rejected],
    }


def summary(answer: Generation) -> dict[str, Any]:
    """What the page says of a finished answer."""
    return {
        "finish": answer.finish,
        "ids": answer.tokens,
        "text": answer.text,
        "steps": answer.steps,
        "tokens_per_second": answer.tokens_per_second,
        "prompt_seconds": answer.prompt_seconds,
        "accepted_per_step": answer.accepted_per_step,
        "drafted": sum(answer.drafted),
        "proposed": answer.proposed,
        "accepted": answer.accepted,
        "near_ties": answer.near_ties,
    }
