"""Deformable detectors: Dai et al. 2017, "Deformable Convolutional Networks".

Convolutions whose taps move by offsets that a convolution of the same map predicts (section 2.1). The predictors start
at zero, so that a detector answers at first as it did before, whatever its weights.
"""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor, nn

from volvelle.errors import UsageError
from volvelle.parts.convolution.atrous import AtrousConv2d
from volvelle.parts.convolution.conv2d_same import Conv2dSame
from volvelle.parts.convolution.deformable import deform_conv2d
from volvelle.systems.detection.heads import FullyConnected, PositionSensitive
from volvelle.systems.detection.model import Detector
from volvelle.systems.detection.pools import DeformedPool, PositionSensitiveAlign


class DeformedConv2d(nn.Module):
    """A convolution of which every tap moves, at every place, by what `offset` says (Dai et al. 2017, equation 2).

    `conv` keeps the weights, with their names; `offset` is a 3 x 3 convolution with two numbers a tap, zero at first.
    """

    def __init__(self, conv: nn.Conv2d):
        super().__init__()
        self.conv = conv
        taps = conv.kernel_size[0] * conv.kernel_size[1]
        self.offset = AtrousConv2d(
            conv.in_channels, 2 * taps, 3, stride=conv.stride, dilation=conv.dilation,
            device=conv.weight.device, dtype=conv.weight.dtype,
        )  # fmt: skip
        for parameter in self.offset.parameters():
            nn.init.zeros_(parameter)

    def forward(self, x: Tensor) -> Tensor:
        """Map x (b, c, y, x) to what `conv` would give where the offsets are zero."""
        c = self.conv
        assert not isinstance(c.padding, str)
        return deform_conv2d(
            x, self.offset(x), c.weight, c.bias, stride=c.stride, padding=c.padding, dilation=c.dilation
        )


def deformify(model: Detector, convolutions: int = 3) -> Detector:
    """Make the backbone's last `convolutions` deformable, and position-sensitive pooling too; in place.

    Those are the last ones of stride 1 that are larger than 1 x 1: with 3 the whole last stage of a ResNet, as in the
    paper. What the detector answers stays the same, up to rounding, until it is trained. Raises UsageError for a
    detector that is deformable already or has fewer such convolutions.

    >>> from volvelle.systems.detection import thundernet
    >>> deformify(thundernet("snet49", 3)).config.deformable
    3
    """
    if any(isinstance(module, DeformedConv2d) for module in model.modules()):
        raise UsageError("deformify: this detector is deformable already")
    found = [name for name, module in model.backbone.named_modules() if _can_deform(module)]
    if not 1 <= convolutions <= len(found):
        name = type(model.backbone).__name__
        raise UsageError(f"deformify: {name} has {len(found)} such convolutions, asked for {convolutions}")
    for name in found[-convolutions:]:
        layer = model.backbone.get_submodule(name)
        assert isinstance(layer, nn.Conv2d)
        model.backbone.set_submodule(name, DeformedConv2d(layer))
    scorer = model.roi_head.scorer
    if isinstance(scorer, FullyConnected | PositionSensitive) and isinstance(scorer.pool, PositionSensitiveAlign):
        like = next(scorer.parameters())
        scorer.pool = DeformedPool(scorer.pool, scorer.channels, device=like.device, dtype=like.dtype)
    if model.composed:
        model.config = replace(model.config, deformable=convolutions)
    return model


def _can_deform(module: nn.Module) -> bool:
    if not isinstance(module, nn.Conv2d) or isinstance(module, Conv2dSame):
        return False
    return max(module.kernel_size) > 1 and set(module.stride) == {1} and not isinstance(module.padding, str)
