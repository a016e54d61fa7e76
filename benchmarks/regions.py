"""Pooling of regions, deformable convolution and suppression in plain PyTorch against torchvision's compiled operators.

    python -m benchmarks.regions [--quick] [--only deform roi_align ps_roi_align nms] [--rounds 5] [--threads N]

Values are compared first. Each row has two sizes; deformable convolution is measured forward, and forward and backward.
Writes results/regions.json; --quick takes small sizes and two rounds, and prints only. Needs torchvision's operators
(tools/environment.sh keeps them aside; volvelle.claims.peer_ops loads them).
"""

from __future__ import annotations

import math
import statistics
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

if not __package__:  # run as a file
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from benchmarks import protocol, tables
from volvelle.claims import peer_ops
from volvelle.functional import deform_conv2d, nms, ps_roi_align, roi_align

LASTING = 0.1


class Case(NamedTuple):
    """One row: what is called, ours and theirs, and the tensors whose gradients are taken (none: forward alone)."""

    title: str
    ours: Callable[[], Tensor]
    theirs: Callable[[], Tensor]
    wanted: tuple[Tensor, ...] = ()


def main() -> None:
    options = protocol.parser(__doc__, CASES).parse_args()
    torch.set_num_threads(options.threads)
    rounds = options.rounds or (2 if options.quick else 5)
    peer = peer_ops.torchvision_ops()
    with protocol.alone():
        facts = protocol.machine(("torch",)) | {"torchvision": peer_ops.version()}
        rows = protocol.read("regions").get("rows", [])
        for name in options.only:
            for case in CASES[name](peer, options.quick):
                rows = protocol.keep(rows, measure(case, rounds, 0 if options.quick else LASTING))
                if not options.quick:  # after every row: a run that is cut keeps what it measured
                    record = {"machine": facts, "geometric_mean": geometric(rows), "rows": rows}
                    print(protocol.write("regions", record))
                    tables.write("regions")


def geometric(rows: list[dict[str, Any]]) -> float | None:
    """The geometric mean of the ratios that were not refused, of all rows but suppression."""
    ratios = [row["speed"]["ratio"] for row in rows if not row["what"].startswith("nms")]
    measured = [ratio for ratio in ratios if ratio is not None]
    return math.exp(statistics.fmean(map(math.log, measured))) if measured else None


def measure(case: Case, rounds: int, lasting: float) -> dict[str, Any]:
    """Both in turn, the fastest of five in each round, each of so many seconds; the values are compared first."""
    ours, theirs = case.ours(), case.theirs()
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)
    variants = {"ours": partial(_run, case.ours, case.wanted), "torchvision": partial(_run, case.theirs, case.wanted)}
    series = protocol.interleave(variants, rounds=rounds, most=4 * rounds, best_of=5, lasting=lasting)
    speed = protocol.compare(series, "ours", "torchvision")
    print(f"{case.title}: {protocol.shown(speed)}", flush=True)
    milliseconds = {who: 1e3 * one.summary()["wall_median"] for who, one in series.items()}
    return {
        "what": case.title, "milliseconds": milliseconds, "speed": speed,
        "seconds": {who: one.summary() for who, one in series.items()},
    }  # fmt: skip


def _run(work: Callable[[], Tensor], wanted: tuple[Tensor, ...]) -> None:
    if not wanted:
        with torch.no_grad():
            work()
        return
    found = work()
    torch.autograd.grad(found, wanted, torch.ones_like(found))


def deform(peer: Any, quick: bool) -> list[Case]:
    """3 x 3, one group of taps."""
    cases = []
    for c, size in ((16, 8), (32, 6)) if quick else ((128, 40), (512, 20)):
        g = torch.Generator().manual_seed(0)
        x, weight = torch.randn(1, c, size, size, generator=g), torch.randn(c, c, 3, 3, generator=g) / (3 * c**0.5)
        offset, mask, bias = torch.randn(1, 18, size, size, generator=g), torch.ones(1, 9, size, size), torch.zeros(c)
        wanted = tuple(t.requires_grad_() for t in (x, offset, weight))
        ours = partial(deform_conv2d, x, offset, weight, bias, 1, 1)
        theirs = partial(peer.deform_conv2d, x, weight, offset, mask, bias, 1, 1, 1, 1, 1, 1, 1, 1, False)
        title = f"deform_conv2d, {c} channels, {size} x {size}"
        cases += [Case(title, ours, theirs), Case(f"{title}, with gradients", ours, theirs, wanted)]
    return cases


def align(peer: Any, quick: bool) -> list[Case]:
    """256 channels, two samples an axis."""
    cases = []
    for r, size in ((5, 8), (9, 8)) if quick else ((200, 20), (1000, 50)):
        x, rois = torch.randn(1, 8 if quick else 256, size, size), _rois(r, 16 * size)
        ours = partial(roi_align, x, rois, 7, 1 / 16, 2, True)
        theirs = partial(peer.roi_align, x, rois, 1 / 16, 7, 7, 2, True)
        cases.append(Case(f"roi_align, {r} regions, {x.shape[1]} channels, {size} x {size}", ours, theirs))
    return cases


def position_sensitive(peer: Any, quick: bool) -> list[Case]:
    """ThunderNet's 245 maps of 20 x 20."""
    cases = []
    for r in (5, 9) if quick else (200, 1000):
        x, rois = torch.randn(1, 245, 20, 20), _rois(r, 320)
        ours = partial(ps_roi_align, x, rois, 7, 1 / 16, 2)
        cases.append(Case(f"ps_roi_align, {r} regions, 245 channels", ours, partial(_first, peer, x, rois)))
    return cases


def _first(peer: Any, x: Tensor, rois: Tensor) -> Tensor:
    return peer.ps_roi_align(x, rois, 1 / 16, 7, 7, 2)[0]


def suppression(peer: Any, quick: bool) -> list[Case]:
    """Boxes of which many stay, and of which few do."""
    cases = []
    for span in (1000, 300):
        g, n = torch.Generator().manual_seed(0), 100 if quick else 2000
        corner, size = torch.rand(n, 2, generator=g) * span, torch.rand(n, 2, generator=g) * 100 + 1
        boxes, scores = torch.cat((corner, corner + size), dim=1), torch.rand(n, generator=g)
        title = f"nms, {n} boxes up to 101 pixels long within {span}"
        cases.append(Case(title, partial(nms, boxes, scores, 0.5), partial(peer.nms, boxes, scores, 0.5)))
    return cases


def _rois(r: int, size: int) -> Tensor:
    g = torch.Generator().manual_seed(1)
    corner, extent = torch.rand(r, 2, generator=g) * 0.7 * size, torch.rand(r, 2, generator=g) * 0.3 * size + 8
    return torch.cat((torch.zeros(r, 1), corner, corner + extent), dim=1)


CASES = {"deform": deform, "roi_align": align, "ps_roi_align": position_sensitive, "nms": suppression}

if __name__ == "__main__":
    main()
