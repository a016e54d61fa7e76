"""What the Triton kernels share: tiles of queries and keys, their scores, which of them anybody sees, and dropout.

Scores are kept in units of log 2, s = log2(e) (scale q k^T + bias), because the hardware raises 2 to a power, not e.
Only imported where Triton is installed (triton.py asks first).

Shapes: b batch, h query heads, h_kv key/value heads, n_q queries, n_k keys, d and d_v features a head; a tile holds
queries i (Q,) and keys j (K,). A pair is one head of one row of the batch, counted b-first: pair = batch * h + head.
"""

# pyright: reportArgumentType=false
# (Triton declares constexpr where plain values are given, and Python sees no difference.)

from typing import Any, NamedTuple

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)


class Matrix(NamedTuple):
    """A tensor (b, h, n, d), d side by side: where it begins, and how far batches, heads and rows lie apart."""

    pointer: Any
    b: int
    h: int
    n: int


class Call(NamedTuple):
    """What a call asks of every tile. None, and a pointer that is None, stand for a term that is not there.

    Query i stands at key i + n_k - n_q and sees `left` keys before it and `right` behind.
    mask (bytes), bias, numbers and segments carry the strides of the axes named; numbers holds the bias of each
    diagonal, the lowest distance i - j first. Queries and keys of one segment meet; bounds
    (b or 1, blocks, 2) is what each block of the kernel's own side may meet, first and one beyond the last. Dropout
    keeps a weight whose 24 random bits reach `limit`, and multiplies it by `factor`.
    """

    scale: float
    h: int
    group: int
    n_q: int
    n_k: int
    left: int | None
    right: int | None
    mask: Any
    mask_b: int
    mask_h: int
    mask_i: int
    mask_j: int
    bias: Any
    bias_b: int
    bias_h: int
    bias_i: int
    bias_j: int
    numbers: Any
    numbers_h: int
    q_segments: Any
    q_segments_b: int
    k_segments: Any
    k_segments_b: int
    bounds: Any
    bounds_b: int
    seed: int | None
    limit: int | None
    factor: float


@triton.jit
def product(a, b, DOT: tl.constexpr):
    """Return a @ b in fp32. DOT: "ieee", "tf32", or "widened" in the interpreter, whose bf16 products are garbage."""
    if DOT == "widened":
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, input_precision="tf32" if DOT == "tf32" else "ieee")


@triton.jit
def start_of(matrix, batch, head):
    """Where a head of a row of the batch begins."""
    return matrix.pointer + tl.cast(batch, tl.int64) * matrix.b + tl.cast(head, tl.int64) * matrix.h


@triton.jit
def load_rows(start, stride, rows, count, D: tl.constexpr, BLOCK: tl.constexpr):
    """Rows of a (count, D) matrix as a tile (rows, BLOCK), 0 beyond its edges."""
    columns = tl.arange(0, BLOCK)
    inside = rows[:, None] < count
    if D < BLOCK:
        inside = inside & (columns[None, :] < D)
    return tl.load(start + rows.to(tl.int64)[:, None] * stride + columns[None, :], mask=inside, other=0.0)


@triton.jit
def store_rows(start, rows, count, tile, D: tl.constexpr):
    """Write a tile (rows, BLOCK) into a contiguous (count, D) matrix, in the matrix's dtype."""
    columns = tl.arange(0, tile.shape[1])
    inside = (rows[:, None] < count) & (columns[None, :] < D)
    tl.store(start + rows.to(tl.int64)[:, None] * D + columns[None, :], tile.to(start.dtype.element_ty), mask=inside)


@triton.jit
def within_bounds(first, first_full, last_full, last, block, batch, call):
    """Cut a range to what the segments of a block may meet, and order its four ends."""
    if call.bounds is not None:
        at = call.bounds + tl.cast(batch, tl.int64) * call.bounds_b + block * 2
        low = tl.load(at)
        high = tl.load(at + 1)
        first = tl.maximum(first, low)
        first_full = tl.maximum(first_full, low)
        last_full = tl.minimum(last_full, high)
        last = tl.minimum(last, high)
    first_full = tl.minimum(first_full, last)
    return first, first_full, tl.maximum(last_full, first_full), last


@triton.jit
def key_range(i0, batch, call, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr):
    """The keys that queries from i0 on see, (first, first_full, last_full, last): in the middle part all see all."""
    i1 = tl.minimum(i0 + BLOCK_Q, call.n_q)
    shift = call.n_k - call.n_q
    first = 0
    first_full = 0
    last = call.n_k
    last_full = call.n_k // BLOCK_K * BLOCK_K
    if call.left is not None:
        first = tl.maximum(i0 + shift - call.left, 0) // BLOCK_K * BLOCK_K
        first_full = (tl.maximum(i1 - 1 + shift - call.left, 0) + BLOCK_K - 1) // BLOCK_K * BLOCK_K
    if call.right is not None:
        last = tl.minimum(tl.maximum(i1 + shift + call.right, 0), call.n_k)
        last_full = tl.minimum(tl.maximum(i0 + shift + call.right + 1, 0), call.n_k) // BLOCK_K * BLOCK_K
    return within_bounds(first, first_full, last_full, last, i0 // BLOCK_Q, batch, call)


@triton.jit
def query_range(j0, batch, call, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr):
    """The queries that see keys from j0 on, as `key_range`. Rows beyond n_q weigh nothing and need no edge."""
    j1 = tl.minimum(j0 + BLOCK_K, call.n_k)
    shift = call.n_k - call.n_q
    first = 0
    first_full = 0
    last = call.n_q
    last_full = call.n_q
    if call.right is not None:
        first = tl.maximum(j0 - shift - call.right, 0) // BLOCK_Q * BLOCK_Q
        first_full = (tl.maximum(j1 - 1 - shift - call.right, 0) + BLOCK_Q - 1) // BLOCK_Q * BLOCK_Q
    if call.left is not None:
        last = tl.minimum(tl.maximum(j1 - shift + call.left, 0), call.n_q)
        last_full = tl.minimum(tl.maximum(j0 - shift + call.left + 1, 0), call.n_q) // BLOCK_Q * BLOCK_Q
    return within_bounds(first, first_full, last_full, last, j0 // BLOCK_K, batch, call)


@triton.jit
def score_tile(products, i, j, pair, call, EDGES: tl.constexpr):
    """Return log2(e) (scale q k^T + bias), -inf where hidden. EDGES: the tile may reach past what i sees.

    The products are (Q, K) with i (Q, 1) and j (1, K), or the other way round with i (1, Q) and j (K, 1).
    """
    scores = products * (call.scale * LOG2E)
    batch = (pair // call.h).to(tl.int64)
    head = (pair % call.h).to(tl.int64)
    inside = (i < call.n_q) & (j < call.n_k)
    if call.bias is not None:
        at = call.bias + batch * call.bias_b + head * call.bias_h
        at += i.to(tl.int64) * call.bias_i + j.to(tl.int64) * call.bias_j
        scores += tl.load(at, mask=inside, other=0.0).to(tl.float32) * LOG2E
    if call.numbers is not None:
        at = call.numbers + head * call.numbers_h + (i - j + call.n_k - 1)
        scores += tl.load(at, mask=inside, other=0.0) * LOG2E
    if call.mask is not None:
        at = call.mask + batch * call.mask_b + head * call.mask_h
        at += i.to(tl.int64) * call.mask_i + j.to(tl.int64) * call.mask_j
        scores = tl.where(tl.load(at, mask=inside, other=0) != 0, scores, float("-inf"))
    if call.q_segments is not None:
        of_query = tl.load(call.q_segments + batch * call.q_segments_b + i, mask=i < call.n_q, other=0)
        of_key = tl.load(call.k_segments + batch * call.k_segments_b + j, mask=j < call.n_k, other=0)
        scores = tl.where(of_query == of_key, scores, float("-inf"))
    if EDGES:
        seen = j < call.n_k
        ahead = j - i - (call.n_k - call.n_q)  # how far the key lies behind the query's own place
        if call.left is not None:
            seen = seen & (ahead >= -call.left)
        if call.right is not None:
            seen = seen & (ahead <= call.right)
        scores = tl.where(seen, scores, float("-inf"))
    return scores


@triton.jit
def mix(x):
    """Spread 32 bits so that each decides over all others (the finalizer of MurmurHash3, Appleby 2011)."""
    x = x ^ (x >> 16)
    x = tl.mul(x, 0x85EBCA6B, sanitize_overflow=False)
    x = x ^ (x >> 13)
    x = tl.mul(x, 0xC2B2AE35, sanitize_overflow=False)
    return x ^ (x >> 16)


@triton.jit
def kept(i, j, pair, call):
    """Which weights dropout keeps: bits that depend on the seed, the pair, the query and the key alone."""
    low = call.seed.to(tl.uint32)
    high = (call.seed >> 32).to(tl.uint32)
    of_query = mix(mix(low ^ pair.to(tl.uint32)) ^ i.to(tl.uint32))
    of_key = mix(high ^ j.to(tl.uint32))
    return (mix(of_query ^ of_key) >> 8).to(tl.int32) >= call.limit


@triton.jit
def gradient_tile(  # noqa: PLR0917
    products, d_products, lse, within, i, j, pair, call, EDGES: tl.constexpr
):
    """(weights behind dropout, gradient of the natural scores) from q k^T and dO v^T, all shaped as `score_tile` says.

    P = exp(S - L), dS = P * (dO V^T - D) with D = rowsum(dO * O) - dL (Dao et al. 2022, algorithm 4).
    """
    weights = tl.exp2(score_tile(products, i, j, pair, call, EDGES) - lse)
    dropped = weights
    if call.limit is not None:
        keep = kept(i, j, pair, call)
        dropped = tl.where(keep, weights * call.factor, 0.0)
        d_products = tl.where(keep, d_products * call.factor, 0.0)
    return dropped, weights * (d_products - within)


@triton.jit
def load_sums(lse, within, pair, i, call):
    """L in units of log 2, +inf where a row sees nothing or does not exist, so that its weights are 0; and D."""
    at = pair.to(tl.int64) * call.n_q + i
    inside = i < call.n_q
    found = tl.load(lse + at, mask=inside, other=float("-inf"))
    found = tl.where(found == float("-inf"), float("inf"), found * LOG2E)
    return found, tl.load(within + at, mask=inside, other=0.0)
