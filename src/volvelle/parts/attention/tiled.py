"""FlashAttention in plain PyTorch: tiles, an online softmax, and a backward pass that computes the scores again.

For a block of queries the tiles of scores S come one after the other; m is the largest score so far, l the sum of
exp(S - m), and O the sum of exp(S - m) V, all three rescaled by exp(m_old - m) when m grows (Dao et al. 2022,
algorithm 1; Milakov & Gimelshein 2018). Kept for the backward pass are only the output and L = m + log l: with
P = exp(S - L) and D = rowsum(dO * O), a tile gives (algorithm 4)
    dV += P^T dO,   dS = P * (dO V^T - D),   dQ += scale dS K,   dK += scale dS^T Q.
No (n_q, n_k) tensor ever exists, also not for the gradient of a bias, for dropout, for a window or for packed segments,
whose hidden tiles are not even computed. Sums run in a fixed order: the same inputs give the same bits.

Shapes: b batch, h query heads, h_kv key/value heads, g = h / h_kv, n_q queries, n_k keys, d and d_v features a head.
Inside, heads of a group lie below each other: B = b h_kv batches of R = g * queries rows.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from volvelle.parts.attention.spec import LSEBackend, Shape, Spec, Terms, only_once
from volvelle.parts.attention.tiled_terms import Term, make_term
from volvelle.parts.attention.tiles import Tile, seen, tile_rows, tile_side

MOST = 40.0
"""Scores up to this magnitude are exponentiated as they are."""


class Tiled(LSEBackend):
    """Memory linear in the number of keys for every call, in plain PyTorch; once differentiable.

    fp16 and bf16 are computed in fp32 and cast at the end.
    """

    name = "tiled"

    def supports(self, spec: Spec) -> str | None:
        """Serve everything that is differentiated once and backwards; in a traced graph not quite."""
        if spec.tangents or spec.order > 1:
            return "tiles have no second and no forward-mode derivative"
        if spec.traced and spec.dropout:
            return "the draws of a tile follow from a seed, which torch.compile cannot trace"
        if spec.traced and spec.order and spec.blockwise():
            return "the bias is differentiated tile by tile, which torch.compile cannot trace"
        return None

    def with_lse(self, q: Tensor, k: Tensor, v: Tensor, terms: Terms, shape: Shape) -> tuple[Tensor, Tensor]:
        """Return (b, h, n_q, d_v) and log Σ_j exp(score_ij), (b, h, n_q), -inf where no key is allowed."""
        # Half types are widened on purpose, which autocast would undo.
        with torch.autocast(q.device.type, enabled=False):
            wide = torch.promote_types(q.dtype, torch.float32)
            calls = []
            for i in range(shape.b if terms.by_row else 1):
                own, rows = (terms.row(i), slice(i, i + 1)) if terms.by_row else (terms, slice(None))
                sizes = shape._replace(b=1) if terms.by_row else shape
                term = make_term(own, q[rows], k[rows], sizes, wide)
                calls.append(_Call(own, sizes, term, wide, q.device))
            inputs = [x for call in calls for x in call.term.inputs]
            return _Tiled.apply(calls, q, k, v, *inputs)  # type: ignore[return-value]


class _Call:
    """What forward and backward share: the cut into tiles, and how a tile is made; for all rows of a batch or one."""

    def __init__(self, terms: Terms, shape: Shape, term: Term, wide: torch.dtype, device: torch.device):
        self.terms, self.shape, self.term, self.wide, self.device = terms, shape, term, wide, device
        self.side = tile_side(shape.b, shape.h, terms.causal, terms.window)
        mask = terms.mask
        self.mask = None if mask is None else mask.reshape((1,) * (4 - mask.dim()) + mask.shape)
        self.meetings = self._meetings()
        self.bands: dict[tuple[int, int, int], Tensor] = {}  # what causal order and window hide, by size and place

    def rows(self) -> Iterator[tuple[int, int, list[Tile]]]:
        """The blocks of queries, each with the tiles that are computed for it."""
        shape = self.shape
        for i0, i1, tiles in tile_rows(shape.n_q, shape.n_k, self.side, self.terms.causal, self.terms.window):
            if self.meetings is not None:
                some = self.meetings[0][i0 // self.side]
                tiles = [tile for tile in tiles if some[tile.j0 // self.side]]
            yield i0, i1, tiles

    def _meetings(self) -> tuple[list[list[bool]], list[list[bool]]] | None:
        """Tiles in which some, and in which all queries share a segment with a key; None where nobody can tell."""
        segments = self.terms.segments
        if segments is None or not self.shape.n_q or torch.compiler.is_compiling() or type(segments.keys) is not Tensor:
            return None
        some, every = segments.meetings(self.side)
        return some[0].tolist(), every[0].tolist()

    def keys(self, x: Tensor, ones: bool = False) -> list[Tensor]:
        """(b, h_kv, n_k, d) -> for each tile of keys (B, keys, d), widened, the keys as the tile lists them.

        With `ones` each key has one more feature, 1.
        """
        parts = (self._ordered(part.to(self.wide), -2).flatten(0, 1) for part in x.split(self.side, 2))
        return [pad(part, (0, 1), value=1.0) if ones else part for part in parts]

    def restore(self, parts: list[Tensor], whole: Tensor) -> None:
        """Undo `keys`, for gradients; takes the list apart, so that its memory goes as it is copied."""
        for part in whole.split(self.side, 2):
            part.copy_(self._ordered(parts.pop(0), -2).view(part.shape))

    def _ordered(self, x: Tensor, axis: int) -> Tensor:
        return x.flip(axis) if self.term.reversed_keys else x

    def queries(self, x: Tensor, i0: int, i1: int) -> Tensor:
        """(b, h, n_q, d) -> (B, R, d), the rows of a block of queries."""
        b, h, h_kv, _, _, _, _ = self.shape
        return x[:, :, i0:i1].to(self.wide).reshape(b * h_kv, h // h_kv * (i1 - i0), x.shape[-1])

    def heads(self, x: Tensor, i0: int, i1: int) -> Tensor:
        """(B, R, n) -> (b, h, queries, n): the same memory."""
        return x.view(self.shape.b, self.shape.h, i1 - i0, x.shape[-1])

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

    def scores(self, room: Tensor, rows: Tensor, columns: Tensor, tile: Tile) -> Tensor:
        """Fill `room` with rows @ columns^T + bias, -inf where hidden; rows come scaled."""
        added, view = self.term.tile(tile), self.heads(room, tile.i0, tile.i1)
        if added is None:
            torch.bmm(rows, columns.transpose(1, 2), out=room)
        else:
            view.copy_(added)
            room.baddbmm_(rows, columns.transpose(1, 2))
        hidden = self._hidden(tile)
        if hidden is not None:
            view.masked_fill_(hidden, -torch.inf)
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

    def _hidden(self, tile: Tile) -> Tensor | None:
        """What may not be attended to in a tile, broadcastable to (b, h, queries, keys), the keys as it lists them."""
        hidden = self._band(tile) if tile.partial else None
        for allowed in self._allowed(tile):
            less = self._ordered(~allowed, -1)
            hidden = less if hidden is None else hidden | less
        return hidden

    def _allowed(self, tile: Tile) -> Iterator[Tensor]:
        """What mask and segments say about the tile, where they say anything."""
        rows, columns = slice(tile.i0, tile.i1), slice(tile.j0, tile.j1)
        if self.mask is not None:
            one_row, one_column = (size == 1 for size in self.mask.shape[2:])
            yield self.mask[:, :, slice(None) if one_row else rows, slice(None) if one_column else columns]
        if self.terms.segments is not None:
            every = None if self.meetings is None else self.meetings[1][tile.i0 // self.side]
            if every is None or not every[tile.j0 // self.side]:
                yield self.terms.segments.same(rows, columns)

    def _band(self, tile: Tile) -> Tensor:
        """What causal order and window hide: the same in all tiles of one size that lie as far from the diagonal."""
        key = (tile.i1 - tile.i0, tile.j1 - tile.j0, tile.i0 - tile.j0)
        if key not in self.bands:
            shift = self.shape.n_k - self.shape.n_q
            allowed = seen(tile, shift, self.terms.causal, self.terms.window, self.device)
            self.bands[key] = self._ordered(~allowed, -1)
        return self.bands[key]

    def factors(self, tile: Tile) -> Tensor | None:
        """What dropout multiplies the weights of the tile by."""
        if self.terms.dropout is None:
            return None
        kept = self.terms.dropout.factors(tile, self.shape.b, self.shape.h, self.wide, self.device)
        return self._ordered(kept, -1)


def each_row(calls: list[_Call]) -> Iterator[tuple[_Call, slice]]:
    """Every call with the rows of the batch that it is for."""
    for i, call in enumerate(calls):
        yield call, slice(i, i + 1) if len(calls) > 1 else slice(None)


def _forward(call: _Call, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor) -> None:
    """Fill `out` and `lse`."""
    shape, scale, term = call.shape, call.terms.scale, call.term
    keys, values, scratch, bounded = call.keys(k), call.keys(v), call.scratch(), call.bounded(q, k)
    for i0, i1, tiles in call.rows():
        rows = call.queries(q, i0, i1) * scale
        largest = rows.new_full((*rows.shape[:2], 1), 0.0 if bounded else torch.finfo(call.wide).min)
        total, sums = torch.zeros_like(largest), rows.new_zeros(*rows.shape[:2], shape.d_v)
        for tile in tiles:
            at = tile.j0 // call.side
            weights = call.scores(call.room(scratch, tile), rows, keys[at], tile)
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
            sums.baddbmm_(weights, values[at])
            if term.has_value_term:
                call.heads(sums, i0, i1).add_(term.values(tile, call.heads(weights, i0, i1)))
        nothing = total == 0
        out[:, :, i0:i1] = call.heads(sums.div_(total.masked_fill(nothing, 1)), i0, i1)
        lse[:, :, i0:i1] = call.heads((largest + total.log()).masked_fill_(nothing, -torch.inf), i0, i1)[..., 0]


def _backward(
    call: _Call, saved: list[Tensor], d_out: Tensor, d_lse: Tensor | None, d_q: Tensor
) -> tuple[list[Tensor], list[Tensor], list[Tensor | None]]:
    """Fill `d_q`; return the gradients of keys and values by tile, as `restore` takes them, and those of the term."""
    q, k, v, out, lse = saved
    scale, term, sums = call.terms.scale, call.term, call.term.start()
    first, second = call.scratch(), call.scratch()
    # One more feature, 1 in K and in V, -L in Q and -D in dO, makes the products give S - L and dO V^T - D.
    keys, keys_1, values_1 = call.keys(k), call.keys(k, ones=True), call.keys(v, ones=True)
    d_keys, d_values = ([torch.zeros_like(x[..., :-1]) for x in parts] for parts in (keys_1, values_1))
    # A row with nothing to attend to has P = exp(S - L) = 0, for which L must not be -inf.
    lse = lse.masked_fill(lse == -torch.inf, torch.inf)[..., None]
    for i0, i1, tiles in call.rows():
        rows, towards = call.queries(q, i0, i1) * scale, call.queries(d_out, i0, i1)
        less, within = call.queries(lse, i0, i1), (towards * call.queries(out, i0, i1)).sum(-1, keepdim=True)
        if d_lse is not None:
            within = within - call.queries(d_lse[..., None], i0, i1)
        d_rows, more, rows_1 = torch.zeros_like(rows), None, torch.cat((rows, -less), -1)
        dropping = call.terms.dropout is not None  # then D is subtracted behind the factors
        towards_1 = torch.cat((towards, torch.zeros_like(within) if dropping else -within), -1)
        for tile in tiles:
            at = tile.j0 // call.side
            weights = call.scores(call.room(first, tile), rows_1, keys_1[at], tile).exp_()
            kept = call.factors(tile)
            dropped = weights if kept is None else (call.heads(weights, i0, i1) * kept).view_as(weights)
            d_values[at].baddbmm_(dropped.transpose(1, 2), towards)
            d_scores = torch.bmm(towards_1, values_1[at].transpose(1, 2), out=call.room(second, tile))
            if term.has_value_term:
                seen_by = call.heads(dropped, i0, i1)
                d_scores += term.collect_values(sums, tile, seen_by, call.heads(towards, i0, i1)).reshape(
                    d_scores.shape
                )
            if kept is not None:
                call.heads(d_scores, i0, i1).mul_(kept)
                d_scores.sub_(within)
            d_scores.mul_(weights)
            d_rows.baddbmm_(d_scores, keys[at])
            d_keys[at].baddbmm_(d_scores.transpose(1, 2), rows)
            more_q, more_k = term.collect(sums, tile, call.heads(d_scores, i0, i1))
            if more_q is not None:
                more = more_q if more is None else more + more_q
            if more_k is not None:
                d_keys[at].view(more_k.shape).add_(more_k)
        d_block = call.heads(d_rows.mul_(scale), i0, i1)
        d_q[:, :, i0:i1] = d_block if more is None else d_block.add_(more)
    return d_keys, d_values, term.gradients(sums)


class _Tiled(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, calls: list[_Call], q: Tensor, k: Tensor, v: Tensor, *inputs: Tensor
    ) -> tuple[Tensor, Tensor]:
        out = q.new_empty(*q.shape[:3], v.shape[3])
        lse = torch.empty(q.shape[:3], dtype=calls[0].wide, device=q.device)
        for call, rows in each_row(calls):
            _forward(call, *(x[rows] for x in (q, k, v, out, lse)))
        ctx.calls = calls
        ctx.save_for_backward(q, k, v, out, lse, *inputs)  # the inputs too: a change in place is then noticed
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    def backward(ctx: Any, d_out: Tensor | None, d_lse: Tensor | None) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            # torch's once_differentiable lets a second derivative through that would silently be 0.
            raise only_once("tiled")
        saved = ctx.saved_tensors[:5]
        q, k, v, out, _ = saved
        d_out = torch.zeros_like(out) if d_out is None else d_out
        d_q, parts = torch.empty(q.shape, dtype=q.dtype, device=q.device), []
        with torch.autocast(q.device.type, enabled=False):
            for call, rows in each_row(ctx.calls):
                towards = d_out[rows], None if d_lse is None else d_lse[rows]
                parts.append(_backward(call, [x[rows] for x in saved], *towards, d_q[rows]))
            found = []
            for i, x in ((0, k), (1, v)):  # one after the other: what is copied is let go
                found.append(torch.empty(x.shape, dtype=x.dtype, device=x.device))
                for (call, rows), part in zip(each_row(ctx.calls), parts, strict=True):
                    call.restore(part[i], found[i][rows])
        return None, d_q, *found, *(x for part in parts for x in part[2])
