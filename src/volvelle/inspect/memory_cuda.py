"""A CUDA step, planned with fake CPU tensors.

On a CPU build of torch, fake CUDA tensors can end the process inside attention. So the plan keeps fake CPU tensors and
changes, call by call, what CUDA does otherwise: the operations that autocast keeps in fp32 there, fused attention with
dropout, optimisers in foreach form, blocks rounded to 512 bytes, cuBLAS's workspace. cuDNN's is not modelled.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map_only

GRAIN = 512  # the caching allocator rounds every request up to this
CUBLAS_WORKSPACE = 32 * 2**20  # torch's default for Hopper; 8.1 MiB on older cards

_F = torch.nn.functional
# In CUDA's fp32 list of autocast, not in the CPU's.
_WIDE = {
    _F.layer_norm,
    _F.group_norm,
    _F.softmax,
    _F.log_softmax,
    _F.cross_entropy,
    _F.nll_loss,
    torch.softmax,
    torch.log_softmax,
    torch.layer_norm,
    torch.pow,
    torch.rsqrt,
    torch.sum,
    torch.cumsum,
    Tensor.softmax,
    Tensor.log_softmax,
    Tensor.pow,
    Tensor.rsqrt,
    Tensor.sum,
    Tensor.cumsum,
}


class CudaForm(TorchFunctionMode):
    """Inside, functions behave in memory as their CUDA forms do."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Rewrite the call where CUDA differs."""
        kwargs = kwargs or {}
        if func is _F.scaled_dot_product_attention and kwargs.get("dropout_p"):
            kwargs = {**kwargs, "dropout_p": 0.0}  # flash attention draws dropout inside the kernel
        elif func in _WIDE and torch.is_autocast_enabled("cpu"):
            args, kwargs = (tree_map_only(Tensor, _widen, part) for part in (args, kwargs))
        return func(*args, **kwargs)


def _widen(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.dtype in (torch.bfloat16, torch.float16) else tensor
