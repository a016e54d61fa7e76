"""Pictures on their way into Segment Anything: the longer side to the input's, zeros below and to the right.

The same bytes as Meta's `ResizeLongestSide` on the picture. Enormous pictures are made smaller before they are
converted and turned, and JPEG files already while they are decoded, so that memory holds the picture once at most.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from PIL.JpegImagePlugin import JpegImageFile
from torch import Tensor

from volvelle.data.images import naming, to_rgb, to_tensor
from volvelle.errors import VolvelleError
from volvelle.systems.segmentation.sam.config import SamConfig

LARGE = 1 << 25
"""Pixels above which a picture is first reduced by a whole number: twice the input's side remain."""
LARGEST = 1 << 30
"""Pixels of the largest file that is opened."""
_TURNED = 0x0112
"""The number of the tag that says how a camera was held."""


def scaled(height: int, width: int, size: int) -> tuple[int, int]:
    """(height, width) when the longer side is `size`, rounded to whole pixels.

    >>> scaled(480, 640, 1024), scaled(3, 4000, 1024)
    ((768, 1024), (1, 1024))
    """
    scale = size / max(height, width)
    return max(1, int(height * scale + 0.5)), max(1, int(width * scale + 0.5))


def open_picture(path: str | os.PathLike[str]) -> Image.Image:
    """A file opened; an enormous one is not decoded yet, so that a JPEG can be decoded no larger than needed.

    Unlike `volvelle.data.images.open_image` it takes pictures up to `LARGEST` pixels. Raises VolvelleError that names
    the file: missing, not an image, larger.
    """
    from volvelle.data.images import MAX_PIXELS, open_image

    path = Path(path)
    image = _unchecked(path)
    if image is None or image.width * image.height <= MAX_PIXELS:
        return open_image(path)
    if image.width * image.height > LARGEST:
        raise VolvelleError(f"{path}: {image.width:,} x {image.height:,} pixels are more than {LARGEST:,}")
    return image


def _unchecked(path: Path) -> Image.Image | None:
    """The file by its own reader, header only, without Pillow's limit on its size; None where none takes it."""
    Image.init()
    try:
        with path.open("rb") as file:
            start = file.read(16)
        for kind in ("JPEG", "PNG", "TIFF", "BMP", "PPM", "WEBP"):
            factory, accept = Image.OPEN.get(kind, (None, None))
            if factory is not None and accept is not None and accept(start) is True:
                return factory(open(path, "rb"), str(path))
    except (OSError, SyntaxError, ValueError):
        return None
    return None


def as_pixels(image: Image.Image | np.ndarray | Tensor, size: int) -> tuple[Tensor, tuple[int, int]]:
    """The picture resized, uint8 (3, y, x) with the longer side `size`, and its own (height, width), upright.

    `image` is a Pillow image of any mode, or uint8 (y, x), (y, x, 1 to 4) or a tensor (1, 3 or 4, y, x); it stays as it
    is. Raises VolvelleError for anything else, for pictures without pixels, and for files that cannot be decoded.
    """
    picture = image if isinstance(image, Image.Image) else _from_array(image)
    if min(picture.size) < 1:
        raise VolvelleError(f"embed: the picture has no pixels, it is {picture.width} x {picture.height}")
    if picture.width * picture.height > LARGE:
        picture, original = _reduced(picture, size)
    else:
        picture = upright(picture)
        original = picture.height, picture.width
    height, width = scaled(*original, size)
    return to_tensor(picture.resize((width, height), Image.Resampling.BILINEAR)), original


def upright(image: Image.Image | np.ndarray | Tensor) -> Image.Image:
    """A picture as `as_pixels` takes it, as upright RGB in its own size."""
    picture = image if isinstance(image, Image.Image) else _from_array(image)
    with naming(_source(picture)):
        picture.load()
    return to_rgb(ImageOps.exif_transpose(picture), source=_source(picture))


def upright_size(picture: Image.Image) -> tuple[int, int]:
    """(height, width) of a picture as it is shown; it is not decoded for that."""
    turned = picture.getexif().get(_TURNED, 1) in (5, 6, 7, 8)
    return (picture.width, picture.height) if turned else (picture.height, picture.width)


def shrunk(picture: Image.Image, size: tuple[int, int], step: int) -> Image.Image:
    """A picture whose upright `size` is (height, width), in RGB, with one pixel for `step` x `step`."""
    height, width = (-(-side // step) for side in size)
    small = _reduced(picture, max(height, width))[0] if picture.width * picture.height > LARGE else upright(picture)
    return small if small.size == (width, height) else small.resize((width, height), Image.Resampling.BILINEAR)


def _reduced(picture: Image.Image, size: int) -> tuple[Image.Image, tuple[int, int]]:
    """An enormous picture, upright RGB at about twice the input's side, and its (height, width) before."""
    (width, height), original, exif = picture.size, upright_size(picture), picture.getexif()
    wanted = max(1, max(width, height) // (2 * size))
    picture = _decoded(picture, (width // wanted, height // wanted))
    left = max(1, max(picture.size) // (2 * size))
    if picture.mode in ("1", "P") or picture.mode.startswith("I;"):  # numbers of which Pillow makes no mean
        small = picture.resize(
            (max(1, picture.width // left), max(1, picture.height // left)), Image.Resampling.NEAREST
        )
    else:
        small = picture.reduce(left)
    small.getexif()[_TURNED] = exif.get(_TURNED, 1)
    return to_rgb(ImageOps.exif_transpose(small), source=_source(picture)), original


def _decoded(picture: Image.Image, least: tuple[int, int]) -> Image.Image:
    """The picture with its pixels; of a JPEG file that is not decoded yet fewer of them, but no fewer than `least`.

    The decoder skips what it is told to for good, so it is told in a second look at the file: the picture that was
    given keeps its size.
    """
    file = Path(getattr(picture, "filename", "") or os.devnull)
    with naming(_source(picture)):
        if isinstance(picture, JpegImageFile) and picture.tile and file.is_file():
            with file.open("rb") as opened, JpegImageFile(opened, str(file)) as again:
                if (again.size, again.mode) == (picture.size, picture.mode):  # and nobody has told the first one
                    again.draft(None, least)
                    again.load()
                    return again
        picture.load()
    return picture


def _source(picture: Image.Image) -> str:
    return str(getattr(picture, "filename", "")) or "the picture"


def _from_array(image: Any) -> Image.Image:
    if isinstance(image, Tensor):
        pixels = image.detach().cpu()
        if pixels.dim() == 3 and pixels.shape[0] in (1, 3, 4):
            pixels = pixels.permute(1, 2, 0)
        image = pixels.numpy() if pixels.dtype == torch.uint8 else image
    if not isinstance(image, np.ndarray) or image.dtype != np.uint8:
        got = f"{getattr(image, 'dtype', '')} {type(image).__name__}".strip()
        raise VolvelleError(
            f"embed: a picture is a Pillow image, a uint8 array or a uint8 tensor, got {got}",
            tip="pixels in [0, 1] become (255 * pixels).round().astype(uint8)",
        )
    fits = image.ndim == 2 or (image.ndim == 3 and image.shape[2] in (1, 2, 3, 4))
    if not fits or image.size == 0:
        raise VolvelleError(
            f"embed: an array is (y, x) or (y, x, 1 to 4), a tensor (1, 3 or 4, y, x); got {tuple(image.shape)}"
        )
    return Image.fromarray(np.ascontiguousarray(image[..., 0] if image.ndim == 3 and image.shape[2] == 1 else image))


def padded(pixels: Tensor, config: SamConfig) -> Tensor:
    """Normalised input (1, 3, s, s) of resized uint8 (3, y, x): zeros, which are the mean colour, fill it up.

    In 255ths as Meta's code has it, (pixels - 255 mean) / (255 std), so that not a bit differs.
    """
    mean, std = (torch.tensor(v, dtype=torch.float64).mul(255).float().view(3, 1, 1) for v in (config.mean, config.std))
    filled = torch.zeros(1, 3, config.size, config.size)
    filled[0, :, : pixels.shape[1], : pixels.shape[2]] = (pixels.cpu() - mean) / std
    return filled
