"""Inspect: receptive fields, the memory of a training step, curves of position encodings, an all-reduce as it ran."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Request
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import JSONResponse, Response
from pydantic import BaseModel, ConfigDict, Field

from volvelle.inspect.collectives_trace import ALGORITHMS, CollectiveTrace, trace_all_reduce
from volvelle.inspect.memory_models import KNOWN
from volvelle.inspect.memory_options import MethodName, Optimizer, Precision, Shard
from volvelle.serve.errors import Refused
from volvelle.serve.studio.apart import Gone, apart
from volvelle.serve.studio.inspect_positions import CurvesAsked, curves
from volvelle.serve.studio.inspect_work import field_of, memory_of
from volvelle.serve.studio.turns import Turns
from volvelle.systems.backbone.names import CONFIGS

KEPT = 128
"""Answers that are kept."""
BACKBONES = tuple(name for name in CONFIGS if not name.startswith("tf-"))


class FieldAsked(BaseModel):
    """POST /studio/api/inspect/field."""

    model_config = ConfigDict(extra="forbid")
    model: Annotated[str, Field(max_length=64)]


class MemoryAsked(BaseModel):
    """POST /studio/api/inspect/memory: the arguments of `memory_of`."""

    model_config = ConfigDict(extra="forbid")
    model: Annotated[str, Field(max_length=64)]
    method: MethodName = "full"
    precision: Precision = "amp"
    batch: Annotated[int, Field(ge=1, le=1024)] = 1
    length: Annotated[int, Field(ge=16, le=32_768)] = 1024
    optimizer: Optimizer = "adamw"
    checkpointing: bool = False
    cards: Annotated[int, Field(ge=0, le=1024)] = 2
    gigabytes: Annotated[float, Field(gt=0, le=1024, allow_inf_nan=False)] = 80
    shard: Shard = "ddp"


class TraceAsked(BaseModel):
    """POST /studio/api/inspect/trace: an all-reduce of `kilobytes` on `ranks` processes of this machine."""

    model_config = ConfigDict(extra="forbid")
    algorithm: Literal["ring", "halving-doubling", "recursive-doubling", "tree", "star"] = "ring"
    ranks: Annotated[int, Field(ge=2, le=8)] = 4
    kilobytes: Annotated[int, Field(ge=1, le=1024)] = 64


def router() -> APIRouter:
    """The room's routes."""
    routes, turns, kept = APIRouter(prefix="/studio/api/inspect"), Turns("inspect"), _Kept()

    @routes.get("")
    async def facts() -> dict[str, Any]:
        """What can be chosen."""
        models = {name: {"context": one.config.context, "parameters": one.parameters} for name, one in KNOWN.items()}
        return {"backbones": BACKBONES, "models": models, "algorithms": ALGORITHMS}

    async def computed(request: Request, program: Callable[..., Any], **arguments: Any) -> Response:
        """What the program gives, in a process that ends with the request; kept for the next one that asks."""
        key = program.__name__, *arguments.items()
        found = kept.get(key)
        if found is None:
            turns.check()
            try:
                async with turns.take():
                    found = await apart(_called, (program, arguments), gone=request.is_disconnected)
            except Gone:
                return Response(status_code=499)
            kept.put(key, found)
        return JSONResponse(found)

    @routes.post("/field")
    async def field(asked: FieldAsked, request: Request) -> Response:
        """The receptive fields of a backbone's layers."""
        if asked.model not in BACKBONES:
            raise Refused(400, f"model: {asked.model!r} is not a backbone here", param="model")
        return await computed(request, field_of, name=asked.model)

    @routes.post("/memory")
    async def memory(asked: MemoryAsked, request: Request) -> Response:
        """The memory of a training step; a request that is given up ends its planning."""
        if asked.model not in KNOWN:
            raise Refused(400, f"model: {asked.model!r} is not a model whose configuration is known", param="model")
        if asked.length > KNOWN[asked.model].config.context:
            raise Refused(400, f"length: {asked.model} has a context of {KNOWN[asked.model].config.context} tokens")
        return await computed(request, memory_of, **asked.model_dump())

    @routes.post("/curves")
    async def drawn(asked: CurvesAsked) -> dict[str, Any]:
        """Curves of a position encoding."""
        return await run_in_threadpool(curves, asked)

    @routes.post("/trace")
    async def traced(asked: TraceAsked) -> dict[str, Any]:
        """An all-reduce that is run now, message by message."""
        size = asked.kilobytes * 1024 // (4 * asked.ranks) * 4 * asked.ranks
        async with turns.take():
            trace = await run_in_threadpool(trace_all_reduce, asked.algorithm, asked.ranks, size)
        return told(trace)

    return routes


def told(trace: CollectiveTrace) -> dict[str, Any]:
    """A trace as the page draws it; the formula's bytes are those of one rank where all send alike."""
    return {
        "algorithm": trace.algorithm,
        "ranks": trace.ranks,
        "size": trace.size,
        "steps": trace.steps,
        "right": trace.right,
        "sent": trace.sent,
        "formula": {"rounds": trace.work.rounds, "messages": trace.work.messages, "total": trace.work.total},
        "messages": [message._asdict() for message in trace.messages],
    }


def _called(program: Callable[..., Any], arguments: dict[str, Any]) -> Any:
    return program(**arguments)


class _Kept:
    """The newest answers by what was asked."""

    def __init__(self) -> None:
        self._found: OrderedDict[Any, Any] = OrderedDict()

    def get(self, key: Any) -> Any:
        if key in self._found:
            self._found.move_to_end(key)
        return self._found.get(key)

    def put(self, key: Any, value: Any) -> None:
        self._found[key] = value
        if len(self._found) > KEPT:
            self._found.popitem(last=False)
