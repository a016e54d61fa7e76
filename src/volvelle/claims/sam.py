"""Segment Anything: masks that rise with clicks, three answers to an unclear one, and an embedding computed once."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from volvelle.claims.claim import Budget, Claim, Finding, Measurement, Paper, at_least, at_most

if TYPE_CHECKING:
    from PIL.Image import Image

    from volvelle.data.promptable_objects import Listed
    from volvelle.systems.segmentation.sam.model import Sam
    from volvelle.train.promptable_measure import Measured

CLAIM = Claim(
    title="Segment Anything: promptable segmentation",
    family="segmentation",
    paper=Paper(
        "Kirillov et al.",
        2023,
        "Segment Anything",
        "section 3 and appendix A",
        "https://arxiv.org/abs/2304.02643",
    ),
    sentence="one answer to a click that may mean several things averages over these, and three answers do not; masks "
    "improve with further clicks; on an embedding that is computed once a prompt costs about 50 ms on a CPU",
    measured_by="models trained on scenes where a click on a garment may mean that garment or all garments together: "
    "mean IoU of the best of three masks against that of the one mask of the same model for clear prompts, on scenes "
    "of which none was trained on, and by the number of clicks (quick: one seed); seconds of both image encoders and "
    "of one prompt on their embeddings, random weights",
    summary="Ask a model for any object by a click or a box; the picture is looked at once, each prompt takes "
    "milliseconds.",
    summary_zh="点击或画框即可得到物体掩码：图像只编码一次，每次提示仅需数毫秒。",
    seconds={"quick": 60, "full": 900},
    parts=("functional.attention",),
    recipe="volvelle train promptable data=FOLDER",
)

SIZE, BATCH = 128, 8
PROMPT = 50.0
"""Milliseconds of a prompt, section 3 of the paper."""


class Nested:
    """Scenes with two or more garments: each is an object, and so are all of them together."""

    classes = ("one garment", "all garments")

    def __init__(self, count: int, part: Any):
        from volvelle.data.scenes import Scenes

        self.scenes = Scenes(count, size=SIZE, part=part, garments=(2, 4))
        self.kept = [i for i in range(count) if len(self.scenes.scene(i).garments) > 1]

    def __len__(self) -> int:
        return len(self.kept)

    def __getitem__(self, index: int) -> tuple[Image, Listed]:
        """The picture and its objects."""
        import numpy as np
        from PIL import Image

        from volvelle.data.promptable_objects import Listed
        from volvelle.data.run_lengths import RunLengths

        scene = self.scenes.scene(self.kept[index])
        numbers = range(1, len(scene.garments) + 1)
        masks = [*(scene.instances == number for number in numbers), scene.instances > 0]
        labels = [*(0 for _ in numbers), 1]
        nothing = np.zeros(scene.instances.shape, dtype=bool)
        return Image.fromarray(scene.image), Listed([RunLengths.of(mask) for mask in masks], labels, nothing)

    def source(self, index: int) -> str:
        """Name of a scene for messages."""
        return self.scenes.source(self.kept[index])


def measure(budget: Budget) -> Measurement:
    """Costs of encoder and prompt, then what was learnt on ambiguous scenes."""
    from volvelle.claims.garments import two_threads
    from volvelle.errors import VolvelleError

    seeds, steps, pictures = (1, 80, 120) if budget == "quick" else (3, 700, 600)
    notes = list[str]()
    with two_threads():
        findings = [*_costs("lite0", 512, 5), *_costs("vit_b", 512 if budget == "quick" else 1024, 1)]
        try:
            findings += _learnt([_trained(seed, steps, pictures) for seed in range(seeds)])
        except VolvelleError as error:
            notes.append(f"what clicks are worth was not measured: {error}")
    setting = {
        "scenes": pictures, "pixels": SIZE, "encoder": "efficientnet-lite0, frozen", "steps": steps, "seeds": seeds,
        "dtype": "fp32",
    }  # fmt: skip
    return Measurement(findings, setting=setting, notes=notes)


def _costs(name: str, size: int, passes: int) -> list[Finding]:
    """Milliseconds of the image encoder and of one click on its embedding."""
    import torch

    from volvelle.systems.segmentation.sam.load import sam

    model = sam(name, size=size)
    pixels = torch.zeros(1, 3, size, size)
    points, labels = torch.full((1, 1, 1, 2), size / 2), torch.ones(1, 1, 1, dtype=torch.int64)
    with torch.no_grad():
        features, position = model.image_encoder.features(pixels), model.prompt_encoder.position()
        embedding, fine = features.embedding, features.fine
        dense = model.prompt_encoder(points, labels)[1]
        seen = model.mask_decoder.look(embedding, position, dense)

        def click() -> None:
            sparse, dense = model.prompt_encoder(points, labels)
            model.mask_decoder(embedding, position, sparse, dense, image=seen, fine=fine)

        encoder, prompt = _milliseconds(lambda: model.image_encoder.features(pixels), passes), _milliseconds(click, 20)
    shown = f"{name} at {size} pixels"
    return [
        Finding(f"{shown}: image encoder", encoder, "ms"),
        at_most(f"{shown}: one click on the embedding", prompt, PROMPT, "ms"),
        Finding(f"{shown}: encoder to click", encoder / prompt, "x"),
    ]


def _milliseconds(work: Callable[[], object], passes: int) -> float:
    work()
    seconds = []
    for _ in range(passes):
        start = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - start)
    return 1000 * statistics.median(seconds)


def _trained(seed: int, steps: int, pictures: int) -> Measured:
    """What a model makes of clicks after so many steps on scenes."""
    from volvelle.train.promptable_measure import measure as measure_clicks

    model = train(Nested(pictures, "train"), steps, seed)
    return measure_clicks(model, Nested(max(30, pictures // 6), "val"), more=True)


def train(scenes: Nested, steps: int, seed: int) -> Sam:
    """AdamW on everything behind a frozen ImageNet backbone, by the losses and clicks of `train promptable`."""
    import random

    import torch

    from volvelle.data.masks_augment import Augmentation
    from volvelle.data.promptable_views import ObjectViews, collate_objects
    from volvelle.systems.segmentation.sam.load import sam
    from volvelle.train.promptable_objective import PromptObjective
    from volvelle.train.recipes.promptable import TrainPromptable

    torch.manual_seed(seed)
    model = sam("lite0", size=SIZE, weights="imagenet")
    model.image_encoder.backbone.requires_grad_(False)  # pyright: ignore[reportAttributeAccessIssue]
    recipe = TrainPromptable(
        size=SIZE, crop=(SIZE, SIZE), prompts=4, refined=2, rounds=3, boxes=0.0, others=0.0, seed=seed
    )
    objective = PromptObjective(model, recipe)
    views = ObjectViews(scenes, Augmentation((SIZE, SIZE), (1.0, 1.2), 0.5, 0.2), side=SIZE, prompts=4, least=64)
    weights = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=1e-3, weight_decay=0.01)
    rate = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, total_steps=steps, pct_start=max(2 / steps, 0.1))
    draw = random.Random(f"scenes/{seed}")
    for step in range(steps):
        chosen = [draw.randrange(len(scenes)) for _ in range(BATCH)]
        objective.step = step
        value = objective.loss(collate_objects([views.draw(index, draw) for index in chosen])).value
        optimizer.zero_grad()
        value.backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        rate.step()
    return model.eval()


def _learnt(runs: list[Measured]) -> list[Finding]:
    """Mean figures of all seeds, in percent."""

    def mean(name: str) -> float:
        return 100 * statistics.mean(run.metrics[name] for run in runs)

    def spread(name: str) -> tuple[float, float]:
        values = [100 * run.metrics[name] for run in runs]
        return min(values), max(values)

    curve = [("iou_1", 1), ("iou_2", 2), ("iou_3", 3), ("iou_5", 5)]
    findings = [
        at_least("IoU gained by the best of three over the one mask", mean("best_of_three") - mean("single"), 0.0,
                 "points"),
        at_least("IoU gained by a second click", mean("iou_2") - mean("iou_1"), 0.0, "points"),
        at_least("IoU gained from the second click to the fifth", mean("iou_5") - mean("iou_2"), 0.0, "points"),
    ]  # fmt: skip
    findings += [
        Finding(f"mean IoU after {n} click{'s' * (n > 1)}", mean(name), "%", spread=spread(name)) for name, n in curve
    ]
    named = {"best_of_three": "the best of three", "single": "the one mask"}
    return findings + [
        Finding(f"mean IoU of {words}, one click", mean(name), "%", spread=spread(name))
        for name, words in named.items()
    ]
