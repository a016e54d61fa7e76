"""Attention between a prompt's few tokens and the many places of an image, without projecting the image.

A head's score of a token i against a place j is (W_q t_i) · (W_k z_j) = (W_k^T W_q t_i) · z_j: the key's projection can
be moved to the token's side, and likewise the value's projection behind the sum, Σ_j p_ij W_v z_j = W_v Σ_j p_ij z_j.
With T tokens and h heads this costs h T columns of z where projecting z costs as many as the attention is wide, and
nothing of the size of the image is written for keys and values.

Shapes: b pictures, k prompts a picture, T tokens a prompt, N places, c channels, h heads of d features.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from volvelle.parts.attention.attention import attention


class TokenAttention(nn.Module):
    """softmax(q k^T / √d) v with projections to `width` features in and to `channels` out; h heads."""

    def __init__(self, channels: int, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.q_proj = nn.Linear(channels, width)
        self.k_proj = nn.Linear(channels, width)
        self.v_proj = nn.Linear(channels, width)
        self.out_proj = nn.Linear(width, channels)

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Tokens q (b, k, T, c) attend to tokens k and v (b, k, n, c) of their own prompt."""
        parts = self.q_proj(q), self.k_proj(k), self.v_proj(v)
        found = attention(*(self._split(x.flatten(0, 1)) for x in parts))
        return self.out_proj(found.transpose(1, 2).reshape(*q.shape[:3], -1))

    def keys_and_values(self, keyed: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
        """What `to_shared` needs of an image (b, N, c), `keyed` with its position: (b, h, N, d) twice."""
        return self._split(self.k_proj(keyed)), self._split(self.v_proj(keys))

    def to_shared(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Tokens q (b, k, T, c) of all prompts attend to one image, projected once: k and v (b, h, N, d)."""
        found = attention(self._split(self.q_proj(q).flatten(1, 2)), k, v)
        return self.out_proj(found.transpose(1, 2).reshape(*q.shape[:3], -1))

    def to_image(self, q: Tensor, keyed: Tensor, keys: Tensor) -> Tensor:
        """Tokens q (b, k, T, c) attend to an image of their own (b, k, N, c), `keyed` with its position."""
        asked = self._heads(self.q_proj(q) * self.scale)  # (b, k, T, h, d)
        offset = self._offset(asked, self.k_proj).flatten(2, 3)
        asked = torch.einsum("bkthd,hdc->bkhtc", asked, self._by_head(self.k_proj)).flatten(2, 3)
        weights = (asked @ keyed.mT + offset).softmax(-1)  # (b, k, h T, N)
        seen = (weights @ keys).unflatten(2, (self.heads, -1))
        seen = torch.einsum("bkhtc,hdc->bkthd", seen, self._by_head(self.v_proj)).flatten(-2)
        assert self.v_proj.bias is not None
        return self.out_proj(seen + self.v_proj.bias)

    def from_image(self, keyed: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Places (b, k or 1, N, c) attend to each prompt's tokens k and v (b, k, T, c); the result is (b, k, N, c)."""
        b, prompts, count, _ = k.shape
        held = self._heads(self.k_proj(k) * self.scale)  # (b, k, T, h, d)
        asked = torch.einsum("bkthd,hdc->bkhtc", held, self._by_head(self.q_proj))
        offset = self._offset(held, self.q_proj)
        # One image for all prompts: a product with the tokens of all, not a copy for each.
        shared = keyed.shape[1] == 1
        scores = asked.flatten(1, 3) @ keyed[:, 0].mT if shared else asked.flatten(2, 3) @ keyed.mT
        scores = scores.view(b, prompts, self.heads, count, keyed.shape[2])
        # Over the tokens, which are not the last dimension: the kernel then works on many places at once.
        weights = (scores + offset).softmax(-2).flatten(2, 3)  # (b, k, h T, N)
        given = self.out_proj.weight.view(-1, self.heads, held.shape[-1])
        values = torch.einsum("bkthd,chd->bkhtc", self._heads(self.v_proj(v)), given).flatten(2, 3)
        return weights.mT @ values + self.out_proj.bias

    @property
    def scale(self) -> float:
        """1 / √d."""
        return (self.q_proj.out_features // self.heads) ** -0.5

    def _split(self, x: Tensor) -> Tensor:
        """(b, n, h d) -> (b, h, n, d)."""
        return self._heads(x).transpose(1, 2)

    def _heads(self, x: Tensor) -> Tensor:
        """(..., h d) -> (..., h, d)."""
        return x.unflatten(-1, (self.heads, -1))

    def _offset(self, x: Tensor, layer: nn.Linear) -> Tensor:
        """What a moved projection's bias adds to the scores of tokens x (b, k, T, h, d): (b, k, h, T, 1)."""
        assert layer.bias is not None
        return torch.einsum("bkthd,hd->bkht", x, layer.bias.view(self.heads, -1)).unsqueeze(-1)

    def _by_head(self, layer: nn.Linear) -> Tensor:
        """A projection's matrix as (h, d, c)."""
        return layer.weight.unflatten(0, (self.heads, -1))
