"""FlashAttention in plain PyTorch: tiles, an online softmax, and a backward pass that computes the scores again.

For a block of queries the tiles of scores S come one after the other; m is the largest score so far, l the sum of
exp(S - m), and O the sum of exp(S - m) V, all three rescaled by exp(m_old - m) when m grows (Dao et al. 2022,
algorithm 1; Milakov & Gimelshein 2018). Kept for the backward pass are only the output and L = m + log l: with
P = exp(S - L) and D = rowsum(dO * O), a tile gives (algorithm 4)
    dV += P^T dO,   dS = P * (dO V^T - D),   dQ += scale dS K,   dK += scale dS^T Q.
No (n_q, n_k) tensor ever exists, also not for the gradient of a bias, for dropout, or for a window, whose hidden tiles
are not even computed. Sums run in a fixed order: the same inputs give the same bits.

Shapes: b batch, h query heads, h_kv key/value heads, g = h / h_kv, n_q queries, n_k keys, d and d_v features a head.
Inside, heads of a group lie below each other: B = b h_kv batches of R = g * queries rows.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from volvelle.parts.attention.spec import Shape, Spec, Terms
from volvelle.parts.attention.tiled_terms import Block, Term, make_term
from volvelle.parts.attention.tiles import Tile, seen, tile_rows, tile_side

MOST = 40.0
"""Scores up to this magnitude are exponentiated as they are."""


class Tiled:
    """Memory linear in the number of keys for every call, in plain PyTorch; once differentiable."""

    name = "tiled"

    def supports(self, spec: Spec) -> str | None:
        """Serve everything."""
        return None

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, terms: Terms, shape: Shape) -> Tensor:
        """Return (b, h, n_q, d_v); fp16 and bf16 are computed in fp32 and cast at the end."""
        return self.with_lse(q, k, v, terms, shape)[0]

    def with_lse(self, q: Tensor, k: Tensor, v: Tensor, terms: Terms, shape: Shape) -> tuple[Tensor, Tensor]:
        """Return (b, h, n_q, d_v) and log Σ_j exp(score_ij), (b, h, n_q), -inf where no key is allowed."""
        # Half types are widened on purpose, which autocast would undo.
        with torch.autocast(q.device.type, enabled=False):
            wide = torch.promote_types(q.dtype, torch.float32)
            term = make_term(terms, q, k, shape, wide)
            call = _Call(terms, shape, term, wide, q.device)
            return _Tiled.apply(call, q, k, v, *term.inputs)  # type: ignore[return-value]


class _Call:
    """What forward and backward share: the cut into tiles, and how a tile of scores is made."""

    def __init__(self, terms: Terms, shape: Shape, term: Term, wide: torch.dtype, device: torch.device):
        self.terms, self.shape, self.term, self.wide, self.device = terms, shape, term, wide, device
        self.side = tile_side(shape.b, shape.h, terms.causal, terms.window)
        mask = terms.mask
        self.mask = None if mask is None else mask.reshape((1,) * (4 - mask.dim()) + mask.shape)

    def rows(self):
        return tile_rows(self.shape.n_q, self.shape.n_k, self.side, self.terms.causal, self.terms.window)

    def keys(self, x: Tensor) -> Tensor:
        """(b, h_kv, n_k, d) -> (B, n_k, d), widened, in the order in which tiles list them."""
        x = x.to(self.wide).flatten(0, 1)
        return x.flip(1) if self.term.reversed_keys else x.contiguous()

    def restored(self, x: Tensor, like: Tensor) -> Tensor:
        """Undo `keys`, for gradients."""
        x = x.flip(1) if self.term.reversed_keys else x
        return x.view(like.shape).to(like.dtype)

    def columns(self, tile: Tile) -> slice:
        """Where the tile's keys lie in what `keys` returned."""
        n_k = self.shape.n_k
        return slice(n_k - tile.j1, n_k - tile.j0) if self.term.reversed_keys else slice(tile.j0, tile.j1)

    def queries(self, x: Tensor, i0: int, i1: int) -> Tensor:
        """(b, h, n_q, d) -> (B, R, d), the rows of a block of queries."""
        b, h, h_kv, _, _, _, _ = self.shape
        return x[:, :, i0:i1].to(self.wide).reshape(b * h_kv, h // h_kv * (i1 - i0), x.shape[-1])

    def heads(self, x: Tensor, i0: int, i1: int) -> Tensor:
        """(B, R, n) -> (b, h, queries, n): the same memory."""
        return x.view(self.shape.b, self.shape.h, i1 - i0, x.shape[-1])

    def block(self, tile: Tile, q: Tensor, k: Tensor) -> Block:
        """The tile with its tensors, for terms that are computed from them."""
        q_positions, k_positions = self.terms.positions(q, k)
        rows, columns = slice(tile.i0, tile.i1), slice(tile.j0, tile.j1)
        return Block(
            tile,
            q[:, :, rows].to(self.wide),
            k[:, :, columns].to(self.wide),
            q_positions[..., rows],
            k_positions[..., columns],
        )

    def scratch(self) -> Tensor:
        """Room for one tile of scores."""
        shape, side = self.shape, self.side
        size = shape.b * shape.h * min(side, shape.n_q) * min(side, shape.n_k)
        return torch.empty(size, dtype=self.wide, device=self.device)

    def room(self, scratch: Tensor, tile: Tile) -> Tensor:
        """Scratch memory as (B, R, keys)."""
        shape, keys = self.shape, tile.j1 - tile.j0
        rows = shape.h // shape.h_kv * (tile.i1 - tile.i0)
        return scratch[: shape.b * shape.h_kv * rows * keys].view(shape.b * shape.h_kv, rows, keys)

    def scores(self, room: Tensor, rows: Tensor, columns: Tensor, block: Block) -> Tensor:
        """Fill `room` with rows @ columns^T + bias, -inf where hidden; rows come scaled."""
        tile, added = block.tile, self.term.tile(block)
        view = self.heads(room, tile.i0, tile.i1)
        if added is None:
            torch.bmm(rows, columns.transpose(1, 2), out=room)
        else:
            view.copy_(added)
            room.baddbmm_(rows, columns.transpose(1, 2))
        allowed = self._allowed(tile)
        if allowed is not None:
            view.masked_fill_(~allowed, -torch.inf)
        return room

    def bounded(self, q: Tensor, k: Tensor) -> bool:
        """Whether no score can be large: then exp needs no running maximum, and two passes over a tile are saved.

        |scale q k| <= scale |q| |k| (Cauchy-Schwarz); exp(40) times a million keys is far from fp32's largest number,
        and exp(-40) far from its smallest. Asked on the CPU only, where the answer does not stop a stream.
        """
        if self.device.type != "cpu" or torch.compiler.is_compiling() or not (q.numel() and k.numel()):
            return False
        longest = [float(torch.linalg.vector_norm(x.detach(), dim=-1, dtype=self.wide).amax()) for x in (q, k)]
        return abs(self.terms.scale) * longest[0] * longest[1] + self.term.most() <= MOST

    def _allowed(self, tile: Tile) -> Tensor | None:
        shape, allowed = self.shape, None
        if tile.partial:
            allowed = seen(tile, shape.n_k - shape.n_q, self.terms.causal, self.terms.window, self.device)
        if self.mask is not None:
            rows = slice(None) if self.mask.shape[2] == 1 else slice(tile.i0, tile.i1)
            columns = slice(None) if self.mask.shape[3] == 1 else slice(tile.j0, tile.j1)
            part = self.mask[:, :, rows, columns]
            allowed = part if allowed is None else allowed & part
        return allowed.flip(-1) if allowed is not None and self.term.reversed_keys else allowed

    def factors(self, tile: Tile) -> Tensor | None:
        """What dropout multiplies the weights of the tile by."""
        if self.terms.dropout is None:
            return None
        kept = self.terms.dropout.factors(tile, self.shape.b, self.shape.h, self.wide, self.device)
        return kept.flip(-1) if self.term.reversed_keys else kept


def _forward(call: _Call, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    shape, scale, term = call.shape, call.terms.scale, call.term
    out = q.new_empty(shape.b, shape.h, shape.n_q, shape.d_v)
    lse = torch.empty(shape.b, shape.h, shape.n_q, dtype=call.wide, device=q.device)
    keys, values, scratch, bounded = call.keys(k), call.keys(v), call.scratch(), call.bounded(q, k)
    for i0, i1, tiles in call.rows():
        rows = call.queries(q, i0, i1) * scale
        largest = rows.new_full((*rows.shape[:2], 1), 0.0 if bounded else torch.finfo(call.wide).min)
        total, sums = torch.zeros_like(largest), rows.new_zeros(*rows.shape[:2], shape.d_v)
        for tile in tiles:
            block, at = call.block(tile, q, k), call.columns(tile)
            weights = call.scores(call.room(scratch, tile), rows, keys[:, at], block)
            if not bounded:
                grown = torch.maximum(largest, weights.amax(-1, keepdim=True))
                weights.sub_(grown)
                shrink = largest.sub_(grown).exp_()
                total.mul_(shrink)
                sums.mul_(shrink)
                largest = grown
            total.add_(weights.exp_().sum(-1, keepdim=True))
            kept = call.factors(tile)
            if kept is not None:
                call.heads(weights, i0, i1).mul_(kept)
            sums.baddbmm_(weights, values[:, at])
            if term.has_value_term:
                call.heads(sums, i0, i1).add_(term.values(block, call.heads(weights, i0, i1)))
        nothing = total == 0
        out[:, :, i0:i1] = call.heads(sums.div_(total.masked_fill(nothing, 1)), i0, i1)
        lse[:, :, i0:i1] = call.heads((largest + total.log()).masked_fill_(nothing, -torch.inf), i0, i1)[..., 0]
    return out, lse


def _backward(
    call: _Call, saved: tuple[Tensor, ...], d_out: Tensor, d_lse: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v, out, lse = saved
    scale, term = call.terms.scale, call.term
    keys, values, first, second = call.keys(k), call.keys(v), call.scratch(), call.scratch()
    d_q = torch.zeros(q.shape, dtype=call.wide, device=q.device)
    d_keys, d_values = torch.zeros_like(keys), torch.zeros_like(values)
    # One more feature, 1 in K and in V, -L in Q and -D in dO, makes the products give S - L and dO V^T - D.
    keys_1, values_1 = pad(keys, (0, 1), value=1.0), pad(values, (0, 1), value=1.0)
    # A row with nothing to attend to has P = exp(S - L) = 0, for which L must not be -inf.
    lse = lse.masked_fill(lse == -torch.inf, torch.inf)[..., None]
    for i0, i1, tiles in call.rows():
        rows, towards = call.queries(q, i0, i1) * scale, call.queries(d_out, i0, i1)
        less, within = call.queries(lse, i0, i1), (towards * call.queries(out, i0, i1)).sum(-1, keepdim=True)
        if d_lse is not None:
            within = within - call.queries(d_lse[..., None], i0, i1)
        d_rows, rows_1 = torch.zeros_like(rows), torch.cat((rows, -less), -1)
        dropping = call.terms.dropout is not None  # then D is subtracted behind the factors
        towards_1 = torch.cat((towards, torch.zeros_like(within) if dropping else -within), -1)
        for tile in tiles:
            block, at = call.block(tile, q, k), call.columns(tile)
            weights = call.scores(call.room(first, tile), rows_1, keys_1[:, at], block).exp_()
            kept = call.factors(tile)
            dropped = weights if kept is None else (call.heads(weights, i0, i1) * kept).view_as(weights)
            d_values[:, at].baddbmm_(dropped.transpose(1, 2), towards)
            d_scores = torch.bmm(towards_1, values_1[:, at].transpose(1, 2), out=call.room(second, tile))
            if term.has_value_term:
                seen_by = call.heads(dropped, i0, i1)
                d_scores += term.collect_values(block, seen_by, call.heads(towards, i0, i1)).reshape(d_scores.shape)
            if kept is not None:
                call.heads(d_scores, i0, i1).mul_(kept)
                d_scores.sub_(within)
            d_scores.mul_(weights)
            d_rows.baddbmm_(d_scores, keys[:, at])
            d_keys[:, at].baddbmm_(d_scores.transpose(1, 2), rows)
            more_q, more_k = term.collect(block, call.heads(d_scores, i0, i1))
            if more_q is not None:
                d_q[:, :, i0:i1] += more_q
            if more_k is not None:
                d_keys.view(k.shape)[:, :, tile.j0 : tile.j1] += more_k
        d_q[:, :, i0:i1] += call.heads(d_rows.mul_(scale), i0, i1)
    return d_q.to(q.dtype), call.restored(d_keys, k), call.restored(d_values, v)


class _Tiled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, call: _Call, q: Tensor, k: Tensor, v: Tensor, *inputs: Tensor) -> tuple[Tensor, Tensor]:
        out, lse = _forward(call, q, k, v)
        ctx.call = call
        ctx.save_for_backward(q, k, v, out, lse, *inputs)  # the inputs too: a change in place is then noticed
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    def backward(ctx: Any, d_out: Tensor | None, d_lse: Tensor | None) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            # torch's once_differentiable lets a second derivative through that would silently be 0.
            raise RuntimeError("attention: the tiled back end has no second derivative; use backend='reference'")
        call, (q, k, v, out, lse, *_) = ctx.call, ctx.saved_tensors
        if d_out is None:
            d_out = torch.zeros_like(out)
        with torch.autocast(q.device.type, enabled=False):
            call.term.start()
            found = _backward(call, (q, k, v, out, lse), d_out, d_lse)
            return None, *found, *call.term.gradients()
