"""Pictures and prompts as people have them, good and bad; embeddings on disk."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from tests.systems.segmentation.sam import small

from volvelle.errors import VolvelleError
from volvelle.systems.segmentation.sam import Embedding, Promptable, promptable
from volvelle.systems.segmentation.sam.pictures import as_pixels, open_picture, shrunk, upright


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
    "a number": ({"points": torch.tensor(5.0)}, r"points are .* got \(\)"),
    "rows of three": ({"points": [[[1, 2, 3]], [[1, 2, 3]] * 2]}, r"rows of \(n, 2\) .* got one of \(1, 3\)"),
    "torn rows": ({"points": [[[1, 2], [3]], [[1, 2]]]}, "points must be numbers in a regular table"),
    "half a label": ({"points": [[5, 5]], "labels": [0.5]}, "labels are 1 .* got 0.5"),
    "no label": ({"points": [[5, 5]], "labels": [float("nan")]}, "labels are 1 .* got nan"),
    "turned labels": ({"points": np.ones((2, 3, 2)), "labels": np.ones((3, 2))}, r"\(2, 3, 2\) and \(3, 2\)"),
    "a label for rows": ({"points": [[[1, 2]], [[1, 2]] * 2], "labels": 1}, "every prompt needs as many labels"),
    "three numbers": ({"boxes": [1, 2, 3]}, r"boxes are \(k, 4\) .* got \(1, 3\)"),
    "two boxes a row": ({"boxes": [[1, 1, 9, 9, 1, 1, 9, 9]] * 2}, r"boxes are \(k, 4\) .* got \(2, 8\)"),
    "no box": ({"boxes": torch.tensor(4.0)}, r"boxes are \(k, 4\) .* got \(\)"),
    "three masks": ({"masks": torch.zeros(2, 3, 40, 40)}, r"3 masks a prompt, \(2, 3, 40, 40\), and one is wanted"),
    "nan in a mask": ({"masks": torch.zeros(2, 40, 40).index_fill(0, torch.tensor(1), torch.nan)}, "mask 1 holds"),
}


@pytest.mark.parametrize("kind", BAD)
def test_bad_prompts_are_named(kind, clicker, embedding):
    given, reason = BAD[kind]
    with pytest.raises(VolvelleError, match=reason):
        clicker.predict(embedding, **given)


def test_a_picture_is_no_embedding(clicker, picture):
    with pytest.raises(VolvelleError, match="an embedding is wanted, got ndarray") as caught:
        clicker.predict(picture, points=[[9, 9]])
    assert "promptable.embed" in caught.value.tip


def test_an_answer_goes_back_in(clicker, embedding):
    single = clicker.predict(embedding, points=[[[20, 10]], [[40, 30]]], multimask=False)
    again = clicker.predict(embedding, points=[[[20, 10]], [[40, 30]]], masks=single.logits)
    flat = clicker.predict(embedding, points=[[[20, 10]], [[40, 30]]], masks=single.logits[:, 0])
    assert torch.equal(again.logits, flat.logits)
    three = clicker.predict(embedding, points=[[[20, 10]], [[40, 30]]])
    best = three.logits[range(len(three.iou)), three.iou.argmax(1)]  # as the error says
    assert clicker.predict(embedding, masks=best).masks.shape == (2, 3, 60, 100)


def test_a_box_may_come_without_a_point(clicker, embedding):
    boxes = [[10, 10, 60, 50], [5, 5, 30, 30]]
    found = clicker.predict(embedding, points=[[[20, 20]], [[0, 0]]], labels=[[1], [-1]], boxes=boxes)
    assert found.masks.shape[0] == 2


def test_the_threshold_is_that_of_the_logits(clicker, embedding):
    low, middle, high = (clicker.predict(embedding, points=[[20, 10]], threshold=t) for t in (-1.0, 0.0, 1.0))
    assert torch.equal(middle.masks, clicker.predict(embedding, points=[[20, 10]]).masks)
    assert (high.masks <= middle.masks).all()
    assert (middle.masks <= low.masks).all()
    assert high.masks.sum() < middle.masks.sum() < low.masks.sum()


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
    lazy = open_picture(tmp_path / "big.jpg")
    found, original = as_pixels(lazy, 32)
    assert original == (240, 400)
    assert lazy.size == (400, 240)
    assert lazy.tile  # the decoder skipped most of it, in a second look at the file
    assert (found.float() - wanted.float()).abs().mean() < 8
    monkeypatch.setattr("volvelle.systems.segmentation.sam.pictures.LARGEST", 2000)
    with pytest.raises(VolvelleError, match="400 x 240 pixels are more than 2,000"):
        open_picture(tmp_path / "big.jpg")


def test_a_picture_that_is_embedded_stays_what_it_was(tmp_path, monkeypatch):
    noise = Image.effect_noise((400, 240), 40).convert("RGB")
    noise.save(tmp_path / "big.jpg", quality=95)
    monkeypatch.setattr("volvelle.systems.segmentation.sam.pictures.LARGE", 1000)
    with Image.open(tmp_path / "big.jpg") as given:
        shrunk(given, (240, 400), 4)
        as_pixels(given, 32)
        assert given.size == (400, 240)
        with Image.open(tmp_path / "big.jpg") as wanted:
            assert np.array_equal(np.asarray(given), np.asarray(wanted))
    # A file that is gone, or has become another one, is read as it was opened.
    first = Image.open(tmp_path / "big.jpg")
    wanted, _ = as_pixels(first.copy(), 32)
    lazy = Image.open(tmp_path / "big.jpg")
    (tmp_path / "big.jpg").unlink()
    assert torch.equal(as_pixels(lazy, 32)[0], wanted)


def test_an_enormous_file_that_breaks_off_is_named(tmp_path, monkeypatch):
    Image.effect_noise((400, 240), 40).convert("RGB").save(tmp_path / "whole.jpg", quality=95)
    content = (tmp_path / "whole.jpg").read_bytes()
    (tmp_path / "half.jpg").write_bytes(content[: len(content) // 2])
    monkeypatch.setattr("volvelle.systems.segmentation.sam.pictures.LARGE", 1000)
    monkeypatch.setattr("volvelle.data.images.MAX_PIXELS", 1000)
    for look in (lambda half: as_pixels(half, 32), upright, lambda half: shrunk(half, (240, 400), 4)):
        with pytest.raises(VolvelleError, match=r"half\.jpg: cannot be decoded"):
            look(open_picture(tmp_path / "half.jpg"))


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


def test_an_embedding_of_other_weights_is_refused(embedding, picture, tmp_path):
    other = Promptable(small.model(seed=1))
    with pytest.raises(VolvelleError, match=rf"other weights \({embedding.weights}\)") as caught:
        other.predict(embedding, points=[[9, 9]])
    assert "embed the picture" in caught.value.tip
    embedding.save(tmp_path / "one.safetensors")
    with pytest.raises(VolvelleError, match="other weights"):
        other.predict(Embedding.load(tmp_path / "one.safetensors"), points=[[9, 9]])
    # Training goes on in place, and files of earlier versions do not say their weights.
    own = other.embed(picture)
    other.predict(own, points=[[9, 9]])
    with torch.no_grad():
        other.model.image_encoder.blocks[1].mlp.lin1.weight.mul_(1.001)
    with pytest.raises(VolvelleError, match="other weights"):
        other.predict(own, points=[[9, 9]])
    own.weights = ""
    own.save(tmp_path / "old.safetensors")
    other.predict(Embedding.load(tmp_path / "old.safetensors"), points=[[9, 9]])


def test_what_prompts_share_follows_the_decoder(picture):
    net = small.model()
    one = Promptable(net)
    embedding = one.embed(picture)
    first = one.predict(embedding, points=[[9, 9]]).logits
    with torch.autocast("cpu", torch.bfloat16):
        one.predict(embedding, points=[[9, 9]])
    assert torch.equal(one.predict(embedding, points=[[9, 9]]).logits, first)
    with torch.no_grad():
        net.mask_decoder.transformer.layers[0].cross_attn_token_to_image.v_proj.weight.neg_()
    again = one.predict(embedding, points=[[9, 9]]).logits
    assert not torch.equal(again, first)
    assert torch.equal(again, Promptable(net).predict(one.embed(picture), points=[[9, 9]]).logits)
    net.prompt_encoder.bfloat16()
    net.mask_decoder.bfloat16()
    assert one.predict(embedding, points=[[9, 9]]).logits.dtype == torch.bfloat16


def test_an_answer_of_16_bits_is_a_prompt_again(clicker, embedding):
    first = clicker.predict(embedding, points=[[[20, 10]]], multimask=False)
    again = clicker.predict(embedding, points=[[[20, 10]]], masks=first.logits[:, 0].bfloat16(), multimask=False)
    wide = clicker.predict(embedding, points=[[[20, 10]]], masks=first.logits[:, 0].bfloat16().float(), multimask=False)
    assert torch.equal(again.logits, wide.logits)
