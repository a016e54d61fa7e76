"""The GGUF container: header, metadata and quantised tensors of one memory-mapped file (llama.cpp's format, v2 and v3).

Layout, little-endian: magic "GGUF", version, tensor count, key count; the keys and values; for each tensor its name,
dimensions (fastest first), type and offset; padding to `general.alignment`; the tensor data. Every length is checked
against the bytes that are left before anything is allocated, so a damaged file ends in a VolvelleError.
"""

from __future__ import annotations

import itertools
import math
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize
from torch import Tensor

from volvelle.errors import VolvelleError

Q = GGMLQuantizationType
_PLAIN = {Q.F32: torch.float32, Q.F16: torch.float16, Q.BF16: torch.bfloat16, Q.F64: torch.float64}
_QUANTISED = (Q.Q4_0, Q.Q4_1, Q.Q5_0, Q.Q5_1, Q.Q8_0, Q.Q2_K, Q.Q3_K, Q.Q4_K, Q.Q5_K, Q.Q6_K)
SUPPORTED = tuple(sorted(kind.name for kind in (*_PLAIN, *_QUANTISED)))

# Value types of the metadata: number -> (struct letter, bytes). 8 is a string, 9 an array.
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRUCTS = {letter: struct.Struct("<" + letter) for letter in _SCALARS.values()}
_STRING, _ARRAY = 8, 9
_VERSIONS = (2, 3)
_CHUNK = 1 << 20  # values dequantised at a time: bounds the extra memory to some 8 MB
_RETRY = "the download may be incomplete: fetch the file again"


@dataclass(frozen=True)
class TensorInfo:
    """Where a tensor lies in the file. `shape` is in torch's order (slowest first); `nbytes` counts stored bytes."""

    name: str
    kind: GGMLQuantizationType
    shape: tuple[int, ...]
    offset: int
    nbytes: int


@dataclass(frozen=True)
class Blocks:
    """A tensor as the file stores it: `raw` uint8 (rows, bytes a row), read-only; `shape` counts values."""

    kind: str
    shape: tuple[int, ...]
    raw: np.ndarray


class GGUFFile:
    """An opened GGUF file: `metadata` (key -> value), `tensors` (name -> TensorInfo), `read(name)`, `blocks(name)`.

    Numeric arrays in the metadata are numpy arrays, arrays of strings are lists. Raises VolvelleError that names the
    file and the first thing wrong with it.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self._data = _map(self.path)
        _check_magic(self.path, self._data)
        cursor = _Cursor(self.path, self._data)
        self.metadata, infos = _read_header(cursor)
        start = self._align(cursor.at)
        self.tensors = {info.name: self._place(info, start) for info in infos}
        self._check_overlap()

    def error(self, message: str, *, tip: str | None = None) -> VolvelleError:
        """A VolvelleError that begins with this file's path."""
        return VolvelleError(f"{self.path}: {message}", tip=tip)

    def _align(self, position: int) -> int:
        alignment = self.metadata.get("general.alignment", 32)
        if not isinstance(alignment, int) or isinstance(alignment, bool) or not 0 < alignment <= 1 << 24:
            raise self.error(f"general.alignment must be a small positive number, got {alignment!r}")
        return -(-position // alignment) * alignment

    def _place(self, info: TensorInfo, start: int) -> TensorInfo:
        end = start + info.offset + info.nbytes
        if end > self._data.size:
            raise self.error(
                f"truncated: tensor {info.name} ends at byte {end}, the file has {self._data.size}", tip=_RETRY
            )
        return TensorInfo(info.name, info.kind, info.shape, start + info.offset, info.nbytes)

    def _check_overlap(self) -> None:
        ordered = sorted(self.tensors.values(), key=lambda info: info.offset)
        for left, right in itertools.pairwise(ordered):
            if left.offset + left.nbytes > right.offset:
                raise self.error(f"damaged header: tensors {left.name} and {right.name} overlap", tip=_RETRY)

    def blocks(self, name: str) -> Blocks:
        """The stored bytes of a tensor, without a copy: what an exact import of a quantised grid needs."""
        info = self._info(name)
        raw = self._data[info.offset : info.offset + info.nbytes]
        rows = math.prod(info.shape[:-1])
        return Blocks(info.kind.name, info.shape, raw.reshape(rows, -1))

    def read(self, name: str, dtype: torch.dtype | None = None) -> Tensor:
        """One tensor, dequantised, as `dtype` (None: float32). Values are computed in fp32 and rounded once."""
        info = self._info(name)
        raw = self._data[info.offset : info.offset + info.nbytes]
        out = torch.empty(math.prod(info.shape), dtype=dtype or torch.float32)
        block, size = GGML_QUANT_SIZES[info.kind]
        step = _CHUNK // block
        for first in range(0, info.nbytes // size, step):
            values = _decode(raw[first * size : (first + step) * size], info.kind)
            out[first * block : first * block + values.numel()] = values
        return out.view(info.shape)

    def _info(self, name: str) -> TensorInfo:
        if name not in self.tensors:
            raise self.error(f"no tensor {name}")
        return self.tensors[name]


def _decode(raw: np.ndarray, kind: GGMLQuantizationType) -> Tensor:
    if kind in _PLAIN:
        # A copy: torch warns about read-only memory, and unaligned offsets are legal.
        return torch.frombuffer(bytearray(raw.data), dtype=_PLAIN[kind])
    with np.errstate(all="ignore"):  # a scale of inf or nan belongs to the file's values, not to this code
        return torch.from_numpy(dequantize(raw[None], kind)[0])


def _map(path: Path) -> np.ndarray:
    if not path.is_file():
        raise VolvelleError(f"{path}: " + ("is a folder, not a GGUF file" if path.is_dir() else "no such file"))
    try:
        if path.stat().st_size == 0:
            raise VolvelleError(f"{path}: the file is empty", tip=_RETRY)
        return np.memmap(path, mode="r", dtype=np.uint8)
    except OSError as error:
        raise VolvelleError(f"{path}: cannot be read: {error.strerror or error}") from error


def _check_magic(path: Path, data: np.ndarray) -> None:
    head = data[:512].tobytes()
    if head[:4] != b"GGUF":
        what = describe_bytes(head, data.size)
        raise VolvelleError(f"{path}: not a GGUF file" + (f", it looks like {what}" if what else ""), tip=_tip(what))


def describe_bytes(head: bytes, size: int) -> str | None:
    r"""What a file with these first bytes seems to be, in words, or None when nothing known fits.

    >>> describe_bytes(b"PK\x03\x04....", 100)
    'a zip archive (a PyTorch .pt or .bin file, or a wheel)'
    """
    text = head.lstrip().lower()
    length = int.from_bytes(head[:8], "little")
    known = [
        (head.startswith(b"PK\x03\x04"), "a zip archive (a PyTorch .pt or .bin file, or a wheel)"),
        (head[:1] == b"\x80" and head[1:2] in {b"\x02", b"\x03", b"\x04", b"\x05"}, "a Python pickle"),
        (text.startswith((b"<!doctype", b"<html", b"<?xml")), "an HTML page (a failed download?)"),
        (head[8:9] == b"{" and 0 < length < size, "a safetensors file"),
        (text.startswith(b"version https://git-lfs"), "a Git LFS pointer (the real file was not downloaded)"),
        (head[:4] in {b"lmgg", b"tjgg", b"fmgg", b"algg"}, "an old GGML file from before GGUF"),
        (head[:4] == b"FUGG", "a GGUF file of a big-endian machine"),
        (head.startswith(b"\x1f\x8b"), "a gzip archive"),
        (text.startswith((b"{", b"[")), "JSON text"),
    ]
    return next((name for matches, name in known if matches), None)


def _tip(what: str | None) -> str:
    if what == "a safetensors file":
        return "give the folder that holds it together with its config.json"
    return "a GGUF file begins with the letters GGUF; fetch the model again, for example with: volvelle get smollm2"


class _Cursor:
    """Reads forward through the mapped bytes; every read past the end is a VolvelleError."""

    def __init__(self, path: Path, data: np.ndarray):
        self.path, self.data, self.at, self.what = path, data.data, 4, "the header"

    def error(self, message: str) -> VolvelleError:
        return VolvelleError(f"{self.path}: {message}", tip=_RETRY)

    @property
    def left(self) -> int:
        return len(self.data) - self.at

    def take(self, count: int) -> memoryview:
        if count > self.left:
            raise self.error(
                f"truncated or damaged: {self.what} asks for {count} bytes at byte {self.at}, "
                f"the file has {len(self.data)}"
            )
        self.at += count
        return self.data[self.at - count : self.at]

    def number(self, letter: str) -> Any:
        return _STRUCTS[letter].unpack(self.take(_STRUCTS[letter].size))[0]

    def text(self) -> str:
        raw = self.take(self.number("Q"))
        try:
            return str(raw, "utf-8")
        except UnicodeDecodeError as error:
            raise self.error(f"damaged: {self.what} holds text that is not UTF-8") from error


def _read_header(cursor: _Cursor) -> tuple[dict[str, Any], list[TensorInfo]]:
    version = cursor.number("I")
    if version not in _VERSIONS:
        big = version & 0xFFFF == 0
        raise cursor.error("big-endian GGUF files are not supported" if big else f"unsupported GGUF version {version}")
    tensors, keys = cursor.number("Q"), cursor.number("Q")
    metadata: dict[str, Any] = {}
    for index in range(keys):
        cursor.what = f"metadata entry {index}"
        key = cursor.text()
        cursor.what = f"metadata key {key[:80]!r}"
        if key in metadata:
            raise cursor.error(f"damaged: {cursor.what} occurs twice")
        metadata[key] = _read_value(cursor, cursor.number("I"))
    infos: dict[str, TensorInfo] = {}
    for index in range(tensors):
        cursor.what = f"tensor entry {index}"
        info = _read_tensor_info(cursor)
        if info.name in infos:
            raise cursor.error(f"damaged: tensor {info.name[:80]!r} occurs twice")
        infos[info.name] = info
    return metadata, list(infos.values())


def _read_value(cursor: _Cursor, kind: int) -> Any:
    if kind == _STRING:
        return cursor.text()
    if kind in _SCALARS:
        return cursor.number(_SCALARS[kind])
    if kind != _ARRAY:
        raise cursor.error(f"damaged: {cursor.what} has the unknown value type {kind}")
    kind, count = cursor.number("I"), cursor.number("Q")
    if kind == _STRING:
        if count > cursor.left // 8:  # each string begins with a length of 8 bytes
            raise cursor.error(f"truncated or damaged: {cursor.what} asks for {count} strings")
        return [cursor.text() for _ in range(count)]
    if kind not in _SCALARS:
        raise cursor.error(f"{cursor.what} is an array of the unsupported value type {kind}")
    dtype = np.dtype("<" + _SCALARS[kind])
    return np.frombuffer(bytes(cursor.take(count * dtype.itemsize)), dtype=dtype)


def _read_tensor_info(cursor: _Cursor) -> TensorInfo:
    name = cursor.text()
    cursor.what = f"tensor {name[:80]!r}"
    ndim = cursor.number("I")
    if not 1 <= ndim <= 4:
        raise cursor.error(f"damaged: {cursor.what} has {ndim} dimensions")
    shape = tuple(cursor.number("Q") for _ in range(ndim))[::-1]
    number, offset = cursor.number("I"), cursor.number("Q")
    try:
        kind = GGMLQuantizationType(number)
    except ValueError:
        raise cursor.error(
            f"{cursor.what} has the unknown type number {number}; known: {', '.join(SUPPORTED)}"
        ) from None
    if kind.name not in SUPPORTED:
        raise VolvelleError(
            f"{cursor.path}: {cursor.what} is quantised as {kind.name}, which is not supported",
            tip=f"take a file in one of: {', '.join(SUPPORTED)}",
        )
    block, size = GGML_QUANT_SIZES[kind]
    if not all(shape) or shape[-1] % block:
        raise cursor.error(f"damaged: {cursor.what} of type {kind.name} cannot have the shape {shape}")
    return TensorInfo(name, kind, shape, offset, math.prod(shape) // block * size)
