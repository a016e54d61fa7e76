"""torch's FlexAttention as a back end: score and mask functions inside one generated kernel.

Dong et al. 2024, "Flex Attention: A Programming Model for Generating Optimized Attention Kernels". A bias becomes a
score_mod, a look-up of one number a score; mask, causal order, window and segments become a mask_mod, together with a
table of the blocks of 128 x 128 scores in which anything, or everything, may attend. That table is worked out block by
block, so no (n_q, n_k) tensor is made for it. On the CPU torch has a forward pass only.

The kernel is generated where torch can do it: a C++ compiler and Python's headers on the CPU, Triton on CUDA; the first
call of a kind then takes seconds. Elsewhere torch computes all scores at once, which `explain` says. Measured against
SDPA on a CPU it is faster only where whole blocks are hidden, and slower with a bias, so `auto` never takes it.

Shapes: b batch, h query heads, h_kv key/value heads, n_q queries, n_k keys, d and d_v features a head.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import shutil
import sysconfig
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.functional import pad

from volvelle.parts.attention.spec import Shape, Spec, Terms
from volvelle.parts.attention.tiles import reach
from volvelle.parts.position.encoding import Bias, DistanceBias

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

BLOCK = 128
"""Queries, and keys, of a block in the table of what may attend: torch's own choice."""
NARROWEST = 16
"""Features a head that the kernel for CUDA wants at least."""
KINDS = 256
"""Kernels that one process may generate; torch's own limit of 8 would then silently stop generating any."""

Index = Tensor
MaskMod = Callable[[Index, Index, Index, Index], Tensor]
ScoreMod = Callable[[Tensor, Index, Index, Index, Index], Tensor]


class Flex:
    """torch's FlexAttention, compiled where that is possible."""

    name = "flex"

    def supports(self, spec: Spec) -> str | None:
        """Serve what can be said score by score; on the CPU without gradients."""
        if spec.device not in {"cpu", "cuda"}:
            return f"FlexAttention does not run on {spec.device}"
        if spec.tangents or spec.order > 1:
            return "FlexAttention has no second and no forward-mode derivative"
        if spec.device == "cpu" and spec.order:
            return "FlexAttention has no backward pass on the CPU"
        if spec.dropout:
            return "FlexAttention has no dropout"
        if spec.value_term:
            return "the bias adds a value term, which FlexAttention does not have"
        if spec.computed_bias:
            return "the bias is computed from q and k, of which a score function sees only the score"
        if spec.device == "cuda" and min(spec.shape.d, spec.shape.d_v) < NARROWEST:
            return f"FlexAttention wants at least {NARROWEST} features a head on CUDA"
        if not (spec.shape.b and spec.shape.n_q):
            return "FlexAttention wants at least one query"
        return None

    def remark(self, spec: Spec) -> str:
        """Return whether the kernel is generated, and if not, why not."""
        reason = uncompiled(spec.device, spec.dtype, spec.lse)
        return "in a generated kernel" if reason is None else f"not compiled, all scores at once: {reason}"

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, terms: Terms, shape: Shape) -> Tensor:
        """Return (b, h, n_q, d_v)."""
        return _run(q, k, v, terms, shape, lse=False)[0]

    def with_lse(self, q: Tensor, k: Tensor, v: Tensor, terms: Terms, shape: Shape) -> tuple[Tensor, Tensor]:
        """Return (b, h, n_q, d_v) and log Σ_j exp(score_ij), (b, h, n_q), -inf where no key is allowed."""
        out, lse = _run(q, k, v, terms, shape, lse=True)
        assert lse is not None
        return out, lse


def uncompiled(device: str, dtype: torch.dtype, lse: bool) -> str | None:
    """Return why torch generates no kernel for such a call, or None where it does."""
    if dtype == torch.float64:
        return "the kernel has no fp64"
    if device == "cpu":
        return "the kernel for CPUs does not give the log-sum-exp" if lse else _no_compiler()
    return None if importlib.util.find_spec("triton") else "triton is not installed"


@functools.cache
def _no_compiler() -> str | None:
    if torch.backends.cpu.get_cpu_capability() in {"DEFAULT", "NO AVX"}:
        return "the kernel needs a CPU with AVX2"
    names = [os.environ.get("CXX"), "g++", "clang++", "cl"]
    if not any(name and shutil.which(name) for name in names):
        return "there is no C++ compiler (g++, clang++ or what CXX names)"
    if not (Path(sysconfig.get_paths()["include"]) / "Python.h").is_file():
        return "Python's headers are not installed"
    return None


@functools.cache
def _compiled() -> Callable[..., Any]:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, fullgraph=True)


def _run(q: Tensor, k: Tensor, v: Tensor, terms: Terms, shape: Shape, *, lse: bool) -> tuple[Tensor, Tensor | None]:
    # Imported with the first call: the module brings torch's compiler along.
    from torch._dynamo import config
    from torch.nn.attention.flex_attention import AuxRequest, flex_attention

    device = q.device
    if device.type == "cpu":  # nobody asks for gradients, but torch refuses tensors that could have some
        q, k, v = q.detach(), k.detach(), v.detach()
    with torch.autocast(device.type, enabled=False):
        mask_mod = _mask_mod(terms, shape, device)
        options: dict[str, Any] = {
            "score_mod": _score_mod(terms, q, k),
            "block_mask": None if mask_mod is None else _block_mask(terms, shape, mask_mod, device),
            "scale": terms.scale,
            "enable_gqa": shape.h != shape.h_kv,
            "return_aux": AuxRequest(lse=True) if lse else None,
        }
        if torch.compiler.is_compiling():  # the caller's graph takes it in
            found = flex_attention(q, k, v, **options)
        elif uncompiled(device.type, q.dtype, lse) is None:
            with config.patch(recompile_limit=KINDS):
                found = _compiled()(q, k, v, **options)
        else:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "flex_attention called without torch.compile")  # `explain` says it
                found = flex_attention(q, k, v, **options)
    return (found[0], found[1].lse) if lse else (found, None)


def _score_mod(terms: Terms, q: Tensor, k: Tensor) -> ScoreMod | None:
    """The bias as a function of one score; None where there is none."""
    bias = terms.bias
    if bias is None:
        return None
    if isinstance(bias, DistanceBias):
        return _by_distance(bias, terms, q, k)
    assert not isinstance(bias, Bias)
    whole = bias.detach() if q.device.type == "cpu" else bias
    find = _lookup(whole.reshape((1,) * (4 - whole.dim()) + whole.shape))
    return lambda score, b, h, i, j: score + find(b, h, i, j)


def _by_distance(bias: DistanceBias, terms: Terms, q: Tensor, k: Tensor) -> ScoreMod:
    """A number for every distance that occurs, looked up by the distance or by the positions."""
    wide = torch.promote_types(q.dtype, torch.float32)
    if terms.q_positions is None and terms.k_positions is None:
        numbers = bias.at(torch.arange(1 - q.shape[2], k.shape[2], device=q.device), wide)
        find, last = _by_number(_on(q, numbers)), _number(k.shape[2] - 1, q.device)
        return lambda score, b, h, i, j: score + find(h, i - j + last)
    q_positions, k_positions = terms.positions(q, k)
    lowest = int(q_positions.min() - k_positions.max())
    numbers = bias.at(torch.arange(lowest, int(q_positions.max() - k_positions.min()) + 1, device=q.device), wide)
    find, first = _by_number(_on(q, numbers)), _number(lowest, q.device)
    of_query, of_key = (_lookup(x if x.dim() == 2 else x[None]) for x in (q_positions, k_positions))
    return lambda score, b, h, i, j: score + find(h, of_query(b, i) - of_key(b, j) - first)


def _on(q: Tensor, x: Tensor) -> Tensor:
    return x.detach() if q.device.type == "cpu" else x


def _by_number(numbers: Tensor) -> Callable[..., Tensor]:
    """`_lookup` of numbers (h, distances), in a table whose width is a power of two and part of the kernel.

    A width that the kernel reads may get the name of one of its own variables with a digit behind it, which torch's
    code for CPUs mistakes for that variable; and few widths make few kernels. Nothing reads what is added.
    """
    width = numbers.shape[-1]
    return _lookup(F.pad(numbers, (0, (1 << (width - 1).bit_length()) - width)), static=True)


def _mask_mod(terms: Terms, shape: Shape, device: torch.device) -> MaskMod | None:
    """All that hides keys as one function; None where nothing does."""
    from torch.nn.attention.flex_attention import and_masks

    mods: list[MaskMod] = []
    left, right = reach(terms.causal, terms.window)
    shift = shape.n_k - shape.n_q  # the place of query i among the keys is i + shift
    if left is not None:
        farthest = _number(shift - left, device)
        mods.append(lambda b, h, i, j: j - i >= farthest)
    if right is not None:
        nearest = _number(shift + right, device)
        mods.append(lambda b, h, i, j: j - i <= nearest)
    if terms.mask is not None:
        mods.append(_lookup(terms.mask.reshape((1,) * (4 - terms.mask.dim()) + terms.mask.shape)))
    if terms.segments is not None:
        of_query, of_key = (_lookup(x) for x in terms.segments)
        mods.append(lambda b, h, i, j: of_query(b, i) == of_key(b, j))
    return and_masks(*mods) if mods else None


def _number(x: int, device: torch.device) -> Tensor:
    """A number that a kernel reads, so that another one does not need another kernel."""
    return torch.full((), x, device=device)


def _lookup(x: Tensor, *, static: bool = False) -> Callable[..., Tensor]:
    """Return x as a function of its indices; what has size 1 is the same for all. `static`: its sizes make a kernel."""
    used = [axis for axis, size in enumerate(x.shape) if size != 1]
    table = x.squeeze()
    if static and not torch.compiler.is_compiling():
        torch._dynamo.mark_static(table)
    if not used:
        return lambda *indices: table
    return lambda *indices: table[tuple(indices[axis] for axis in used)]


def _block_mask(terms: Terms, shape: Shape, mask_mod: MaskMod, device: torch.device) -> BlockMask:
    """The blocks that some pair, and those that every pair of query and key lets through."""
    from torch.nn.attention.flex_attention import BlockMask

    some, every = _blocks(terms, shape, device)
    partial, full = some & ~every, some & every
    return BlockMask.from_kv_blocks(
        *_listed(partial), *_listed(full), BLOCK_SIZE=BLOCK, mask_mod=mask_mod, seq_lengths=(shape.n_q, shape.n_k)
    )


def _blocks(terms: Terms, shape: Shape, device: torch.device) -> tuple[Tensor, Tensor]:
    """(b or 1, h or 1, blocks of queries, blocks of keys): may any pair attend, may all."""
    starts = [torch.arange(0, n, BLOCK, device=device) for n in (shape.n_q, shape.n_k)]
    ends = [(start + BLOCK - 1).clamp(max=n - 1) for start, n in zip(starts, (shape.n_q, shape.n_k), strict=True)]
    # A ragged block is never taken for a whole one, as in torch's own tables.
    whole = [end - start == BLOCK - 1 for start, end in zip(starts, ends, strict=True)]
    every = whole[0][:, None] & whole[1]
    some = torch.ones_like(every)
    shift = shape.n_k - shape.n_q
    (first_i, first_j), (last_i, last_j) = starts, ends
    first_i, last_i = first_i[:, None] + shift, last_i[:, None] + shift
    left, right = reach(terms.causal, terms.window)
    if left is not None:
        some, every = some & (last_j >= first_i - left), every & (first_j >= last_i - left)
    if right is not None:
        some, every = some & (first_j <= last_i + right), every & (last_j <= first_i + right)
    some, every = some[None, None], every[None, None]
    if terms.segments is not None:
        meet, same = terms.segments.meetings(BLOCK)
        some, every = some & meet[:, None], every & same[:, None]
    if terms.mask is not None:
        mask = terms.mask.reshape((1,) * (4 - terms.mask.dim()) + terms.mask.shape)
        some, every = some & _pooled(mask, False).any((3, 5)), every & _pooled(mask, True).all((3, 5))
    return some, every


def _pooled(mask: Tensor, beyond: bool) -> Tensor:
    """(b, h, n_q, n_k) -> (b, h, blocks, BLOCK, blocks, BLOCK), `beyond` behind the end; a size of 1 stays 1."""
    missing = [0 if n == 1 else -n % BLOCK for n in mask.shape[2:]]
    padded = pad(mask, (0, missing[1], 0, missing[0]), value=beyond)
    sizes = [size for n in padded.shape[2:] for size in ((1, 1) if n == 1 else (n // BLOCK, BLOCK))]
    return padded.view(*padded.shape[:2], *sizes)


def _listed(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """How many blocks of keys each block of queries has, and which, those first."""
    order = torch.argsort(blocks.int(), dim=-1, descending=True, stable=True)
    return blocks.sum(-1).int(), order.int()
