"""Files of other kinds, broken files and foreign settings are refused by name."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import save_file
from tests.systems.segmentation.sam import small

from volvelle.errors import UsageError, VolvelleError
from volvelle.runs import RunFolder
from volvelle.systems import load_sam, sam
from volvelle.systems.segmentation.sam import is_sam, write_sam

NAMES = {
    "image_encoder.trunk.blocks.0.attn.qkv.weight": "SAM 2",
    "image_encoder.layers.1.blocks.0.attn.qkv.weight": "MobileSAM",
    "model.22.cv2.0.0.conv.weight": "YOLO",
    "model.layers.0.self_attn.q_proj.weight": "a language model",
    "base_model.model.layers.0.lora_A.weight": "adapter|language model",
    "conv_stem.weight": "EfficientNet",
    "layer1.0.conv1.weight": "a ResNet",
    "backbone.body.conv1.weight": "a detector",
    "cls_token": "a vision transformer",
    "what.ever": "something else, its first tensor is what.ever",
}


@pytest.fixture(scope="module")
def net():
    return small.model()


@pytest.mark.parametrize("name", NAMES)
def test_a_file_of_another_kind_is_named(name, tmp_path):
    save_file({name: torch.zeros(2, 2)}, tmp_path / "other.safetensors")
    with pytest.raises(VolvelleError, match=f"other.safetensors: looks like .*({NAMES[name]})"):
        load_sam(tmp_path / "other.safetensors")


def test_sam_hq_is_told_from_sam(net, tmp_path):
    torch.save({**net.state_dict(), "mask_decoder.hf_token.weight": torch.zeros(1, 64)}, tmp_path / "hq.pth")
    with pytest.raises(VolvelleError, match="looks like SAM-HQ"):
        load_sam(tmp_path / "hq.pth")


def test_folders_of_another_kind_are_named(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "sam2"}))
    with pytest.raises(VolvelleError, match="a model of the kind sam2, not Segment Anything"):
        load_sam(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"type": "segmenter"}))
    with pytest.raises(VolvelleError, match="a model of the kind segmenter, not"):
        load_sam(tmp_path)
    (tmp_path / "config.json").unlink()
    with pytest.raises(VolvelleError, match=r"config.json: no such file"):
        load_sam(tmp_path)


def test_broken_files(net, tmp_path):
    write_sam(net, tmp_path / "whole.pth", "meta")
    content = (tmp_path / "whole.pth").read_bytes()
    (tmp_path / "half.pth").write_bytes(content[: len(content) // 2])
    with pytest.raises(VolvelleError, match=r"half.pth: truncated, or not a file of weights"):
        load_sam(tmp_path / "half.pth")
    state = net.state_dict()
    del state["mask_decoder.iou_token.weight"]
    torch.save(state, tmp_path / "less.pth")
    with pytest.raises(VolvelleError, match=r"less.pth: missing mask_decoder.iou_token.weight"):
        load_sam(tmp_path / "less.pth")
    del state["prompt_encoder.no_mask_embed.weight"]
    torch.save(state, tmp_path / "less.pth")
    with pytest.raises(
        VolvelleError, match=r"less.pth: Segment Anything's, but prompt_encoder.no_mask_embed.weight is"
    ):
        load_sam(tmp_path / "less.pth")
    torch.save({"model": state, "code": print}, tmp_path / "code.pth")
    with pytest.raises(VolvelleError, match="reading it could run code, so it is refused"):
        load_sam(tmp_path / "code.pth")


def test_a_foreign_setting_is_named(net, tmp_path):
    write_sam(net, tmp_path, "hf")
    values = json.loads((tmp_path / "config.json").read_text())
    values["vision_config"]["use_rel_pos"] = False
    (tmp_path / "config.json").write_text(json.dumps(values))
    with pytest.raises(VolvelleError, match=r"vision_config: use_rel_pos = False, but only True is known"):
        load_sam(tmp_path)


def test_our_folders_and_runs(tmp_path):
    net = sam("lite0", size=64)
    run = RunFolder.create("one", root=tmp_path, kind="promptable", config={})
    write_sam(net, run.path / "weights")
    assert is_sam(run.path / "weights")
    again = load_sam(run.path)
    assert again.config == net.config
    assert not again.training
    for name, value in net.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name
    for to in ("hf", "meta"):
        with pytest.raises(UsageError, match=f"the format {to} has no image encoder on efficientnet-lite0"):
            write_sam(net, tmp_path / "x", to)
    with pytest.raises(UsageError, match="to must be volvelle, hf or meta, got 'onnx'"):
        write_sam(net, tmp_path / "x", "onnx")  # type: ignore[arg-type]


def test_weights_of_another_size_are_refused(net, tmp_path):
    write_sam(net, tmp_path / "small.pth", "meta")
    with pytest.raises(UsageError, match="holds sam for 160 pixels, not vit_b for 1024"):
        sam("vit_b", weights=tmp_path / "small.pth")
