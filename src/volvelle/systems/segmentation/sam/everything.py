"""All masks of a picture: a grid of points as prompts, and of the answers those that are sure, stable and new.

Kirillov et al. 2023, "Segment Anything", appendix B. What is kept equals what the authors' generator keeps at the same
settings, in the same order; less is computed for it:

- the estimated IoU is known before a mask is, so that nothing is enlarged for prompts which it drops;
- masks are enlarged where they can be above the threshold, in bands (`upsample`), and become run lengths at once;
- small regions are found on the run lengths (`regions`).

Memory holds the picture's embedding, a few prompts on their way through the decoder, one mask, and the run lengths.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from volvelle.data.coco_masks import MaskedObject
from volvelle.data.run_lengths import RunLengths
from volvelle.errors import VolvelleError
from volvelle.hub.progress import megabytes
from volvelle.parts.regions.nms import batched_nms
from volvelle.systems.modes import evaluating
from volvelle.systems.segmentation.sam.crops import Crop, crops
from volvelle.systems.segmentation.sam.embedding import Embedding
from volvelle.systems.segmentation.sam.mask_decoder import prompts_at_once
from volvelle.systems.segmentation.sam.options import EverythingOptions
from volvelle.systems.segmentation.sam.pictures import upright
from volvelle.systems.segmentation.sam.promptable import THRESHOLD
from volvelle.systems.segmentation.sam.prompts import Prompts, prepare
from volvelle.systems.segmentation.sam.regions import clean_regions
from volvelle.systems.segmentation.sam.upsample import Upsampler

if TYPE_CHECKING:
    from PIL.Image import Image

    from volvelle.systems.segmentation.sam.promptable import Promptable

EDGE = 20
"""A mask whose box ends nearer than this, in pixels, to a crop's border inside the picture is cut off there."""
MAPS = 8
"""Maps of the embedding's size that the decoder holds for one prompt, at most."""
STAGES = ("embedding", "decoding", "masks", "duplicates", "small regions")
"""What the seconds are counted by."""
Box = tuple[int, int, int, int]


@dataclass(frozen=True)
class FoundMask:
    """A mask, what the model thinks of it, how stable it is, the point (x, y) it answers, and the crop of that."""

    mask: RunLengths
    iou: float
    stability: float
    point: tuple[float, float]
    crop: Box

    def annotated(self) -> MaskedObject:
        """The mask as COCO's JSON has it, with the facts that SA-1B's files give."""
        x1, y1, x2, y2 = self.crop
        facts = {
            "predicted_iou": self.iou,
            "stability_score": None if math.isnan(self.stability) else self.stability,
            "point_coords": [list(self.point)],
            "crop_box": [x1, y1, x2 - x1, y2 - y1],
        }
        return MaskedObject(self.mask, facts=facts)


@dataclass(frozen=True)
class Everything:
    """The masks of a picture of `size` (height, width), and the seconds that each stage took."""

    masks: Sequence[FoundMask]
    size: tuple[int, int]
    seconds: dict[str, float]


def everything(
    promptable: Promptable,
    image: Image | np.ndarray | Tensor | Embedding,
    *,
    options: EverythingOptions | None = None,
    max_memory: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Everything:
    """Find all masks of a picture, without being told where.

    `image` is what `Promptable.embed` takes, or what it gave where no crops are looked at. `max_memory`, in bytes,
    bounds what is held besides the model, the picture, the image encoder's own pass and the run lengths found; None: as
    many points at once as are fastest. `progress` is called with the points that are done and their number. Raises
    VolvelleError where `max_memory` is too little for one point.
    """
    run = _Run(promptable, options or EverythingOptions(), max_memory, progress)
    with torch.no_grad(), evaluating(promptable.model.prompt_encoder, promptable.model.mask_decoder):
        return run.over(image)


class _Run:
    """One call of `everything`."""

    def __init__(
        self,
        promptable: Promptable,
        options: EverythingOptions,
        max_memory: int | None,
        progress: Callable[[int, int], None] | None,
    ):
        self.promptable, self.options, self.max_memory, self.progress = promptable, options, max_memory, progress
        self.encoder, self.decoder = promptable.model.prompt_encoder, promptable.model.mask_decoder
        self.position = self.encoder.position()
        self.seconds: dict[str, float] = dict.fromkeys(STAGES, 0.0)
        self.done = self.total = 0

    def over(self, image: Image | np.ndarray | Tensor | Embedding) -> Everything:
        """All crops, one after the other."""
        if isinstance(image, Embedding) and self.options.crop_layers:
            raise VolvelleError(
                f"everything: crop_layers={self.options.crop_layers} looks at crops of the picture, got its embedding",
                tip="give the picture itself, or crop_layers=0",
            )
        # Crops are cut of the picture in its full size, so it is made upright once, and not decoded twice.
        picture = upright(image) if self.options.crop_layers and not isinstance(image, Embedding) else None
        embedding = self.embed(image if picture is None else picture)
        size = embedding.original
        windows = list(crops(size, self.options))
        self.total = sum(crop.points**2 for crop in windows)
        found = self.of_crop(embedding, windows[0], size)
        for crop in windows[1:]:
            assert picture is not None
            found += self.of_crop(self.embed(picture.crop(crop.box)), crop, size)
        if len(windows) > 1:
            areas = torch.tensor([(one.crop[2] - one.crop[0]) * (one.crop[3] - one.crop[1]) for one in found])
            found = self.unlike(found, 1 / areas, self.options.crop_nms)
        if self.options.least > 0:
            found = self.clean(found)
        return Everything(found, size, self.seconds)

    def embed(self, image: Image | np.ndarray | Tensor | Embedding) -> Embedding:
        if isinstance(image, Embedding):
            return self.promptable.checked(image)
        with self.stage("embedding"):
            return self.promptable.embed(image)

    def of_crop(self, embedding: Embedding, crop: Crop, size: tuple[int, int]) -> list[FoundMask]:
        """The masks of one crop, duplicates dropped."""
        low = 4 * self.promptable.model.config.grid
        device = embedding.features.device
        upsampler = Upsampler(low, embedding.size, embedding.scaled, crop.box, size, device=device)
        grid, found = crop.grid(), list[FoundMask]()
        prompts = prepare(embedding, grid[:, None], None, None, None)
        step = self.at_once(upsampler)
        for start in range(0, len(grid), step):
            part = prompts.part(start, start + step)
            with self.stage("decoding"):
                logits, iou, point = self.answer(embedding, part)
            with self.stage("masks"):
                for number, stability, mask in upsampler.masks(
                    logits, threshold=THRESHOLD, offset=self.options.offset, least=self.options.stability
                ):
                    x, y = grid[start + point[number]].tolist()
                    where = x + crop.box[0], y + crop.box[1]
                    one = FoundMask(mask, iou[number], stability, where, crop.box)
                    if not _is_cut(_ends(one), crop.box, size):
                        found.append(one)
            self.done += len(grid[start : start + step])
            if self.progress:
                self.progress(self.done, self.total)
        return self.unlike(found, torch.tensor([one.iou for one in found]), self.options.nms)

    def answer(self, embedding: Embedding, prompts: Prompts) -> tuple[Tensor, list[float], list[int]]:
        """Logits (n, low, low) of the masks that think well enough of themselves, how well, and of which prompt."""
        sparse, dense = self.encoder(*prompts)
        image = self.promptable.side(embedding, self.position, dense)
        keys, hyper, iou = self.decoder.attend(embedding.features, self.position, sparse, dense, True, image)
        iou = iou[0].float()
        good = iou > self.options.iou if self.options.iou > 0 else torch.ones_like(iou, dtype=torch.bool)
        asked = good.any(1)
        if not bool(asked.all()):
            keys, hyper = keys[:, asked], hyper[:, asked]
        logits = self.decoder.enlarge(keys, hyper, embedding.features.shape[2], embedding.fine)[0]
        return logits[good[asked]], iou[good].tolist(), good.nonzero()[:, 0].tolist()

    def at_once(self, upsampler: Upsampler) -> int:
        """How many prompts are decoded together."""
        config = self.promptable.model.config
        weight = self.encoder.no_mask_embed.weight
        wide = weight.element_size()
        map_bytes = config.grid**2 * config.width * wide
        fastest = prompts_at_once(map_bytes, weight.device)
        if self.max_memory is None:
            return fastest
        fine = 2 * wide * sum(math.prod(shape) for shape in config.fine)
        shared = upsampler.bytes_needed() + 4 * map_bytes + fine
        each = MAPS * map_bytes + 2 * 4 * (config.decoder.masks + 1) * (4 * config.grid) ** 2
        if self.max_memory < shared + each:
            raise VolvelleError(
                f"everything: max_memory of {megabytes(self.max_memory)} is less than the "
                f"{megabytes(shared + each)} that one point needs"
            )
        return min(fastest, (self.max_memory - shared) // each)

    def unlike(self, found: list[FoundMask], scores: Tensor, threshold: float) -> list[FoundMask]:
        """The masks whose boxes no better one's overlaps too much, best first."""
        with self.stage("duplicates"):
            boxes = torch.tensor([_ends(one) for one in found], dtype=torch.float32).view(-1, 4)
            kept = batched_nms(boxes, scores.float(), torch.zeros(len(found), dtype=torch.int64), threshold)
            return [found[number] for number in kept.tolist()]

    def clean(self, found: list[FoundMask]) -> list[FoundMask]:
        """The masks without small holes and islands; of those that became alike, rather one that had none."""
        with self.stage("small regions"):
            cleaned = [clean_regions(one.mask, self.options.least) for one in found]
        after = [replace(one, mask=mask) for one, (mask, _) in zip(found, cleaned, strict=True)]
        untouched = torch.tensor([not changed for _, changed in cleaned])
        return self.unlike(after, untouched, max(self.options.nms, self.options.crop_nms))

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Count the block's seconds."""
        begun = time.perf_counter()
        yield
        self.seconds[name] += time.perf_counter() - begun


def _ends(one: FoundMask) -> Box:
    """The mask's first and last pixel on each axis, x1 y1 x2 y2; the crop's corner for a mask without pixels.

    Boxes are compared as the authors compare them, from the first pixel to the last.
    """
    x1, y1, x2, y2 = one.mask.box
    return (x1, y1, x2 - 1, y2 - 1) if x2 > x1 else (one.crop[0], one.crop[1], one.crop[0], one.crop[1])


def _is_cut(box: Box, crop: Box, size: tuple[int, int]) -> bool:
    """Whether a side of the box lies at the crop's border, and that is not the picture's."""
    whole = (0, 0, size[1], size[0])
    return any(
        abs(side - border) <= EDGE and abs(side - end) > EDGE
        for side, border, end in zip(box, crop, whole, strict=True)
    )
