"""The three hooks through which every position encoding reaches a model, and the score bias that needs no N x N tensor.

An encoding uses the hooks it needs:
    embed     changes the token embeddings once (sinusoidal, learned, recurrent, multiplicative, complex)
    rotation  turns queries and keys in every layer (RoPE); prepared once a step
    bias      adds to the attention scores in every layer (Shaw, Transformer-XL, T5, DeBERTa, ALiBi)
Positions are always explicit: int64 of shape (n,) or (b, n). A cache, a packed row or a token tree gives its own.

Shapes: b batch, h heads, n tokens, d features a head.
"""

from __future__ import annotations

from typing import Protocol

from torch import Tensor, dtype, nn


class Turning(Protocol):
    """What `rotation` returns: positions made ready, applied to the q and k of every layer."""

    def __call__(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """Return q and k of shape (b, h, n, d), turned."""
        ...

    def turn(self, x: Tensor) -> Tensor:
        """Return one tensor (b, h, n, d), turned."""
        ...


class Bias:
    """A term of the attention scores, given block by block: softmax(scale * q k^T + bias) v.

    `tile` answers for any queries against any keys, so a back end may ask for all pairs at once or for one block of
    them. The block carries its gradient, to the encoding's parameters and to q and k where it depends on them.

    >>> import torch
    >>> class Distance(Bias):
    ...     def tile(self, q, k, q_positions, k_positions):
    ...         return (q_positions[:, None] - k_positions).to(q.dtype)[None, None]
    >>> q = k = torch.zeros(1, 1, 2, 4)
    >>> Distance().tile(q, k, torch.tensor([0, 1]), torch.tensor([0, 1]))
    tensor([[[[ 0., -1.],
              [ 1.,  0.]]]])
    """

    has_value_term: bool = False
    learnable: bool = True

    def tile(self, q: Tensor, k: Tensor, q_positions: Tensor, k_positions: Tensor) -> Tensor:
        """Return the block (b or 1, h or 1, n_q, n_k) that is added to the scaled scores.

        q is (b, h, n_q, d), k is (b, h_kv, n_k, d); the positions are (n_q,) or (b, n_q), and (n_k,) or (b, n_k).
        """
        raise NotImplementedError

    def value_term(self, weights: Tensor, q_positions: Tensor, k_positions: Tensor) -> Tensor:
        """Return what the attention weights (b, h, n_q, n_k) add to the output besides weights @ v: (b, h, n_q, d).

        It must be linear in `weights`, so that the blocks of one row sum up. Used where `has_value_term` is true
        (Shaw et al. 2018, equation 3).
        """
        raise NotImplementedError


class PositionEncoding(nn.Module):
    """Base of all position encodings: by default every hook leaves the model alone.

    >>> import torch
    >>> nothing, x, positions = PositionEncoding(), torch.ones(1, 3, 8), torch.arange(3)
    >>> nothing.embed(x, positions) is x, nothing.rotation(positions, x.dtype), nothing.bias()
    (True, None, None)
    """

    def embed(self, x: Tensor, positions: Tensor, ids: Tensor | None = None) -> Tensor:
        """Return the embeddings x (b, n, width) with position; ids (b, n) for encodings that depend on the word."""
        return x

    def rotation(self, positions: Tensor, dtype: dtype) -> Turning | None:
        """Prepare the turning of q and k at these positions, once a step; None where nothing turns."""
        return None

    def rotate(self, q: Tensor, k: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Turn q (b, h, n, d) and k (b, h_kv, n, d): `rotation` and its use in one call."""
        rotation = self.rotation(positions, q.dtype)
        return (q, k) if rotation is None else rotation(q, k)

    def bias(self) -> Bias | None:
        """Return the score bias, or None where there is none."""
        return None
