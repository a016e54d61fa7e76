"""Receptive fields: what the analysis of a traced network says against the gradients of a positive-weight copy.

Every backbone is compared twice: single units all over it, borders included, on a small input; and the middle unit of
its last features on an input longer than the field, where the measured extent must be the formula's.
"""

from __future__ import annotations

import math
import random
from typing import TYPE_CHECKING

from volvelle.claims.claim import Budget, Claim, Finding, Measurement, Paper, at_most

if TYPE_CHECKING:
    from torch import nn

CLAIM = Claim(
    title="Receptive fields of any network",
    family="convolution",
    paper=Paper(
        "Araujo, Norris and Sim",
        2019,
        "Computing Receptive Fields of Convolutional Neural Networks",
        "equations 2 to 5 and the section on arbitrary computation graphs",
        "https://distill.pub/2019/computing-receptive-fields",
    ),
    sentence="Mathematical derivations and open-source library to compute receptive fields of convnets, enabling the "
    "mapping of extracted features to input signals.",
    measured_by="receptive_field() of every backbone here against the gradient support of a copy with positive weights "
    "in fp64: units of twelve layers as sets of coordinates, and the extent of the last features; chains by the "
    "recursion from the top down; for one network the effective field of its own weights",
    summary="How far a unit of a network sees, with what stride and from where on, for any graph of layers.",
    summary_zh="对任意网络结构，计算每个单元能看到输入的范围、步长与起点。",
    seconds={"quick": 60, "full": 600},
    recipe="volvelle inspect efficientnet-b0 rf",
)

QUICK = ("resnet-18", "mobilenet-v2", "efficientnet-lite0", "shufflenet-v2-x0.5")
FULL = (
    *QUICK, "efficientnet-b0", "efficientnet-b3", "inception-v1", "resnet-50", "resnet-101", "shufflenet-v2-x1.0",
    "snet49", "snet146", "snet535",
)  # fmt: skip


def measure(budget: Budget) -> Measurement:
    """Compare the backbones (full: all kinds there are), chains, and look at one effective field."""
    import torch

    from volvelle.inspect import effective_field, receptive_field
    from volvelle.systems.backbone import backbone

    side = 64 if budget == "quick" else 128
    findings = [at_most("chains whose two recursions differ", _chains(200), 0)]
    for name in QUICK if budget == "quick" else FULL:
        net = backbone(name)
        units, wrong = compared(net, side)
        says, sees = extents(net)
        findings += [
            at_most(f"{name}: units of {units} that read other pixels than the analysis says", wrong, 0),
            at_most(f"{name}: |measured - {says}|, extent of its last features in px", abs(sees - says), 0),
        ]
    torch.manual_seed(0)
    net = backbone("resnet-18")
    field = receptive_field(net, (1, 3, 224, 224))
    effective = effective_field(net, (1, 3, 224, 224), field=field, seeds=2 if budget == "quick" else 16)
    share = sum(effective.share) / 2
    findings.append(Finding("resnet-18, random weights: 4 sigma of the effective field over the field", share))
    setting = {"input of the units": f"{side} x {side} px", "dtype": "fp64", "resnet-18 seeds": effective.seeds}
    return Measurement(
        findings,
        peers={"torch.autograd": torch.__version__},
        setting=setting,
        notes=["squeeze-excitation reads the whole input; for the extents its gates are cut off, as in `local`"],
        pictures={"fields": field.svg(), "effective": effective.svg()},
    )


def compared(net: nn.Module, side: int) -> tuple[int, int]:
    """Units compared with their gradients on a square input, and those that differ."""
    from volvelle.inspect import receptive_field

    checks = receptive_field(net, (1, 3, side, side), verify=True).checks
    return len(checks), sum(not check.agrees for check in checks)


def extents(net: nn.Module) -> tuple[int, int]:
    """Extent of the middle unit of the last features along a long narrow input: analysed, and measured."""
    from volvelle.inspect import receptive_field
    from volvelle.inspect.receptive_field_verify import local_support

    size = receptive_field(net, (1, 3, 64, 32)).features.local[0]
    field = receptive_field(net, (1, 3, 32 * math.ceil(size / 32) + 64, 32))
    features = field.features
    # All channels: where branches or halves stand side by side, one alone sees less than the layer does.
    middle = (0, slice(None), features.shape[2] // 2, 0)
    rows = local_support(field, features.name, middle)[0]
    return features.local[0], max(rows) - min(rows) + 1


def _chains(count: int) -> int:
    """Random chains for which r = 1 + Σ (k - 1) Π s and the recursion from the top down differ."""
    from volvelle.inspect import chain_field

    order, wrong = random.Random(0), 0
    for _ in range(count):
        layers = [(order.randint(1, 11), order.randint(1, 4)) for _ in range(order.randint(1, 20))]
        size, jump = 1, 1
        for ksize, stride in layers:
            size, jump = size + (ksize - 1) * jump, jump * stride
        wrong += chain_field(layers) != size
    return wrong
