"""What the parts of Segment Anything promise: prompts are independent, gradients reach everything, bf16 stays near."""

from __future__ import annotations

import pytest
import torch
from tests.systems.segmentation.sam import small

from volvelle.errors import UsageError, VolvelleError
from volvelle.systems import sam
from volvelle.systems.segmentation.sam import SamConfig
from volvelle.systems.segmentation.sam.config import PRESETS, find_config


@pytest.fixture(scope="module")
def net():
    return small.model()


@pytest.fixture(scope="module")
def embedding():
    return torch.randn(2, 64, 10, 10, generator=torch.Generator().manual_seed(2))


def both(**given):
    other = small.prompts(seed=8)
    return {name: torch.cat((value, other[name])) for name, value in given.items()}


@pytest.mark.parametrize("kind", small.KINDS)
@torch.no_grad()
def test_prompts_do_not_see_each_other(kind, net, embedding):
    given = both(**{name: small.prompts()[name] for name in small.KINDS[kind]})
    place = net.prompt_encoder.position()
    logits, iou = net.mask_decoder(embedding, place, *net.prompt_encoder(**given))
    for picture, prompt in ((0, 3), (1, 0)):
        one = {name: value[picture : picture + 1, prompt : prompt + 1] for name, value in given.items()}
        alone = net.mask_decoder(embedding[picture : picture + 1], place, *net.prompt_encoder(**one))
        torch.testing.assert_close(alone[0][0, 0], logits[picture, prompt], atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(alone[1][0, 0], iou[picture, prompt], atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_a_shared_picture_and_one_for_each_prompt_give_the_same(net, embedding):
    given = both(points=small.prompts()["points"], labels=small.prompts()["labels"])
    sparse, dense = net.prompt_encoder(**given)
    place = net.prompt_encoder.position()
    shared = net.mask_decoder(embedding, place, sparse, dense)
    each = net.mask_decoder(embedding, place, sparse, dense.expand(2, 5, 64, 10, 10))
    for a, b in zip(shared, each, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_many_prompts_are_decoded_in_parts(net, embedding, monkeypatch):
    given = {name: small.prompts(k=7)[name] for name in ("points", "labels", "masks")}
    sparse, dense = net.prompt_encoder(**given)
    place = net.prompt_encoder.position()
    whole = net.mask_decoder(embedding[:1], place, sparse, dense)
    monkeypatch.setattr("volvelle.systems.segmentation.sam.mask_decoder.AT_ONCE", 3)
    for a, b in zip(net.mask_decoder(embedding[:1], place, sparse, dense), whole, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


def test_gradients_reach_every_weight_and_checkpointing_keeps_them(net):
    def gradients():
        net.zero_grad()
        total = 0.0
        for names in (("points", "labels"), ("masks", "boxes")):  # the vectors of each kind of prompt
            given = {name: small.prompts(k=2)[name] for name in names}
            for multimask in (True, False):
                logits, iou = net(torch.full((1, 3, 160, 160), 0.5), multimask=multimask, **given)
                total = total + logits.square().mean() + iou.sum()
        total.backward()
        return {name: p.grad.clone() for name, p in net.named_parameters()}

    plain = gradients()
    # A key's bias adds the same to all scores of a query, which softmax does not see.
    assert not [name for name, grad in plain.items() if not grad.abs().sum() > 0 and "k_proj.bias" not in name]
    net.image_encoder.gradient_checkpointing = True
    try:
        for name, grad in gradients().items():
            torch.testing.assert_close(grad, plain[name], atol=1e-4, rtol=1e-3)
    finally:
        net.image_encoder.gradient_checkpointing = False


@torch.no_grad()
def test_bf16_embeds_within_a_hundredth():
    torch.manual_seed(0)
    net = sam(small.config())
    for block in net.image_encoder.blocks:
        torch.nn.init.normal_(block.attn.rel_pos_h, std=0.1)
        torch.nn.init.normal_(block.attn.rel_pos_w, std=0.1)
    x = torch.randn(1, 3, 160, 160)
    exact = net.image_encoder(x)
    with torch.autocast("cpu", torch.bfloat16):
        found = net.image_encoder(x)
    assert 1e-5 < (found - exact).norm() / exact.norm() < 1e-2


def test_released_sizes():
    sizes = {"vit_b": 93_735_472, "vit_l": 312_342_832, "vit_h": 641_090_608}
    for name, count in sizes.items():
        with torch.device("meta"):
            assert sum(p.numel() for p in sam_parameters(name)) == count


def sam_parameters(name):
    from volvelle.systems.segmentation.sam import Sam

    return Sam(PRESETS[name]()).parameters()


@torch.no_grad()
def test_the_light_encoder_stands_behind_the_same_interface():
    net = sam("lite0", size=96)
    assert net.preprocessing.mean == (0.5, 0.5, 0.5)
    assert net.image_encoder(torch.randn(2, 3, 96, 96)).shape == (2, 256, 6, 6)
    assert SamConfig.from_json(net.config.to_json(), "here") == net.config


def test_configurations_that_make_no_sense():
    with pytest.raises(UsageError, match="'vit_x' is not a Segment Anything model") as raised:
        find_config("vit_x")
    assert "vit_b" in (raised.value.tip or "")
    with pytest.raises(UsageError, match="size must be a multiple of 16, got 100"):
        find_config("vit_b", 100)
    with pytest.raises(VolvelleError, match="here: unknown encoder 'cnn'"):
        SamConfig.from_json({**small.config().to_json(), "encoder": {"type": "cnn"}}, "here")


def test_prompts_that_do_not_fit(net):
    given = small.prompts(k=2)
    with pytest.raises(ValueError, match="give points with labels, boxes or masks, got none"):
        net.prompt_encoder()
    with pytest.raises(ValueError, match="points and labels go together"):
        net.prompt_encoder(points=given["points"])
    with pytest.raises(ValueError, match=r"labels must be \(1, 2, 3\), got \(1, 2, 2\)"):
        net.prompt_encoder(given["points"], given["labels"][..., :2])
    with pytest.raises(ValueError, match=r"masks must be \(1, 2, 40, 40\), got \(1, 2, 40, 39\)"):
        net.prompt_encoder(masks=given["masks"][..., :39])
