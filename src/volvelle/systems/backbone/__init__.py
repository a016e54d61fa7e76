"""Image classifiers with features for dense use: EfficientNet, MobileNetV2, ResNet, ShuffleNetV2, SNet, Inception v1.

Importing this package, or its `config` and `names`, does not import torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from volvelle.lazy import lazy

if TYPE_CHECKING:
    from volvelle.systems.backbone.folding import fold as fold
    from volvelle.systems.backbone.folding import unfold as unfold
    from volvelle.systems.backbone.load import backbone as backbone
    from volvelle.systems.backbone.load import efficientnet as efficientnet
    from volvelle.systems.backbone.load import read_backbone as read_backbone
    from volvelle.systems.backbone.load import write_backbone as write_backbone
    from volvelle.systems.backbone.model import Backbone as Backbone
    from volvelle.systems.backbone.names import CONFIGS as CONFIGS
    from volvelle.systems.backbone.scaling import compound as compound
    from volvelle.systems.backbone.scaling import scale as scale

_HOMES = {
    "compound": "scaling",
    "scale": "scaling",
    "fold": "folding",
    "unfold": "folding",
    "backbone": "load",
    "efficientnet": "load",
    "read_backbone": "load",
    "write_backbone": "load",
    "Backbone": "model",
    "CONFIGS": "names",
}

__getattr__, __dir__ = lazy(__name__, _HOMES)
