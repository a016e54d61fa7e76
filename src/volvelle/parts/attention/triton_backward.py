"""The backward kernels in Triton: dK and dV a block of keys, dQ a block of queries; scores are computed again.

    dV += P^T dO,   dS = P * (dO V^T - D),   dQ += scale dS K,   dK += scale dS^T Q
(Dao 2023, "FlashAttention-2", algorithm 2). Each result is summed up by one program, over the heads of a group too, in
a fixed order: no atomics, the same bits every time. The price is a second computation of the scores for dQ.

Shapes: as in triton_tiles.py.
"""

# pyright: reportArgumentType=false
# (Triton declares constexpr where plain values are given, and Python sees no difference.)

import triton
import triton.language as tl

from volvelle.parts.attention.triton_tiles import (
    gradient_tile,
    key_range,
    load_rows,
    load_sums,
    product,
    query_range,
    start_of,
    store_rows,
)


@triton.jit
def add_to_keys(  # noqa: PLR0917
    d_keys, d_values, keys, values, q, q_n, d_out, d_out_n, lse, within, j, pair, call, begin, end,
    D: tl.constexpr, D_V: tl.constexpr, BLOCK_Q: tl.constexpr, EDGES: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """Add what the queries from `begin` to `end` mean for the keys j and their values; tiles lie keys first, (K, Q)."""
    for start in range(begin, end, BLOCK_Q):
        i = start + tl.arange(0, BLOCK_Q)
        queries = load_rows(q, q_n, i, call.n_q, D, keys.shape[1])
        towards = load_rows(d_out, d_out_n, i, call.n_q, D_V, values.shape[1])
        less, inner = load_sums(lse, within, pair, i, call)
        weights, d_scores = gradient_tile(
            product(keys, tl.trans(queries), DOT), product(values, tl.trans(towards), DOT),
            less[None, :], inner[None, :], i[None, :], j[:, None], pair, call, EDGES,
        )  # fmt: skip
        d_values += product(weights.to(towards.dtype), towards, DOT)
        d_keys += product(d_scores.to(queries.dtype), queries, DOT)
    return d_keys, d_values


@triton.jit
def key_gradients(  # noqa: PLR0917
    q, k, v, call, d_out, lse, within, d_k, d_v,
    D: tl.constexpr, D_V: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """Write dK (b, h_kv, n_k, d) and dV (b, h_kv, n_k, d_v); grid (b h_kv K-blocks,)."""
    blocks = tl.cdiv(call.n_k, BLOCK_K)
    pair_kv = tl.program_id(0) // blocks
    j0 = tl.program_id(0) % blocks * BLOCK_K
    j = j0 + tl.arange(0, BLOCK_K)
    heads_kv = call.h // call.group
    batch = pair_kv // heads_kv
    head_kv = pair_kv % heads_kv
    keys = load_rows(start_of(k, batch, head_kv), k.n, j, call.n_k, D, BLOCK_D)
    values = load_rows(start_of(v, batch, head_kv), v.n, j, call.n_k, D_V, BLOCK_V)
    first, first_full, last_full, last = query_range(j0, batch, call, BLOCK_Q, BLOCK_K)
    d_keys = tl.zeros([BLOCK_K, BLOCK_D], tl.float32)
    d_values = tl.zeros([BLOCK_K, BLOCK_V], tl.float32)
    for member in range(call.group):
        head = head_kv * call.group + member
        pair = batch * call.h + head
        q_start = start_of(q, batch, head)
        d_start = start_of(d_out, batch, head)
        if call.right is not None:
            d_keys, d_values = add_to_keys(
                d_keys, d_values, keys, values, q_start, q.n, d_start, d_out.n, lse, within, j, pair, call,
                first, first_full, D, D_V, BLOCK_Q, True, DOT,
            )  # fmt: skip
        d_keys, d_values = add_to_keys(
            d_keys, d_values, keys, values, q_start, q.n, d_start, d_out.n, lse, within, j, pair, call,
            first_full, last_full, D, D_V, BLOCK_Q, False, DOT,
        )  # fmt: skip
        if call.left is not None:
            d_keys, d_values = add_to_keys(
                d_keys, d_values, keys, values, q_start, q.n, d_start, d_out.n, lse, within, j, pair, call,
                last_full, last, D, D_V, BLOCK_Q, True, DOT,
            )  # fmt: skip
    store_rows(d_k + pair_kv.to(tl.int64) * call.n_k * D, j, call.n_k, d_keys * call.scale, D)
    store_rows(d_v + pair_kv.to(tl.int64) * call.n_k * D_V, j, call.n_k, d_values, D_V)


@triton.jit
def add_to_queries(  # noqa: PLR0917
    d_queries, queries, k, k_n, v, v_n, towards, less, inner, i, pair, call, begin, end,
    D: tl.constexpr, D_V: tl.constexpr, BLOCK_K: tl.constexpr, EDGES: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """Add what the keys from `begin` to `end` mean for the queries i."""
    for start in range(begin, end, BLOCK_K):
        j = start + tl.arange(0, BLOCK_K)
        keys = load_rows(k, k_n, j, call.n_k, D, queries.shape[1])
        values = load_rows(v, v_n, j, call.n_k, D_V, towards.shape[1])
        _, d_scores = gradient_tile(
            product(queries, tl.trans(keys), DOT), product(towards, tl.trans(values), DOT),
            less[:, None], inner[:, None], i[:, None], j[None, :], pair, call, EDGES,
        )  # fmt: skip
        d_queries += product(d_scores.to(keys.dtype), keys, DOT)
    return d_queries


@triton.jit
def query_gradients(  # noqa: PLR0917
    q, k, v, call, d_out, lse, within, d_q,
    D: tl.constexpr, D_V: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """Write dQ (b, h, n_q, d); grid (b h Q-blocks,)."""
    blocks = tl.cdiv(call.n_q, BLOCK_Q)
    pair = tl.program_id(0) // blocks
    i0 = (blocks - 1 - tl.program_id(0) % blocks) * BLOCK_Q
    i = i0 + tl.arange(0, BLOCK_Q)
    batch = pair // call.h
    head = pair % call.h
    queries = load_rows(start_of(q, batch, head), q.n, i, call.n_q, D, BLOCK_D)
    towards = load_rows(start_of(d_out, batch, head), d_out.n, i, call.n_q, D_V, BLOCK_V)
    less, inner = load_sums(lse, within, pair, i, call)
    k_start = start_of(k, batch, head // call.group)
    v_start = start_of(v, batch, head // call.group)
    first, first_full, last_full, last = key_range(i0, batch, call, BLOCK_Q, BLOCK_K)
    d_queries = tl.zeros([BLOCK_Q, BLOCK_D], tl.float32)
    if call.left is not None:
        d_queries = add_to_queries(
            d_queries, queries, k_start, k.n, v_start, v.n, towards, less, inner, i, pair, call,
            first, first_full, D, D_V, BLOCK_K, True, DOT,
        )  # fmt: skip
    d_queries = add_to_queries(
        d_queries, queries, k_start, k.n, v_start, v.n, towards, less, inner, i, pair, call,
        first_full, last_full, D, D_V, BLOCK_K, False, DOT,
    )  # fmt: skip
    d_queries = add_to_queries(
        d_queries, queries, k_start, k.n, v_start, v.n, towards, less, inner, i, pair, call,
        last_full, last, D, D_V, BLOCK_K, True, DOT,
    )  # fmt: skip
    store_rows(d_q + pair.to(tl.int64) * call.n_q * D, i, call.n_q, d_queries * call.scale, D)
