"""Segment Anything's prompt encoder: points, boxes and masks become tokens and maps for the mask decoder.

A place (x, y) in [0, 1]^2 is [sin 2π B z, cos 2π B z], z = 2 (x, y) - 1, B drawn once from N(0, 1) (Tancik et al. 2020,
"Fourier Features"); what the place is (background, foreground, a box's corner) adds a learnt vector. A mask is shrunk
by convolutions and added to the image's embedding. Kirillov et al. 2023, section 3 and appendix A.

Shapes: b pictures, k prompts a picture, n points a prompt, t tokens a prompt, c channels, g places a side.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from volvelle.parts.position.encoding import exact
from volvelle.systems.segmentation.sam.config import SamConfig
from volvelle.systems.segmentation.sam.layers import LayerNorm2d

NOTHING, BACKGROUND, FOREGROUND, TOP_LEFT, BOTTOM_RIGHT = -1, 0, 1, 2, 3
"""What a point can be: nothing (it fills a row up), a click, or a box's corner."""


class PromptEncoder(nn.Module):
    """Sparse tokens (b, k, t, c) and dense maps (b, k or 1, c, g or 1, g or 1) of prompts, in pixels of the input.

    Coordinates are (x, y) in the s x s input, whole numbers at a pixel's corner, half added here. Without masks the
    dense map is one vector for all prompts and places.
    """

    def __init__(self, config: SamConfig):
        super().__init__()
        self.size, self.grid, width = config.size, config.grid, config.width
        self.pe_layer = FourierFeatures(width // 2)
        self.point_embeddings = nn.ModuleList(nn.Embedding(1, width) for _ in range(4))
        self.not_a_point_embed = nn.Embedding(1, width)
        inner = config.mask_channels
        self.mask_downscaling = nn.Sequential(
            nn.Conv2d(1, inner // 4, 2, stride=2),
            LayerNorm2d(inner // 4),
            nn.GELU(),
            nn.Conv2d(inner // 4, inner, 2, stride=2),
            LayerNorm2d(inner),
            nn.GELU(),
            nn.Conv2d(inner, width, 1),
        )
        self.no_mask_embed = nn.Embedding(1, width)

    def forward(
        self,
        points: Tensor | None = None,
        labels: Tensor | None = None,
        boxes: Tensor | None = None,
        masks: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Return the tokens and the dense maps.

        `points` (b, k, n, 2) come with `labels` (b, k, n): 1 foreground, 0 background, -1 nothing; `boxes` are
        (b, k, 4), `masks` (b, k, 4 g, 4 g) logits of an earlier answer. Prompts without a box end with a point that is
        nothing. Raises ValueError where nothing is given, or sizes do not fit.
        """
        b, k = _prompts(points, labels, boxes, masks, 4 * self.grid)
        tokens: list[Tensor] = []
        if points is not None and labels is not None:
            if boxes is None:
                points = F.pad(points, (0, 0, 0, 1))
                labels = F.pad(labels, (0, 1), value=NOTHING)
            tokens.append(self.embed(points, labels))
        if boxes is not None:
            corners = boxes.reshape(b, k, 2, 2)
            what = torch.tensor([TOP_LEFT, BOTTOM_RIGHT], device=boxes.device).expand(b, k, 2)
            tokens.append(self.embed(corners, what))
        width = self.no_mask_embed.weight.shape[1]
        sparse = torch.cat(tokens, 2) if tokens else self.no_mask_embed.weight.new_zeros(b, k, 0, width)
        if masks is None:
            return sparse, self.no_mask_embed.weight.view(1, 1, width, 1, 1).expand(b, 1, width, 1, 1)
        dtype = self.no_mask_embed.weight.dtype
        dense = self.mask_downscaling(masks.reshape(b * k, 1, *masks.shape[2:]).to(dtype))
        return sparse, dense.view(b, k, *dense.shape[1:])

    def embed(self, points: Tensor, labels: Tensor) -> Tensor:
        """Tokens (b, k, n, c) of points (b, k, n, 2), in pixels of the input, and what each is (b, k, n), -1 to 3."""
        places = self.pe_layer((points + 0.5) / self.size)
        labels = labels.unsqueeze(-1)
        learnt = torch.stack([self.not_a_point_embed.weight[0], *(e.weight[0] for e in self._kinds())])
        # A product with one-hot rows: as an embedding looked up, and nothing that an exported graph would choke on.
        hot = (labels + 1 == torch.arange(5, device=labels.device)).to(learnt.dtype)
        return torch.where(labels == NOTHING, 0, places) + hot @ learnt

    def _kinds(self) -> list[nn.Embedding]:
        return [module for module in self.point_embeddings if isinstance(module, nn.Embedding)]

    def position(self) -> Tensor:
        """The encoding (1, c, g, g) of the places of the image's embedding."""
        weight = self.no_mask_embed.weight
        at = (torch.arange(self.grid, device=weight.device) + 0.5) / self.grid
        places = torch.stack((at.expand(self.grid, -1), at.unsqueeze(1).expand(-1, self.grid)), dim=-1)
        return self.pe_layer(places).permute(2, 0, 1).unsqueeze(0)


class FourierFeatures(nn.Module):
    """[sin 2π B z, cos 2π B z] (..., 2 c) of places (..., 2) in [0, 1], z = 2 place - 1; B (2, c) stays as drawn.

    Computed in fp32: the angles are many turns, of which 16 bits would keep little.
    """

    positional_encoding_gaussian_matrix: Tensor

    def __init__(self, channels: int, scale: float = 1.0):
        super().__init__()
        self.register_buffer("positional_encoding_gaussian_matrix", scale * torch.randn(2, channels))

    def forward(self, places: Tensor) -> Tensor:
        """Return the features, in the dtype of B."""
        matrix = self.positional_encoding_gaussian_matrix
        wide = torch.promote_types(matrix.dtype, torch.float32)
        with exact(matrix):
            angle = 2 * math.pi * ((2 * places.to(wide) - 1) @ matrix.to(wide))
        return torch.cat((angle.sin(), angle.cos()), dim=-1).to(matrix.dtype)


def _prompts(
    points: Tensor | None, labels: Tensor | None, boxes: Tensor | None, masks: Tensor | None, side: int
) -> tuple[int, int]:
    """(b, k) of the prompts; ValueError where they do not fit each other."""
    if (points is None) != (labels is None):
        raise ValueError("PromptEncoder: points and labels go together, got one without the other")
    given = {
        "points": (points, ("b", "k", "n", 2)),
        "labels": (labels, ("b", "k", "n")),
        "boxes": (boxes, ("b", "k", 4)),
        "masks": (masks, ("b", "k", side, side)),
    }
    counts: dict[str | int, int] = {}
    for name, (tensor, wanted) in given.items():
        if tensor is None:
            continue
        fits = tensor.dim() == len(wanted) and all(
            size == (want if isinstance(want, int) else counts.setdefault(want, size))
            for size, want in zip(tensor.shape, wanted, strict=True)
        )
        if not fits:
            shape = ", ".join(str(counts.get(want, want)) for want in wanted)
            raise ValueError(f"PromptEncoder: {name} must be ({shape}), got {tuple(tensor.shape)}")
    if not counts:
        raise ValueError("PromptEncoder: give points with labels, boxes or masks, got none")
    return counts["b"], counts["k"]
