"""The container: every type decodes as the gguf package does it, and damaged files end in an error that says so."""

from __future__ import annotations

import random
import struct

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Q
from gguf.quants import dequantize
from tests.systems.language.gguf_writing import tokenizer_metadata, write

from volvelle.errors import VolvelleError
from volvelle.systems.language.gguf_file import SUPPORTED, GGUFFile, describe_bytes

RNG = np.random.default_rng(0)


def raw_blocks(kind: Q, rows: int, width: int) -> np.ndarray:
    """Random stored bytes; the fp16 scales among them are made finite by clearing an exponent bit everywhere."""
    block, size = gguf.GGML_QUANT_SIZES[kind]
    return RNG.integers(0, 256, (rows, width // block * size), dtype=np.uint8) & np.uint8(0xBF)


@pytest.mark.parametrize("kind", [Q[name] for name in SUPPORTED if name not in {"F32", "F64"}], ids=lambda k: k.name)
def test_types_decode_as_the_gguf_package(tmp_path, kind):
    # The second tensor is larger than one decoding chunk and does not divide into chunks.
    stored = {"small": raw_blocks(kind, 3, 256), "large": raw_blocks(kind, 4103, 256)}
    path = write(tmp_path / "a.gguf", {}, {name: (raw, kind) for name, raw in stored.items()})
    file = GGUFFile(path)
    for name, raw in stored.items():
        expected = dequantize(raw, kind)
        found = file.read(name)
        assert found.dtype == torch.float32
        np.testing.assert_array_equal(found.numpy(), expected)
        half = file.read(name, torch.bfloat16)
        torch.testing.assert_close(half, torch.from_numpy(expected).bfloat16(), rtol=0, atol=0, equal_nan=True)
        blocks = file.blocks(name)
        assert (blocks.kind, blocks.shape) == (kind.name, expected.shape)
        np.testing.assert_array_equal(blocks.raw, raw)


def test_float32_and_shapes_are_exact(tmp_path):
    arrays = {f"t{n}": RNG.standard_normal((2, 3, 5, 7)[:n]).astype(np.float32) for n in (1, 2, 3, 4)}
    file = GGUFFile(write(tmp_path / "a.gguf", {}, arrays))
    for name, array in arrays.items():
        np.testing.assert_array_equal(file.read(name).numpy(), array)


def test_metadata_values(tmp_path):
    values = {"a": 7, "b": 0.5, "c": True, "d": "ü", "e": ["x", ""], "f": [1, 2, 3], "g": [0.5, 1.5]}
    found = GGUFFile(write(tmp_path / "a.gguf", values, {"t": np.ones(1, np.float32)})).metadata
    assert {key: found[key] for key in "abcde"} == {key: values[key] for key in "abcde"}
    assert found["f"].tolist() == [1, 2, 3]
    assert found["g"].tolist() == [0.5, 1.5]


def small(tmp_path):
    tensors = {"one": np.ones((4, 32), np.float32), "two": np.zeros((2, 32), np.float32)}
    return write(tmp_path / "small.gguf", tokenizer_metadata(), tensors)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "the file is empty"),
        (b"PK\x03\x04" + bytes(40), "looks like a zip archive"),
        (b"\x80\x04\x95" + bytes(40), "looks like a Python pickle"),
        (struct.pack("<Q", 20) + b'{"a": 1}' + bytes(40), "looks like a safetensors file"),
        (b"\n<!DOCTYPE html><html>", "looks like an HTML page"),
        (b"version https://git-lfs.github.com/spec/v1\n", "looks like a Git LFS pointer"),
        (b"\x00" * 64, "not a GGUF file"),
        (b"GGUF", "truncated"),
        (b"GGUF" + struct.pack("<I", 1), "unsupported GGUF version 1"),
        (b"GGUF" + struct.pack(">I", 3), "big-endian"),
        (b"GGUF" + struct.pack("<IQQ", 3, 0, 1 << 60), "truncated"),
    ],
)
def test_other_files_are_named_for_what_they_are(tmp_path, content, says):
    path = tmp_path / "x.gguf"
    path.write_bytes(content)
    with pytest.raises(VolvelleError, match=says) as caught:
        GGUFFile(path)
    assert str(path) in str(caught.value)


def test_missing_file_and_folder(tmp_path):
    with pytest.raises(VolvelleError, match="no such file"):
        GGUFFile(tmp_path / "none.gguf")
    with pytest.raises(VolvelleError, match="is a folder"):
        GGUFFile(tmp_path)


def test_unsupported_type_is_named(tmp_path):
    path = write(tmp_path / "a.gguf", {}, {"w": (raw_blocks(Q.IQ4_XS, 2, 256), Q.IQ4_XS)})
    with pytest.raises(VolvelleError, match="'w' is quantised as IQ4_XS") as caught:
        GGUFFile(path)
    assert "Q4_K" in caught.value.tip


def test_truncated_data_names_the_tensor(tmp_path):
    path = small(tmp_path)
    content = path.read_bytes()
    path.write_bytes(content[:-100])
    with pytest.raises(VolvelleError, match="truncated: tensor two ends at byte"):
        GGUFFile(path)


def test_overlapping_tensors_are_refused(tmp_path):
    path = small(tmp_path)
    content = bytearray(path.read_bytes())
    at = content.index(b"\x03\x00\x00\x00\x00\x00\x00\x00two") + 11 + 4 + 16 + 4
    assert struct.unpack_from("<Q", content, at) == (512,)
    struct.pack_into("<Q", content, at, 256)
    path.write_bytes(content)
    with pytest.raises(VolvelleError, match="one and two overlap"):
        GGUFFile(path)


def test_every_truncation_is_an_error(tmp_path):
    path = small(tmp_path)
    content = path.read_bytes()
    cuts = [*range(0, 64), *random.Random(0).sample(range(64, len(content)), 150), len(content) - 1]
    for cut in cuts:
        path.write_bytes(content[:cut])
        with pytest.raises(VolvelleError, match=r"small\.gguf"):
            GGUFFile(path)


def test_describe_bytes_knows_nothing_of_noise():
    assert describe_bytes(bytes(range(1, 100)), 1000) is None
