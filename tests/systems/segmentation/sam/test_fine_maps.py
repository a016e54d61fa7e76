"""Finer maps of the light encoder: where they go, that prompts share them, that checkpoints may do without."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import save_file
from tests.systems.segmentation.sam import small
from torch.nn import functional as F

from volvelle.errors import VolvelleError
from volvelle.systems import sam
from volvelle.systems.segmentation.sam import Embedding, Promptable, load_sam, write_sam
from volvelle.systems.segmentation.sam.mask_decoder import AT_ONCE
from volvelle.systems.segmentation.sam.onnx import PictureEncoder, PromptAnswerer

SIZE = 96


@pytest.fixture(scope="module")
def net():
    torch.manual_seed(0)
    model = sam("lite0_fine", size=SIZE)
    assert not any(one.any() for one in model.image_encoder.features(torch.randn(1, 3, SIZE, SIZE)).fine)
    for layer in (model.image_encoder.eighth_out, model.image_encoder.quarter_out):
        layer.reset_parameters()  # as after some training
    return model


def asked(net, k, b=1):
    given = small.prompts(SIZE, k)
    sparse, dense = net.prompt_encoder(given["points"], given["labels"])
    return sparse.expand(b, -1, -1, -1), dense


@torch.no_grad()
def test_an_encoder_gives_what_its_configuration_says(net):
    pixels = torch.randn(2, 3, SIZE, SIZE)
    embedding, fine, cells = net.image_encoder.features(pixels)
    assert cells.shape == (2, 32, 24, 24)
    assert torch.equal(embedding, net.image_encoder(pixels))
    assert tuple(one.shape for one in fine) == ((2, 64, 12, 12), (2, 32, 24, 24))
    assert tuple(tuple(one.shape[1:]) for one in fine) == net.config.fine
    vit = small.model()
    assert vit.config.fine == vit.image_encoder.features(torch.randn(1, 3, 160, 160)).fine == ()


@torch.no_grad()
def test_maps_are_added_before_norm_and_activation_as_convolutions_would(net):
    """The upscaling written with plain transposed convolutions on each prompt's image, the maps repeated for each."""
    decoder, b, k, rows, columns = net.mask_decoder, 2, 3, 3, 4
    keys, hyper = torch.randn(b, k, rows * columns, 256), torch.randn(b, k, 3, 32)
    fine = torch.randn(b, 64, 2 * rows, 2 * columns), torch.randn(b, 32, 4 * rows, 4 * columns)
    grow, norm, _, again, _ = decoder.output_upscaling
    image = keys.flatten(0, 1).mT.unflatten(2, (rows, columns))
    x = F.gelu(norm(grow(image) + fine[0].repeat_interleave(k, 0)))
    x = F.gelu(again(x) + fine[1].repeat_interleave(k, 0))
    wanted = torch.einsum("ncyx,nmc->nmyx", x, hyper.flatten(0, 1)).unflatten(0, (b, k))
    torch.testing.assert_close(decoder.enlarge(keys, hyper, rows, fine), wanted, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(decoder.enlarge(keys, hyper, rows), wanted, atol=0.1)


@torch.no_grad()
def test_prompts_in_parts_and_alone_see_the_same_maps(net):
    embedding, fine, _ = net.image_encoder.features(torch.randn(1, 3, SIZE, SIZE))
    position = net.prompt_encoder.position()
    sparse, dense = asked(net, AT_ONCE + 2)
    whole = net.mask_decoder(embedding, position, sparse, dense, fine=fine)[0]
    for i in (0, AT_ONCE):
        alone = net.mask_decoder(embedding, position, sparse[:, i : i + 1], dense, fine=fine)[0]
        torch.testing.assert_close(whole[:, i : i + 1], alone, atol=1e-4, rtol=1e-4)


def test_the_maps_learn(net):
    net.zero_grad()
    given = small.prompts(SIZE, 2)
    logits, _ = net(torch.randn(1, 3, SIZE, SIZE), points=given["points"], labels=given["labels"])
    logits.square().mean().backward()
    encoder = net.image_encoder
    parts = encoder.eighth, encoder.quarter, encoder.eighth_out, encoder.quarter_out
    learnt = [p.grad.abs().sum() for part in parts for p in part.parameters()]
    net.zero_grad()
    assert len(learnt) == 16
    assert all(learnt)


def test_an_embedding_keeps_its_maps(net, tmp_path):
    clicker = Promptable(net)
    embedding = clicker.embed(torch.randint(256, (3, 60, SIZE), dtype=torch.uint8))
    embedding.save(tmp_path / "one.safetensors")
    again = Embedding.load(tmp_path / "one.safetensors")
    for mine, kept in zip(again.fine, embedding.fine, strict=True):
        assert torch.equal(mine, kept)
    assert torch.equal(
        clicker.predict(again, points=[[9, 9]]).logits, clicker.predict(embedding, points=[[9, 9]]).logits
    )
    embedding.fine = ()
    with pytest.raises(VolvelleError, match=r"has finer maps \[\], but the model makes \[\(1, 64, 12, 12\)"):
        clicker.predict(embedding, points=[[9, 9]])


@torch.no_grad()
def test_a_checkpoint_says_whether_it_has_maps(net, tmp_path):
    """One from before there were any says nothing, and has none; one with maps brings them."""
    plain = sam("lite0", size=SIZE)
    for model, name in ((plain, "old"), (net, "new")):
        write_sam(model, tmp_path / name)
    file = tmp_path / "old" / "config.json"
    values = json.loads(file.read_text())
    del values["encoder"]["fine"]
    file.write_text(json.dumps(values))
    pixels = torch.randn(1, 3, SIZE, SIZE)
    old, new = (load_sam(tmp_path / name) for name in ("old", "new"))
    assert old.config == plain.config
    assert old.image_encoder.features(pixels).fine == old.config.fine == ()
    assert not any("eighth" in name or "quarter" in name for name in old.state_dict())
    for mine, wanted in zip(
        new.image_encoder.features(pixels).fine, net.image_encoder.features(pixels).fine, strict=True
    ):
        assert torch.equal(mine, wanted)
    save_file(old.state_dict(), tmp_path / "new" / "model.safetensors")
    with pytest.raises(VolvelleError, match="does not fit"):
        load_sam(tmp_path / "new")


@torch.no_grad()
def test_what_onnx_holds_carries_the_maps(net):
    embedding, *fine = PictureEncoder(net)(torch.randn(1, 3, SIZE, SIZE))
    given = small.prompts(SIZE, 2)
    wanted = net.mask_decoder(embedding, net.prompt_encoder.position(), *asked(net, 2), None, fine=fine)
    points, labels = given["points"][0], given["labels"][0].float()
    # Prompts without a box end with a point that is nothing.
    points, labels = torch.cat((points, torch.zeros(2, 1, 2)), 1), torch.cat((labels, -torch.ones(2, 1)), 1)
    found = PromptAnswerer(net)(embedding, points, labels, torch.zeros(2, 1, 24, 24), torch.zeros(1), *fine)
    torch.testing.assert_close(found[0], wanted[0][0], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(found[1], wanted[1][0], atol=1e-4, rtol=1e-4)
