"""VQGAN: a codec of any size of picture, four formats of checkpoints there and back, files that are refused."""

from __future__ import annotations

import os
from dataclasses import replace

import pytest
import torch
import yaml

from volvelle.errors import UsageError, VolvelleError
from volvelle.systems.generation.config import PRESETS, VQGANConfig, find_config
from volvelle.systems.generation.discriminator import PatchDiscriminator
from volvelle.systems.generation.load import load_vqgan, open_codec, vqgan, write_vqgan
from volvelle.systems.generation.perceptual import Perceptual

SMALL = VQGANConfig("vqgan", 3, 16, 32, (1, 2), 1, (1,), 8, 5, 24, beta_on="codebook")
MEANS = replace(SMALL, codebook="means", beta_on="commitment")


def net(config=SMALL, seed=0):
    torch.manual_seed(seed)
    model = vqgan(config)
    model.quantize.start_from(torch.randn(config.codes, config.code_width))
    return model


def pixels(count=2, channels=3, high=16, wide=16, seed=1):
    return torch.rand(count, channels, high, wide, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def alike(one, other, x, *, config=True):
    if config:
        assert one.config == other.config
    assert torch.equal(one.encode(x), other.encode(x))
    codes = one.encode(x)
    assert torch.equal(one.decode(codes), other.decode(codes))


@pytest.mark.parametrize("name", ["small-f4", "small-f8"])
@pytest.mark.parametrize(("rows", "columns"), [(7, 7), (1, 1), (5, 12)])
def test_codes_of_any_size_of_picture(name, rows, columns):
    codec = net(find_config(name))
    side = codec.factor
    codes = codec.encode(pixels(3, codec.channels, rows * side, columns * side))
    assert codes.shape == (3, rows, columns)
    assert codes.dtype == torch.long
    drawn = codec.decode(codes)
    assert drawn.shape == (3, codec.channels, rows * side, columns * side)
    assert drawn.abs().max() <= 1
    assert not drawn.requires_grad
    assert codec.encode(torch.empty(0, codec.channels, side, side)).shape == (0, 1, 1)


def test_forward_trains_everything_and_decodes_the_codes_it_found():
    model = net().train()
    found = model(pixels())
    (found.pixels.square().mean() + found.quantized.loss).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())
    torch.testing.assert_close(model.decode(found.quantized.codes), found.pixels.detach().clamp(-1, 1))


@pytest.mark.parametrize("config", [SMALL, MEANS])
def test_encoding_teaches_nothing(config):
    model = net(config).train()
    before = {name: value.clone() for name, value in model.named_buffers()}
    model.encode(pixels())
    assert all(torch.equal(value, before[name]) for name, value in model.named_buffers())


def test_what_a_codec_refuses():
    model = net()
    for bad in (pixels(high=17), pixels(channels=1), pixels()[0]):
        with pytest.raises(UsageError, match=r"pictures .b, 3, y, x. with sides that are multiples of 2"):
            model.encode(bad)
    for bad in (torch.tensor([[[24]]]), torch.tensor([[[-1]]]), torch.zeros(2, 2, dtype=torch.long)):
        with pytest.raises(UsageError, match=r"codes .b, h, w. from 0 to 23"):
            model.decode(bad)


def test_configurations_that_make_no_sense():
    for changes in ({"size": 17}, {"width": 33}, {"attention": (2,)}, {"codes": 0}, {"multipliers": ()}):
        with pytest.raises(UsageError):
            replace(SMALL, **changes)
    with pytest.raises(UsageError, match="beta weighs"):
        replace(SMALL, codebook="means")
    with pytest.raises(UsageError) as caught:
        vqgan("small-f5")
    assert "small-f4" in str(caught.value.tip)
    assert {name: config.name for name, config in PRESETS.items()} == {name: name for name in PRESETS}


# Formats


@pytest.mark.parametrize("config", [SMALL, MEANS, replace(SMALL, middle_attention=False, beta=0.5)])
@pytest.mark.parametrize("to", ["volvelle", "taming", "diffusers"])
def test_written_and_read_it_is_the_same(config, to, tmp_path):
    model, path = net(config), tmp_path / ("x.ckpt" if to == "taming" else "x")
    write_vqgan(model, path, to)
    alike(model, load_vqgan(path), pixels())
    assert open_codec(path).vocabulary == 24


def test_a_chameleon_folder_encodes_and_says_that_it_cannot_decode(tmp_path):
    model = net()
    write_vqgan(model, tmp_path, "transformers")
    read = load_vqgan(tmp_path)
    assert torch.equal(model.encode(pixels()), read.encode(pixels()))
    with pytest.raises(VolvelleError, match="has no decoder"):
        read.decode(read.encode(pixels()))
    write_vqgan(read, tmp_path / "again", "transformers")
    assert torch.equal(load_vqgan(tmp_path / "again").encode(pixels()), read.encode(pixels()))


@pytest.mark.peer
@pytest.mark.parametrize("attention", [(), (1,), (0, 1)])
def test_diffusers_computes_the_same_and_its_folders_are_read(attention, tmp_path):
    diffusers = pytest.importorskip("diffusers")
    model, x = net(replace(SMALL, attention=attention)), pixels(3)
    write_vqgan(model, tmp_path / "ours", "diffusers")
    theirs = diffusers.VQModel.from_pretrained(tmp_path / "ours").eval()
    with torch.no_grad():
        latents, drawn = theirs.encode(x).latents, theirs(x).sample
        found = model(x)
        _, loss, (_, _, codes) = theirs.quantize(latents)
    torch.testing.assert_close(model.latents(x), latents, atol=1e-4, rtol=0)
    torch.testing.assert_close(found.pixels, drawn, atol=1e-4, rtol=0)
    assert torch.equal(found.quantized.codes.flatten(), codes.flatten())
    torch.testing.assert_close(found.quantized.loss, loss)  # their misplaced beta, carried
    theirs.save_pretrained(tmp_path / "theirs")  # without what we leave beside a folder
    read = load_vqgan(tmp_path / "theirs")
    alike(model, read, x)
    assert read.config.beta_on == "codebook"


@pytest.mark.peer
@pytest.mark.parametrize("attention", [(), (1,)])
def test_transformers_finds_the_same_codes_and_its_folders_are_read(attention, tmp_path):
    modeling = pytest.importorskip("transformers.models.chameleon.modeling_chameleon")
    model, x = net(replace(SMALL, attention=attention)), pixels(3)
    write_vqgan(model, tmp_path / "ours", "transformers")
    theirs = modeling.ChameleonVQVAE.from_pretrained(tmp_path / "ours").eval()
    with torch.no_grad():
        found = theirs.encode(x)
        torch.testing.assert_close(model.latents(x), theirs.quant_conv(theirs.encoder(x)), atol=1e-4, rtol=0)
        torch.testing.assert_close(model(x).quantized.loss, found.embedding_loss)
    assert torch.equal(found.image_tokens.flatten(), model.encode(x).flatten())
    theirs.save_pretrained(tmp_path / "theirs")
    read = load_vqgan(tmp_path / "theirs")
    assert torch.equal(read.encode(x), model.encode(x))
    assert (read.config.beta_on, read.config.decodes) == ("codebook", False)


def taming_file(path, model, **beside):
    state = {name: value for name, value in model.state_dict().items() if "cluster" not in name and "avg" not in name}
    torch.save({"state_dict": {**state, **beside}, "epoch": 3, "global_step": 7}, path)
    return path


def test_a_file_of_the_authors_gives_its_configuration_by_its_shapes(tmp_path):
    model = net(replace(SMALL, size=256))
    other = PatchDiscriminator(3, width=4, layers=1).state_dict()
    beside = {f"loss.discriminator.{name}": value for name, value in other.items()}
    read = load_vqgan(taming_file(tmp_path / "last.ckpt", model, **beside))
    alike(model, read, pixels())
    (tmp_path / "last.yaml").write_text(
        yaml.safe_dump({"model": {"params": {"ddconfig": {"resolution": 64}, "n_embed": 24}}})
    )
    assert load_vqgan(tmp_path / "last.ckpt").config == replace(model.config, size=64)


def test_the_codec_inside_a_latent_diffusion_model(tmp_path):
    model = net(replace(SMALL, size=256))
    state = {f"first_stage_model.{name}": value for name, value in model.state_dict().items()}
    torch.save({"state_dict": {**state, "model.diffusion_model.out.weight": torch.zeros(3)}}, tmp_path / "model.ckpt")
    alike(model, load_vqgan(tmp_path / "model.ckpt"), pixels())


class Callback:
    """Stands for what Lightning leaves in a checkpoint: an object of a class that is not here."""


Callback.__module__, Callback.__qualname__ = "pytorch_lightning.callbacks.model_checkpoint", "Callback"


def test_what_a_trainer_left_beside_the_weights_is_read_as_nothing(tmp_path, monkeypatch):
    import sys
    import types

    model = net(replace(SMALL, size=256))
    with monkeypatch.context() as here:
        for name in ("pytorch_lightning", "pytorch_lightning.callbacks", Callback.__module__):
            here.setitem(sys.modules, name, types.ModuleType(name))
        here.setattr(sys.modules[Callback.__module__], "Callback", Callback, raising=False)
        content = {"state_dict": model.state_dict(), "callbacks": {Callback: {"best": 1.0}}, "hparams": Callback()}
        torch.save(content, tmp_path / "x.ckpt")
    alike(model, load_vqgan(tmp_path / "x.ckpt"), pixels())


class Evil:
    """Runs a command when it is unpickled."""

    def __reduce__(self):
        return os.mkdir, (os.environ["VOLVELLE_EVIL"],)


def test_a_pickle_with_code_in_it_is_refused_and_does_not_run(tmp_path, monkeypatch):
    monkeypatch.setenv("VOLVELLE_EVIL", str(tmp_path / "ran"))
    for content in ({"state_dict": net().state_dict(), "callbacks": Evil()}, Evil()):
        torch.save(content, tmp_path / "x.ckpt")
        with pytest.raises(VolvelleError, match="could run code, so it is refused"):
            load_vqgan(tmp_path / "x.ckpt")
        torch.save(content, tmp_path / "old.ckpt", _use_new_zipfile_serialization=False)
        with pytest.raises(VolvelleError, match="could run code, so it is refused"):
            load_vqgan(tmp_path / "old.ckpt")
    assert not (tmp_path / "ran").exists()


def test_files_of_other_kinds_are_named(tmp_path):
    state = net().state_dict()
    weight = state.pop("quantize.embedding.weight")
    torch.save(state, tmp_path / "kl.ckpt")
    with pytest.raises(VolvelleError, match="a KL autoencoder: it has no codebook"):
        load_vqgan(tmp_path / "kl.ckpt")
    torch.save({**state, "quantize.embed.weight": weight}, tmp_path / "gumbel.ckpt")
    with pytest.raises(VolvelleError, match="Gumbel"):
        load_vqgan(tmp_path / "gumbel.ckpt")
    torch.save({"layers.weight": weight}, tmp_path / "other.ckpt")
    with pytest.raises(VolvelleError, match=r"its first tensor is layers\.weight"):
        load_vqgan(tmp_path / "other.ckpt")
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(VolvelleError, match="a model of llama, not an image codec"):
        load_vqgan(tmp_path)


def test_damaged_files_and_missing_tensors_are_named(tmp_path):
    path = taming_file(tmp_path / "x.ckpt", net())
    path.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(VolvelleError, match="truncated"):
        load_vqgan(path)
    model = net()
    del model.decoder.up[0].block[1]
    with pytest.raises(VolvelleError, match=r"missing decoder.up.0.block.1"):
        load_vqgan(taming_file(path, model))
    with pytest.raises(VolvelleError, match=r"unknown spare\.weight"):
        load_vqgan(taming_file(path, net(), **{"spare.weight": torch.zeros(2)}))


def test_what_another_library_cannot_build_is_said(tmp_path):
    model = net(replace(SMALL, groups=8))
    for to in ("taming", "transformers"):
        with pytest.raises(UsageError, match="its norms have 32 groups"):
            write_vqgan(model, tmp_path / "x.ckpt", to)
    with pytest.raises(UsageError, match="to must be"):
        write_vqgan(model, tmp_path / "x", "onnx")  # type: ignore[arg-type]
    write_vqgan(net(), tmp_path / "y")
    with pytest.raises(UsageError, match="is no vqgan: decoder"):
        vqgan(replace(SMALL, depth=2), weights=tmp_path / "y")


# What judges a codec


@pytest.mark.parametrize("channels", [1, 3])
def test_the_perceptual_distance_is_a_distance_and_teaches(channels):
    torch.manual_seed(0)
    judge = Perceptual(None, least=32).train()
    x, y = pixels(3, channels, 28, 28), pixels(3, channels, 28, 28, seed=2).requires_grad_()
    assert judge(x, x).tolist() == [0, 0, 0]
    both = judge(x, y)
    torch.testing.assert_close(both, judge(y, x))
    (gradient,) = torch.autograd.grad(both.sum(), y)
    assert gradient.abs().amax((1, 2, 3)).min() > 0
    assert not any(part.training for part in judge.modules())
    assert not any(p.requires_grad for p in judge.parameters())
    alone = torch.cat([judge(x[i : i + 1], y[i : i + 1]) for i in range(3)])
    torch.testing.assert_close(both, alone)
    with pytest.raises(ValueError, match="Perceptual: two batches"):
        judge(x, y[:2])


@pytest.mark.parametrize("layers", [1, 2, 3])
def test_a_patch_is_judged_by_what_it_sees(layers):
    judge = PatchDiscriminator(1, width=4, layers=layers).eval()
    x = torch.zeros(1, 1, 96, 96, requires_grad=True)
    scores = judge(x)
    middle = scores.shape[-1] // 2
    scores[0, 0, middle, middle].backward()
    seen = x.grad[0, 0].abs().sum(0).nonzero()[:, 0]
    assert int(seen[-1] - seen[0]) + 1 <= {1: 16, 2: 34, 3: 70}[layers]
