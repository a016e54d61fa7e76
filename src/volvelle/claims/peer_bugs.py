"""What the compiled operators of detection get wrong on this machine, measured anew on the versions installed here."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from volvelle.claims.claim import Budget, Claim, Finding, Measurement, Paper, at_least, at_most

if TYPE_CHECKING:
    from torch import Tensor

CLAIM = Claim(
    title="Operators of detection beside torchvision's",
    family="regions",
    paper=Paper(
        "TorchVision maintainers",
        2016,
        "TorchVision: PyTorch's Computer Vision library",
        "torchvision.ops, batched_nms",
        "https://docs.pytorch.org/vision/stable/ops.html",
    ),
    sentence="Performs non-maximum suppression in a batched fashion: each index value corresponds to a category, and "
    "NMS will not be applied between elements of different categories",
    measured_by="the same calls to torchvision's compiled operators and to ours: boxes of 8 pixels of class 1202 in an "
    "image of 4000, a region at the border against the adjoint, a NaN offset in a process of its own, 16-bit inputs, "
    "second derivatives, gradients for boxes; the bounds are on ours, the peer's figures are reported",
    summary="Known faults of the compiled detection operators, re-run on what is installed, beside the plain versions.",
    summary_zh="在本机已安装的版本上重新测量检测算子的已知缺陷，并与纯 PyTorch 实现对照。",
    seconds={"quick": 40, "full": 60},
    parts=(
        "functional.batched_nms",
        "functional.ps_roi_pool",
        "functional.roi_align",
        "functional.deform_conv2d",
    ),
)

OFFSET = """
import torch
from volvelle.claims.peer_ops import torchvision_ops
offset = torch.full((1, 18, 6, 6), float("nan"))
x, weight = torch.randn(1, 4, 6, 6), torch.randn(4, 4, 3, 3)
for _ in range(20):
    torchvision_ops().deform_conv2d(x, weight, offset, torch.ones(1, 9, 6, 6), torch.zeros(4), *[1] * 8, False)
"""


def measure(budget: Budget) -> Measurement:
    """Every fault once on each side; both budgets are the same."""
    import torch

    from volvelle.claims import peer_ops

    try:
        peer = peer_ops.torchvision_ops()
    except ImportError as error:
        return Measurement(unmeasurable=str(error))
    torch.manual_seed(0)
    findings = [*_keeps(peer), *_border(peer), *_nan(), *_derivatives(peer)]
    return Measurement(
        findings,
        peers={"torchvision": peer_ops.version()},
        setting={"torch": torch.__version__, "threads": torch.get_num_threads()},
        notes=("a process that ends by a signal is counted as a crash, with the signal's number below zero",),
    )


def _keeps(peer: Any) -> list[Finding]:
    """Boxes of one class, alone and as class 1202: what is kept must be the same."""
    import torch

    from volvelle.parts.regions.nms import batched_nms, nms

    corner = torch.rand(300, 2) * 3960
    boxes = torch.cat((corner, corner + 8), dim=1)
    boxes = torch.cat((boxes, boxes + torch.rand(300, 4) * 3))
    scores, classes = torch.rand(600), torch.full((600,), 1202)
    alone = set(peer.nms(boxes, scores, 0.5).tolist())
    # torchvision's batched_nms for up to 1000 boxes on a CPU: classes are moved apart, then suppressed together.
    moved = boxes + (classes.to(boxes) * (boxes.max() + 1))[:, None]
    theirs = set(peer.nms(moved, scores, 0.5).tolist())
    ours = set(batched_nms(boxes, scores, classes, 0.5).tolist())
    agree = set(nms(boxes, scores, 0.5).tolist()) ^ alone
    return [
        at_most("boxes that our nms and torchvision's treat apart", len(agree), 0),
        at_most("batched_nms at class 1202, ours: wrong decisions", len(ours ^ alone), 0),
        Finding("the same, moving classes apart as torchvision does", len(theirs ^ alone)),
    ]


def _border(peer: Any) -> list[Finding]:
    """<J v, u> - <v, J' u> of ps_roi_pool for a region that touches the lower right border."""
    import torch

    from volvelle.parts.regions.ps_roi_pool import ps_roi_pool

    region = torch.tensor([[0.0, 2, 2, 8, 8]], dtype=torch.float64)
    v = torch.randn(1, 4, 8, 8, dtype=torch.float64)

    def gap(function: Callable[[Tensor], Tensor]) -> float:
        x = torch.zeros_like(v).requires_grad_()
        out = function(x)
        u = torch.ones_like(out)
        (back,) = torch.autograd.grad(out, x, u)
        return abs(float((function(v) * u).sum() - (v * back).sum()))

    return [
        at_most(
            "ps_roi_pool at the border, ours: |<Jv, u> - <v, J'u>|", gap(lambda x: ps_roi_pool(x, region, 2)), 1e-12
        ),
        Finding("the same, torchvision", gap(lambda x: peer.ps_roi_pool(x, region, 1.0, 2, 2)[0])),
    ]


def _nan() -> list[Finding]:
    """An offset of NaN: torchvision's may read anywhere, so it runs in a process of its own."""
    import torch

    from volvelle.parts.convolution.deformable import deform_conv2d

    done = subprocess.run([sys.executable, "-c", OFFSET], capture_output=True, timeout=300)
    offset = torch.zeros(1, 18, 6, 6)
    offset[0, 0, 2, 3] = torch.nan
    found = deform_conv2d(torch.randn(1, 4, 6, 6), offset, torch.randn(4, 4, 3, 3), None, 1, 1)
    return [
        at_most("deform_conv2d with one NaN offset, ours: outputs that are NaN", int(found.isnan().any(1).sum()), 1),
        Finding("torchvision with NaN offsets: exit code of the process", done.returncode),
    ]


def _derivatives(peer: Any) -> list[Finding]:
    """Which of roi_align, ps_roi_align and deform_conv2d take bf16 and have second derivatives; gradients for boxes."""
    import torch

    from volvelle.parts.convolution.deformable import deform_conv2d
    from volvelle.parts.regions.ps_roi_align import ps_roi_align
    from volvelle.parts.regions.roi_align import roi_align

    region = torch.tensor([[0.0, 1.2, 1.4, 6.1, 5.3]])
    weight, mask, bias = torch.randn(4, 4, 3, 3), torch.ones(1, 9, 6, 6), torch.zeros(4)
    offset = torch.rand(1, 18, 6, 6)
    pairs: list[tuple[Callable[..., Tensor], Callable[..., Tensor]]] = [
        (
            lambda x: roi_align(x, region.to(x), 2, 1.0, 2),
            lambda x: peer.roi_align(x, region.to(x), 1.0, 2, 2, 2, False),
        ),
        (
            lambda x: ps_roi_align(x, region.to(x), 2, 1.0, 2),
            lambda x: peer.ps_roi_align(x, region.to(x), 1.0, 2, 2, 2)[0],
        ),
        (
            lambda x: deform_conv2d(x, offset.to(x), weight.to(x), None, 1, 1),
            lambda x: peer.deform_conv2d(x, weight.to(x), offset.to(x), mask.to(x), bias.to(x), *[1] * 8, False),
        ),
    ]

    def half(function: Callable[[Tensor], Tensor]) -> bool:
        return _works(lambda: function(torch.randn(1, 4, 6, 6).bfloat16()))

    def twice(function: Callable[[Tensor], Tensor]) -> bool:
        x = torch.randn(1, 4, 6, 6, requires_grad=True)

        def run() -> None:
            (once,) = torch.autograd.grad(function(x).square().sum(), x, create_graph=True)
            once.square().sum().backward()

        return _works(run)

    box = region.clone().requires_grad_()
    roi_align(torch.randn(1, 4, 6, 6), box, 2, 1.0, 2).sum().backward()
    ours, theirs = [a for a, _ in pairs], [b for _, b in pairs]
    return [
        at_least(f"of {len(pairs)} operators, take bf16 on a CPU: ours", sum(map(half, ours)), len(pairs)),
        Finding("torchvision's", sum(map(half, theirs))),
        at_least(f"of {len(pairs)} operators, have second derivatives: ours", sum(map(twice, ours)), len(pairs)),
        Finding("torchvision's", sum(map(twice, theirs))),
        at_least(
            "roi_align: numbers of a box with a gradient, ours",
            0 if box.grad is None else int((box.grad != 0).sum()),
            4,
        ),
        Finding("torchvision's", _box_gradients(peer, region)),
    ]


def _box_gradients(peer: Any, region: Tensor) -> int:
    import torch

    box = region.clone().requires_grad_()
    x = torch.randn(1, 4, 6, 6, requires_grad=True)
    peer.roi_align(x, box, 1.0, 2, 2, 2, False).sum().backward()
    return 0 if box.grad is None else int((box.grad != 0).sum())


def _works(run: Callable[[], object]) -> bool:
    try:
        run()
    except (RuntimeError, NotImplementedError):
        return False
    return True
