"""Vision: clicks and boxes to masks, a detector's boxes, and objects kept for the next training, as COCO's JSON."""

from __future__ import annotations

import base64
import hashlib
import io
import re
from pathlib import Path
from typing import Annotated, Any, Literal

from fastapi import APIRouter
from PIL import Image
from pydantic import BaseModel, ConfigDict, Field

from volvelle.cli.detecting import KIND as DETECT
from volvelle.cli.prompting import KIND as PROMPTABLE
from volvelle.data.coco_masks import MaskedObject, coco_masks_document
from volvelle.data.images import decode_image
from volvelle.data.run_lengths import RunLengths
from volvelle.data.scenes import Scenes
from volvelle.files import write_atomic
from volvelle.hub.store import status
from volvelle.serve.errors import Refused
from volvelle.serve.studio.jobs import Jobs
from volvelle.serve.studio.vision_models import SMALL, Models
from volvelle.serve.vision import PIXELS, Desk, DetectAsked, Pictured, SegmentAsked
from volvelle.train.promptable_engine import Collection

SCENES = 200
"""Composed scenes that can be asked for; of the part that no training sees."""
SIDE = 256
FOLDER, FILE = "annotated", "objects.json"
"""Where kept objects go: runs/annotated/objects.json beside the pictures."""
OBJECTS = 256

Name = Annotated[str, Field(min_length=1, max_length=80)]


class RunSegment(SegmentAsked):
    """POST /studio/api/vision/segment: as /v1/segment, and which run answers."""

    run: Name


class RunDetect(DetectAsked):
    """POST /studio/api/vision/detect: as /v1/detect, and which run answers."""

    run: Name


class Kept(BaseModel):
    """An object that was kept: its mask as COCO's run lengths, its name, what is known of it."""

    model_config = ConfigDict(extra="forbid")
    segmentation: dict[str, Any]
    name: Name = "object"
    predicted_iou: Annotated[float, Field(allow_inf_nan=False)] | None = None
    points: Annotated[list[Annotated[list[float], Field(min_length=2, max_length=2)]], Field(max_length=256)] = []


class SaveAsked(Pictured):
    """POST /studio/api/vision/coco and /save: a picture and its objects."""

    objects: Annotated[list[Kept], Field(min_length=1, max_length=OBJECTS)]
    file_name: Annotated[str, Field(max_length=200)] = "picture.png"


class TrainAsked(BaseModel):
    """POST /studio/api/vision/train."""

    model_config = ConfigDict(extra="forbid")
    kind: Literal["promptable", "detect"]


def router(jobs: Jobs, *, runs: Path = Path("runs")) -> APIRouter:
    """The room's routes; one thread asks the models, in turn."""
    routes, desk, models = APIRouter(prefix="/studio/api/vision"), Desk("volvelle-vision", 4), Models(runs)

    @routes.get("")
    def facts() -> dict[str, Any]:
        """The runs that can be asked, and whether scenes can be composed."""
        return {
            "segment": models.names(PROMPTABLE),
            "detect": models.names(DETECT),
            "scenes": SCENES if _has_scenes() else 0,
            "train": {kind: " ".join(("volvelle", *words)) for kind, words in SMALL.items()},
        }

    @routes.get("/scene")
    async def scene(number: Annotated[int, Field(ge=0, lt=SCENES)] = 0) -> dict[str, Any]:
        """A composed scene as a PNG in a data URL; image is null where Fashion-MNIST is not on this machine."""
        return await desk.run(lambda: _scene(number))

    @routes.post("/segment")
    async def segment(asked: RunSegment) -> dict[str, Any]:
        """A mask for each object; as the answer of /v1/segment."""
        return await desk.run(lambda: models.get(PROMPTABLE, asked.run).answer(asked))

    @routes.post("/detect")
    async def detect(asked: RunDetect) -> dict[str, Any]:
        """Boxes with class and score; as the answer of /v1/detect."""
        return await desk.run(lambda: models.get(DETECT, asked.run).answer(asked))

    @routes.post("/coco")
    async def coco(asked: SaveAsked) -> dict[str, Any]:
        """The objects as a document of COCO's, to be downloaded."""
        return await desk.run(lambda: document(asked))

    @routes.post("/save")
    async def save(asked: SaveAsked) -> dict[str, Any]:
        """Put the picture and its objects into the folder of annotations, for the next training."""
        return await desk.run(lambda: _save(asked, runs / FOLDER))

    @routes.post("/train")
    async def train(asked: TrainAsked) -> dict[str, Any]:
        """Train the small model of a kind on composed scenes, as a job."""
        return jobs.start(f"train {asked.kind}", SMALL[asked.kind]).told()

    return routes


def _has_scenes() -> bool:
    return status("fashion-mnist").state == "ready"


def _scene(number: int) -> dict[str, Any]:
    if not _has_scenes():
        return {"number": number, "image": None, "caption": "Fashion-MNIST is not on this machine", "label": ""}
    found = Scenes(SCENES, size=SIDE, part="val").scene(number)
    buffer = io.BytesIO()
    Image.fromarray(found.image).save(buffer, "PNG")
    image = f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"
    label = "composed: real Fashion-MNIST garments on a drawn background"
    return {"number": number, "image": image, "caption": found.caption, "label": label}


def _objects(asked: SaveAsked) -> tuple[Image.Image, bytes, list[MaskedObject]]:
    """The picture, its bytes and the objects. Raises Refused where masks are not of the picture's size."""
    if asked.image is None:
        raise Refused(400, "image: the picture itself is wanted to be kept", param="image")
    content = asked.content()
    picture = decode_image(content, largest=PIXELS)
    found = []
    for number, one in enumerate(asked.objects):
        mask = RunLengths.from_coco(one.segmentation)
        if mask.size != (picture.height, picture.width):
            raise Refused(400, f"objects.{number}: a mask of {mask.size[1]} x {mask.size[0]} pixels in a picture of "
                          f"{picture.width} x {picture.height}", param="objects")  # fmt: skip
        facts: dict[str, Any] = {"point_coords": one.points}
        if one.predicted_iou is not None:
            facts["predicted_iou"] = round(one.predicted_iou, 4)
        found.append(MaskedObject(mask, one.name, facts=facts))
    return picture, content, found


def document(asked: SaveAsked) -> dict[str, Any]:
    """The document of one picture."""
    picture, _, objects = _objects(asked)
    names = tuple(dict.fromkeys(one.name for one in objects))
    return coco_masks_document([(Path(asked.file_name).name or "picture.png", picture.size)], [objects], names)


def _save(asked: SaveAsked, folder: Path) -> dict[str, Any]:
    """Write the picture under a name of our own, and its objects into the folder's one file."""
    picture, content, objects = _objects(asked)
    stem = re.sub(r"[^a-z0-9]+", "-", Path(asked.file_name).stem.lower()).strip("-")[:40] or "picture"
    file = folder / f"{stem}-{hashlib.sha256(content).hexdigest()[:12]}.png"
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    folder.mkdir(parents=True, exist_ok=True)
    write_atomic(file, buffer.getvalue())
    collection = Collection(folder / FILE)
    collection.add(file, picture.size, objects)
    return {
        "file": str(folder / FILE),
        "picture": file.name,
        "pictures": len(collection.entries),
        "objects": len(collection),
        "next": f"volvelle train promptable data={folder / FILE}",
    }
