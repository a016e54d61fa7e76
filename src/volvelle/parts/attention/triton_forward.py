"""The forward kernel in Triton: one block of queries a program, an online softmax over tiles of keys.

m is the largest score so far, l the sum of exp2(s - m) and O the sum of exp2(s - m) V, rescaled when m grows (Dao 2023,
"FlashAttention-2", algorithm 1). Tiles that everybody sees whole skip the comparisons of causal order and window.

Shapes: as in triton_tiles.py.
"""

# pyright: reportArgumentType=false
# (Triton declares constexpr where plain values are given, and Python sees no difference.)

import triton
import triton.language as tl

from volvelle.parts.attention.triton_tiles import (
    LOG2E,
    kept,
    key_range,
    load_rows,
    product,
    score_tile,
    start_of,
    store_rows,
)


@triton.jit
def add_keys(  # noqa: PLR0917
    largest, total, sums, queries, k, k_n, v, v_n, i, pair, call, begin, end,
    D: tl.constexpr, D_V: tl.constexpr, BLOCK_K: tl.constexpr, EDGES: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """Take the keys from `begin` to `end` into the running softmax."""
    for start in range(begin, end, BLOCK_K):
        j = start + tl.arange(0, BLOCK_K)
        keys = load_rows(k, k_n, j, call.n_k, D, queries.shape[1])
        products = product(queries, tl.trans(keys), DOT)
        scores = score_tile(products, i[:, None], j[None, :], pair, call, EDGES)
        grown = tl.maximum(largest, tl.max(scores, 1))
        base = tl.where(grown == float("-inf"), 0.0, grown)  # while a row has seen nothing, exp2 must still give 0
        weights = tl.exp2(scores - base[:, None])
        shrink = tl.exp2(largest - base)
        total = total * shrink + tl.sum(weights, 1)
        if call.limit is not None:
            weights = tl.where(kept(i[:, None], j[None, :], pair, call), weights, 0.0)
        values = load_rows(v, v_n, j, call.n_k, D_V, sums.shape[1])
        sums = sums * shrink[:, None] + product(weights.to(values.dtype), values, DOT)
        largest = grown
    return largest, total, sums


@triton.jit
def attend(  # noqa: PLR0917
    q, k, v, call, out, lse,
    D: tl.constexpr, D_V: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """Write out (b, h, n_q, d_v) and L (b, h, n_q), -inf where a query sees nothing; grid (b h Q-blocks,)."""
    blocks = tl.cdiv(call.n_q, BLOCK_Q)
    pair = tl.program_id(0) // blocks
    i0 = (blocks - 1 - tl.program_id(0) % blocks) * BLOCK_Q  # in causal order the last have most to do: first
    i = i0 + tl.arange(0, BLOCK_Q)
    batch = pair // call.h
    head = pair % call.h
    queries = load_rows(start_of(q, batch, head), q.n, i, call.n_q, D, BLOCK_D)
    k_start = start_of(k, batch, head // call.group)
    v_start = start_of(v, batch, head // call.group)
    first, first_full, last_full, last = key_range(i0, batch, call, BLOCK_Q, BLOCK_K)
    largest = tl.full([BLOCK_Q], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_Q], tl.float32)
    sums = tl.zeros([BLOCK_Q, BLOCK_V], tl.float32)
    if call.left is not None:
        largest, total, sums = add_keys(
            largest, total, sums, queries, k_start, k.n, v_start, v.n, i, pair, call, first, first_full,
            D, D_V, BLOCK_K, True, DOT,
        )  # fmt: skip
    largest, total, sums = add_keys(
        largest, total, sums, queries, k_start, k.n, v_start, v.n, i, pair, call, first_full, last_full,
        D, D_V, BLOCK_K, False, DOT,
    )  # fmt: skip
    largest, total, sums = add_keys(
        largest, total, sums, queries, k_start, k.n, v_start, v.n, i, pair, call, last_full, last,
        D, D_V, BLOCK_K, True, DOT,
    )  # fmt: skip
    nothing = total == 0.0
    total = tl.where(nothing, 1.0, total)
    share = 1.0 / total
    if call.limit is not None:
        share = share * call.factor
    store_rows(out + pair.to(tl.int64) * call.n_q * D_V, i, call.n_q, sums * share[:, None], D_V)
    found = tl.where(nothing, float("-inf"), (largest + tl.log2(total)) / LOG2E)
    tl.store(lse + pair.to(tl.int64) * call.n_q + i, found, mask=i < call.n_q)
