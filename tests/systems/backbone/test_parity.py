"""Backbones against timm, transformers and torchvision with the same weights, and files of theirs, both ways.

The functions are compared in fp64. Deep networks with random weights magnify rounding (EfficientNet-B4 at 380 px in
fp32 is half a percent from itself), so fp32 says something of shallow networks and of trained weights only.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from tests.vision_peers import needs_lite0, photo, torchvision_models
from tests.vision_peers import timm as import_timm
from torch import nn

from volvelle.systems.backbone import CONFIGS, backbone, read_backbone, write_backbone
from volvelle.systems.backbone.files import to_tensors, write_tensors
from volvelle.systems.backbone.key_maps import EFFICIENTNET_PYTORCH, TRANSFORMERS
from volvelle.systems.backbone.load import build

pytestmark = pytest.mark.peer


@pytest.fixture(scope="module")
def timm():
    return import_timm()


@torch.no_grad()
def shake(model: nn.Module) -> nn.Module:
    """Give every weight and statistic a value that matters, so that activations stay of size one."""
    draw = torch.Generator().manual_seed(0)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.uniform_(-0.2, 0.2, generator=draw)
            module.running_var.uniform_(0.5, 1.5, generator=draw)
            module.weight.uniform_(0.8, 1.2, generator=draw)
            module.bias.uniform_(-0.2, 0.2, generator=draw)
        elif isinstance(module, nn.Conv2d):
            module.weight.normal_(0, (2 / module.weight[0].numel()) ** 0.5, generator=draw)
        elif isinstance(module, nn.Linear):
            module.weight.normal_(0, module.in_features**-0.5, generator=draw)
    return model


def assert_same(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    """Of two pictures or more."""
    assert float(theirs.std(0).max()) > 1e-3, "the pictures make no difference, so this could not fail"
    within = {torch.float32: 1e-4, torch.float64: 1e-9}[theirs.dtype]
    assert float((ours - theirs).abs().max() / theirs.abs().max()) <= within


def pictures(size: int) -> torch.Tensor:
    return torch.randn(2, 3, size, size + 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


CASES = [("efficientnet-b0", 64), ("efficientnet-lite0", 75), ("resnet-18", 64)]
SLOW = [
    ("tf-efficientnet-b0", 75), ("mobilenet-v2", 65), ("efficientnet-b4", 96), ("tf-efficientnet-b4", 97),
    ("resnet-50", 64), ("efficientnet-lite4", 65),
]  # fmt: skip


@pytest.mark.parametrize(("name", "size"), [*CASES, *(pytest.param(*case, marks=pytest.mark.slow) for case in SLOW)])
@torch.no_grad()
def test_timm_with_the_same_weights(timm, tmp_path, name, size):
    config = CONFIGS[name]
    theirs = shake(timm.create_model(config.timm, pretrained=False)).eval()
    write_tensors(theirs.state_dict(), tmp_path / "x.safetensors")
    ours, x = backbone(name, weights=tmp_path / "x.safetensors"), pictures(size)
    if (name, size) in CASES:
        assert_same(ours(x.float()), theirs(x.float()))
    assert_same(ours.double()(x), theirs.double()(x))
    features = timm.create_model(config.timm, pretrained=False, features_only=True, out_indices=(1, 2, 3, 4)).eval()
    features.double().load_state_dict(theirs.state_dict(), strict=False)
    for mine, other, channels in zip(ours.features(x), features(x), ours.channels, strict=True):
        assert mine.shape == other.shape
        assert mine.shape[1] == channels
        assert_same(mine, other)
    # Both ways: their names are ours, and a folder of ours is one of theirs.
    assert to_tensors(ours, config).keys() == theirs.state_dict().keys()
    write_backbone(ours.float(), tmp_path / "ours")
    again = timm.create_model(f"local-dir:{tmp_path / 'ours'}", pretrained=True).eval()
    assert torch.equal(again.double()(x), theirs(x))


@pytest.mark.parametrize(
    ("name", "stride"),
    [
        ("efficientnet-lite0", 8),
        ("resnet-18", 16),
        pytest.param("efficientnet-b0", 8, marks=pytest.mark.slow),
        pytest.param("efficientnet-b0", 16, marks=pytest.mark.slow),
    ],
)
@torch.no_grad()
def test_timm_with_an_output_stride(timm, name, stride):
    config = CONFIGS[name]
    theirs = shake(timm.create_model(config.timm, pretrained=False, output_stride=stride)).eval()
    ours = build(config, stride).eval()
    ours.load_state_dict(theirs.state_dict())
    assert_same(ours.double()(pictures(65)), theirs.double()(pictures(65)))


@needs_lite0
@torch.no_grad()
def test_timm_with_the_real_weights_and_real_pictures(timm):
    """In fp32, prepared by each in its own way: what a picture is cut to and resized to is the same too."""
    config = CONFIGS["efficientnet-lite0"]
    ours = backbone("efficientnet-lite0", weights="imagenet")
    theirs = timm.create_model(config.timm, pretrained=False).eval()
    theirs.load_state_dict(ours.state_dict())
    facts = timm.data.resolve_data_config(model=theirs)
    how = ours.preprocessing
    said = (facts["input_size"], facts["interpolation"], facts["mean"], facts["std"], facts["crop_pct"])
    assert said == ((3, how.size, how.size), how.interpolation, how.mean, how.std, how.crop)
    x = torch.stack([how.normalise(how.prepare(photo(name))) for name in ("chelsea", "coffee")])
    assert_same(ours(x), theirs(x))


@pytest.mark.parametrize("name", ["efficientnet-lite0", pytest.param("efficientnet-b0", marks=pytest.mark.slow)])
def test_running_statistics_move_as_timm_s(timm, name):
    config = CONFIGS[name]
    theirs = shake(timm.create_model(config.timm, pretrained=False, drop_path_rate=0.0, drop_rate=0.0)).train()
    ours = build(config).train()
    ours.load_state_dict(theirs.state_dict())
    for module in ours.modules():
        if hasattr(module, "drop"):
            module.drop = 0.0
    if name.endswith("lite0"):  # timm builds this one with PyTorch's momentum, whatever TensorFlow's was
        for module in ours.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.momentum = 0.1
    theirs.eval(), ours.eval()
    before = {key: value.clone() for key, value in ours.state_dict().items() if "running" in key}
    for model in (ours, theirs):
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.train()
        model(pictures(64).float())
    for key, value in theirs.state_dict().items():
        if "running" in key:
            assert torch.allclose(ours.state_dict()[key], value, rtol=1e-4, atol=1e-5), key
            assert not torch.equal(before[key], value), key


TORCHVISION_CASES = [
    ("efficientnet-b0", "efficientnet_b0", 75), ("inception-v1", "googlenet", 64), ("mobilenet-v2", "mobilenet_v2", 65),
    ("resnet-18", "resnet18", 64), ("resnet-50", "resnet50", 64), ("shufflenet-v2-x0.5", "shufflenet_v2_x0_5", 65),
    ("shufflenet-v2-x1.0", "shufflenet_v2_x1_0", 64), ("shufflenet-v2-x2.0", "shufflenet_v2_x2_0", 64),
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(("name", "theirs", "size"), TORCHVISION_CASES)
@torch.no_grad()
def test_torchvision_with_the_same_weights(tmp_path, name, theirs, size):
    options = {"init_weights": False, "transform_input": False} if theirs == "googlenet" else {}
    peer = shake(getattr(torchvision_models(), theirs)(**options)).eval()
    torch.save(peer.state_dict(), tmp_path / "x.pth")
    ours, x = backbone(name, weights=tmp_path / "x.pth"), pictures(size)
    assert_same(ours.double()(x), peer.double()(x))


def peer_of_transformers(variant: str, size: int):
    transformers = pytest.importorskip("transformers")
    from volvelle.systems.backbone.native_config import to_transformers

    config = CONFIGS[f"tf-efficientnet-{variant}"]
    config = replace(config, preprocessing=replace(config.preprocessing, size=size))
    values = to_transformers(config, tuple(f"class {i}" for i in range(1000)))
    peer = transformers.EfficientNetForImageClassification(transformers.EfficientNetConfig(**values))
    return shake(peer).eval()


@pytest.mark.parametrize(
    ("variant", "size"),
    [("b0", 64), *(pytest.param(*case, marks=pytest.mark.slow) for case in (("b0", 76), ("b4", 380)))],
)
@torch.no_grad()
def test_transformers_with_the_same_weights(tmp_path, variant, size):
    theirs = peer_of_transformers(variant, size)
    theirs.save_pretrained(tmp_path / "theirs")
    ours = read_backbone(tmp_path / "theirs")
    assert ours.config.name == f"tf-efficientnet-{variant}"
    assert ours.classes[3] == "class 3"
    x = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(1))
    if variant == "b0":
        assert_same(ours(x), theirs(x).logits)
    write_backbone(ours, tmp_path / "ours", form=TRANSFORMERS)
    again = type(theirs).from_pretrained(tmp_path / "ours").eval()
    # The weights, not what they give: those of a mapped file lie otherwise in memory, and sums may round otherwise.
    kept, state = again.state_dict(), theirs.state_dict()
    assert kept.keys() == state.keys()
    assert all(torch.equal(kept[name], state[name]) for name in state)
    # In fp64: the random weights of a deep network turn fp32's rounding into something else, in any implementation.
    x, expected = x.double(), theirs.double()(x.double()).logits
    assert_same(ours.double()(x), expected)
    assert_same(again.double()(x).logits, expected)
    assert again.config.id2label[3] == "class 3"


@torch.no_grad()
def test_a_file_of_transformers_is_recognised_without_its_configuration(tmp_path):
    theirs = peer_of_transformers("b0", 64)
    write_tensors(theirs.state_dict(), tmp_path / "x.safetensors")
    ours = backbone("efficientnet-b0", weights=tmp_path / "x.safetensors")
    assert (ours.config.padding, ours.config.norm.eps) == ("same", 1e-3)  # as these weights were trained
    x = torch.randn(2, 3, 64, 64)
    assert_same(ours(x), theirs(x).logits)


@torch.no_grad()
def test_names_of_efficientnet_pytorch_go_there_and_back(tmp_path):
    model = shake(build(CONFIGS["tf-efficientnet-b0"])).eval()
    tensors = to_tensors(model, model.config, EFFICIENTNET_PYTORCH)
    assert {"_conv_stem.weight", "_blocks.15._se_reduce.bias", "_fc.bias"} <= tensors.keys()
    torch.save({f"module.{name}": value for name, value in tensors.items()}, tmp_path / "x.pth")
    again = backbone("efficientnet-b0", weights=tmp_path / "x.pth")
    x = torch.randn(2, 3, 64, 64)
    assert torch.equal(again(x), model(x))
