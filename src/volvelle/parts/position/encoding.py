"""The three hooks through which every position encoding reaches a model, and the score bias that needs no N x N tensor.

An encoding uses the hooks it needs:
    embed     changes the token embeddings once (sinusoidal, learned, recurrent, multiplicative, complex)
    rotation  turns queries and keys in every layer (RoPE); prepared once a step
    bias      adds to the attention scores in every layer (Shaw, Transformer-XL, T5, DeBERTa, ALiBi)
Positions are always explicit: int64 of shape (n,) or (b, n). A cache, a packed row or a token tree gives its own.
Encodings of several axes (axial.py, multimodal_rope.py) take (n, axes) or (b, n, axes).

Shapes: b batch, h heads, n tokens, d features a head.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor, dtype, nn


def distances(q_positions: Tensor, k_positions: Tensor) -> Tensor:
    """Return i - j for each query position i and key position j, (1, 1, n_q, n_k) or (b, 1, n_q, n_k), int64.

    >>> distances(torch.tensor([3]), torch.tensor([0, 3, 5]))
    tensor([[[[ 3,  0, -2]]]])
    """
    distance = q_positions.unsqueeze(-1) - k_positions.unsqueeze(-2)
    return distance[None, None] if distance.dim() == 2 else distance.unsqueeze(1)


def widened(x: Tensor) -> Tensor:
    """Return x in fp32 when it is fp16 or bf16, else as it is: score terms are added before the last rounding."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def exact(x: Tensor) -> torch.autocast:
    """Return a context without autocast on the device of x, for score terms that are kept in fp32 on purpose."""
    return torch.autocast(x.device.type, enabled=False)


def moved(x: Tensor, fn: Callable[[Tensor], Tensor]) -> Tensor:
    """Return x on the device that `fn` (of nn.Module._apply) moves to, in its own dtype.

    For constants that follow their module to its device, never to its dtype; meta and mps cannot hold fp64 values.
    """
    device = fn(torch.empty(0)).device
    return x if device.type in {"meta", "mps"} else x.to(device)


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
    """Whether `value_term` adds to the output."""
    learnable: bool = True
    """Whether a gradient flows through the block, to parameters or to q and k."""
    scale: float | None = None
    """The factor of q k^T that goes with this term, where the encoding fixes one (DeBERTa); None: 1 / sqrt(d)."""

    def tile(self, q: Tensor, k: Tensor, q_positions: Tensor, k_positions: Tensor) -> Tensor:
        """Return the block (b or 1, h or 1, n_q, n_k) that is added to the scaled scores.

        q is (b, h, n_q, d), k is (b, h_kv, n_k, d); the positions are (n_q,) or (b, n_q), and (n_k,) or (b, n_k). The
        block has the dtype of q or, where that has 16 bits, fp32; back ends cast it as they need.
        """
        raise NotImplementedError

    def rank(self, n_q: int, n_k: int) -> int | None:
        """Return the width of `factors` for all queries against all keys at their default positions, None: it has none.

        A back end then gives q and k so many features more, and holds no block of the bias at all.
        """
        return None

    def factors(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """Return A (b or 1, h or 1, n_q, r) and B (b or 1, h_kv or 1, n_k, r), in the dtype of q: the block is A B^T.

        Asked where `rank` gives r.
        """
        raise NotImplementedError

    def tensors(self) -> tuple[Tensor, ...]:
        """Return the tensors besides q and k that the block and the value term are made of.

        A back end that recomputes blocks in its backward asks for the gradients of these.
        """
        return ()

    def value_term(self, weights: Tensor, q_positions: Tensor, k_positions: Tensor) -> Tensor:
        """Return what the attention weights (b, h, n_q, n_k) add to the output besides weights @ v: (b, h, n_q, d).

        It must be linear in `weights`, so that the blocks of one row sum up. Used where `has_value_term` is true
        (Shaw et al. 2018, equation 3).
        """
        raise NotImplementedError


class DistanceBias(Bias):
    """A bias that is a function of the distance i - j alone (T5, ALiBi): a block is constant along its diagonals.

    A back end may ask for the n_q + n_k - 1 values of a whole block instead of the block.

    >>> class Near(DistanceBias):
    ...     def at(self, distance, dtype):
    ...         return (distance.abs() <= 1).to(dtype)[None]
    >>> q = k = torch.zeros(1, 1, 3, 4)
    >>> Near().tile(q, k, torch.arange(3), torch.arange(3))
    tensor([[[[1., 1., 0.],
              [1., 1., 1.],
              [0., 1., 1.]]]])
    """

    def at(self, distance: Tensor, dtype: torch.dtype) -> Tensor:
        """Return the bias (h, ...) at integer distances (...), in `dtype`."""
        raise NotImplementedError

    def tile(self, q: Tensor, k: Tensor, q_positions: Tensor, k_positions: Tensor) -> Tensor:
        """Return the block (b or 1, h, n_q, n_k): `at` of all distances."""
        dtype = torch.promote_types(q.dtype, torch.float32)
        return self.at(distances(q_positions, k_positions)[:, 0], dtype).transpose(0, 1)


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

    def vectors(self) -> Tensor | None:
        """Return the vectors that the encodings of single layers share (DeBERTa), or None where they share nothing."""
        return None
