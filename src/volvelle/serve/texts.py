"""/v1/models, /v1/completions and /v1/chat/completions: OpenAI's API over one engine."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from fastapi import APIRouter, Request
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import JSONResponse, Response, StreamingResponse

from volvelle.decode.request import Generation
from volvelle.errors import VolvelleError
from volvelle.serve import protocol, replies
from volvelle.serve.engine import Closing, Engine, Job, Piece, Told
from volvelle.serve.errors import Refused, answer, body
from volvelle.serve.figures import Figures
from volvelle.serve.protocol import Asked, ChatAsked, CompletionAsked
from volvelle.systems.language.tokenizer import TextTokenizer

MOST_PROMPTS = 32
GLANCE = 0.25
"""Seconds between two looks whether somebody who waits for a whole answer is still there."""


@dataclass(frozen=True)
class Texts:
    """What is served: names of models with the adapter of each (None: the base), by one engine.

    An answer that takes longer than `seconds` in all ends with an error.
    """

    engine: Engine
    tokenizer: TextTokenizer
    names: Mapping[str, str | None]
    figures: Figures
    seconds: float = 600.0
    created: int = field(default_factory=lambda: int(time.time()))


class Answers:
    """The answers to one request in the making: a job each, whose news come in one queue."""

    def __init__(self, texts: Texts, asked: Asked, prompts: Sequence[Sequence[int]], most: int | None, top: int | None):
        loop, self.news = asyncio.get_running_loop(), asyncio.Queue[tuple[int, Told]]()
        self.texts, self.asked, self.prompts = texts, asked, prompts
        self.deadline = time.monotonic() + texts.seconds

        def teller(number: int) -> Any:
            def tell(told: Told) -> None:
                if not loop.is_closed():
                    loop.call_soon_threadsafe(self.news.put_nowait, (number, told))

            return tell

        self.jobs = [
            Job(
                prompt,
                teller(asked.n * place + choice),
                sampling=asked.sampling(choice),
                max_tokens=most,
                stop=asked.stops,
                logprobs=top,
                adapter=texts.names[asked.model],
            )
            for place, prompt in enumerate(prompts)
            for choice in range(asked.n)
        ]
        texts.engine.submit(*self.jobs)

    async def __aiter__(self) -> AsyncIterator[tuple[int, Told]]:
        """What is told, with the answer's number, until all are finished; an error ends it, and is raised."""
        open_, first = len(self.jobs), True
        try:
            while open_:
                try:
                    number, told = await asyncio.wait_for(self.news.get(), max(0.0, self.deadline - time.monotonic()))
                except TimeoutError:
                    raise Refused(504, f"no answer within {self.texts.seconds:.0f} s", code="timeout") from None
                if isinstance(told, VolvelleError):
                    raise told
                if isinstance(told, Piece) and first:
                    first = False
                    self.texts.figures.first_token.observe(time.monotonic() - self.jobs[number].arrived)
                open_ -= isinstance(told, Generation)
                yield number, told
        finally:
            self.leave()

    def leave(self) -> None:
        """Nobody waits any more."""
        for job in self.jobs:
            job.leave()

    @property
    def prompt_tokens(self) -> int:
        """Tokens of all prompts."""
        return sum(map(len, self.prompts))


def routes(texts: Texts) -> APIRouter:
    """The three paths."""
    router = APIRouter(prefix="/v1")

    @router.get("/models", response_model=replies.ModelList)
    async def models() -> dict[str, Any]:
        """The names that requests may use."""
        entries = [
            {"id": name, "object": "model", "created": texts.created, "owned_by": "volvelle"} for name in texts.names
        ]
        return {"object": "list", "data": entries}

    @router.get("/models/{name:path}", response_model=replies.ModelEntry, responses=replies.failures(404))
    async def model(name: str) -> dict[str, Any]:
        """One of them."""
        _known(texts, name)
        return {"id": name, "object": "model", "created": texts.created, "owned_by": "volvelle"}

    @router.post(
        "/completions",
        response_model=replies.Completion,
        responses=replies.streamed(replies.CompletionChunk, *replies.OF_A_MODEL),
    )
    async def completions(asked: CompletionAsked, request: Request) -> Response:
        """Continue prompts."""
        _known(texts, asked.model)
        prompts = await run_in_threadpool(_prompts, texts.tokenizer, asked)
        if len(prompts) * asked.n > MOST_PROMPTS:
            raise Refused(400, f"prompt: at most {MOST_PROMPTS} answers a request, got {len(prompts) * asked.n}")
        answers = Answers(texts, asked, prompts, asked.max_tokens, asked.logprobs)
        return await _respond(_Completion(answers, asked.logprobs is not None), request)

    @router.post(
        "/chat/completions",
        response_model=replies.ChatCompletion,
        responses=replies.streamed(replies.ChatChunk, *replies.OF_A_MODEL),
    )
    async def chat(asked: ChatAsked, request: Request) -> Response:
        """Answer a conversation."""
        _known(texts, asked.model)
        if not texts.tokenizer.chat_template:
            raise Refused(400, f"{asked.model} has no chat template", param="model")
        prompt = await run_in_threadpool(_conversation, texts.tokenizer, asked)
        top = (asked.top_logprobs or 0) if asked.logprobs else None
        return await _respond(_Chat(Answers(texts, asked, [prompt], asked.most, top), asked.logprobs), request)

    return router


class _Form:
    """How an answer is written: whole, or in chunks."""

    kind = chunk_kind = ""
    prefix = ""

    def __init__(self, answers: Answers, scored: bool):
        self.answers, self.scored = answers, scored
        self.tokenizer = answers.texts.tokenizer
        self.id, self.created = protocol.new_id(self.prefix), int(time.time())

    def head(self, chunk: bool) -> dict[str, Any]:
        kind = self.chunk_kind if chunk else self.kind
        return protocol.head(kind, self.id, self.answers.asked.model, self.created)

    def first(self, number: int) -> dict[str, Any] | None:
        """The choice of the chunk that opens an answer."""
        return None

    def piece(self, number: int, piece: Piece, written: int) -> dict[str, Any]:
        """The choice of a chunk; `written` characters came before."""
        raise NotImplementedError

    def last(self, number: int, answer: Generation) -> dict[str, Any]:
        """The choice of the chunk that closes an answer."""
        raise NotImplementedError

    def whole(self, number: int, answer: Generation) -> dict[str, Any]:
        """The choice of an answer that is not streamed."""
        raise NotImplementedError


class _Completion(_Form):
    kind = chunk_kind = "text_completion"
    prefix = "cmpl"

    def piece(self, number: int, piece: Piece, written: int) -> dict[str, Any]:
        scored = None
        if piece.scored is not None:
            ids = [token.id for token in piece.tokens]
            scored = protocol.completion_logprobs(self.tokenizer, ids, piece.scored, written)
        text = "".join(token.text for token in piece.tokens)
        return {"index": number, "text": text, "logprobs": scored, "finish_reason": None}

    def last(self, number: int, answer: Generation) -> dict[str, Any]:
        return {"index": number, "text": "", "logprobs": None, "finish_reason": protocol.FINISH[answer.finish]}

    def whole(self, number: int, answer: Generation) -> dict[str, Any]:
        scored = None
        if answer.logprobs is not None:
            scored = protocol.completion_logprobs(self.tokenizer, answer.tokens, answer.logprobs)
        reason = protocol.FINISH[answer.finish]
        return {"index": number, "text": answer.text, "logprobs": scored, "finish_reason": reason}


class _Chat(_Form):
    kind, chunk_kind = "chat.completion", "chat.completion.chunk"
    prefix = "chatcmpl"

    def first(self, number: int) -> dict[str, Any] | None:
        return _delta(number, {"role": "assistant", "content": ""})

    def piece(self, number: int, piece: Piece, written: int) -> dict[str, Any]:
        scored = None
        if piece.scored is not None:
            scored = protocol.chat_logprobs(self.tokenizer, [token.id for token in piece.tokens], piece.scored)
        return _delta(number, {"content": "".join(token.text for token in piece.tokens)}, scored)

    def last(self, number: int, answer: Generation) -> dict[str, Any]:
        return {**_delta(number, {}), "finish_reason": protocol.FINISH[answer.finish]}

    def whole(self, number: int, answer: Generation) -> dict[str, Any]:
        scored = None
        if answer.logprobs is not None:
            scored = protocol.chat_logprobs(self.tokenizer, answer.tokens, answer.logprobs)
        message = {"role": "assistant", "content": answer.text, "refusal": None}
        reason = protocol.FINISH[answer.finish]
        return {"index": number, "message": message, "logprobs": scored, "finish_reason": reason}


def _delta(number: int, delta: dict[str, Any], scored: dict[str, Any] | None = None) -> dict[str, Any]:
    return {"index": number, "delta": delta, "logprobs": scored, "finish_reason": None}


async def _respond(form: _Form, request: Request) -> Response:
    if form.answers.asked.stream:
        headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
        return StreamingResponse(_chunks(form), media_type="text/event-stream", headers=headers)
    found = await _whole(form, request)
    if found is None:
        return Response(status_code=499)  # nobody reads it
    choices = [form.whole(number, found[number]) for number in sorted(found)]
    used = protocol.usage(form.answers.prompt_tokens, list(found.values()))
    return JSONResponse({**form.head(False), "choices": choices, "usage": used, "system_fingerprint": None})


async def _whole(form: _Form, request: Request) -> dict[int, Generation] | None:
    """All answers; None when the client went away meanwhile."""
    found: dict[int, Generation] = {}

    async def collect() -> None:
        async for number, told in form.answers:
            if isinstance(told, Generation):
                found[number] = told

    task = asyncio.ensure_future(collect())
    try:
        while not task.done():
            await asyncio.wait({task}, timeout=GLANCE)
            if not task.done() and await request.is_disconnected():
                return None
        task.result()
    finally:
        form.answers.leave()
        task.cancel()
    return found


async def _chunks(form: _Form) -> AsyncIterator[str]:
    """The events of a stream."""
    wanted = form.answers.asked.usage_wanted
    finished: list[Generation] = []
    written: dict[int, int] = {}

    def event(choices: list[dict[str, Any]], **more: Any) -> str:
        empty = {"usage": None} if wanted else {}
        chunk = {**form.head(True), "choices": choices, **empty, **more}
        return f"data: {json.dumps(chunk, ensure_ascii=False)}\n\n"

    try:
        async for number, told in form.answers:
            if number not in written:
                written[number] = 0
                if (opening := form.first(number)) is not None:
                    yield event([opening])
            if isinstance(told, Piece):
                text = "".join(token.text for token in told.tokens)
                if text or told.scored:
                    yield event([form.piece(number, told, written[number])])
                written[number] += len(text)
            elif isinstance(told, Generation):
                finished.append(told)
                yield event([form.last(number, told)])
        if wanted:
            yield event([], usage=protocol.usage(form.answers.prompt_tokens, finished))
        yield "data: [DONE]\n\n"
    except (VolvelleError, Refused) as error:
        yield f"data: {_in_stream(error)}\n\n"
    finally:
        form.answers.leave()


def _in_stream(error: Exception) -> str:
    """An error where the status is sent already."""
    if isinstance(error, Closing):
        return json.dumps(body(503, str(error), code="shutdown"))
    return bytes(answer(error).body).decode()


def _known(texts: Texts, name: str) -> None:
    if name not in texts.names:
        known = ", ".join(texts.names)
        raise Refused(
            404, f"the model {name!r} does not exist; there are: {known}", param="model", code="model_not_found"
        )


def _prompts(tokenizer: TextTokenizer, asked: CompletionAsked) -> list[list[int]]:
    prompt = asked.prompt
    if isinstance(prompt, str):
        return [_ids(tokenizer, prompt)]
    if not prompt:
        raise Refused(400, "prompt: at least one is wanted", param="prompt")
    numbers = [one for one in prompt if isinstance(one, int)]
    if numbers:
        return [numbers]  # all of them are: pydantic has seen to that
    return [_ids(tokenizer, one) if isinstance(one, str) else list(one) for one in prompt if not isinstance(one, int)]


def _ids(tokenizer: TextTokenizer, text: str) -> list[int]:
    _proper(text, "prompt")
    return tokenizer.encode_prompt(text)


def _conversation(tokenizer: TextTokenizer, asked: ChatAsked) -> list[int]:
    messages = [message.plain() for message in asked.messages]
    for place, message in enumerate(messages):
        _proper(message["content"], f"messages.{place}.content")
    return tokenizer.chat_ids(messages)


def _proper(text: str, where: str) -> None:
    """JSON can hold halves of characters, which are no text."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise Refused(400, f"{where}: half of a surrogate pair at {error.start} is no text", param=where) from None
