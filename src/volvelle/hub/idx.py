"""A folder of IDX files (the MNIST format): four arrays of unsigned bytes, gzipped or plain, with a header each.

The header is two zero bytes, the type (8: unsigned byte), the number of axes, then each length as a big-endian int32.
"""

from __future__ import annotations

import gzip
import shutil
import struct
from pathlib import Path

from volvelle.errors import VolvelleError
from volvelle.files import atomic_path

AXES = {
    "train-images-idx3-ubyte": 3,
    "train-labels-idx1-ubyte": 1,
    "t10k-images-idx3-ubyte": 3,
    "t10k-labels-idx1-ubyte": 1,
}


def check_folder(folder: Path) -> list[Path]:
    """Return the four files of the folder; raise VolvelleError naming the one that is missing or malformed."""
    if not folder.is_dir():
        raise VolvelleError(
            f"{folder}: no such folder", tip=f"a folder with {', '.join(AXES)} (.gz or plain) is wanted"
        )
    return [_check_file(folder, name, axes) for name, axes in AXES.items()]


def copy_folder(source: Path, target: Path) -> None:
    """Copy the four checked files into the store, each in one step."""
    files = check_folder(source)
    if target.is_dir() and source.samefile(target):
        return
    for file in files:
        other = target / (file.name.removesuffix(".gz") if file.suffix == ".gz" else f"{file.name}.gz")
        other.unlink(missing_ok=True)
        with atomic_path(target / file.name) as temporary:
            shutil.copyfile(file, temporary)


def _check_file(folder: Path, name: str, axes: int) -> Path:
    """Find NAME.gz or NAME and check the header and length."""
    for file in (folder / f"{name}.gz", folder / name):
        if file.is_file():
            break
    else:
        raise VolvelleError(f"{folder}: holds no {name}.gz and no {name}")
    try:
        with gzip.open(file) if file.suffix == ".gz" else open(file, "rb") as stream:
            header = stream.read(4 + 4 * axes)
            if header[:4] != bytes((0, 0, 8, axes)) or len(header) < 4 + 4 * axes:
                raise VolvelleError(f"{file}: not an IDX file of unsigned bytes with {axes} axes")
            expected = 1
            for length in struct.unpack(f">{axes}i", header[4:]):
                expected *= length
            got = 0
            while block := stream.read(1 << 20):
                got += len(block)
    except (OSError, EOFError) as error:
        raise VolvelleError(f"{file}: damaged ({error})") from error
    if got != expected:
        raise VolvelleError(f"{file}: the header promises {expected} bytes, {got} follow")
    return file
