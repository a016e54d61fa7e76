"""The gradient of a bias in Triton, in memory of the bias itself: by diagonal, or as a tensor. No atomics.

Scores are computed once more, in the order in which the gradient is summed: a program walks down one diagonal of tiles,
or through everything that one tile of the bias was broadcast to, and keeps the sum in registers.

Shapes: as in triton_tiles.py; tiles by diagonal are square, (B, B).
"""

# pyright: reportArgumentType=false
# (Triton declares constexpr where plain values are given, and Python sees no difference.)

import triton
import triton.language as tl

from volvelle.parts.attention.triton_tiles import gradient_tile, load_rows, load_sums, product, start_of


@triton.jit
def score_gradients(  # noqa: PLR0917
    q, k, v, d_out, lse, within, i, j, batch, head, call,
    D: tl.constexpr, D_V: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """Return the gradient of the natural scores of one tile, (Q, K); 0 where hidden and beyond the edges."""
    pair = batch * call.h + head
    queries = load_rows(start_of(q, batch, head), q.n, i, call.n_q, D, BLOCK_D)
    towards = load_rows(start_of(d_out, batch, head), d_out.n, i, call.n_q, D_V, BLOCK_V)
    keys = load_rows(start_of(k, batch, head // call.group), k.n, j, call.n_k, D, BLOCK_D)
    values = load_rows(start_of(v, batch, head // call.group), v.n, j, call.n_k, D_V, BLOCK_V)
    less, inner = load_sums(lse, within, pair, i, call)
    _, d_scores = gradient_tile(
        product(queries, tl.trans(keys), DOT), product(towards, tl.trans(values), DOT),
        less[:, None], inner[:, None], i[:, None], j[None, :], pair, call, True,
    )  # fmt: skip
    return d_scores


@triton.jit
def somebody_sees(i0, j0, call, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr):
    """Whether causal order and window leave anything of the tile at (i0, j0)."""
    least = j0 - (i0 + BLOCK_Q - 1) - (call.n_k - call.n_q)  # how far its nearest and furthest keys lie ahead
    most = j0 + BLOCK_K - 1 - i0 - (call.n_k - call.n_q)
    seen = most >= least
    if call.left is not None:
        seen = seen & (most >= -call.left)
    if call.right is not None:
        seen = seen & (least <= call.right)
    return seen


@triton.jit
def diagonal_gradients(  # noqa: PLR0917
    q, k, v, call, d_out, lse, within, sums,
    D: tl.constexpr, D_V: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """Write sums (b h, tile diagonals, 2 B), of diagonals: key minus query from (J - I) B - B on.

    Column c of row r moves to c - r; what falls off on the left comes in on the right, one tile diagonal earlier. The
    grid is (b h tile-diagonals,); the first tile diagonal holds the last queries and the first keys.
    """
    tl.static_assert(BLOCK_Q == BLOCK_K)
    BLOCK: tl.constexpr = BLOCK_Q
    blocks_q = tl.cdiv(call.n_q, BLOCK)
    blocks_k = tl.cdiv(call.n_k, BLOCK)
    bands = blocks_q + blocks_k - 1
    pair = tl.program_id(0) // bands
    band = tl.program_id(0) % bands
    offset = band - (blocks_q - 1)  # J - I
    batch = pair // call.h
    head = pair % call.h
    rows = tl.arange(0, BLOCK)
    turned = rows[:, None] + rows[None, :]
    before = tl.zeros([BLOCK], tl.float32)
    behind = tl.zeros([BLOCK], tl.float32)
    first = tl.maximum(-offset, 0)
    last = tl.minimum(blocks_q, blocks_k - offset)
    if not somebody_sees(0, offset * BLOCK, call, BLOCK, BLOCK):
        last = first
    for block in range(first, last):
        i = block * BLOCK + rows
        j = (block + offset) * BLOCK + rows
        d_scores = score_gradients(
            q, k, v, d_out, lse, within, i, j, batch, head, call, D, D_V, BLOCK_D, BLOCK_V, DOT
        )  # fmt: skip
        skewed = tl.gather(d_scores, turned % BLOCK, 1)
        behind += tl.sum(tl.where(turned < BLOCK, skewed, 0.0), 0)
        before += tl.sum(tl.where(turned < BLOCK, 0.0, skewed), 0)
    at = sums + tl.program_id(0).to(tl.int64) * (2 * BLOCK) + rows
    tl.store(at, before)
    tl.store(at + BLOCK, behind)


@triton.jit
def tensor_gradients(  # noqa: PLR0917
    q, k, v, call, d_out, lse, within, d_bias, b, b_bias, h_bias, q_bias, k_bias,
    D: tl.constexpr, D_V: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """Write d_bias, contiguous (b_bias, h_bias, q_bias, k_bias), each 1 or the full size; grid (tiles of the bias,).

    Along an axis of 1 the program walks through all batches, heads, queries or keys that share the number.
    """
    blocks_q = tl.cdiv(call.n_q, BLOCK_Q)
    blocks_k = tl.cdiv(call.n_k, BLOCK_K)
    tiles_q = tl.cdiv(q_bias, BLOCK_Q)
    tiles_k = tl.cdiv(k_bias, BLOCK_K)
    tile_k = tl.program_id(0) % tiles_k
    tile_q = tl.program_id(0) // tiles_k % tiles_q
    pair_bias = tl.program_id(0) // (tiles_k * tiles_q)
    head_bias = pair_bias % h_bias
    batch_bias = pair_bias // h_bias
    total = tl.zeros([BLOCK_Q, BLOCK_K], tl.float32)
    for batch in range(batch_bias, tl.where(b_bias == 1, b, batch_bias + 1)):
        for head in range(head_bias, tl.where(h_bias == 1, call.h, head_bias + 1)):
            for block_q in range(tile_q, tl.where(q_bias == 1, blocks_q, tile_q + 1)):
                for block_k in range(tile_k, tl.where(k_bias == 1, blocks_k, tile_k + 1)):
                    i0 = block_q * BLOCK_Q
                    j0 = block_k * BLOCK_K
                    if somebody_sees(i0, j0, call, BLOCK_Q, BLOCK_K):
                        i = i0 + tl.arange(0, BLOCK_Q)
                        j = j0 + tl.arange(0, BLOCK_K)
                        total += score_gradients(
                            q, k, v, d_out, lse, within, i, j, batch, head, call, D, D_V, BLOCK_D, BLOCK_V, DOT
                        )  # fmt: skip
    rows = tile_q * BLOCK_Q + tl.arange(0, BLOCK_Q)
    columns = tile_k * BLOCK_K + tl.arange(0, BLOCK_K)
    if q_bias == 1:
        total = tl.broadcast_to(tl.sum(total, 0)[None, :], [BLOCK_Q, BLOCK_K])
    if k_bias == 1:
        total = tl.broadcast_to(tl.sum(total, 1)[:, None], [BLOCK_Q, BLOCK_K])
    at = (pair_bias.to(tl.int64) * q_bias + rows[:, None]) * k_bias + columns[None, :]
    inside = (rows[:, None] < q_bias) & (columns[None, :] < k_bias)
    tl.store(d_bias + at, total.to(d_bias.dtype.element_ty), mask=inside)
