"""All masks of a picture: the authors' generator on random weights and on drawn blobs, enlarging, memory, progress."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest
import torch
from benchmarks.protocol import tensor_peak
from benchmarks.support.sam_peer import enliven, load_segment_anything, small_config, their_generator
from PIL import Image
from torch import nn
from torch.nn import functional as F

from volvelle.data.run_lengths import RunLengths
from volvelle.errors import VolvelleError
from volvelle.functional import stability_score
from volvelle.systems.segmentation.sam import EverythingOptions, Promptable, sam
from volvelle.systems.segmentation.sam.crops import crops
from volvelle.systems.segmentation.sam.upsample import Upsampler

NAMES = {
    "points": "points_per_side", "iou": "pred_iou_thresh", "stability": "stability_score_thresh",
    "offset": "stability_score_offset", "nms": "box_nms_thresh", "crop_layers": "crop_n_layers",
    "crop_overlap": "crop_overlap_ratio", "crop_nms": "crop_nms_thresh",
    "crop_shrink": "crop_n_points_downscale_factor",
}  # fmt: skip


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return enliven(sam(small_config()))


@pytest.fixture(scope="module")
def picture():
    noise = np.random.default_rng(0).integers(0, 256, (9, 14, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize((140, 90), Image.Resampling.BICUBIC)


@pytest.fixture(scope="module")
def peer():
    try:
        return load_segment_anything()
    except ImportError as error:
        pytest.skip(f"segment_anything does not load: {error}")


# Enlarging.


@pytest.mark.parametrize(
    ("low", "used", "box", "size"),
    [
        (64, (192, 256), (0, 0, 160, 120), (120, 160)),  # smaller than the input
        (64, (256, 100), (10, 20, 110, 276), (300, 200)),  # a crop, inside a picture
        (64, (200, 256), (0, 0, 640, 500), (500, 640)),  # larger, in many bands
        (16, (64, 64), (3, 4, 5, 6), (10, 9)),
    ],
)
@pytest.mark.parametrize("smooth", [1, 9])
def test_bands_are_what_two_interpolations_give(low, used, box, size, smooth):
    draw = torch.Generator().manual_seed(1)
    z = F.avg_pool2d(3 * smooth * torch.randn(1, 7, low, low, generator=draw), smooth, 1, smooth // 2)[0]
    z[0], z[1], z[2, :, : low // 2], z[3, 1:] = -9, 9, -9, -9
    inner = F.interpolate(z[None], size=4 * low, mode="bilinear")[..., : used[0], : used[1]]
    whole = F.interpolate(inner, size=(box[3] - box[1], box[2] - box[0]), mode="bilinear")[0]
    found = Upsampler(low, 4 * low, used, box, size).masks(z, threshold=0.25)
    assert [number for number, _, _ in found] == list(range(7))
    for number, stability, mask in found:
        wanted = np.zeros(size, dtype=bool)
        wanted[box[1] : box[3], box[0] : box[2]] = whole[number] > 0.25
        # Rounding may differ; a pixel that lies at the threshold so closely is rare.
        assert (mask.mask() != wanted).sum() <= 1
        assert stability == pytest.approx(stability_score(whole[number], 0.25).item(), abs=1e-5, nan_ok=True)
    stable = [number for number, _, _ in Upsampler(low, 4 * low, used, box, size).masks(z, threshold=0.25, least=0.6)]
    assert stable == (stability_score(whole, 0.25) >= 0.6).nonzero()[:, 0].tolist()


def test_no_map_of_the_picture_is_made():
    at = torch.linspace(-1, 1, 64)
    z = 20 * (0.5 - torch.hypot(at, at[:, None]))[None]
    way = Upsampler(64, 256, (192, 256), (0, 0, 4000, 3000), (3000, 4000))
    tracemalloc.start()
    try:
        ((_, stability, mask),) = way.masks(z)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert 0.6 < stability < 0.75
    assert mask.area > 2_000_000
    assert peak < 3_000_000, "the mask itself has 12,000,000 pixels"
    assert way.bytes_needed() < 3_000_000


# The peer.


def compared(model, picture, **values):
    """Our masks and theirs at the same settings."""
    ours = Promptable(model).everything(picture, options=EverythingOptions(**values))
    settings = {NAMES[name]: value for name, value in values.items()}
    theirs = their_generator(model, output_mode="uncompressed_rle", **settings).generate(np.asarray(picture))
    return ours.masks, theirs


def agree(ours, theirs, *, pixels):
    """As many masks in the same order, of the same points and crops, with the same figures."""
    assert len(ours) == len(theirs)
    for one, other in zip(ours, theirs, strict=True):
        facts = one.annotated().facts
        assert facts["predicted_iou"] == pytest.approx(other["predicted_iou"], abs=2e-5)
        few = (pixels + 0.5) / max(other["area"], 1)
        assert one.stability == pytest.approx(other["stability_score"], abs=few, nan_ok=True)
        assert facts["point_coords"][0] == pytest.approx(other["point_coords"][0])
        assert facts["crop_box"] == other["crop_box"]
        mask = RunLengths.from_coco(other["segmentation"])
        assert (one.mask.mask() != mask.mask()).sum() <= pixels
        x, y, wide, high = other["bbox"]  # from the first pixel to the last
        x1, y1, x2, y2 = one.mask.box
        assert pixels or (one.mask.area == 0 or [x1, y1, x2 - 1 - x1, y2 - 1 - y1] == [x, y, wide, high])


@pytest.mark.peer
@pytest.mark.parametrize(
    "values",
    [
        {"points": 5, "iou": 0.4, "stability": 0.4, "offset": 0.4, "nms": 1.0},
        {"points": 4, "iou": 0.0, "stability": 0.0, "nms": 1.0, "crop_layers": 1, "crop_shrink": 2, "crop_nms": 1.0},
        {"points": 3, "iou": 0.99, "stability": 0.99},  # none is left
    ],
)
def test_random_weights_give_what_theirs_give(peer, model, picture, values):
    ours, theirs = compared(model, picture, **values)
    agree(ours, theirs, pixels=3)
    assert len(ours) in (range(10, 99) if "nms" in values else [0])


class Prompts(nn.Module):
    """Stands for a prompt encoder: the tokens are the points themselves."""

    def __init__(self, grid):
        super().__init__()
        self.grid = grid
        self.no_mask_embed = nn.Embedding(1, 32)

    def forward(self, points=None, labels=None, boxes=None, masks=None):
        at = points[0] if isinstance(points, tuple) else points
        dense = torch.zeros(1, 1, 1, 1, 1) if at.dim() == 4 else torch.zeros(1, 1, 1, 1)
        return at.float(), dense

    def position(self):
        return torch.zeros(1, 1, self.grid, self.grid)

    get_dense_pe = position


class Blobs(nn.Module):
    """Stands for a mask decoder: near each point three blobs of smoothly varying size, with holes and islands."""

    def __init__(self, grid):
        super().__init__()
        self.grid = grid

    def draw(self, points):
        """Logits (k, 3, 4 g, 4 g) and IoU (k, 3) of points (k, 2) in pixels of the input, 16 g wide."""
        side = 4 * self.grid
        x, y = (points / 4).T[:, :, None, None, None]
        kind = torch.arange(3.0)[:, None, None]
        at = torch.arange(side) + 0.5
        away = torch.hypot(at - x - 2 * torch.sin(y), at[:, None] - y - 2 * torch.cos(x))
        radius = side * (0.06 + 0.05 * kind) * (1.3 + torch.sin(x / 3 + y / 5))
        ripple = 2.6 * torch.sin(at * 1.9) * torch.sin(at[:, None] * 1.7 + x)  # in a rim of the blob, holes and islands
        iou = 0.5 + 0.5 * torch.sin(points[:, :1] / 9 + points[:, 1:] / 7 + torch.arange(3.0))
        return 1.2 * (radius - away) + ripple, iou

    def look(self, embedding, position, dense):
        return "seen"

    def attend(self, embedding, position, sparse, dense, multimask, image):
        assert multimask
        assert image == "seen"
        return sparse, sparse.new_zeros(*sparse.shape[:2], 3, 1), self.draw(sparse[0, :, 0])[1][None]

    def enlarge(self, keys, hyper, rows, fine=()):
        return self.draw(keys[0, :, 0])[0][None]

    def forward(self, *, sparse_prompt_embeddings, **given):
        return self.draw(sparse_prompt_embeddings[:, 0])


@pytest.fixture
def blobs(peer, model, monkeypatch):
    """Both with drawn masks: what follows the decoder is compared exactly, on masks as trained models make them."""
    import benchmarks.support.sam_peer as support

    grid, theirs = model.config.grid, support.their_sam(model)
    theirs.prompt_encoder, theirs.mask_decoder = Prompts(grid), Blobs(grid)
    monkeypatch.setattr(support, "their_sam", lambda model: theirs)
    other = sam(model.config)
    other.prompt_encoder, other.mask_decoder = Prompts(grid), Blobs(grid)
    return other


@pytest.mark.peer
@pytest.mark.parametrize(
    ("values", "least"),
    [
        ({"points": 9, "iou": 0.7, "stability": 0.5}, 20),
        ({"points": 9, "iou": 0.0, "stability": 0.0, "nms": 0.3}, 50),
        ({"points": 6, "iou": 0.5, "stability": 0.6, "crop_layers": 1, "crop_shrink": 2}, 15),
        ({"points": 4, "iou": 0.5, "stability": 0.3, "crop_layers": 2, "crop_overlap": 0.5, "crop_nms": 0.4}, 30),
    ],
)
def test_drawn_blobs_give_what_theirs_give(blobs, values, least):
    picture = Image.new("RGB", (301, 187))
    ours, theirs = compared(blobs, picture, **values)
    assert len(ours) >= least
    agree(ours, theirs, pixels=0)


@pytest.mark.peer
def test_small_regions_after_blobs(blobs, monkeypatch):
    """Their cleaning wants OpenCV, which is replaced by the same function of scipy's."""
    import sys
    from types import SimpleNamespace

    from scipy.ndimage import label

    def connected(mask, connectivity):
        names, count = label(mask, np.ones((3, 3)))
        areas = np.bincount(names.ravel(), minlength=count + 1)
        return count + 1, names, np.repeat(areas[:, None], 5, axis=1), None

    monkeypatch.setitem(sys.modules, "cv2", SimpleNamespace(connectedComponentsWithStats=connected))
    picture = Image.new("RGB", (211, 157))
    values = {"points": 9, "iou": 0.5, "stability": 0.3, "nms": 0.8}
    ours = Promptable(blobs).everything(picture, options=EverythingOptions(**values, least=60)).masks
    settings = {NAMES[name]: value for name, value in values.items()} | {"min_mask_region_area": 60}
    theirs = their_generator(blobs, output_mode="uncompressed_rle", **settings).generate(np.asarray(picture))
    agree(ours, theirs, pixels=0)
    plain = Promptable(blobs).everything(picture, options=EverythingOptions(**values)).masks
    assert {one.point: one.mask.area for one in plain} != {one.point: one.mask.area for one in ours}


# Memory, progress, pictures.


def test_memory_stays_below_what_was_asked(model):
    wide = sam(small_config(256))
    picture, options = Image.new("RGB", (640, 480)), EverythingOptions(points=4, iou=0.0, stability=0.0, nms=1.0)
    promptable = Promptable(enliven(wide, logits=1.0))
    embedding = promptable.embed(picture)
    promptable.embed = lambda image: embedding  # the encoder's own pass is not counted
    whole = promptable.everything(picture, options=options)
    with pytest.raises(VolvelleError, match=r"max_memory of 1\.0 MB is less than the \d+\.\d MB that one point needs"):
        promptable.everything(picture, options=options, max_memory=1_000_000)
    peaks = {}
    for limit in (4_000_000, 8_000_000):
        found = promptable.everything(picture, options=options, max_memory=limit)
        assert [one.mask.area for one in found.masks] == pytest.approx([one.mask.area for one in whole.masks], rel=1e-3)
        peaks[limit] = tensor_peak(
            lambda limit=limit: promptable.everything(picture, options=options, max_memory=limit)
        )
        assert peaks[limit] < limit
    assert peaks[8_000_000] > 1.3 * peaks[4_000_000], "more memory is not used"


def test_progress_and_stages(model, picture):
    heard = []
    options = EverythingOptions(points=4, crop_layers=1, crop_shrink=2)
    found = Promptable(model).everything(
        picture, options=options, progress=lambda done, total: heard.append((done, total))
    )
    assert heard[-1] == (16 + 4 * 4, 16 + 4 * 4)
    assert [done for done, _ in heard] == sorted(done for done, _ in heard)
    assert found.size == (90, 140)
    assert found.seconds["embedding"] > 0
    assert found.seconds["decoding"] > 0


def test_kinds_of_pictures_are_one(model, picture):
    promptable, options = Promptable(model), EverythingOptions(points=3, iou=0.0, stability=0.0, nms=1.0, crop_layers=1)
    pixels = np.asarray(picture)
    turned = picture.transpose(Image.Transpose.ROTATE_90)
    exif = turned.getexif()
    exif[0x0112] = 6
    wanted = promptable.everything(picture, options=options).masks
    for image in (pixels, torch.from_numpy(pixels.copy()).permute(2, 0, 1), turned):
        found = promptable.everything(image, options=options).masks
        assert [one.mask for one in found] == [one.mask for one in wanted]


def test_crops_of_a_file_that_is_not_decoded_yet(model, picture, tmp_path, monkeypatch):
    picture.resize((560, 360)).save(tmp_path / "photo.jpg", quality=95)
    monkeypatch.setattr("volvelle.systems.segmentation.sam.pictures.LARGE", 1000)
    promptable, options = Promptable(model), EverythingOptions(points=2, crop_layers=1)
    seen, embed = [], promptable.embed
    promptable.embed = lambda image: (embed(image), seen.append(image))[0]
    found = promptable.everything(Image.open(tmp_path / "photo.jpg"), options=options)
    assert found.size == (360, 560)
    whole, *rest = map(np.asarray, seen)
    assert whole.shape == (360, 560, 3)
    assert len(rest) == 4
    assert all(crop.mean() > 50 for crop in rest), "none of them is black"
    assert np.array_equal(rest[0], whole[: len(rest[0]), : rest[0].shape[1]])


def test_an_embedding_is_enough_where_there_are_no_crops(model, picture):
    promptable, options = Promptable(model), EverythingOptions(points=3, iou=0.0, stability=0.0)
    embedding = promptable.embed(picture)
    wanted = promptable.everything(picture, options=options).masks
    assert promptable.everything(embedding, options=options).masks == wanted
    with pytest.raises(VolvelleError, match=r"crop_layers=1 looks at crops of the picture, got its embedding"):
        promptable.everything(embedding, options=EverythingOptions(points=3, crop_layers=1))
    embedding.weights = "of another"
    with pytest.raises(VolvelleError, match="other weights"):
        promptable.everything(embedding, options=options)


@pytest.mark.parametrize("size", [(1, 1), (2, 3), (1, 40), (3, 500)])
def test_crops_of_tiny_and_flat_pictures_are_not_empty(model, size):
    options = EverythingOptions(points=4, crop_layers=2, crop_shrink=2)
    found = list(crops(size, options))
    assert all(0 <= x1 < x2 <= size[1] and 0 <= y1 < y2 <= size[0] for x1, y1, x2, y2 in (one.box for one in found))
    heard = []
    picture = np.zeros((*size, 3), dtype=np.uint8)
    Promptable(model).everything(picture, options=options, progress=lambda done, total: heard.append((done, total)))
    assert heard[-1] == (sum(one.points**2 for one in found),) * 2
