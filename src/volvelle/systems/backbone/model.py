"""What every backbone is: features at four strides for dense use, a classifier on top, the facts of its pictures."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from volvelle.data.images_prepare import Preprocessing
from volvelle.errors import UsageError
from volvelle.systems.backbone.config import STRIDES, AnyConfig, OutputStride


class Backbone(nn.Module):
    """An image classifier whose inner features can be used.

    `features(x)` gives four maps; `channels` and `strides` say what they are: (4, 8, 16, 32), or with an output stride
    of 16 or 8 (4, 8, 16, 16) and (4, 8, 8, 8): later stages are then dilated in place of strided, with the weights they
    had. `forward(x)` gives logits (b, classes). `classes` are the names of the outputs, in order.

    Subclasses build their layers, give `stages` and `head`, and name the classifier's layer.
    """

    classifier_name = "classifier"
    """The layer that gives the logits."""

    def __init__(self, config: AnyConfig, channels: Sequence[int], output_stride: OutputStride):
        super().__init__()
        if output_stride not in (8, 16, 32):
            raise UsageError(f"output_stride={output_stride}: must be 8, 16 or 32")
        self.config = config
        self.channels: tuple[int, ...] = tuple(channels)
        self.strides: tuple[int, ...] = tuple(min(stride, output_stride) for stride in STRIDES)
        self.classes: tuple[str, ...] = tuple(str(number) for number in range(config.classes))

    @property
    def preprocessing(self) -> Preprocessing:
        """What the network expects of its pictures."""
        return self.config.preprocessing

    @property
    def last_layer(self) -> nn.Linear:
        """The classifier's layer."""
        layer = self.get_submodule(self.classifier_name)
        assert isinstance(layer, nn.Linear)
        return layer

    def features(self, x: Tensor) -> tuple[Tensor, ...]:
        """Maps (b, channels[i], ⌈y / strides[i]⌉, ⌈x / strides[i]⌉) of x (b, 3, y, x), finest first."""
        raise NotImplementedError

    def head(self, last: Tensor) -> Tensor:
        """Logits (b, classes) of the last map."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        """Logits (b, classes) of pictures x (b, 3, y, x)."""
        return self.head(self.features(x)[-1])

    def reset_classifier(self, classes: Sequence[str]) -> None:
        """Give the network new classes, with a fresh last layer on the same device and of the same dtype."""
        if len(classes) < 2 or len(set(classes)) < len(classes):
            raise UsageError(
                f"a classifier needs two classes or more, all different; got {', '.join(classes) or 'none'}"
            )
        owner, _, leaf = self.classifier_name.rpartition(".")
        old = self.last_layer
        fresh = nn.Linear(old.in_features, len(classes), dtype=old.weight.dtype, device=old.weight.device)
        _initialise_linear(fresh)
        setattr(self.get_submodule(owner), leaf, fresh)
        self.classes = tuple(classes)
        self.config = replace(self.config, classes=len(classes))


def initialise(model: nn.Module) -> None:
    """Convolutions normal with variance 2 / fan-out, norms the identity, linear layers uniform with 1 / √fan-in.

    He et al. 2015, "Delving Deep into Rectifiers", equation 14; fan-out counts one group's outputs.
    """
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            fan_out = math.prod(module.kernel_size) * module.out_channels // module.groups
            nn.init.normal_(module.weight, 0.0, math.sqrt(2 / fan_out))
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.BatchNorm2d):
            nn.init.ones_(module.weight)
            nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Linear):
            _initialise_linear(module)


def _initialise_linear(layer: nn.Linear) -> None:
    bound = 1 / math.sqrt(layer.in_features)  # logits of features of size one stay below one
    nn.init.uniform_(layer.weight, -bound, bound)
    nn.init.zeros_(layer.bias)


class Strides:
    """Turns the strides of a network into dilations once the output stride is reached, stage by stage.

    A layer that would exceed it keeps its taps where they were and loses its stride; what follows sees a denser map,
    and spreads its taps by as much (the à trous algorithm: every second feature of every second row is what it was).

    >>> plan = Strides(16, 8)
    >>> plan.step(2), plan.step(1), plan.step(2), plan.step(1)
    ((2, 1), (1, 1), (1, 1), (1, 2))
    """

    def __init__(self, output_stride: int, reached: int):
        self.output_stride, self.reached, self.dilation = output_stride, reached, 1

    def step(self, stride: int) -> tuple[int, int]:
        """(stride, dilation) of the next layer that would have this stride."""
        before = self.dilation
        if stride > 1 and self.reached * stride > self.output_stride:
            self.dilation *= stride
            return 1, before
        self.reached *= stride
        return stride, before


def count_parameters(module: nn.Module) -> int:
    """Numbers to learn; running statistics are not among them."""
    return sum(parameter.numel() for parameter in module.parameters())


@torch.no_grad()
def map_sizes(model: Backbone, size: int) -> list[tuple[int, ...]]:
    """Shapes of the feature maps of one picture of size x size, found without computing on real memory."""
    with torch.device("meta"):
        return [tuple(feature.shape) for feature in model.to("meta").eval().features(torch.empty(1, 3, size, size))]
