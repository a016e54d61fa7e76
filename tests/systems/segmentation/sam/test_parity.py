"""Equal to the authors' segment_anything and to transformers' SamModel, part by part and whole, on random weights."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from tests.systems.segmentation.sam import small
from torch.nn import functional as F

from volvelle.systems.segmentation.sam import Promptable, load_sam, write_sam
from volvelle.systems.segmentation.sam.pictures import as_pixels, padded

CLOSE = {"atol": 1e-4, "rtol": 0.0}
pytestmark = pytest.mark.peer


@pytest.fixture(scope="module")
def ours():
    return small.model()


@pytest.fixture(scope="module")
def meta(ours):
    from benchmarks.support.sam_peer import their_sam

    try:
        return their_sam(ours)
    except ImportError as error:
        pytest.skip(f"segment_anything does not load: {error}")


@pytest.fixture(scope="module")
def hf(ours, tmp_path_factory):
    transformers = pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("hf")
    write_sam(ours, folder, "hf")
    return transformers.SamModel.from_pretrained(folder).eval()


@torch.no_grad()
def test_image_encoder(ours, meta, hf):
    x = torch.randn(2, 3, 160, 160, generator=torch.Generator().manual_seed(3))
    found = ours.image_encoder(x)
    assert found.std() > 0.1
    torch.testing.assert_close(found, meta.image_encoder(x), **CLOSE)
    torch.testing.assert_close(found, hf.vision_encoder(x).last_hidden_state, **CLOSE)


@pytest.mark.parametrize("kind", small.KINDS)
@torch.no_grad()
def test_prompt_encoder_and_mask_decoder(kind, ours, meta):
    given = {name: value for name, value in small.prompts().items() if name in small.KINDS[kind]}
    points = (given["points"][0], given["labels"][0]) if "points" in given else None
    boxes = given["boxes"][0] if "boxes" in given else None
    masks = given["masks"][0].unsqueeze(1) if "masks" in given else None
    sparse, dense = ours.prompt_encoder(**given)
    their_sparse, their_dense = meta.prompt_encoder(points, boxes, masks)
    torch.testing.assert_close(sparse[0], their_sparse, **CLOSE)
    torch.testing.assert_close(dense[0].expand(their_dense.shape), their_dense, **CLOSE)
    embedding = torch.randn(1, 64, 10, 10, generator=torch.Generator().manual_seed(4))
    place = meta.prompt_encoder.get_dense_pe()
    torch.testing.assert_close(ours.prompt_encoder.position(), place, **CLOSE)
    for multimask in (True, False):
        wanted = meta.mask_decoder(embedding, place, their_sparse, their_dense, multimask)
        found = ours.mask_decoder(embedding, place, sparse, dense, multimask)
        assert wanted[0].std() > 0.1
        for mine, theirs in zip(found, wanted, strict=True):
            torch.testing.assert_close(mine[0], theirs, **CLOSE)


@pytest.mark.parametrize("kind", ["points", "boxes", "points and boxes"])
@torch.no_grad()
def test_end_to_end_beside_transformers(kind, hf, ours, tmp_path):
    hf.save_pretrained(tmp_path)
    mine = load_sam(tmp_path)  # with the constant of its norms
    x = torch.randn(2, 3, 160, 160, generator=torch.Generator().manual_seed(5))
    one, two = small.prompts(k=3), small.prompts(k=3, seed=9)
    given = {name: torch.cat((one[name], two[name])) for name in small.KINDS[kind]}
    for multimask in (True, False):
        theirs = hf(
            x,
            multimask_output=multimask,
            **{"input_" + name: value for name, value in given.items()},
        )
        logits, iou = mine(x, multimask=multimask, **given)
        torch.testing.assert_close(logits, theirs.pred_masks, **CLOSE)
        torch.testing.assert_close(iou, theirs.iou_scores, **CLOSE)


@torch.no_grad()
def test_checkpoints_travel_through_all_formats(ours, meta, tmp_path):
    torch.save(meta.state_dict(), tmp_path / "meta.pth")
    from_meta = load_sam(tmp_path / "meta.pth")
    assert from_meta.config.encoder == ours.config.encoder
    write_sam(from_meta, tmp_path / "hf", "hf")
    from_hf = load_sam(tmp_path / "hf")
    assert from_hf.config == from_meta.config
    bare = load_sam(tmp_path / "hf" / "model.safetensors")  # without its config.json
    write_sam(bare, tmp_path / "own")
    from_own = load_sam(tmp_path / "own")
    write_sam(from_own, tmp_path / "back.pth", "meta")
    back = torch.load(tmp_path / "back.pth", weights_only=True)
    assert list(back) == list(meta.state_dict())
    meta.load_state_dict(back)
    for name, value in ours.state_dict().items():
        assert torch.equal(back[name], value), name


@pytest.mark.parametrize("shape", [(120, 160), (333, 97), (50, 51), (700, 900)])
def test_pictures_reach_the_model_bit_by_bit_as_theirs(shape, ours, meta):
    import importlib

    resize = importlib.import_module("segment_anything.utils.transforms").ResizeLongestSide(160)
    picture = np.random.default_rng(sum(shape)).integers(0, 256, (*shape, 3), dtype=np.uint8)
    theirs = torch.as_tensor(resize.apply_image(picture)).permute(2, 0, 1)
    found, original = as_pixels(picture, 160)
    assert original == shape
    assert torch.equal(found, theirs)
    assert torch.equal(padded(found, ours.config), meta.preprocess(theirs[None].float()))


def test_predict_gives_the_masks_of_their_predictor(ours, meta):
    import importlib

    predictor = importlib.import_module("segment_anything").SamPredictor(meta)
    picture = np.random.default_rng(0).integers(0, 256, (90, 130, 3), dtype=np.uint8)
    predictor.set_image(picture)
    promptable = Promptable(ours)
    embedding = promptable.embed(picture)
    torch.testing.assert_close(embedding.features, predictor.get_image_embedding(), **CLOSE)
    points, labels, box = np.array([[20.0, 30.0], [100.0, 80.5]]), np.array([1, 0]), np.array([10, 20, 90.0, 70])
    for multimask in (True, False):
        masks, iou, logits = predictor.predict(points, labels, box, multimask_output=multimask)
        found = promptable.predict(embedding, points=points, labels=labels, boxes=box, multimask=multimask)
        torch.testing.assert_close(found.logits[0], torch.from_numpy(logits), **CLOSE)
        torch.testing.assert_close(found.iou[0], torch.from_numpy(iou), **CLOSE)
        # A logit may lie within the tolerance of the threshold.
        assert (found.masks[0].numpy() != masks).mean() < 1e-3
        again = predictor.predict(points, labels, mask_input=logits[:1], multimask_output=multimask)
        refined = promptable.predict(
            embedding, points=points, labels=labels, masks=torch.from_numpy(logits[0]), multimask=multimask
        )
        torch.testing.assert_close(refined.iou[0], torch.from_numpy(again[1]), **CLOSE)


@pytest.mark.parametrize("size", [(60, 100), (333, 250)])
@torch.no_grad()
def test_from_a_picture_to_its_masks_as_with_transformers_processor(size, ours, hf, tmp_path):
    """Transformers' own way: SamProcessor, the model, post_process_masks."""
    transformers = pytest.importorskip("transformers")
    write_sam(ours, tmp_path, "hf")
    processor = transformers.SamProcessor.from_pretrained(tmp_path)
    coarse = np.random.default_rng(0).integers(0, 256, (size[0] // 10, size[1] // 10, 3), dtype=np.uint8)
    picture = Image.fromarray(coarse).resize(size[::-1], Image.Resampling.BICUBIC)
    points = [[[20.0, 10.0]], [[size[1] - 30.0, size[0] / 2]]]
    inputs = processor(picture, input_points=[points], return_tensors="pt")
    mine = Promptable(load_sam(tmp_path))
    embedding = mine.embed(picture)
    pixels, original = as_pixels(picture, 160)
    assert original == size == tuple(inputs["original_sizes"][0].tolist())
    assert tuple(pixels.shape[1:]) == tuple(inputs["reshaped_input_sizes"][0].tolist())
    assert (padded(pixels, mine.model.config) - inputs["pixel_values"]).abs().max() <= 1e-5
    theirs = hf(pixel_values=inputs["pixel_values"], input_points=inputs["input_points"].float())
    found = mine.predict(embedding, points=points)
    torch.testing.assert_close(found.logits, theirs.pred_masks[0], atol=1e-3, rtol=0.0)
    masks = processor.image_processor.post_process_masks(
        theirs.pred_masks,
        inputs["original_sizes"],
        inputs["reshaped_input_sizes"],
        pad_size={"height": 160, "width": 160},
    )[0]
    near = F.interpolate(found.logits, size=(160, 160), mode="bilinear")[..., : pixels.shape[1], : pixels.shape[2]]
    sure = F.interpolate(near, size=size, mode="bilinear").abs() > 1e-3
    assert sure.float().mean() > 0.9
    assert torch.equal(found.masks[sure], masks[sure])
