"""Rotary positions on a grid: scores depend on the way between two places, and larger pictures cost less accuracy."""

from __future__ import annotations

import statistics
from typing import TYPE_CHECKING, Literal

from volvelle.claims.claim import Budget, Claim, Finding, Measurement, Paper, at_least, at_most

if TYPE_CHECKING:
    from torch import Tensor, nn

CLAIM = Claim(
    title="Axial RoPE: rotary positions for pictures",
    family="position",
    paper=Paper(
        "Heo et al.",
        2024,
        "Rotary Position Embedding for Vision Transformer",
        "abstract and section 4.1",
        "https://arxiv.org/abs/2403.13298",
    ),
    sentence="RoPE demonstrates impressive extrapolation performance, i.e., maintaining precision while increasing "
    "image resolution at inference",
    measured_by="scores of queries and keys on a grid, fp64, when all places move by rows and columns; small vision "
    "transformers trained on Fashion-MNIST at 28 x 28, positions rotary by axis or a learned vector a place (enlarged "
    "by interpolation, as is usual), tested at larger sizes (quick: the scores alone)",
    summary="Half of a head's features turn with the row, half with the column: a larger picture goes on with the same "
    "positions.",
    summary_zh="注意力头一半特征随行旋转，一半随列旋转：换成更大的图像时位置可自然延续。",
    seconds={"quick": 20, "full": 900},
    parts=(
        "functional.apply_axial_rope",
        "nn.AxialRotaryEmbedding",
        "functional.axial_positions",
        "nn.AxialPositions",
        "functional.grid_positions",
    ),
)

PATCH, WIDTH, DEPTH, HEADS = 4, 64, 3, 4
TRAINED, LARGER = 28, (36, 44, 56)
"""Pixels a side, while training and when tested."""
STEPS, SEEDS = 600, 3
Positions = Literal["rotary", "learned"]


def measure(budget: Budget) -> Measurement:
    """The scores; full: three seeds of both networks too."""
    from volvelle.claims.garments import unless_missing

    findings, notes = _scores(), list[str]()
    setting: dict[str, object] = {"grid": "12 x 16", "dtype of scores": "fp64"}
    if budget == "full":
        with unless_missing(notes):
            findings += _trained()
            setting |= {"data": "Fashion-MNIST, 20000 to train, 2000 to test", "steps": STEPS, "seeds": SEEDS,
                        "patch": PATCH, "width": WIDTH, "depth": DEPTH, "heads": HEADS}  # fmt: skip
    return Measurement(findings, setting=setting, notes=notes)


def _scores() -> list[Finding]:
    """What scores depend on, and what the tables of each kind weigh."""
    import torch

    from volvelle.parts.position import axial

    draw = torch.Generator().manual_seed(0)
    at = axial.grid_positions(12, 16)
    q, k = (torch.randn(1, HEADS, len(at), WIDTH, generator=draw, dtype=torch.float64) for _ in "qk")

    def scores(places: Tensor) -> Tensor:
        turned, other = axial.apply_axial_rope(q, k, places)
        return turned @ other.mT

    here = scores(at)
    moved = float((scores(at + torch.tensor([7, 31])) - here).abs().max() / here.abs().max())
    turned = float((scores(at.flip(1)) - here).abs().max() / here.abs().max())
    stretched = [
        float((scores(at * torch.tensor(by)) - here).abs().max() / here.abs().max()) for by in ((2, 1), (1, 2))
    ]
    vectors = sum(weight.shape[0] for weight in axial.AxialPositions((12, 16), 8).weights)
    return [
        at_most("all places moved by 7 rows and 31 columns: largest change of a score", moved, 1e-12),
        at_least("rows and columns exchanged: largest change (must not be nothing)", turned, 1e-2),
        at_least("rows, or columns, drawn apart: the same, the lesser one", min(stretched), 1e-2),
        at_most("learned by axis: vectors over one a place", vectors / len(at), (12 + 16) / (12 * 16), "x"),
    ]


def _trained() -> list[Finding]:
    """Accuracies of both kinds of positions at each size."""
    from volvelle.claims.garments import garments, two_threads

    data, held = garments(20000, 2000)
    with two_threads():
        runs = {kind: [accuracies(kind, data, held, seed) for seed in range(SEEDS)] for kind in ("rotary", "learned")}
    mean = {kind: [statistics.mean(each) for each in zip(*found, strict=True)] for kind, found in runs.items()}
    findings = list[Finding]()
    for number, side in enumerate((TRAINED, *LARGER)):
        for kind, found in runs.items():
            values = [each[number] for each in found]
            what = f"{kind}: accuracy at {side} x {side}"
            findings.append(Finding(what, mean[kind][number], "%", spread=(min(values), max(values))))
        if side > TRAINED:
            lost = {kind: values[0] - values[number] for kind, values in mean.items()}
            what = f"accuracy lost at {side} x {side}, rotary less learned"
            findings.append(at_most(what, lost["rotary"] - lost["learned"], 0.0, "points"))
    return findings


def network(positions: Positions, seed: int) -> nn.Module:
    """A small vision transformer: patches, blocks of attention and an MLP, the mean of all places, ten classes."""
    import torch
    from torch import nn
    from torch.nn import functional as F

    from volvelle.parts.position.axial import AxialRotaryEmbedding, grid_positions

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.before, self.between = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
            self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
            self.mlp = nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH))

        def forward(self, x, turn):
            q, k, v = self.qkv(self.before(x)).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
            q, k = turn(q, k)
            found = F.scaled_dot_product_attention(q, k, v)
            x = x + self.out(found.transpose(1, 2).flatten(2))
            return x + self.mlp(self.between(x))

    class Vision(nn.Module):
        def __init__(self):
            super().__init__()
            side = TRAINED // PATCH
            self.patches = nn.Conv2d(1, WIDTH, PATCH, stride=PATCH)
            self.blocks = nn.ModuleList(Block() for _ in range(DEPTH))
            self.norm, self.classes = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 10)
            self.rope = AxialRotaryEmbedding(WIDTH // HEADS, base=100.0)
            self.table = nn.Parameter(0.02 * torch.randn(1, WIDTH, side, side)) if positions == "learned" else None

        def forward(self, images):
            x = self.patches(images)
            at = grid_positions(*x.shape[2:])
            turn = self.rope.rotation(at, x.dtype)
            if self.table is not None:
                x = x + F.interpolate(self.table, size=x.shape[2:], mode="bicubic", align_corners=False)
                turn = lambda q, k: (q, k)  # noqa: E731
            x = x.flatten(2).transpose(1, 2)
            for block in self.blocks:
                x = block(x, turn)
            return self.classes(self.norm(x).mean(1))

    torch.manual_seed(seed)
    return Vision()


def accuracies(
    positions: Positions, data: tuple[Tensor, Tensor], held: tuple[Tensor, Tensor], seed: int
) -> list[float]:
    """Train one network; its accuracy in percent at the size of training and at the larger ones."""
    import torch
    from torch.nn import functional as F

    from volvelle.claims.garments import train

    (images, labels), (others, their_labels) = data, held
    net = network(positions, seed)
    train(net, lambda rows: F.cross_entropy(net(images[rows]), labels[rows]), len(images), STEPS, seed=seed)
    found = []
    with torch.no_grad():
        for side in (TRAINED, *LARGER):
            larger = F.interpolate(others, size=(side, side), mode="bilinear", align_corners=False)
            seen = torch.cat([net(part).argmax(1) for part in larger.split(250)])
            found.append(float((seen == their_labels).double().mean() * 100))
    return found
