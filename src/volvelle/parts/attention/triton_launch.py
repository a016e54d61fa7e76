"""How the Triton kernels are started: block sizes, strides, room for the results, and the last sums of a bias gradient.

Block sizes follow from reasoning and have NOT been measured on a device. A program wants the largest tiles whose
operands fit into the shared memory of its card (99 KiB on Ampere and Ada cards for desktops, 163 on the A100, 227 on
Hopper) next to the copies that hide the latency of loads (`stages`), and whose fp32 sums leave room among the 255
registers of a thread. Candidates go from large to small; the first that satisfies both estimates is taken, so that the
same call on the same card always adds in the same order, which a timed choice would not promise.

Shapes: as in triton_tiles.py.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from volvelle.parts.attention.segments import ranges
from volvelle.parts.attention.triton import INTERPRETED
from volvelle.parts.attention.triton_backward import key_gradients, query_gradients
from volvelle.parts.attention.triton_bias import diagonal_gradients, tensor_gradients
from volvelle.parts.attention.triton_forward import attend
from volvelle.parts.attention.triton_tiles import Call, Matrix

RANDOM_BITS = 24
REGISTERS = 160
"""Of a thread, for sums and scores, at most; addresses and operands want the other 95."""


class Options(NamedTuple):
    """The numbers of a call; `seed` matters only with dropout."""

    left: int | None
    right: int | None
    scale: float
    dropout: float
    seed: int


class Added(NamedTuple):
    """The tensors that shape the scores besides q and k; at most one of bias and numbers is there."""

    mask: Tensor | None
    bias: Tensor | None
    numbers: Tensor | None
    q_segments: Tensor | None
    k_segments: Tensor | None


class Blocks(NamedTuple):
    """Queries and keys of a tile, warps of a program, copies of what its loop loads."""

    queries: int
    keys: int
    warps: int
    stages: int


class Kind(NamedTuple):
    """One kernel's candidates, from the best; numbers in shared memory and fp32 numbers in registers, of each."""

    candidates: tuple[Blocks, ...]
    shared: Callable[[Blocks, int], int]
    registers: Callable[[Blocks, int], int]


# In these estimates d stands for d + d_v, both padded.
FORWARD = Kind(
    tuple(Blocks(*x) for x in ((128, 64, 4, 3), (128, 64, 8, 3), (128, 64, 8, 2), (64, 64, 4, 2), (64, 32, 4, 2),
                               (32, 32, 4, 2), (32, 32, 4, 1), (16, 16, 4, 1))),
    lambda x, d: x.queries * d // 2 + x.stages * x.keys * d,
    lambda x, d: x.queries * (d // 2 + x.keys),
)  # fmt: skip
KEYS = Kind(
    tuple(Blocks(*x) for x in ((64, 128, 8, 2), (64, 64, 4, 2), (64, 64, 8, 2), (32, 64, 8, 2), (32, 64, 8, 1),
                               (32, 32, 8, 1), (16, 16, 4, 1))),
    lambda x, d: (x.keys + x.stages * x.queries) * d + 2 * x.queries * x.keys,
    lambda x, d: 2 * x.keys * d + 3 * x.queries * x.keys,  # K and V stay in registers beside their gradients
)  # fmt: skip
QUERIES = Kind(
    tuple(Blocks(*x) for x in ((128, 64, 8, 2), (64, 64, 4, 2), (64, 64, 8, 2), (64, 32, 8, 2), (64, 32, 8, 1),
                               (32, 32, 4, 1), (16, 16, 4, 1))),
    lambda x, d: (x.queries + x.stages * x.keys) * d + x.queries * x.keys,
    lambda x, d: x.queries * d // 2 + 2 * x.queries * x.keys,
)  # fmt: skip
BIAS = Kind(
    tuple(Blocks(*x) for x in ((64, 64, 4, 1), (32, 32, 4, 1), (16, 16, 4, 1))),
    lambda x, d: (x.queries + x.keys) * d + 2 * x.queries * x.keys,
    lambda x, d: 4 * x.queries * x.keys,
)


@lru_cache(maxsize=256)
def choose(kind: Kind, widths: tuple[int, int], itemsize: int, shared: int, read: int = 0) -> Blocks:
    """Return the first candidate that fits `shared` bytes and the registers; the last where none does.

    `widths` are d and d_v, `read` the bytes that are read for each score (a mask, a bias), in copies too. Products of
    fp32 numbers run outside the matrix units and take far more registers.

    >>> choose(FORWARD, (128, 128), 2, 227 * 1024), choose(FORWARD, (256, 256), 2, 99 * 1024)[:2]
    (Blocks(queries=128, keys=64, warps=8, stages=3), (64, 32))
    """
    both = sum(widths)
    for blocks in kind.candidates:
        needed = kind.shared(blocks, both) * itemsize + blocks.stages * blocks.queries * blocks.keys * read
        registers = kind.registers(blocks, both) * (3 if itemsize == 4 else 1)
        if needed <= shared and registers <= REGISTERS * 32 * blocks.warps:
            return blocks
    return kind.candidates[-1]


def _blocks(kind: Kind, q: Tensor, v: Tensor, added: Added) -> Blocks:
    if INTERPRETED:
        return kind.candidates[-1]  # small calls still have many tiles
    read = sum(x.element_size() for x in (added.mask, added.bias, added.numbers) if x is not None)
    shared = torch.cuda.get_device_properties(q.device).shared_memory_per_block_optin
    return choose(kind, (_padded(q), _padded(v)), q.element_size(), shared, read)


def _padded(x: Tensor) -> int:
    return max(16, triton.next_power_of_2(x.shape[-1]))


def _how(dtype: torch.dtype) -> str:
    """How products are taken (`DOT`): torch's own switch decides about TF32."""
    if INTERPRETED and dtype == torch.bfloat16:
        return "widened"
    return "tf32" if torch.backends.cuda.matmul.allow_tf32 else "ieee"


def _matrix(x: Tensor) -> Matrix:
    x = x if x.stride(-1) == 1 else x.contiguous()
    return Matrix(x, *x.stride()[:3])


def _spread(x: Tensor | None, full: tuple[int, ...]) -> tuple[Tensor | None, int, int, int, int]:
    """A tensor that broadcasts to `full` with its four strides, 0 along what it is broadcast over."""
    if x is None:
        return None, 0, 0, 0, 0
    b, h, i, j = x.expand(full).stride()
    return x, b, h, i, j


def _rows(x: Tensor | None) -> tuple[Tensor | None, int]:
    """A tensor (b or h or 1, n), n side by side, and how far its rows lie apart, 0 where all share one."""
    if x is None:
        return None, 0
    x = x.contiguous()
    return x, 0 if len(x) == 1 else x.stride(0)


def _call(q: Tensor, k: Tensor, added: Added, o: Options) -> Call:
    (b, h, n_q, _), n_k = q.shape, k.shape[2]
    full, dropping, most = (b, h, n_q, n_k), o.dropout > 0, 1 << RANDOM_BITS
    limit = round(o.dropout * most)  # p is rounded, and the share that remains made up for exactly
    return Call(
        o.scale, h, h // k.shape[1], n_q, n_k, o.left, o.right,
        *_spread(None if added.mask is None else added.mask.view(torch.uint8), full),
        *_spread(added.bias, full),
        *_rows(added.numbers), *_rows(added.q_segments), *_rows(added.k_segments), None, 0,
        2 * o.seed + 3 if dropping else None,  # odd and large: Triton compiles anew for multiples of 16 and for 1
        limit if dropping else None,
        most / (most - limit) if limit < most else 0.0,
    )  # fmt: skip


def _meeting(call: Call, of: Tensor | None, among: Tensor | None, side: int, other: int) -> Call:
    """The call with, for each `side` neighbours of one side, the range of the other that shares a segment with them.

    It comes from the least and the greatest number of every block: exact where segments are numbered in order.
    """
    if of is None or among is None:
        return call
    (low, high), (low_other, high_other) = ranges(of, side), ranges(among, other)
    meet = (low[:, :, None] <= high_other[:, None]) & (low_other[:, None] <= high[:, :, None])
    starts = torch.arange(0, among.shape[1], other, dtype=torch.int32, device=of.device)
    first = starts.masked_fill(~meet, among.shape[1]).amin(-1)
    last = (starts + other).masked_fill(~meet, 0).amax(-1)
    bounds = torch.stack((first, last), -1)
    return call._replace(bounds=bounds, bounds_b=0 if len(bounds) == 1 else bounds.stride(0))


def _sizes(q: Tensor, v: Tensor, blocks: Blocks) -> dict[str, int | str]:
    return {
        "D": q.shape[-1], "D_V": v.shape[-1], "BLOCK_D": _padded(q), "BLOCK_V": _padded(v),
        "BLOCK_Q": blocks.queries, "BLOCK_K": blocks.keys, "DOT": _how(q.dtype),
    }  # fmt: skip


def _start(kernel: Any, programs: int, arguments: tuple, blocks: Blocks, sizes: dict[str, int | str]) -> None:
    _, _, num_warps, num_stages = blocks
    kernel[(programs,)](*arguments, **sizes, num_warps=num_warps, num_stages=num_stages)


def forward(q: Tensor, k: Tensor, v: Tensor, added: Added, options: Options) -> tuple[Tensor, Tensor]:
    """Return the output (b, h, n_q, d_v) in q's dtype and the log-sum-exp (b, h, n_q) in fp32."""
    b, h, n_q, _ = q.shape
    out = q.new_empty(b, h, n_q, v.shape[-1])
    lse = torch.empty(b, h, n_q, dtype=torch.float32, device=q.device)
    if not lse.numel():
        return out, lse
    blocks = _blocks(FORWARD, q, v, added)
    call = _meeting(_call(q, k, added, options), added.q_segments, added.k_segments, blocks.queries, blocks.keys)
    with torch.cuda.device_of(q):
        arguments = (_matrix(q), _matrix(k), _matrix(v), call, out, lse)
        _start(attend, b * h * triton.cdiv(n_q, blocks.queries), arguments, blocks, _sizes(q, v, blocks))
    return out, lse


class Saved(NamedTuple):
    """What the backward pass starts from."""

    d_out: Tensor
    d_lse: Tensor
    q: Tensor
    k: Tensor
    v: Tensor
    out: Tensor
    lse: Tensor


def backward(
    saved: Saved, added: Added, options: Options, bias_too: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Return dQ, dK, dV and, where wanted, the gradient of the bias or of the numbers, whichever there is."""
    d_out, d_lse, q, k, v, out, lse = saved
    (b, h, n_q, _), (_, h_kv, n_k, _) = q.shape, v.shape
    d_q = q.new_empty(q.shape)
    if not lse.numel():
        either = added.bias if added.numbers is None else added.numbers
        return d_q, torch.zeros_like(k), torch.zeros_like(v), None if either is None else torch.zeros_like(either)
    d_k, d_v = k.new_empty(k.shape), v.new_empty(v.shape)
    within = (d_out.float() * out.float()).sum(-1) - d_lse
    call, found = _call(q, k, added, options), None
    q_segments, k_segments = added.q_segments, added.k_segments
    shared = (_matrix(q), _matrix(k), _matrix(v), call, _matrix(d_out), lse, within)
    with torch.cuda.device_of(q):
        blocks = _blocks(KEYS, q, v, added)
        met = _meeting(call, k_segments, q_segments, blocks.keys, blocks.queries)
        arguments = (*shared[:3], met, *shared[4:], d_k, d_v)
        programs = b * h_kv * triton.cdiv(n_k, blocks.keys)
        _start(key_gradients, programs, arguments, blocks, _sizes(q, v, blocks))
        blocks = _blocks(QUERIES, q, v, added)
        met = _meeting(call, q_segments, k_segments, blocks.queries, blocks.keys)
        arguments = (*shared[:3], met, *shared[4:], d_q)
        _start(query_gradients, b * h * triton.cdiv(n_q, blocks.queries), arguments, blocks, _sizes(q, v, blocks))
        if bias_too:
            blocks = _blocks(BIAS, q, v, added)
            if added.numbers is not None:
                found = _by_diagonal(shared, added.numbers, blocks, _sizes(q, v, blocks))
            elif added.bias is not None:
                found = _as_tensor(shared, added.bias, blocks, _sizes(q, v, blocks))
    return d_q, d_k, d_v, found


def _by_diagonal(shared: tuple, numbers: Tensor, blocks: Blocks, sizes: dict[str, int | str]) -> Tensor:
    call: Call = shared[3]
    side = blocks.queries
    blocks_q, blocks_k = triton.cdiv(call.n_q, side), triton.cdiv(call.n_k, side)
    bands, pairs = blocks_q + blocks_k - 1, shared[5].shape[0] * call.h
    sums = torch.empty(pairs, bands, 2, side, dtype=torch.float32, device=numbers.device)
    _start(diagonal_gradients, pairs * bands, (*shared, sums), blocks, sizes)
    # The right half of one tile diagonal lies over the left half of the next.
    whole = sums.new_zeros(pairs, bands + 1, side)
    whole[:, :-1] += sums[:, :, 0]
    whole[:, 1:] += sums[:, :, 1]
    heads = whole.view(-1, call.h, (bands + 1) * side).sum(0)  # over the batch
    if len(numbers) == 1:
        heads = heads.sum(0, keepdim=True)
    first = blocks_q * side - (call.n_q - 1)  # where the first key stands to the last query
    return heads[:, first : first + call.n_q + call.n_k - 1].flip(-1)


def _as_tensor(shared: tuple, bias: Tensor, blocks: Blocks, sizes: dict[str, int | str]) -> Tensor:
    shape = (1,) * (4 - bias.dim()) + bias.shape
    gradient = torch.empty(shape, dtype=bias.dtype, device=bias.device)
    tiles = triton.cdiv(shape[2], blocks.queries) * triton.cdiv(shape[3], blocks.keys)
    arguments = (*shared, gradient, shared[5].shape[0], *shape)
    _start(tensor_gradients, shape[0] * shape[1] * tiles, arguments, blocks, sizes)
    return gradient.view(bias.shape)
