"""A fresh mask decoder looks where the prompt is; one whose projections were drawn apart does not."""

from __future__ import annotations

import torch
from torch import nn

from volvelle.systems import sam
from volvelle.systems.segmentation.sam.token_attention import TokenAttention


def looks_near(model, points):
    """The share of points (n, 2) that score their own place or one beside it highest, by position, in block one."""
    encoder, attention = model.prompt_encoder, model.mask_decoder.transformer.layers[0].cross_attn_token_to_image
    asked = attention.q_proj(encoder.pe_layer((points + 0.5) / encoder.size))
    keys = attention.k_proj(encoder.position().flatten(2).mT)[0]
    found = (asked @ keys.T).argmax(-1)
    own = (points // 16).long()
    away = torch.stack((found % encoder.grid, found // encoder.grid), -1) - own
    return float((away.abs().amax(-1) <= 1).float().mean())


def test_a_fresh_decoder_looks_where_it_is_asked_to():
    torch.manual_seed(0)
    model = sam("lite0", size=256)
    points = torch.rand(200, 2, generator=torch.Generator().manual_seed(1)) * 256
    assert looks_near(model, points) == 1
    for module in model.mask_decoder.modules():
        if isinstance(module, TokenAttention):
            module.q_proj.reset_parameters()
    assert looks_near(model, points) < 0.2


def test_tokens_attend_to_tokens_with_projections_of_their_own():
    block = sam("lite0", size=64).mask_decoder.transformer.layers[0]
    assert not torch.equal(block.self_attn.q_proj.weight, block.self_attn.k_proj.weight)
    assert isinstance(block.self_attn.q_proj, nn.Linear)
