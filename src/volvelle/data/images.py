"""Reading the image files that people have: any mode Pillow opens becomes upright 8-bit RGB, or an error with a reason.

| what the file holds | what is read |
|---|---|
| L, P, CMYK, YCbCr, 1 bit | converted to RGB |
| LA, RGBA, P with transparency | laid over white |
| 16-bit grey | the upper 8 bits, rounded: v / 257 |
| floating-point grey in [0, 1] | 255 v, rounded |
| EXIF orientation | applied, so that up is up |
| several frames | the first |

A picture's size is read from its header first: one that would unpack to more than `MAX_PIXELS` is refused unread.
"""

from __future__ import annotations

import io
import os
import struct
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from volvelle.data.text import Bad, OnBad
from volvelle.errors import UsageError, VolvelleError, did_you_mean

SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm", ".pbm"})
"""File names that are taken for images in a folder; a file named one by one may be called anything."""
MAX_PIXELS = 89_478_485
"""The largest picture that is unpacked: 256 MB as RGB, which is also where Pillow begins to warn."""
DECODED = 20_000
"""The most files that are decoded whole when a folder is checked; of larger folders only the headers are read."""
_WIDE = ("I;16", "I;16L", "I;16B", "I;16N", "I")
# What Pillow's decoders raise on broken bytes: mostly OSError, but every format has its own reader.
_BROKEN = (OSError, SyntaxError, ValueError, TypeError, LookupError, OverflowError, EOFError, struct.error, zlib.error)


def read_image(path: str | os.PathLike[str]) -> Image.Image:
    """Return the picture as upright 8-bit RGB (the table above). Raises VolvelleError as `open_image` does."""
    return to_rgb(open_image(path), source=str(path))


def open_image(path: str | os.PathLike[str]) -> Image.Image:
    """Return the picture decoded and upright, in the mode it is stored in: masks keep their class numbers.

    Raises VolvelleError that names the file and the reason: missing, not an image, truncated, too large.
    """
    with naming(path), Image.open(path) as image:
        _refuse_bomb(image, path)
        image.load()
        return ImageOps.exif_transpose(image)


def decode_image(content: bytes, *, source: str = "image", largest: int = MAX_PIXELS) -> Image.Image:
    """The picture in the bytes of a file, upright 8-bit RGB, for content that somebody sent.

    Raises VolvelleError that names `source` and the reason: not an image, truncated, more than `largest` pixels (which
    its header says, before anything is decoded).
    """
    with naming(source), Image.open(io.BytesIO(content)) as image:
        _refuse_bomb(image, source, largest)
        image.load()
        return to_rgb(ImageOps.exif_transpose(image), source=source)


def image_size(path: str | os.PathLike[str]) -> tuple[int, int]:
    """(width, height) as shown, from the header alone. Raises VolvelleError as `open_image`, except for truncation."""
    with naming(path), Image.open(path) as image:
        _refuse_bomb(image, path)
        turned = image.getexif().get(0x0112, 1) in (5, 6, 7, 8)
        return (image.height, image.width) if turned else (image.width, image.height)


def to_rgb(image: Image.Image, *, source: str = "image") -> Image.Image:
    """Convert any mode to 8-bit RGB. Raises VolvelleError for numbers that have no agreed brightness.

    >>> to_rgb(Image.new("LA", (1, 1), (0, 0))).getpixel((0, 0))  # black, but wholly transparent
    (255, 255, 255)
    """
    if image.mode in _WIDE:
        values = np.asarray(image).astype(np.int64)
        if values.size and not (values.min() >= 0 and values.max() < 1 << 16):
            raise VolvelleError(
                f"{source}: whole numbers from {values.min()} to {values.max()} are neither 8 nor 16 bits",
                tip="save it as an 8-bit or 16-bit image",
            )
        return Image.fromarray(((values + 128) // 257).astype(np.uint8)).convert("RGB")
    if image.mode == "F":
        values = np.asarray(image)
        if not (np.isfinite(values).all() and values.min() >= 0 and values.max() <= 1):
            raise VolvelleError(
                f"{source}: floating-point pixels must lie in [0, 1], got {values.min():g} to {values.max():g}",
                tip="save it as an 8-bit or 16-bit image",
            )
        return Image.fromarray(np.rint(255 * values).astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, image.convert("RGBA")).convert("RGB")
    with naming(source):
        return image.convert("RGB")


def to_tensor(image: Image.Image) -> Tensor:
    """The pixels as uint8 (c, y, x); one channel for grey images and masks.

    >>> to_tensor(Image.new("RGB", (3, 2))).shape
    torch.Size([3, 2, 3])
    """
    values = torch.from_numpy(np.array(image))
    return values[None] if values.ndim == 2 else values.permute(2, 0, 1).contiguous()


def to_image(pixels: Tensor) -> Image.Image:
    """Undo `to_tensor`: uint8 (c, y, x) of one or three channels, or (y, x). Raises ValueError for anything else."""
    grey = pixels.ndim == 2 or (pixels.ndim == 3 and pixels.shape[0] == 1)
    if pixels.dtype != torch.uint8 or not (grey or (pixels.ndim == 3 and pixels.shape[0] == 3)):
        raise ValueError(f"to_image: pixels must be uint8 (1 or 3, y, x), got {pixels.dtype} {tuple(pixels.shape)}")
    if grey:
        return Image.fromarray(pixels.reshape(pixels.shape[-2:]).cpu().numpy())
    return Image.fromarray(pixels.permute(1, 2, 0).contiguous().cpu().numpy())


def list_images(folder: str | os.PathLike[str]) -> list[Path]:
    """The image files of a folder and of the folders in it, by name; hidden ones are passed over.

    Raises UsageError when it is no folder, VolvelleError when it holds no image.
    """
    folder = Path(folder)
    if not folder.is_dir():
        beside = [p.name for p in folder.parent.iterdir()] if folder.parent.is_dir() else []
        raise UsageError(f"{folder}: no such folder", tip=did_you_mean(folder.name, beside))
    found = sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES and not _hidden(path, folder))
    found = [path for path in found if path.is_file()]
    if not found:
        raise VolvelleError(f"{folder}: holds no image", tip=f"names end in {', '.join(sorted(SUFFIXES))}")
    return found


def check_images(
    files: Sequence[Path],
    *,
    on_bad: OnBad,
    source: str | os.PathLike[str],
    look: Callable[[Path], object] | None = None,
) -> tuple[list[Path], list[str]]:
    """Read every file before training starts: the good ones, and the bad ones with their reasons ("file: reason").

    `look` is what must not raise VolvelleError; by default the file is decoded whole, or its header read where there
    are more than `DECODED`. Raises VolvelleError that lists the bad files, unless `on_bad` is "skip" and some are good.
    """
    if look is None:
        look = read_image if len(files) <= DECODED else image_size
    bad = Bad(source, on_bad)
    good = []
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        for path, reason in zip(files, pool.map(lambda file: _complaint(look, file), files), strict=True):
            if reason is None:
                good.append(path)
            else:
                bad.add(str(path), reason)
    return good, bad.finish(len(good))


def _complaint(look: Callable[[Path], object], file: Path) -> str | None:
    try:
        look(file)
    except VolvelleError as error:
        return str(error).removeprefix(f"{file}: ")
    return None


def _hidden(path: Path, folder: Path) -> bool:
    return any(part.startswith(".") for part in path.relative_to(folder).parts)


@contextmanager
def naming(path: str | os.PathLike[str]) -> Iterator[None]:
    """Turn whatever a decoder raises into an error that names the file."""
    try:
        yield
    except VolvelleError:
        raise
    except FileNotFoundError:
        raise VolvelleError(f"{path}: no such file", tip=_beside(Path(path))) from None
    except IsADirectoryError:
        raise VolvelleError(f"{path}: a folder, but an image file is wanted") from None
    except Image.UnidentifiedImageError:
        raise VolvelleError(f"{path}: not an image that can be read", tip="open and save it as PNG or JPEG") from None
    except Image.DecompressionBombError as error:
        raise VolvelleError(f"{path}: refused, {error}") from error
    except _BROKEN as error:
        raise VolvelleError(f"{path}: cannot be decoded ({error or type(error).__name__})") from error


def _refuse_bomb(image: Image.Image, path: str | os.PathLike[str], largest: int = MAX_PIXELS) -> None:
    width, height = image.size
    if width * height > largest:
        raise VolvelleError(
            f"{path}: {width:,} x {height:,} pixels are more than {largest:,}",
            tip="make it smaller first; such a file can also be an attack",
        )


def _beside(path: Path) -> str | None:
    if not path.parent.is_dir():
        return f"{path.parent} does not exist either"
    return did_you_mean(path.name, _names(path.parent.iterdir()))


def _names(paths: Iterable[Path]) -> list[str]:
    return [path.name for path in paths]
