"""FlashAttention-2 in Triton as a back end: masks, windows, learnable biases and dropout inside the kernel, on CUDA.

Scores live in tiles on the chip; the backward pass computes them again (Dao 2023, "FlashAttention-2"). A bias by
distance is read, and its gradient summed, as one number a diagonal. No atomics: the same inputs give the same bits.
The kernels lie in triton_forward.py, triton_backward.py and triton_bias.py; this file holds what torch sees of them:
two custom operators with shapes known to torch.compile and torch.export, and the table's entry. Triton is imported with
the first call. The kernels have been run in Triton's interpreter (TRITON_INTERPRET=1, on the CPU) and compiled for
sm_80 and sm_90; on a device they have not been measured.

Shapes: b batch, h query heads, h_kv key/value heads, n_q queries, n_k keys, d and d_v features a head.
"""

from __future__ import annotations

import importlib.util
import os
from typing import Any

import torch
from torch import Tensor

from volvelle.parts.attention.spec import LSEBackend, Shape, Spec, Terms, only_once
from volvelle.parts.attention.tiles import reach

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
"""Whether kernels run in Triton's interpreter, on tensors of the CPU. Triton reads it once, hence a constant."""
INSTALLED = importlib.util.find_spec("triton") is not None
WIDEST = 256
"""Features a head whose tiles still fit on the chip."""


class Triton(LSEBackend):
    """Fused kernels for CUDA, once differentiable; fp16 and bf16 are multiplied as they are and summed in fp32.

    fp32 is multiplied in full, or as TF32 where `torch.backends.cuda.matmul.allow_tf32` says so. Dropout draws by a
    rule of its own from the call's seed: other weights are dropped than in the tiled back end, as many, and the same
    ones for any block size and on any device.
    """

    name = "triton"

    def supports(self, spec: Spec) -> str | None:
        """Serve CUDA tensors of 16 and 32 bits with a bias that is a tensor or one number a diagonal."""
        if spec.device != "cuda" and not INTERPRETED:
            return f"the kernels run on CUDA devices, not on {spec.device} (TRITON_INTERPRET=1 interprets them, slowly)"
        if not INSTALLED:
            return "triton is not installed (pip install triton)"
        if spec.dtype not in {torch.float32, torch.float16, torch.bfloat16}:
            return f"the kernels compute in fp32, in which {str(spec.dtype).removeprefix('torch.')} would lose digits"
        if max(spec.shape.d, spec.shape.d_v) > WIDEST:
            return f"heads wider than {WIDEST} features do not fit on the chip"
        if spec.value_term:
            return "the bias adds a value term, which the kernels do not have"
        if spec.tangents or spec.order > 1:
            return "the kernels have no second and no forward-mode derivative"
        if spec.traced and spec.dropout:
            return "the draws follow from a seed, which torch.compile would make a constant"
        if spec.blockwise():  # last: the answer may read the positions, for which a device has to stop
            return "the bias must be asked block by block, and the kernels read a tensor or one number a diagonal"
        return None

    def with_lse(self, q: Tensor, k: Tensor, v: Tensor, terms: Terms, shape: Shape) -> tuple[Tensor, Tensor]:
        """Return (b, h, n_q, d_v) and log Σ_j exp(score_ij), (b, h, n_q) in fp32, -inf where no key is allowed."""
        with torch.autocast(q.device.type, enabled=False):
            numbers = terms.diagonals(q, k, torch.float32)
            bias = terms.whole_bias(q, k) if numbers is None else None
            left, right = reach(terms.causal, terms.window)
            p, seed = (0.0, 0) if terms.dropout is None else terms.dropout
            packed = (None, None) if terms.segments is None else terms.segments
            return triton_attention(
                q, k, v, terms.mask, bias, numbers, *packed,
                left=left, right=right, scale=terms.scale, dropout=p, seed=seed,
            )  # fmt: skip


@torch.library.custom_op("volvelle::triton_attention", mutates_args=())
def triton_attention(  # noqa: PLR0917 - torch takes tensors by place only
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, bias: Tensor | None, numbers: Tensor | None,
    q_segments: Tensor | None, k_segments: Tensor | None,
    *, left: int | None, right: int | None, scale: float, dropout: float, seed: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Attention with log-sum-exp. `numbers` (h or 1, n_q + n_k - 1): the bias of each diagonal, lowest i - j first."""
    from volvelle.parts.attention import triton_launch

    added = triton_launch.Added(mask, bias, numbers, q_segments, k_segments)
    return triton_launch.forward(q, k, v, added, triton_launch.Options(left, right, scale, dropout, seed))


@triton_attention.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, *_: object, **__: object) -> tuple[Tensor, Tensor]:
    return q.new_empty(*q.shape[:3], v.shape[-1]), q.new_empty(q.shape[:3], dtype=torch.float32)


@torch.library.custom_op("volvelle::triton_attention_backward", mutates_args=())
def triton_attention_backward(  # noqa: PLR0917 - torch takes tensors by place only
    d_out: Tensor, d_lse: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor,
    mask: Tensor | None, bias: Tensor | None, numbers: Tensor | None, q_segments: Tensor | None,
    k_segments: Tensor | None,
    *, bias_too: bool, left: int | None, right: int | None, scale: float, dropout: float, seed: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of q, k, v, and of bias or numbers where `bias_too`; otherwise the last is empty."""
    from volvelle.parts.attention import triton_launch

    saved = triton_launch.Saved(d_out, d_lse, q, k, v, out, lse)
    added = triton_launch.Added(mask, bias, numbers, q_segments, k_segments)
    options = triton_launch.Options(left, right, scale, dropout, seed)
    d_q, d_k, d_v, d_bias = triton_launch.backward(saved, added, options, bias_too)
    return d_q, d_k, d_v, q.new_empty(0) if d_bias is None else d_bias


@triton_attention_backward.register_fake
def _(  # noqa: PLR0917
    d_out: Tensor, d_lse: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor,
    mask: Tensor | None, bias: Tensor | None, numbers: Tensor | None, *_: object, bias_too: bool, **__: object,
) -> tuple[Tensor, ...]:  # fmt: skip
    either = bias if numbers is None else numbers
    d_bias = either.new_empty(either.shape) if bias_too and either is not None else q.new_empty(0)
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape), d_bias


def _keep(ctx: Any, inputs: tuple, keyword_only_inputs: dict[str, Any], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs, *output)
    ctx.options = keyword_only_inputs


def _differentiate(ctx: Any, d_out: Tensor, d_lse: Tensor) -> tuple[Tensor | None, ...]:
    if torch.is_grad_enabled():
        raise only_once("triton")
    q, k, v, mask, bias, numbers, q_segments, k_segments, out, lse = ctx.saved_tensors
    for_bias, for_numbers = ctx.needs_input_grad[4:6]
    d_q, d_k, d_v, d_bias = triton_attention_backward(
        d_out, d_lse, q, k, v, out, lse, mask, bias, numbers, q_segments, k_segments,
        bias_too=for_bias or for_numbers, **ctx.options,
    )  # fmt: skip
    return d_q, d_k, d_v, None, d_bias if for_bias else None, d_bias if for_numbers else None, None, None


triton_attention.register_autograd(_differentiate, setup_context=_keep)
