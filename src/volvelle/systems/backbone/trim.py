"""A backbone without what classifies: for systems that stand on its maps."""

from __future__ import annotations

import torch

from volvelle.systems.backbone.model import Backbone


def without_classifier(encoder: Backbone) -> Backbone:
    """Take away the layers that features do not pass through, so that nothing is stored or trained in vain."""
    used = set[str]()
    hooks = [
        child.register_forward_pre_hook(lambda _, __, name=name: used.add(name.split(".")[0]))
        for name, child in encoder.named_modules()
        if name
    ]
    training = encoder.training
    try:
        with torch.no_grad():
            parameter = next(encoder.parameters())
            encoder.eval().features(torch.zeros(1, 3, 64, 64, dtype=parameter.dtype, device=parameter.device))
    finally:
        encoder.train(training)
        for hook in hooks:
            hook.remove()
    for name, child in list(encoder.named_children()):
        if name not in used and any(True for _ in child.parameters()):
            delattr(encoder, name)
    return encoder
