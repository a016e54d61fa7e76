"""Segment Anything's mask decoder: two blocks in which prompt and image attend to each other, then one product a pixel.

Kirillov et al. 2023, section 3 and appendix A (figure 14). A prompt's tokens are joined by learnt ones, one that will
say how good each mask is and one a mask. After the blocks the image is doubled in size twice, and a mask's logit at a
pixel is the product of the pixel's features with what a small network makes of the mask's token. Where the image
encoder has finer maps than the embedding, each is added where the image has grown to its size (Ravi et al. 2024, "SAM
2", section 4 and appendix D.1): outlines come from these.

All prompts of a picture share its embedding: what the first block needs of it is computed once (`ImageSide`), and only
what prompts have changed in it is held for each; finer maps are never copied. Maps stay in channels-last order
throughout, where a transposed convolution of kernel and stride 2 is a product with a matrix.

Shapes: b pictures, k prompts a picture, t tokens a prompt, T = 1 + masks + t, g places a side, N = g^2, c channels, m
masks.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from volvelle.systems.segmentation.sam.config import Decoder, SamConfig
from volvelle.systems.segmentation.sam.layers import LayerNorm2d, TwoLayers
from volvelle.systems.segmentation.sam.token_attention import TokenAttention

AT_ONCE = 16
"""The most prompts decoded together where no gradient is wanted: more need more memory and are no faster."""
CACHED = 8 << 20
"""Bytes of the maps of these prompts, one a prompt, on a processor: beyond its caches each prompt takes longer."""


def prompts_at_once(map_bytes: int, device: torch.device) -> int:
    """How many prompts are decoded together where no gradient is wanted; a map of the embedding has `map_bytes`.

    >>> [prompts_at_once(4 * 256 * 64 * 64, torch.device(kind)) for kind in ("cpu", "cuda")]
    [2, 16]
    """
    return max(1, min(AT_ONCE, CACHED // max(1, map_bytes))) if device.type == "cpu" else AT_ONCE


class ImageSide(NamedTuple):
    """A picture without a mask as a prompt, as the first block meets it: the same for all its prompts."""

    keys: Tensor
    """The embedding (b, 1, N, c), the vector "no mask" added."""
    keyed: Tensor
    """The same with the places' encoding added."""
    projected: tuple[Tensor, Tensor]
    """Keys and values (b, h, N, d) of the first block."""
    places: Tensor
    """The places' encoding (1, N, c)."""


class MaskDecoder(nn.Module):
    """Mask logits (b, k, m, 4 g, 4 g) and the estimated IoU (b, k, m) of prompts over an embedding."""

    def __init__(self, config: SamConfig):
        super().__init__()
        spec, c = config.decoder, config.width
        self.masks = spec.masks
        self.transformer = TwoWayTransformer(c, spec)
        self.iou_token = nn.Embedding(1, c)
        self.mask_tokens = nn.Embedding(spec.masks + 1, c)
        self.output_upscaling = nn.Sequential(
            nn.ConvTranspose2d(c, c // 4, 2, stride=2),
            LayerNorm2d(c // 4),
            nn.GELU(),
            nn.ConvTranspose2d(c // 4, c // 8, 2, stride=2),
            nn.GELU(),
        )
        self.output_hypernetworks_mlps = nn.ModuleList(Layers(c, c, c // 8, 3) for _ in range(spec.masks + 1))
        self.iou_prediction_head = Layers(c, spec.iou_width, spec.masks + 1, spec.iou_depth)
        _begin_near_the_prompt(self.transformer)

    def forward(
        self,
        embedding: Tensor,
        position: Tensor,
        sparse: Tensor,
        dense: Tensor,
        multimask: bool | None = True,
        *,
        image: ImageSide | None = None,
        fine: Sequence[Tensor] = (),
    ) -> tuple[Tensor, Tensor]:
        """Return logits and estimated IoU: of the masks for an ambiguous prompt, or of the one for a clear prompt.

        `multimask` None: of all, that for a clear prompt first.

        `embedding` is (b, c, g, g), `position` (1, c, g, g); `sparse` (b, k, t, c) and `dense`
        (b, k or 1, c, g or 1, g or 1) are the prompt encoder's. `image` is what `look` gave for this embedding, to be
        used again for further prompts. `fine` are the image encoder's finer maps (b, c / 4, 2 g, 2 g) and
        (b, c / 8, 4 g, 4 g), if it has some.
        """
        if dense.shape[1] == 1 and image is None:
            image = self.look(embedding, position, dense)
        together = prompts_at_once(embedding.nbytes, embedding.device)
        if torch.is_grad_enabled() or sparse.shape[1] <= together:
            return self.decode(embedding, position, sparse, dense, multimask, image, fine=fine)
        parts = [
            self.decode(
                embedding,
                position,
                sparse[:, i : i + together],
                dense if image is not None else dense[:, i : i + together],
                multimask,
                image,
                fine=fine,
            )
            for i in range(0, sparse.shape[1], together)
        ]
        return torch.cat([logits for logits, _ in parts], 1), torch.cat([iou for _, iou in parts], 1)

    def look(self, embedding: Tensor, position: Tensor, dense: Tensor) -> ImageSide:
        """What all prompts without a mask share; `dense` is (b or 1, 1, c, g or 1, g or 1)."""
        keys = _places(embedding + dense[:, 0])
        places = _places(position)
        keyed = keys + places
        first = self.transformer.layers[0]
        assert isinstance(first, TwoWayBlock)
        projected = first.cross_attn_token_to_image.keys_and_values(keyed, keys)
        return ImageSide(keys.unsqueeze(1), keyed.unsqueeze(1), projected, places)

    def decode(
        self,
        embedding: Tensor,
        position: Tensor,
        sparse: Tensor,
        dense: Tensor,
        multimask: bool | None,
        image: ImageSide | None,
        *,
        fine: Sequence[Tensor] = (),
    ) -> tuple[Tensor, Tensor]:
        """`forward` for all prompts at once; `image` None: `dense` is of each prompt. `multimask` None: all masks."""
        keys, hyper, iou = self.attend(embedding, position, sparse, dense, multimask, image)
        return self.enlarge(keys, hyper, embedding.shape[2], fine), iou

    def attend(
        self,
        embedding: Tensor,
        position: Tensor,
        sparse: Tensor,
        dense: Tensor,
        multimask: bool | None,
        image: ImageSide | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """What `enlarge` makes masks of: each prompt's image (b, k, N, c), weights (b, k, m, c / 8); and the IoU."""
        b, k = sparse.shape[:2]
        learnt = torch.cat((self.iou_token.weight, self.mask_tokens.weight))
        tokens = torch.cat((learnt.expand(b, k, *learnt.shape), sparse.to(learnt.dtype)), dim=2)
        if image is None:
            places, keys = _places(position), (embedding.unsqueeze(1) + dense).flatten(3).transpose(2, 3).contiguous()
            tokens, keys = self.transformer(tokens, keys, keys + places, places)
        else:
            tokens, keys = self.transformer(tokens, image.keys, image.keyed, image.places, image.projected)
        chosen = range(0 if multimask is None else int(multimask), self.masks + 1 if multimask is not False else 1)
        networks = [self.output_hypernetworks_mlps[i] for i in chosen]
        hyper = torch.stack([network(tokens[:, :, 1 + i]) for i, network in zip(chosen, networks, strict=True)], 2)
        iou = self.iou_prediction_head(tokens[:, :, 0])[..., chosen.start : chosen.stop]
        return keys, hyper, iou

    def enlarge(self, keys: Tensor, hyper: Tensor, rows: int, fine: Sequence[Tensor] = ()) -> Tensor:
        """Logits (b, k, m, 4 g, 4 g) of the image (b, k, N, c) and each mask's weights (b, k, m, c / 8).

        The maps `fine` are added before the norm and the activation, to all prompts' images alike.
        """
        grow, norm, _, again, _ = self.output_upscaling
        assert isinstance(norm, LayerNorm2d)
        x = _doubled(keys, grow)  # (b, k, N, 2, 2, c / 4)
        if fine:
            x = x + _within(fine[0], rows)
        x = F.gelu(F.layer_norm(x, norm.normalized_shape, norm.weight, norm.bias, norm.eps))
        x = _doubled(x, again)  # (b, k, N, 2, 2, 2, 2, c / 8)
        x = F.gelu(x + _within(fine[1], rows) if fine else x)
        b, k, n = keys.shape[:3]
        logits = x.flatten(2, 6) @ hyper.mT  # (b, k, 16 N, m)
        logits = logits.view(b, k, rows, n // rows, 2, 2, 2, 2, hyper.shape[2]).permute(0, 1, 8, 2, 4, 6, 3, 5, 7)
        return logits.reshape(b, k, hyper.shape[2], 4 * rows, 4 * (n // rows))


class TwoWayTransformer(nn.Module):
    """The blocks, and a last look of the tokens at the image."""

    def __init__(self, channels: int, spec: Decoder):
        super().__init__()
        self.layers = nn.ModuleList(TwoWayBlock(channels, spec, first=i == 0) for i in range(spec.depth))
        self.final_attn_token_to_image = TokenAttention(channels, channels // spec.downsample, spec.heads)
        # Every released implementation leaves this norm at torch's own constant.
        self.norm_final_attn = nn.LayerNorm(channels)

    def forward(
        self,
        tokens: Tensor,
        keys: Tensor,
        keyed: Tensor,
        places: Tensor,
        projected: tuple[Tensor, Tensor] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Return the tokens (b, k, T, c) and each prompt's image (b, k, N, c).

        `keys` is the image (b, k or 1, N, c), `keyed` the same with `places` (1, N, c) added; `projected` are the first
        block's keys and values of an image that all prompts share.
        """
        given = tokens
        for block in self.layers:
            tokens, keys = block(tokens, given, keys, keyed, projected)
            keyed, projected = keys + places, None
        tokens = tokens + self.final_attn_token_to_image.to_image(tokens + given, keyed, keys)
        return self.norm_final_attn(tokens), keys


class TwoWayBlock(nn.Module):
    """Tokens attend to tokens, tokens to the image, an MLP on tokens, the image to tokens; a norm after each.

    The first block's tokens are all position, so nothing is added to them and its self-attention has no shortcut.
    """

    def __init__(self, channels: int, spec: Decoder, *, first: bool):
        super().__init__()
        narrow = channels // spec.downsample
        self.first = first
        self.self_attn = TokenAttention(channels, channels, spec.heads)
        self.norm1 = nn.LayerNorm(channels, spec.eps)
        self.cross_attn_token_to_image = TokenAttention(channels, narrow, spec.heads)
        self.norm2 = nn.LayerNorm(channels, spec.eps)
        self.mlp = TwoLayers(channels, spec.mlp, F.relu)
        self.norm3 = nn.LayerNorm(channels, spec.eps)
        self.norm4 = nn.LayerNorm(channels, spec.eps)
        self.cross_attn_image_to_token = TokenAttention(channels, narrow, spec.heads)

    def forward(
        self, tokens: Tensor, given: Tensor, keys: Tensor, keyed: Tensor, projected: tuple[Tensor, Tensor] | None
    ) -> tuple[Tensor, Tensor]:
        """Return tokens (b, k, T, c) and the image (b, k, N, c); `given` are the tokens as they came."""
        if self.first:
            tokens = self.norm1(self.self_attn(tokens, tokens, tokens))
        else:
            asked = tokens + given
            tokens = self.norm1(tokens + self.self_attn(asked, asked, tokens))
        if projected is None:
            found = self.cross_attn_token_to_image.to_image(tokens + given, keyed, keys)
        else:
            found = self.cross_attn_token_to_image.to_shared(tokens + given, *projected)
        tokens = self.norm2(tokens + found)
        tokens = self.norm3(tokens + self.mlp(tokens))
        found = self.cross_attn_image_to_token.from_image(keyed, tokens + given, tokens)
        return tokens, self.norm4(keys + found)


class Layers(nn.Module):
    """Linear layers with ReLU between them."""

    def __init__(self, width: int, hidden: int, out: int, depth: int):
        super().__init__()
        sizes = [width, *[hidden] * (depth - 1), out]
        self.layers = nn.ModuleList(nn.Linear(i, o) for i, o in pairwise(sizes))

    def forward(self, x: Tensor) -> Tensor:
        """Return (..., out) of x (..., width)."""
        for layer in self.layers[:-1]:
            x = layer(x).relu()
        return self.layers[-1](x)


@torch.no_grad()
def _begin_near_the_prompt(transformer: TwoWayTransformer) -> None:
    """Start between tokens and image with W_q = W_k, from N(0, 1 / c).

    The score of a prompt and a place is then near B z · B z' of their Fourier features, which is highest where the two
    lie together: a fresh decoder looks where it is asked to, which it would else have to find out first.
    """
    for name, module in transformer.named_modules():
        if isinstance(module, TokenAttention) and not name.endswith("self_attn"):
            nn.init.normal_(module.k_proj.weight, std=module.k_proj.in_features**-0.5)
            module.q_proj.weight.copy_(module.k_proj.weight)


def _places(maps: Tensor) -> Tensor:
    """(b, c, g, g) -> (b, N, c), in this order in memory too: what follows runs several times as fast."""
    return maps.flatten(2).transpose(1, 2).contiguous()


def _within(maps: Tensor, rows: int) -> Tensor:
    """A finer map (b, c, f g, f g) in the order of what has grown from g rows: (b, 1, N, 2, 2, …, c)."""
    b, c, high, wide = maps.shape
    doublings = (high // rows).bit_length() - 1
    parts = maps.view(b, c, rows, *[2] * doublings, wide * rows // high, *[2] * doublings)
    pairs = [axis for i in range(doublings + 1) for axis in (2 + i, 3 + doublings + i)]
    return parts.permute(0, *pairs, 1).flatten(1, 2).contiguous().unsqueeze(1)


def _doubled(x: Tensor, layer: nn.Module) -> Tensor:
    """A transposed convolution of kernel and stride 2 on places (..., c): (..., 2, 2, c'), rows before columns."""
    assert isinstance(layer, nn.ConvTranspose2d)
    matrix = layer.weight.permute(0, 2, 3, 1)  # (c, 2, 2, c')
    found = (x @ matrix.flatten(1)).unflatten(-1, matrix.shape[1:])
    return found if layer.bias is None else found + layer.bias
