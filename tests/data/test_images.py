"""Reading images: every mode becomes the RGB one would see, and whatever cannot be read is named with its reason."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from volvelle.data import images
from volvelle.data.images import check_images, image_size, list_images, open_image, read_image, to_image, to_tensor
from volvelle.data.images_prepare import Preprocessing
from volvelle.errors import UsageError, VolvelleError


def ramp(width: int = 5, height: int = 3) -> np.ndarray:
    return np.arange(width * height * 3, dtype=np.uint8).reshape(height, width, 3) * 5


def save(path, image: Image.Image, **options):
    image.save(path, **options)
    return path


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr", "I;16", "I", "F"])
def test_every_mode_becomes_rgb(tmp_path, mode):
    grey = Image.fromarray(np.full((3, 5), 200, np.uint8))
    if mode in {"I;16", "I"}:
        image = Image.fromarray(np.full((3, 5), 200 * 257, np.uint16 if mode == "I;16" else np.int32))
    elif mode == "F":
        image = Image.fromarray(np.full((3, 5), 200 / 255, np.float32))
    elif mode == "1":
        image = grey.point(lambda v: 255).convert("1")
    else:
        image = grey.convert("RGB").convert(mode) if mode in {"CMYK", "YCbCr", "P"} else grey.convert(mode)
    assert image.mode == mode
    read = read_image(save(tmp_path / "x.tiff", image))
    assert (read.mode, read.size) == ("RGB", (5, 3))
    expected = 255 if mode == "1" else 200
    assert np.abs(np.asarray(read).astype(int) - expected).max() <= (6 if mode == "P" else 1)


def test_sixteen_bit_png_keeps_its_upper_bits(tmp_path):
    values = np.array([[0, 255, 256, 32768, 65535]], np.uint16)
    read = read_image(save(tmp_path / "x.png", Image.fromarray(values)))
    assert np.asarray(read)[0, :, 0].tolist() == [round(v / 257) for v in values[0].tolist()]


def test_transparent_pixels_lie_over_white(tmp_path):
    image = Image.new("RGBA", (2, 1), (255, 0, 0, 255))
    image.putpixel((1, 0), (0, 0, 0, 0))
    read = read_image(save(tmp_path / "x.png", image))
    assert [read.getpixel((x, 0)) for x in (0, 1)] == [(255, 0, 0), (255, 255, 255)]
    palette = image.convert("RGB").quantize(2)
    palette.info["transparency"] = palette.getpixel((1, 0))
    assert read_image(save(tmp_path / "p.png", palette)).getpixel((1, 0)) == (255, 255, 255)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_up_is_up(tmp_path, orientation):
    upright = Image.fromarray(ramp())
    undo = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}  # how a camera turned the picture that it marks so
    stored = upright.transpose(Image.Transpose(undo[orientation])) if orientation > 1 else upright
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = save(tmp_path / "x.png", stored, exif=exif)
    assert np.array_equal(np.asarray(read_image(path)), ramp())
    assert image_size(path) == (5, 3)


def test_masks_keep_their_numbers(tmp_path):
    mask = Image.fromarray(np.array([[0, 7, 255]], np.uint8)).convert("P")
    assert np.asarray(open_image(save(tmp_path / "x.png", mask))).tolist() == [[0, 7, 255]]


def test_tensors_and_back():
    pixels = to_tensor(Image.fromarray(ramp()))
    assert (pixels.dtype, pixels.shape) == (torch.uint8, (3, 3, 5))
    assert pixels[1, 2, 4] == ramp()[2, 4, 1]
    assert np.array_equal(np.asarray(to_image(pixels)), ramp())
    assert to_tensor(to_image(pixels[:1])).shape == (1, 3, 5)
    with pytest.raises(ValueError, match="uint8"):
        to_image(pixels.float())


def bad_files(folder):
    good = save(folder / "good.jpg", Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)))
    (folder / "text.png").write_text("hello")
    (folder / "empty.jpg").write_bytes(b"")
    (folder / "cut.jpg").write_bytes(good.read_bytes()[:900])
    png = bytearray(save(folder / "flipped.png", Image.fromarray(ramp(40, 40))).read_bytes())
    png[len(png) // 2] ^= 255
    (folder / "flipped.png").write_bytes(bytes(png))
    save(folder / "far.tiff", Image.fromarray(np.full((2, 2), 70_000, np.int32)))
    save(folder / "nan.tiff", Image.fromarray(np.full((2, 2), np.nan, np.float32)))
    return ["cut.jpg", "empty.jpg", "far.tiff", "flipped.png", "nan.tiff", "text.png"]


def test_a_bad_file_is_named_with_its_reason(tmp_path):
    for name in bad_files(tmp_path):
        with pytest.raises(VolvelleError, match=name) as raised:
            read_image(tmp_path / name)
        assert len(str(raised.value)) > len(str(tmp_path / name)) + 5
    with pytest.raises(VolvelleError, match="no such file") as raised:
        read_image(tmp_path / "god.jpg")
    assert "good.jpg" in str(raised.value.tip)
    with pytest.raises(VolvelleError, match="folder"):
        read_image(tmp_path)


def test_a_folder_is_checked_before_anything_starts(tmp_path):
    names = bad_files(tmp_path)
    with pytest.raises(VolvelleError, match="6 bad") as raised:
        check_images(list_images(tmp_path), on_bad="stop", source=tmp_path)
    assert "on_bad=skip" in str(raised.value.tip)
    good, skipped = check_images(list_images(tmp_path), on_bad="skip", source=tmp_path)
    assert [path.name for path in good] == ["good.jpg"]
    assert [line.split(": ")[0] for line in skipped] == [str(tmp_path / name) for name in names]


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_a_decompression_bomb_is_refused_unread(tmp_path, monkeypatch):
    path = save(tmp_path / "x.png", Image.new("1", (10_000, 10_000)))
    assert path.stat().st_size < 20_000
    monkeypatch.setattr(Image.Image, "load", lambda self: pytest.fail("it was unpacked"))
    with pytest.raises(VolvelleError, match="10,000 x 10,000 pixels are more than"):
        read_image(path)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(VolvelleError, match=r"x\.png: refused"):
        image_size(path)


def test_lists_of_images(tmp_path):
    for name in ("b/2.JPG", "a.png", ".hidden/x.png", "notes.txt", "b/.x.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    assert [str(path.relative_to(tmp_path)) for path in list_images(tmp_path)] == ["a.png", "b/2.JPG"]
    (tmp_path / "c").mkdir()
    with pytest.raises(VolvelleError, match="holds no image"):
        list_images(tmp_path / "c")
    with pytest.raises(UsageError, match="no such folder"):
        list_images(tmp_path / "d")


@pytest.mark.parametrize("size", [(50, 31), (31, 50), (7, 90), (224, 224)])
def test_the_middle_is_prepared(size):
    how = Preprocessing(24, mean=(0.5, 0.25, 0.0), std=(0.5, 0.25, 1.0))
    pixels = how.prepare(Image.new("RGB", size, (255, 51, 102)))
    assert (pixels.dtype, pixels.shape) == (torch.uint8, (3, 24, 24))
    batch = how.normalise(torch.stack([pixels, pixels]))
    assert batch.shape == (2, 3, 24, 24)
    assert torch.allclose(batch[1, :, 3, 3], torch.tensor([1.0, -0.2, 0.4]))


def test_preparing_keeps_the_middle():
    stripes = np.zeros((64, 128, 3), np.uint8)
    stripes[:, 32:96] = 255
    assert int(Preprocessing(56, crop=0.875).prepare(Image.fromarray(stripes)).min()) == 255


def test_header_checks_of_large_folders(tmp_path, monkeypatch):
    bad_files(tmp_path)
    monkeypatch.setattr(images, "DECODED", 2)
    good, _ = check_images(list_images(tmp_path), on_bad="skip", source=tmp_path)
    assert {"good.jpg", "cut.jpg"} <= {path.name for path in good}
