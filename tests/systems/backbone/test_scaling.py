"""Compound scaling: parameters and FLOPs of the paper's table, and the rules from which they follow."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.vision_peers import timm as import_timm
from torch.utils.flop_counter import FlopCounterMode

from volvelle.errors import UsageError
from volvelle.inspect import count_flops
from volvelle.systems.backbone import CONFIGS, backbone, compound, efficientnet, scale
from volvelle.systems.backbone.config import MobileConfig
from volvelle.systems.backbone.load import build
from volvelle.systems.backbone.model import count_parameters
from volvelle.systems.backbone.names import find_config
from volvelle.systems.backbone.scaling import B0, LITE, PUBLISHED, lite_config, round_channels

# Tan & Le 2019, table 2: parameters in millions, FLOPs in billions (multiply-accumulates).
TABLE = {
    "b0": (5.3, 0.39), "b1": (7.8, 0.70), "b2": (9.2, 1.0), "b3": (12, 1.8), "b4": (19, 4.2), "b5": (30, 9.9),
    "b6": (43, 19), "b7": (66, 37),
}  # fmt: skip
# timm 1.0, exactly.
PARAMETERS = {
    "efficientnet-b0": 5_288_548, "efficientnet-b1": 7_794_184, "efficientnet-b2": 9_109_994,
    "efficientnet-b3": 12_233_232, "efficientnet-b4": 19_341_616, "efficientnet-b5": 30_389_784,
    "efficientnet-b6": 43_040_704, "efficientnet-b7": 66_347_960, "efficientnet-lite0": 4_652_008,
    "mobilenet-v2": 3_504_872, "resnet-18": 11_689_512, "resnet-50": 25_557_032, "resnet-101": 44_549_160,
    "shufflenet-v2-x1.0": 2_278_604,
}  # fmt: skip


def macs(config: MobileConfig) -> int:
    """Multiply-accumulates by hand: k² c d / groups for each pixel of every convolution, and the matrices."""
    side = -(-config.preprocessing.size // 2)
    total, channels = 9 * 3 * config.stem * side**2, config.stem
    for stage in config.stages:
        for i in range(stage.repeats):
            wide = channels * stage.expansion
            total += channels * wide * side**2 if stage.expansion > 1 else 0
            side = -(-side // (1 if i else stage.stride))
            total += stage.kernel**2 * wide * side**2
            total += 2 * wide * int(channels * stage.squeeze)
            total += wide * stage.channels * side**2
            channels = stage.channels
    return total + channels * config.head * side**2 + config.head * config.classes


# Where the released network does not round to the table: what it has instead, in the table's digits.
APART = {"b1": (7.8, 0.69), "b2": (9.1, 1.0), "b4": (19, 4.4), "b5": (30, 10.3), "b7": (66, 38)}


def on_meta(config):
    with torch.device("meta"):
        return build(config).eval(), torch.zeros(1, 3, *[config.preprocessing.size] * 2)


@torch.no_grad()
def products(net, x) -> int:
    """Multiply-accumulates as torch counts them."""
    with FlopCounterMode(display=False) as counter:
        net(x)
    return counter.get_total_flops() // 2


@pytest.mark.parametrize("variant", PUBLISHED)
def test_parameters_and_flops_are_those_of_the_table(variant):
    config = find_config(variant)
    net, x = on_meta(config)
    count, found = count_parameters(net), macs(config)
    assert count == PARAMETERS[config.name]
    assert found == products(net, x)
    millions, billions = APART.get(variant, TABLE[variant])
    assert f"{count / 1e6:.{_digits(millions)}f}" == str(millions)
    assert f"{found / 1e9:.{_digits(billions)}f}" == f"{billions:.{_digits(billions)}f}"
    # What the released networks count stays within a twentieth of the table, for all that.
    for ours, paper in zip((count / 1e6, found / 1e9), TABLE[variant], strict=True):
        assert ours == pytest.approx(paper, rel=0.05)
    row = (
        f"| {variant.upper()} | {count / 1e6:.2f} | {TABLE[variant][0]:g} | {found / 1e9:.3f} | {TABLE[variant][1]:g} |"
    )
    print(row)
    page = (Path(__file__).parents[3] / "docs" / "backbones.md").read_text(encoding="utf-8")
    assert row in page


def _digits(figure: float) -> int:
    return len(str(figure).partition(".")[2])


@pytest.mark.peer
@pytest.mark.parametrize("variant", PUBLISHED)
def test_timms_networks_count_the_same(variant):
    config = find_config(variant)
    timm = import_timm()
    with torch.device("meta"):
        theirs = timm.create_model(config.timm).eval()
        x = torch.zeros(1, 3, *[config.preprocessing.size] * 2)
    assert products(theirs, x) == macs(config)


@pytest.mark.parametrize("variant", ["b0", *(pytest.param(v, marks=pytest.mark.slow) for v in PUBLISHED if v != "b0")])
def test_count_flops_gives_the_same(variant):
    config = find_config(variant)
    net, x = on_meta(config)
    counted = count_flops(net, tuple(x.shape))
    assert (counted.macs, counted.flops, counted.parameters) == (macs(config), 2 * macs(config), count_parameters(net))
    assert not counted.unknown


def test_the_other_networks_have_the_usual_number_of_parameters():
    for name, count in PARAMETERS.items():
        with torch.device("meta"):
            assert count_parameters(build(CONFIGS[name])) == count, name


def test_hand_formula_agrees_with_shapes_seen_in_a_forward_pass():
    config = replace(find_config("lite0"), preprocessing=replace(find_config("lite0").preprocessing, size=75))
    model, seen = build(config).eval(), []

    def count(module, inputs, output):
        weight = module.weight
        seen.append(weight.numel() * (output[0, 0].numel() if output.ndim == 4 else 1))

    for module in model.modules():
        if isinstance(module, torch.nn.Conv2d | torch.nn.Linear):
            module.register_forward_hook(count)
    model(torch.zeros(1, 3, 75, 75))
    assert sum(seen) == macs(config)


def test_rounding_of_channels():
    assert [round_channels(v) for v in (32, 28.8, 19.2, 11.9, 3.0, 44.0)] == [32, 32, 24, 16, 8, 48]


@given(st.floats(1, 5000))
@settings(max_examples=200, deadline=None)
def test_rounded_channels_lie_within_a_tenth_below(channels):
    rounded = round_channels(channels)
    assert rounded % 8 == 0
    assert rounded >= 0.9 * channels
    assert rounded <= max(8, channels + 8)


def test_the_rule_gives_the_small_released_networks():
    for variant, phi in (("b0", 0), ("b1", 0.5), ("b2", 1), ("b3", 2)):
        rule, released = compound(phi), PUBLISHED[variant]
        assert (round(rule.width, 1), round(rule.depth, 1)) == (released.width, released.depth)
        assert rule.resolution == pytest.approx(released.resolution, rel=0.02)
    assert compound(6).width < PUBLISHED["b7"].width  # from B4 on the released networks run ahead


@pytest.mark.parametrize("phi", [1.0, 2.0])
def test_cost_grows_by_two_to_the_phi(phi):
    grown = macs(scale(B0, compound(phi))) / macs(B0)
    assert 2**phi <= grown <= 1.3 * 2**phi  # repeats are rounded up; at φ = 1/2 that alone doubles single blocks
    assert compound(phi).cost == pytest.approx((1.2 * 1.1**2 * 1.15**2) ** phi, rel=0.02)


def test_lite_keeps_its_ends():
    for variant, scaling in LITE.items():
        config = lite_config(variant)
        assert (config.stem, config.head, config.activation) == (32, 1280, "relu6")
        assert [stage.squeeze for stage in config.stages] == [0.0] * 7
        assert (config.stages[0].repeats, config.stages[-1].repeats) == (1, 1)
        assert config.stages[3].repeats == math.ceil(3 * scaling.depth)
    assert [lite_config(v).preprocessing.size for v in LITE] == [224, 240, 260, 280, 300]


@pytest.mark.parametrize("name", [name for name in CONFIGS if "efficientnet" in name])
def test_pictures_keep_what_the_published_evaluation_keeps(name):
    """A border of 16 pixels is cut off (the reference's CROP_PADDING); at 224 pixels 0.875 of the side remain."""
    how = find_config(name).preprocessing
    assert how.resized == how.size + 32
    assert how.interpolation == "bicubic"
    assert how.mean == ((0.5, 0.5, 0.5) if "lite" in name else (0.485, 0.456, 0.406))


def test_names():
    assert efficientnet("b0").config is CONFIGS["efficientnet-b0"]
    assert find_config("tf_efficientnet_b4").name == "tf-efficientnet-b4"
    assert find_config("tf_efficientnet_lite0").name == "efficientnet-lite0"
    assert find_config("resnet50").name == "resnet-50"
    assert find_config("googlenet").name == "inception-v1"
    with pytest.raises(UsageError, match="not a backbone") as raised:
        backbone("resnet-51")
    assert "resnet-50" in str(raised.value.tip)
    with pytest.raises(UsageError, match="no EfficientNet"):
        efficientnet("resnet-50")
