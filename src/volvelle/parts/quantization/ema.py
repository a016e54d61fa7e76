"""Codes as running means of the vectors they stand for: van den Oord et al. 2017, appendix A.1; Razavi et al. 2019.

After every step, with n_k vectors z that had code k,

    N_k <- γ N_k + (1 - γ) n_k        m_k <- γ m_k + (1 - γ) Σ z        e_k = m_k / N_k

A code that stands for too few vectors is dead: nothing moves it any more. It begins anew as one of the latest vectors,
code and running sums together: with the old sums the next step would put it back where it was.

Several processes each see their own vectors. Their counts and sums are added before anything is computed from them, and
codes begin anew as vectors of the first process, so that all hold the same codes, bit for bit.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from volvelle.export import export
from volvelle.parts.quantization.vector_quantize import Quantized, Quantizer, vector_quantize


class RunningCodes(NamedTuple):
    """The codebook e (K, d), how many vectors each code stands for N (K), and their sums m (K, d)."""

    codebook: Tensor
    sizes: Tensor
    sums: Tensor


@export("functional.ema_codebook")
def ema_codebook(
    codebook: Tensor, sizes: Tensor, sums: Tensor, counts: Tensor, totals: Tensor, *, decay: float = 0.99
) -> RunningCodes:
    """One update of running means: N <- γ N + (1 - γ) n, m <- γ m + (1 - γ) Σ z, e = m / N.

    codebook and sums (K, d), sizes and counts (K), totals (K, d): the sum of the vectors that had each code. `decay` is
    γ. A code with N = 0 stays where it is. Raises ValueError for a decay outside [0, 1).

    van den Oord et al. 2017, equations 6 to 8 (appendix A.1).

    >>> one, two = torch.tensor([[0.0], [5.0]]), torch.tensor([[4.0], [0.0]])
    >>> ema_codebook(one, torch.tensor([1.0, 0.0]), one, torch.tensor([2.0, 0.0]), two, decay=0.5).codebook.tolist()
    [[1.3333333730697632], [5.0]]
    """
    if not 0 <= decay < 1:
        raise ValueError(f"ema_codebook: decay must lie in [0, 1), got {decay}")
    sizes = torch.lerp(counts.to(sizes.dtype), sizes, decay)
    sums = torch.lerp(totals.to(sums.dtype), sums, decay)
    known = sizes[:, None] > torch.finfo(sizes.dtype).tiny
    return RunningCodes(torch.where(known, sums / sizes[:, None].clamp_min(1e-30), codebook), sizes, sums)


class _Codes(nn.Module):
    """The running codes under the names of taming-transformers. Buffers: no optimiser moves them."""

    weight: Tensor
    cluster_size: Tensor
    embed_avg: Tensor
    seen: Tensor
    totals: Tensor
    recent: Tensor

    def __init__(self, codes: int, width: int, dtype: torch.dtype | None, device: torch.device | str | None):
        super().__init__()
        weight = torch.empty(codes, width, dtype=dtype, device=device).uniform_(-1 / codes, 1 / codes)
        self.register_buffer("weight", weight)
        self.register_buffer("cluster_size", weight.new_ones(codes))
        self.register_buffer("embed_avg", weight.clone())
        # What forward has seen since the last update; empty whenever a checkpoint is written.
        self.register_buffer("seen", weight.new_zeros(codes), persistent=False)
        self.register_buffer("totals", torch.zeros_like(weight), persistent=False)
        self.register_buffer("recent", weight.clone(), persistent=False)


@export("nn.EMAVectorQuantizer", twin=vector_quantize)
class EMAVectorQuantizer(Quantizer):
    """A codebook of running means, with dead codes that begin anew; forward gives `Quantized`.

    In training mode forward remembers what it saw, and `update()`, to be called after each step of the optimiser, moves
    the codes: gradient accumulation, a step that is left out, and many processes then need no special case. A code is
    dead when its N is below `least` times the mean. The loss is the commitment alone. Buffers are `embedding.weight`,
    `embedding.cluster_size` (N) and `embedding.embed_avg` (m), as in taming-transformers.

    >>> quantizer = EMAVectorQuantizer(8, 2, dim=-1)
    >>> _ = quantizer(torch.ones(32, 2))
    >>> _ = quantizer.update()
    >>> [round(float(size), 2) for size in quantizer.embedding.cluster_size.sort().values]  # they began at 1
    [0.99, 0.99, 0.99, 0.99, 0.99, 0.99, 0.99, 1.31]
    """

    embedding: _Codes
    numbers = ("commitment", "decay", "least")

    def __init__(
        self,
        codes: int,
        width: int,
        *,
        dim: int = 1,
        commitment: float = 0.25,
        decay: float = 0.99,
        least: float = 0.03,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ):
        super().__init__(codes, width, dim=dim, commitment=commitment)
        if not 0 <= decay < 1 or not 0 <= least < 1:
            raise ValueError(f"EMAVectorQuantizer: decay and least must lie in [0, 1), got {decay} and {least}")
        self.decay, self.least = decay, least
        self.embedding = _Codes(codes, width, dtype, device)

    def forward(self, z: Tensor) -> Quantized:
        """Quantize z, with `width` numbers along `dim`."""
        found = vector_quantize(z, self.embedding.weight, dim=self.dim, commitment=self.commitment, codebook_weight=0.0)
        if self.training:
            self._remember(z.detach().movedim(self.dim, -1).reshape(-1, z.shape[self.dim]), found.codes.reshape(-1))
        return found

    @torch.no_grad()
    def start_from(self, vectors: Tensor) -> None:
        """Take over (codes, width) vectors as the codes, each standing for one vector: first steps move them far."""
        held = self.embedding
        held.weight.copy_(vectors)
        held.cluster_size.fill_(1.0)
        held.embed_avg.copy_(vectors)
        held.seen.zero_()
        held.totals.zero_()

    @torch.no_grad()
    def _remember(self, vectors: Tensor, codes: Tensor) -> None:
        held = self.embedding
        vectors = vectors.to(held.weight.dtype)
        held.seen.index_add_(0, codes, torch.ones_like(codes, dtype=held.seen.dtype))
        held.totals.index_add_(0, codes, vectors)
        # As many of the latest as there are codes, at even distances: of every picture some.
        at = torch.arange(len(held.recent), device=codes.device) * len(vectors) // len(held.recent)
        if len(vectors):
            held.recent.copy_(vectors[at])

    @torch.no_grad()
    def update(self) -> int:
        """Move the codes to what forward has seen since the last update; gives how many dead ones began anew.

        A collective call: with a process group all processes make it together. Without anything seen nothing changes.
        """
        held, many = self.embedding, dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
        if many:
            seen = torch.cat([held.seen[:, None], held.totals], 1)
            dist.all_reduce(seen)
            held.seen.copy_(seen[:, 0])
            held.totals.copy_(seen[:, 1:])
        if not bool(held.seen.any()):
            return 0
        moved = ema_codebook(held.weight, held.cluster_size, held.embed_avg, held.seen, held.totals, decay=self.decay)
        dead = (moved.sizes < self.least * moved.sizes.mean()).nonzero()[:, 0]
        if len(dead):
            chosen = held.recent[torch.randint(len(held.recent), (len(dead),), device=dead.device)]
            if many:
                dist.broadcast(chosen, src=0)
            size = moved.sizes.mean()
            moved.codebook[dead], moved.sizes[dead], moved.sums[dead] = chosen, size, chosen * size
        for buffer, value in zip((held.weight, held.cluster_size, held.embed_avg), moved, strict=True):
            buffer.copy_(value)
        held.seen.zero_()
        held.totals.zero_()
        return len(dead)
