"""Which weights a module has: a short name for them that outlives the process, and a mark that changes as they do."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Hashable

import torch
from torch import nn

SAMPLES = 64
"""Numbers of each tensor that are looked at, at least, where it has so many. Training moves nearly all of them."""


def fingerprint(module: nn.Module) -> str:
    """16 letters of the names, shapes and some numbers of a module's weights: other weights have other ones.

    Milliseconds for any module, since few numbers are read; the same on every device.

    >>> layer = nn.Linear(300, 200)
    >>> before = fingerprint(layer)
    >>> _ = nn.init.normal_(layer.weight)
    >>> before == fingerprint(layer), len(before)
    (False, 16)
    """
    tensors = {name: x.detach() for name, x in module.state_dict().items() if x.is_floating_point()}
    facts = json.dumps([(name, list(x.shape)) for name, x in tensors.items()])
    some = [x.flatten()[:: max(1, x.numel() // SAMPLES)].float() for x in tensors.values()]
    values = torch.cat(some).cpu().numpy().tobytes() if some else b""
    return hashlib.sha256(facts.encode() + values).hexdigest()[:16]


def mark(*modules: nn.Module) -> Hashable:
    """What is another one as soon as a tensor of the modules is written to or replaced; for this process only."""
    tensors = [x for module in modules for x in (*module.parameters(), *module.buffers())]
    # Tensors made in inference mode do not count how often they were written to.
    return tuple((x.data_ptr(), x.dtype, 0 if x.is_inference() else x._version) for x in tensors)
