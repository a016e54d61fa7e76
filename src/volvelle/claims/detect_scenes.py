"""Scenes for claims on detectors: an encoder's maps of them, computed once, and heads trained and measured on these."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor, nn

    from volvelle.systems.backbone.model import Backbone
    from volvelle.systems.detection.model import Detector
    from volvelle.systems.detection.targets import Targets

SIZE = 128
BATCH = 8
ANCHORS = tuple((float(side), float(side)) for side in (28, 40, 56))
"""What garments of scenes measure: a quarter to a half of the picture."""


@dataclass(frozen=True)
class Part:
    """Scenes as an encoder sees them: its maps (n, c, y, x), finest first, and the garments."""

    maps: Sequence[Tensor]
    targets: Targets

    def __len__(self) -> int:
        return len(self.maps[0])

    def rows(self, chosen: Any) -> tuple[list[Tensor], Tensor, Targets]:
        """Maps, sizes and garments of some of the scenes."""
        import torch

        from volvelle.systems.detection.targets import Targets

        targets = Targets(*(part[chosen] for part in self.targets))
        return [one[chosen] for one in self.maps], torch.full((len(targets.mask), 2), SIZE), targets


def scenes(encoder: Backbone, count: int, part: Any) -> Part:
    """The first so many scenes of a part, as the encoder sees them. Raises VolvelleError without Fashion-MNIST."""
    import torch

    from volvelle.data.scenes import Scenes
    from volvelle.systems.detection.targets import collate

    data = Scenes(count, size=SIZE, part=part)
    found = [data.scene(index) for index in range(count)]
    boxes = [torch.tensor([g.box for g in scene.garments], dtype=torch.float32).view(-1, 4) for scene in found]
    labels = [torch.tensor([g.label - 1 for g in scene.garments], dtype=torch.int64) for scene in found]
    pixels = torch.stack([torch.from_numpy(scene.image).permute(2, 0, 1) for scene in found])
    with torch.no_grad():
        parts = [encoder.features(encoder.preprocessing.normalise(some)) for some in pixels.split(BATCH)]
    return Part([torch.cat(one) for one in zip(*parts, strict=True)], collate(boxes, labels, least=1))


def train(model: Detector, part: Part, steps: int, seed: int) -> None:
    """AdamW with warm-up and cosine on everything behind the backbone."""
    import torch

    torch.manual_seed(seed)
    model.backbone.requires_grad_(False)
    weights = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=1e-3, weight_decay=0.02)
    warm = max(2, steps // 10)  # one step would divide by nothing
    rate = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, total_steps=steps, pct_start=warm / steps)
    draw = torch.Generator().manual_seed(seed)
    model.train()
    for _ in range(steps):
        maps, sizes, targets = part.rows(torch.randint(len(part), (BATCH,), generator=draw))
        loss = sum(model.losses_of(maps, sizes, (SIZE, SIZE), targets).values())
        optimizer.zero_grad()
        loss.backward()  # pyright: ignore[reportAttributeAccessIssue]
        torch.nn.utils.clip_grad_norm_(weights, 10.0)
        optimizer.step()
        rate.step()
    model.eval()


def map50(model: Detector, part: Part) -> float:
    """Mean average precision at an IoU of 0.5, in percent."""
    import torch

    from volvelle.parts.metrics.mean_average_precision import MeanAveragePrecision

    figures = MeanAveragePrecision()
    with torch.no_grad():
        for start in range(0, len(part), BATCH):
            maps, sizes, there = part.rows(slice(start, start + BATCH))
            found = model.detections(maps, sizes, (SIZE, SIZE))
            for i, seen in enumerate(found.mask):
                is_there = there.mask[i]
                figures.update(
                    [{"boxes": found.boxes[i][seen], "scores": found.scores[i][seen], "labels": found.labels[i][seen]}],
                    [{"boxes": there.boxes[i][is_there], "labels": there.labels[i][is_there]}],
                )
    return 100 * float(figures.voc()["map"])


def counted(model: nn.Module, work: Callable[[], object]) -> int:
    """Multiply-accumulates of the model's convolutions and linear layers while `work` runs."""
    import torch
    from torch import nn

    total = 0

    def add(layer: Any, inputs: Any, out: Tensor) -> None:
        nonlocal total
        total += out.numel() * layer.weight[0].numel()

    hooks = [m.register_forward_hook(add) for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    try:
        with torch.no_grad():
            work()
    finally:
        for hook in hooks:
            hook.remove()
    return total
