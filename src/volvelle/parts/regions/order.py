"""Orders in which equals stay as they came."""

from __future__ import annotations

import torch
from torch import Tensor


def stable_order(keys: Tensor, *, descending: bool = False) -> Tensor:
    """Return the places of keys (..., n) from the lowest to the highest, or the other way; equals stay as they came.

    >>> stable_order(torch.tensor([2.0, 1.0, 2.0, 1.0])), stable_order(torch.tensor([2.0, 1.0, 2.0]), descending=True)
    (tensor([1, 3, 0, 2]), tensor([0, 2, 1]))
    """
    if torch.onnx.is_in_onnx_export():  # ONNX sorts by TopK alone, which puts the lower place first among equals
        wide = keys if keys.is_floating_point() or keys.dtype == torch.int64 else keys.int()
        return wide.topk(keys.shape[-1], largest=descending).indices
    return keys.sort(stable=True, descending=descending).indices
