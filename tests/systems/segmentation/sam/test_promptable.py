"""Pictures and prompts as people have them, good and bad; embeddings on disk."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from tests.systems.segmentation.sam import small

from volvelle.errors import VolvelleError
from volvelle.systems.segmentation.sam import Embedding, Promptable, promptable
from volvelle.systems.segmentation.sam.pictures import as_pixels, open_picture


@pytest.fixture(scope="module")
def clicker():
    return Promptable(small.model())


@pytest.fixture(scope="module")
def picture():
    return np.random.default_rng(0).integers(0, 256, (60, 100, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def embedding(clicker, picture):
    return clicker.embed(picture)


def test_prompts_of_different_lengths_are_filled_up(clicker, embedding):
    ragged = clicker.predict(embedding, points=[[[20, 10]], [[40, 20], [90, 50]]], labels=[[1], [1, 0]])
    assert ragged.masks.shape == (2, 3, 60, 100)
    assert ragged.masks.dtype == torch.bool
    alone = clicker.predict(embedding, points=[[40, 20], [90, 50]], labels=[1, 0])
    torch.testing.assert_close(ragged.logits[1], alone.logits[0], atol=1e-4, rtol=1e-4)


BAD = {
    "outside": ({"points": [[100.5, 20]]}, r"point 0 of prompt 0 at \(100.5, 20\) is outside the picture of 100 x 60"),
    "negative": ({"points": [[[5, 5]], [[5, -1]]]}, r"point 0 of prompt 1 at \(5, -1\) is outside"),
    "nan": ({"points": [[float("nan"), 3]]}, r"at \(nan, 3\) is outside"),
    "empty box": ({"boxes": [[10, 10, 10, 20]]}, r"box 0 \(10, 10, 10, 20\) is empty"),
    "box outside": ({"boxes": [[1, 1, 5, 5], [0, 0, 101, 60]]}, r"box 1 \(0, 0, 101, 60\) leaves the picture"),
    "nothing": ({}, "no prompt"),
    "no points": ({"points": torch.zeros(0, 1, 2)}, "no prompt"),
    "no boxes": ({"boxes": []}, "no prompt"),
    "label": ({"points": [[5, 5]], "labels": [2]}, "labels are 1 .* got 2"),
    "only nothing": ({"points": [[5, 5]], "labels": [-1]}, "a prompt without a point"),
    "too few labels": ({"points": [[5, 5], [6, 6]], "labels": [1]}, "2 points need as many labels, got 1"),
    "counts": ({"points": [[5, 5]], "boxes": [[1, 1, 2, 2]] * 2}, "got 1 points, 2 boxes"),
    "mask size": ({"masks": torch.zeros(1, 60, 100)}, r"masks are \(k, 40, 40\) logits, got \(1, 60, 100\)"),
    "words": ({"points": "here"}, "points must be numbers"),
}


@pytest.mark.parametrize("kind", BAD)
def test_bad_prompts_are_named(kind, clicker, embedding):
    given, reason = BAD[kind]
    with pytest.raises(VolvelleError, match=reason):
        clicker.predict(embedding, **given)


@pytest.mark.parametrize("image", [np.zeros((4, 4, 3)), np.zeros((0, 4, 3), np.uint8), np.zeros((4, 4, 7), np.uint8)])
def test_bad_pictures_are_named(image, clicker):
    with pytest.raises(VolvelleError, match="embed: "):
        clicker.embed(image)


def test_every_mode_of_picture_is_read(picture):
    rgb = Image.fromarray(picture)
    wanted, _ = as_pixels(picture, 64)
    for same in (rgb, torch.from_numpy(picture).permute(2, 0, 1), rgb.convert("RGBA")):
        assert torch.equal(as_pixels(same, 64)[0], wanted)
    grey, _ = as_pixels(rgb.convert("L"), 64)
    assert torch.equal(grey[0], grey[2])
    assert as_pixels(rgb.convert("CMYK"), 64)[0].shape == (3, 38, 64)
    turned = rgb.transpose(Image.Transpose.ROTATE_90)
    turned.getexif()[0x0112] = 6  # to be shown a quarter turn to the right
    again, original = as_pixels(turned, 64)
    assert original == (60, 100)
    assert torch.equal(again, wanted)


def test_enormous_pictures_are_reduced_first(tmp_path, monkeypatch):
    small_file = Image.effect_noise((400, 240), 40).convert("RGB")
    small_file.save(tmp_path / "big.jpg", quality=95)
    wanted, _ = as_pixels(small_file, 32)
    monkeypatch.setattr("volvelle.systems.segmentation.sam.pictures.LARGE", 1000)
    monkeypatch.setattr("volvelle.data.images.MAX_PIXELS", 1000)
    lazy = open_picture(tmp_path / "big.jpg", 32)
    found, original = as_pixels(lazy, 32)
    assert original == (240, 400)
    assert lazy.size == (100, 60)  # the decoder skipped the rest
    assert (found.float() - wanted.float()).abs().mean() < 8
    monkeypatch.setattr("volvelle.systems.segmentation.sam.pictures.LARGEST", 2000)
    with pytest.raises(VolvelleError, match="400 x 240 pixels are more than 2,000"):
        open_picture(tmp_path / "big.jpg", 32)


def test_masks_enlarged_in_bands_are_the_same(clicker, embedding, monkeypatch):
    logits = torch.randn(2, 3, 40, 40, generator=torch.Generator().manual_seed(0))
    whole = promptable.enlarged(logits, embedding)
    monkeypatch.setattr(promptable, "BAND", 700)
    assert (promptable.enlarged(logits, embedding) != whole).float().mean() < 1e-4


def test_an_embedding_survives_the_disk(clicker, embedding, tmp_path):
    embedding.save(tmp_path / "one.safetensors")
    again = Embedding.load(tmp_path / "one.safetensors")
    assert (again.original, again.scaled, again.model) == ((60, 100), (96, 160), "small")
    for a, b in zip(clicker.predict(again, points=[[9, 9]]), clicker.predict(embedding, points=[[9, 9]]), strict=True):
        assert torch.equal(a, b)
    (tmp_path / "half").write_bytes((tmp_path / "one.safetensors").read_bytes()[:900])
    with pytest.raises(VolvelleError, match="half: cannot be read"):
        Embedding.load(tmp_path / "half")
    with pytest.raises(VolvelleError, match="no such file"):
        Embedding.load(tmp_path / "none")
    again.model = "vit_b"
    with pytest.raises(VolvelleError, match=r"an embedding of vit_b .* the model is small"):
        clicker.predict(again, points=[[9, 9]])


def test_an_answer_of_16_bits_is_a_prompt_again(clicker, embedding):
    first = clicker.predict(embedding, points=[[[20, 10]]], multimask=False)
    again = clicker.predict(embedding, points=[[[20, 10]]], masks=first.logits[:, 0].bfloat16(), multimask=False)
    wide = clicker.predict(embedding, points=[[[20, 10]]], masks=first.logits[:, 0].bfloat16().float(), multimask=False)
    assert torch.equal(again.logits, wide.logits)
