"""/v1/segment and /v1/detect: masks for points and boxes, and boxes of known classes, in pictures that are sent.

A picture is embedded once: the answer names it by its `image_id`, and further clicks send only that. Pictures stay in
memory, the last few of them; no path from a request ever opens a file.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import hashlib
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Annotated, Any, TypeVar

import torch
from fastapi import APIRouter
from fastapi.responses import JSONResponse, Response
from PIL import Image
from pydantic import BaseModel, ConfigDict, Field, model_validator

from volvelle.data.boxes_augment import Fit
from volvelle.data.images import decode_image
from volvelle.data.polygons import trace_polygons
from volvelle.serve import replies
from volvelle.serve.engine import Busy
from volvelle.serve.errors import Refused
from volvelle.systems.detection.inference import detect
from volvelle.systems.detection.model import Detector
from volvelle.systems.segmentation.sam.embedding import Embedding
from volvelle.systems.segmentation.sam.objects import objects_at
from volvelle.systems.segmentation.sam.promptable import Promptable

PIXELS = 40_000_000
"""Of the largest picture; more is refused by what its header says."""
KEPT = 8
"""Pictures that stay embedded."""
OBJECTS, POINTS = 64, 256

T = TypeVar("T")
Number = Annotated[float, Field(allow_inf_nan=False)]
Point = Annotated[list[Number], Field(min_length=2, max_length=2)]
Points = Annotated[list[Point], Field(min_length=1, max_length=POINTS)]
Box = Annotated[list[Number], Field(min_length=4, max_length=4)]


class Pictured(BaseModel):
    """A picture: the bytes of an image file in base64, perhaps as a data URL, or the id of one that was sent."""

    model_config = ConfigDict(extra="forbid")

    image: str | None = None
    image_id: Annotated[str, Field(max_length=64)] | None = None

    @model_validator(mode="after")
    def _one_of_both(self) -> Pictured:
        if (self.image is None) == (self.image_id is None):
            raise ValueError("image or image_id: one of both is wanted")
        return self

    def content(self) -> bytes:
        """The bytes of the file. Raises Refused where they are not base64."""
        text = self.image or ""
        if text.startswith("data:"):
            text = text.partition(",")[2]
        try:
            return base64.b64decode(text, validate=True)
        except (binascii.Error, ValueError) as error:
            raise Refused(400, f"image: not base64 ({error})", param="image") from None


class SegmentAsked(Pictured):
    """POST /v1/segment: of each object its points with labels, 1 on it and 0 beside it, or its box, or both."""

    points: Annotated[list[Points], Field(max_length=OBJECTS)] = Field(default_factory=list)
    labels: Annotated[list[list[Annotated[int, Field(ge=0, le=1)]]], Field(max_length=OBJECTS)] | None = None
    boxes: Annotated[list[Box], Field(max_length=OBJECTS)] = Field(default_factory=list)
    polygons: bool = False

    @model_validator(mode="after")
    def _as_many_of_each(self) -> SegmentAsked:
        if not self.points and not self.boxes:
            raise ValueError("points or boxes: at least one object is wanted")
        if self.points and self.boxes and len(self.points) != len(self.boxes):
            raise ValueError(f"boxes: one for each object, got {len(self.boxes)} and points of {len(self.points)}")
        if self.labels is not None and [len(row) for row in self.labels] != [len(row) for row in self.points]:
            raise ValueError("labels: one for each point")
        return self


class DetectAsked(Pictured):
    """POST /v1/detect."""

    score: Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)] | None = None


class Desk:
    """One thread for one model, with a bounded number of requests that wait for it."""

    def __init__(self, name: str, queue: int = 32):
        self._pool, self._free = ThreadPoolExecutor(1, name), threading.Semaphore(queue)
        self.queue = queue

    async def run(self, work: Callable[[], T]) -> T:
        """Do the work when its turn comes. Raises Busy when as many wait as may."""
        if not self._free.acquire(blocking=False):
            raise Busy(f"{self.queue} pictures wait already")
        try:
            return await asyncio.get_running_loop().run_in_executor(self._pool, work)
        finally:
            self._free.release()


class Recent:
    """The last few things by their keys, in one thread."""

    def __init__(self, kept: int = KEPT):
        self._kept, self._found = kept, OrderedDict[str, Any]()

    def get(self, key: str, make: Callable[[], Any]) -> Any:
        """What is known by the key, else what is made."""
        if key not in self._found:
            self._found[key] = make()
            if len(self._found) > self._kept:
                self._found.popitem(last=False)
        self._found.move_to_end(key)
        return self._found[key]


class Segmenter:
    """A promptable model and the pictures that it embedded last: each is embedded once."""

    def __init__(self, promptable: Promptable):
        self.promptable, self.embeddings = promptable, Recent()

    def answer(self, asked: SegmentAsked) -> dict[str, Any]:
        """A mask for each object that is asked for."""
        began = time.perf_counter()
        key, made = known(asked)

        def embed() -> Embedding:
            with torch.no_grad():
                return self.promptable.embed(made())

        embedding: Embedding = self.embeddings.get(key, embed)
        embedded = time.perf_counter()
        labels = [[1] * len(row) for row in asked.points] if asked.labels is None else asked.labels
        found = objects_at(self.promptable, embedding, asked.points, labels, asked.boxes)
        height, width = embedding.original
        masks = []
        for one in found:
            x, y, x2, y2 = one.mask.box
            entry = {"segmentation": one.mask.to_coco(), "area": one.mask.area, "bbox": [x, y, x2 - x, y2 - y]}
            if asked.polygons:
                entry["polygons"] = trace_polygons(one.mask.mask(), tolerance=0.5)
            masks.append(entry | {name: one.facts[name] for name in ("predicted_iou", "stability_score")})
        seconds = {"embed": embedded - began, "decode": time.perf_counter() - embedded}
        return {"image_id": key, "width": width, "height": height, "masks": masks, "seconds": seconds}


class Finder:
    """A detector and the pictures it saw last; boxes of less than `trusted` are left out unless a request says more."""

    def __init__(self, model: Detector, fit: Fit, trusted: float):
        self.model, self.fit, self.trusted, self.pictures = model, fit, trusted, Recent()

    def answer(self, asked: DetectAsked) -> dict[str, Any]:
        """Boxes with class and score, surest first."""
        began = time.perf_counter()
        key, made = known(asked)
        picture: Image.Image = self.pictures.get(key, made)
        least = self.trusted if asked.score is None else asked.score
        with torch.no_grad():
            found = detect(self.model, self.fit.prepare(picture)[None])
        sure = found.mask[0] & (found.scores[0] >= least)
        corners = self.fit.back(found.boxes[0][sure], *picture.size).tolist()
        facts = zip(corners, found.labels[0][sure].tolist(), found.scores[0][sure].tolist(), strict=True)
        objects = [{"class": self.model.classes[label], "score": score, "box": box} for box, label, score in facts]
        return {
            "image_id": key,
            "width": picture.width,
            "height": picture.height,
            "objects": objects,
            "seconds": {"detect": time.perf_counter() - began},
        }


def segment_routes(promptable: Promptable, *, queue: int = 32) -> APIRouter:
    """POST /v1/segment with this model."""
    router, desk, segmenter = APIRouter(prefix="/v1"), Desk("volvelle-segment", queue), Segmenter(promptable)

    @router.post("/segment", response_model=replies.Masks, responses=replies.failures(*replies.OF_A_PICTURE))
    async def segment(asked: SegmentAsked) -> Response:
        """Masks of the objects that are asked for, as COCO's run lengths."""
        return JSONResponse(await desk.run(lambda: segmenter.answer(asked)))

    return router


def detect_routes(model: Detector, fit: Fit, *, trusted: float = 0.5, queue: int = 32) -> APIRouter:
    """POST /v1/detect with this model; boxes of less than `trusted` are left out where nobody says otherwise."""
    router, desk, finder = APIRouter(prefix="/v1"), Desk("volvelle-detect", queue), Finder(model, fit, trusted)

    @router.post("/detect", response_model=replies.Objects, responses=replies.failures(*replies.OF_A_PICTURE))
    async def find(asked: DetectAsked) -> Response:
        """Boxes x1, y1, x2, y2 in the picture's pixels with class and score, surest first."""
        return JSONResponse(await desk.run(lambda: finder.answer(asked)))

    return router


def known(asked: Pictured) -> tuple[str, Callable[[], Image.Image]]:
    """The picture's id, and what decodes it; an id alone cannot be decoded again."""
    if asked.image is not None:
        content = asked.content()
        return hashlib.sha256(content).hexdigest(), lambda: decode_image(content, largest=PIXELS)

    def gone() -> Image.Image:
        raise Refused(404, f"the picture {asked.image_id} is not kept any more; send it again", param="image_id")

    return asked.image_id or "", gone
