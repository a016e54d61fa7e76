"""Segment Anything's image encoder: a vision transformer whose blocks attend inside windows, a few over everything.

Kirillov et al. 2023, "Segment Anything", section 3; Li et al. 2022, "Exploring Plain Vision Transformer Backbones for
Object Detection", section 3. Relative positions: `volvelle.parts.position.decomposed`.

Shapes: b pictures, s pixels a side, g = s / 16 places a side, w places a side of a window, c the transformer's width.
"""

from __future__ import annotations

import torch
import torch.utils.checkpoint
from torch import Tensor, nn

from volvelle.parts.attention.attention import attention
from volvelle.parts.position.decomposed import DecomposedBias
from volvelle.systems.segmentation.sam.config import STRIDE, SamConfig, ViT
from volvelle.systems.segmentation.sam.layers import Features, LayerNorm2d, TwoLayers


class ImageEncoder(nn.Module):
    """Embedding (b, width, g, g) of normalised pictures (b, 3, s, s).

    `gradient_checkpointing` computes each block again in the backward pass, to hold less.
    """

    def __init__(self, config: SamConfig):
        super().__init__()
        spec = config.encoder
        assert isinstance(spec, ViT)
        grid, width = config.grid, spec.width
        self.gradient_checkpointing = False
        self.patch_embed = _Patches(width)
        self.pos_embed = nn.Parameter(torch.zeros(1, grid, grid, width))
        self.blocks = nn.ModuleList(Block(spec, grid, window=i not in spec.everywhere) for i in range(spec.depth))
        self.neck = nn.Sequential(
            nn.Conv2d(width, config.width, 1, bias=False),
            LayerNorm2d(config.width),
            nn.Conv2d(config.width, config.width, 3, padding=1, bias=False),
            LayerNorm2d(config.width),
        )
        _initialise(self)

    def forward(self, pixels: Tensor) -> Tensor:
        """Return the embedding, in the dtype of the weights."""
        x = self.patch_embed(pixels) + self.pos_embed  # (b, g, g, c)
        for block in self.blocks:
            if self.gradient_checkpointing and torch.is_grad_enabled():
                x = torch.utils.checkpoint.checkpoint(block, x, use_reentrant=False)
            else:
                x = block(x)
        return self.neck(x.permute(0, 3, 1, 2))

    def features(self, pixels: Tensor) -> Features:
        """Return the embedding, and no finer map."""
        return Features(self(pixels))


class _Patches(nn.Module):
    """Patches of 16 x 16 pixels, each projected: (b, 3, s, s) -> (b, g, g, c)."""

    def __init__(self, width: int):
        super().__init__()
        self.proj = nn.Conv2d(3, width, STRIDE, stride=STRIDE)

    def forward(self, pixels: Tensor) -> Tensor:
        return self.proj(pixels).permute(0, 2, 3, 1).contiguous()  # or all that follows goes through memory in strides


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)), on maps (b, g, g, c)."""

    def __init__(self, spec: ViT, grid: int, *, window: bool):
        super().__init__()
        self.norm1 = nn.LayerNorm(spec.width, spec.eps)
        self.attn = GridAttention(spec.width, spec.heads, spec.window if window else grid)
        self.norm2 = nn.LayerNorm(spec.width, spec.eps)
        self.mlp = TwoLayers(spec.width, spec.mlp)
        self.window = window

    def forward(self, x: Tensor) -> Tensor:
        """Return maps of the same size."""
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class GridAttention(nn.Module):
    """Attention between the places of a window of `side` x `side`, with decomposed relative positions.

    Maps are cut into windows after q, k and v are made, so that nothing is computed for the places that pad the last
    windows: there q, k and v are the bias of the projection, as of a place that is zero.
    """

    def __init__(self, width: int, heads: int, side: int):
        super().__init__()
        self.heads, self.side = heads, side
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        self.rel_pos_h = nn.Parameter(torch.zeros(2 * side - 1, width // heads))
        self.rel_pos_w = nn.Parameter(torch.zeros(2 * side - 1, width // heads))

    def forward(self, x: Tensor) -> Tensor:
        """Return maps of the same size (b, g, g, c)."""
        b, height, width, c = x.shape
        side, heads = self.side, self.heads
        down, right = -height % side, -width % side
        qkv = self.qkv(x)
        if down or right:
            assert self.qkv.bias is not None
            fill = self.qkv.bias.to(qkv.dtype)
            qkv = torch.cat((qkv, fill.expand(b, height, right, -1)), dim=2)
            qkv = torch.cat((qkv, fill.expand(b, down, width + right, -1)), dim=1)
        rows, columns = (height + down) // side, (width + right) // side
        parts = qkv.view(b, rows, side, columns, side, 3, heads, c // heads)
        parts = parts.permute(5, 0, 1, 3, 6, 2, 4, 7).reshape(3, b * rows * columns, heads, side * side, c // heads)
        q, k, v = parts.unbind(0)
        out = attention(q, k, v, bias=DecomposedBias(self.rel_pos_h, self.rel_pos_w))
        out = out.view(b, rows, columns, heads, side, side, c // heads).permute(0, 1, 4, 2, 5, 3, 6)
        out = out.reshape(b, rows * side, columns * side, c)[:, :height, :width]
        return self.proj(out)


def _initialise(encoder: ImageEncoder) -> None:
    """Linear layers from N(0, 0.02) cut at two deviations, as vision transformers start; relative positions zero."""
    for module in encoder.modules():
        if isinstance(module, nn.Linear):
            nn.init.trunc_normal_(module.weight, std=0.02)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    nn.init.trunc_normal_(encoder.pos_embed, std=0.02)
