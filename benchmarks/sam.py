"""Segment Anything: the image encoder, a click, and all masks of a picture, beside transformers and the authors' code.

    python -m benchmarks.sam [--quick] [--only encoder decoder everything] [--rounds 5] [--threads N] [--points 32]
                             [--run FOLDER]

encoder: ViT-B at 1024 pixels in bf16 and fp32 against transformers' in fp32, and how far the embeddings lie apart.
decoder: one click on an embedded picture, and 16 at once. everything: our generator against the authors' at equal
settings, seconds of each stage and memory; random weights give no sure masks, so the limits are set between two values
near the median, where rounding moves no mask over them, and boxes strike nothing. With --run it is a trained model's
masks, at limits found in the same way, duplicates dropped. Writes results/sam.json; --quick prints only.
"""

from __future__ import annotations

import copy
import functools
import json
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

if not __package__:  # run as a file
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from benchmarks import protocol, tables
from benchmarks.support.sam_peer import centre, enliven, small_config, their_generator, their_sam
from volvelle.data.images import read_image
from volvelle.data.run_lengths import RunLengths
from volvelle.systems.segmentation.sam import Everything, EverythingOptions, Promptable, Sam, load_sam, sam, write_sam
from volvelle.systems.segmentation.sam.prompts import prepare

PARTS = ("encoder", "decoder", "everything")
HF, META = "transformers, fp32", "segment_anything, fp32"
SIZE = (1024, 683)
"""Width and height of the photo."""
BOUND = 256_000_000
"""max_memory of the bounded variant, in bytes."""
CLICKS = 16


def main() -> None:
    parser = protocol.parser(__doc__, PARTS)
    parser.add_argument("--points", type=int, default=32, help="everything: points along a side of the grid")
    parser.add_argument("--run", type=Path, help="everything: a trained model instead of random weights")
    parser.add_argument("--memory", help="one variant of everything, in this process alone; prints JSON")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    rounds = options.rounds or (2 if options.quick else 5)
    model = build(options.run, quick=options.quick)
    if options.memory:
        print(json.dumps(memory_of(options.memory, model)))
        return
    with protocol.alone(), torch.no_grad():
        record = protocol.read("sam") | {
            "machine": protocol.machine(("torch", "transformers", "segment-anything")),
            "size": SIZE,
        }
        for part in options.only:
            if part == "everything":
                name = f"everything, {options.run.name}" if options.run else part
                points = 4 if options.quick else options.points
                record[name] = everything(model, rounds, points, options.run, quick=options.quick)
            else:
                record[part] = encoder(fresh(model), rounds) if part == "encoder" else decoder(model, rounds)
            if not options.quick:
                print(protocol.write("sam", record))
                tables.write("sam")


def build(run: Path | None, *, quick: bool) -> Sam:
    """ViT-B with lively random weights, a small one for smoke runs, or a trained one."""
    torch.manual_seed(0)
    if run is not None:
        return load_sam(run)
    return centre(enliven(sam(small_config(256) if quick else "vit_b")), photo())


def fresh(model: Sam) -> Sam:
    """The same model as it begins, with relative positions: the lively weights magnify what bf16 rounds off."""
    torch.manual_seed(0)
    made = Sam(model.config).eval()
    for name, weight in made.image_encoder.named_parameters():
        if "rel_pos" in name:
            nn.init.normal_(weight, std=0.1)
    return made


def photo() -> Image.Image:
    """A photograph of scikit-image's; without it, noise."""
    package = find_spec("skimage")
    if package is None or package.origin is None:
        draw = np.random.default_rng(0)
        picture = Image.fromarray(draw.integers(0, 256, (32, 48, 3), dtype=np.uint8))
    else:
        picture = read_image(Path(package.origin).parent / "data" / "coffee.png")
    return picture.resize(SIZE, Image.Resampling.BICUBIC)


# The image encoder.


def encoder(model: Sam, rounds: int) -> dict[str, Any]:
    """Seconds for one picture of every way to embed it."""
    x = torch.randn(1, 3, model.config.size, model.config.size, generator=torch.Generator().manual_seed(0))
    theirs, half = _transformers(model).vision_encoder, copy.deepcopy(model.image_encoder).bfloat16()
    small = x.bfloat16()

    def autocast() -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return model.image_encoder(x)

    variants: dict[str, Callable[[], Tensor]] = {
        HF: lambda: theirs(x).last_hidden_state,
        "ours, fp32": lambda: model.image_encoder(x),
        "ours, bf16": lambda: half(small),
        "ours, bf16 by autocast": autocast,
    }
    exact = variants[HF]()
    far = {who: _relative(work(), exact) for who, work in variants.items()}
    series = protocol.interleave(variants, rounds=rounds, most=3 * rounds, steady=[HF])
    speed = {who: protocol.compare(series, who, HF) for who in variants if who != HF}
    for who, found in speed.items():
        print(f"encoder: {who}: {protocol.shown(found)} of {HF}, relative error {far[who]:.1e}", flush=True)
    return {"model": model.config.name, "far": far, "speed": speed, "seconds": _summaries(series)}


def _transformers(model: Sam) -> Any:
    """The same weights in transformers' SamModel."""
    from transformers import SamModel

    with tempfile.TemporaryDirectory() as folder:
        write_sam(model, Path(folder) / "hf", to="hf")
        return SamModel.from_pretrained(Path(folder) / "hf").eval()


def _relative(found: Tensor, exact: Tensor) -> float:
    return float((found.float() - exact).norm() / exact.norm())


# A click.


def decoder(model: Sam, rounds: int) -> dict[str, Any]:
    """Seconds of a click, and of several at once, from coordinates to logits."""
    promptable = Promptable(model)
    embedding = promptable.embed(photo())
    hf, meta = _transformers(model), their_sam(model)
    halves = Promptable(copy.deepcopy(model).bfloat16())
    halved = copy.copy(embedding)
    halved.features, halved.weights = embedding.features.bfloat16(), halves.weights()
    found: dict[str, Any] = {}
    for count in (1, CLICKS):
        draw = torch.Generator().manual_seed(count)
        points = torch.rand(count, 1, 2, generator=draw) * torch.tensor(SIZE)
        prompts = prepare(embedding, points, None, None, None)
        assert prompts.points is not None
        variants = {
            META: functools.partial(_meta, meta, embedding.features, prompts.points[0]),
            HF: functools.partial(_hf, hf, embedding.features, prompts.points),
            "ours, fp32": functools.partial(promptable.decode, embedding, prompts),
            "ours, bf16": functools.partial(halves.decode, halved, prompts),
        }
        exact = variants[META]()[0]
        far = {who: _relative(work()[0].reshape(exact.shape), exact) for who, work in variants.items()}
        series = protocol.interleave(variants, rounds=rounds, most=3 * rounds, steady=[META], lasting=1.0)
        speed = {who: protocol.compare(series, who, META) for who in variants if who != META}
        for who, one in speed.items():
            each = 1000 * series[who].summary()["wall_median"] / count
            print(f"decoder: {count} at once: {who}: {each:.1f} ms each, {protocol.shown(one)} of {META}", flush=True)
        found[str(count)] = {"far": far, "speed": speed, "seconds": _summaries(series)}
    return {"model": model.config.name, "clicks": found}


def _meta(model: Any, features: Tensor, points: Tensor) -> tuple[Tensor, Tensor]:
    sparse, dense = model.prompt_encoder(points=(points, torch.ones(points.shape[:2])), boxes=None, masks=None)
    return model.mask_decoder(features, model.prompt_encoder.get_dense_pe(), sparse, dense, multimask_output=True)


def _hf(model: Any, features: Tensor, points: Tensor) -> tuple[Tensor, Tensor]:
    labels = torch.ones(points.shape[:3], dtype=torch.int64)
    found = model(input_points=points, input_labels=labels, image_embeddings=features, multimask_output=True)
    return found.pred_masks[0], found.iou_scores[0]


# All masks of a picture.


def everything(model: Sam, rounds: int, points: int, run: Path | None, *, quick: bool) -> dict[str, Any]:
    """Seconds for a picture, of each stage, memory, and how alike the masks are."""
    picture = photo()
    options = settings(Promptable(model), picture, points, nms=0.7 if run else 1.0)
    generator, array = _generator(model, options), np.asarray(picture)
    stages = {META: watch(generator)}
    variants: dict[str, Callable[[], Any]] = {META: lambda: generator.generate(array)}
    ways = {
        "ours, fp32": (None, None), f"ours, at most {BOUND // 10**6} MB": (None, BOUND),
        "ours, encoder in bf16": (torch.bfloat16, None),
    }  # fmt: skip
    for who, (dtype, bound) in ways.items():
        stages[who] = dict[str, float]()
        variants[who] = functools.partial(_ours, Promptable(model, dtype=dtype), picture, options, bound, stages[who])
    theirs = variants[META]()
    alike = {who: _alike(variants[who](), theirs) for who in ways}
    for times in stages.values():
        times.clear()
    series = protocol.interleave(variants, rounds=rounds, warmup=0, most=2 * rounds, steady=[META])
    speed = {who: protocol.compare(series, who, META) for who in ways}
    done = {who: len(one.wall) + len(one.dropped) for who, one in series.items()}
    each = {who: {stage: total / done[who] for stage, total in times.items()} for who, times in stages.items()}
    for who in ways:
        told = ", ".join(f"{stage} {seconds:.2f}" for stage, seconds in each[who].items())
        print(f"everything: {who}: {protocol.shown(speed[who])} of {META}; seconds: {told}; {alike[who]}", flush=True)
    arguments = [
        f"--threads={torch.get_num_threads()}",
        *(["--quick"] if quick else []),
        *(["--run", str(run)] if run else []),
    ]
    memory = {
        who: protocol.in_subprocess(Path(__file__), [*arguments, f"--memory={who}"]) for who in (META, *list(ways)[:2])
    }
    return {
        "model": model.config.name, "points": points, "options": vars(options), "masks": len(theirs), "alike": alike,
        "speed": speed, "stages": each, "memory": memory, "seconds": _summaries(series),
    }  # fmt: skip


def settings(promptable: Promptable, picture: Image.Image, points: int, nms: float) -> EverythingOptions:
    """Limits in the widest gap between two values near the median: half of the masks are dropped, by either."""
    loose = EverythingOptions(points=points, iou=0.0, stability=0.0, nms=1.0)
    found = promptable.everything(picture, options=loose).masks
    iou = between([one.iou for one in found])
    stability = between([one.stability for one in found if one.iou > iou and one.stability == one.stability])
    return EverythingOptions(points=points, iou=iou, stability=stability, nms=nms)


def between(values: list[float]) -> float:
    """The middle of the widest gap among the values near the median, in (0, 1)."""
    inside = sorted(value for value in values if 0 < value < 1)
    near = inside[int(0.45 * len(inside)) : int(0.55 * len(inside)) + 2]
    gaps = np.diff(near)
    at = int(gaps.argmax())
    return float(near[at] + gaps[at] / 2)


def _generator(model: Sam, options: EverythingOptions) -> Any:
    return their_generator(
        model,
        points_per_side=options.points,
        pred_iou_thresh=options.iou,
        stability_score_thresh=options.stability,
        box_nms_thresh=options.nms,
        output_mode="uncompressed_rle",
    )


def watch(generator: Any) -> dict[str, float]:
    """Count the seconds of their stages from now on: the encoder, the decoder, and (the whole less these) the masks."""
    seconds: dict[str, float] = {}

    def timed(owner: Any, name: str, stage: str, inner: tuple[str, ...] = ()) -> None:
        work = getattr(owner, name)

        def run(*given: Any, **named: Any) -> Any:
            before, begun = sum(seconds.get(one, 0.0) for one in inner), time.perf_counter()
            answer = work(*given, **named)
            spent = time.perf_counter() - begun - (sum(seconds.get(one, 0.0) for one in inner) - before)
            seconds[stage] = seconds.get(stage, 0.0) + spent
            return answer

        setattr(owner, name, run)

    model: nn.Module = generator.predictor.model
    timed(generator.predictor, "set_image", "embedding")
    timed(model.prompt_encoder, "forward", "decoding")
    timed(model.mask_decoder, "forward", "decoding")
    timed(generator, "generate", "masks", ("embedding", "decoding"))
    return seconds


def _ours(
    promptable: Promptable,
    picture: Image.Image,
    options: EverythingOptions,
    bound: int | None,
    seconds: dict[str, float],
) -> Everything:
    found = promptable.everything(picture, options=options, max_memory=bound)
    for stage, spent in found.seconds.items():
        seconds[stage] = seconds.get(stage, 0.0) + spent
    return found


def _alike(ours: Everything, theirs: list[dict[str, Any]]) -> dict[str, Any]:
    """How many masks each has, how many of ours have the same point, and the least IoU and pixels apart of those."""
    rest = dict[tuple[Any, ...], list[RunLengths]]()
    for one in theirs:
        key = tuple(np.round(one["point_coords"][0], 3).tolist())
        rest.setdefault(key, []).append(RunLengths.from_coco(one["segmentation"]))
    overlaps, apart, common = list[float](), 0, 0
    for one in ours.masks:
        candidates = rest.get(tuple(np.round(one.point, 3).tolist()), [])
        if not candidates:
            continue
        mask = one.mask.mask()
        wrong = [int((mask != other.mask()).sum()) for other in candidates]
        at = int(np.argmin(wrong))
        union = (mask.sum() + candidates[at].area + wrong[at]) / 2
        overlaps.append(1 - wrong[at] / max(union, 1))
        apart, common = apart + wrong[at], common + 1
        del candidates[at]
    return {
        "ours": len(ours.masks), "theirs": len(theirs), "common": common, "pixels": apart,
        "least_iou": float(min(overlaps, default=1.0)),
    }  # fmt: skip


def memory_of(who: str, model: Sam) -> dict[str, int]:
    """What one pass over 64 points needs, in this process alone."""
    picture = photo()
    options = EverythingOptions(points=8, iou=0.0, stability=0.0, nms=1.0)
    with torch.no_grad():
        if who == META:
            generator, array = _generator(model, options), np.asarray(picture)
            return protocol.peak_memory(lambda: generator.generate(array))
        bound = BOUND if "at most" in who else None
        promptable = Promptable(model)
        return protocol.peak_memory(lambda: promptable.everything(picture, options=options, max_memory=bound))


def _summaries(series: dict[str, protocol.Series]) -> dict[str, Any]:
    return {who: one.summary() for who, one in series.items()}


if __name__ == "__main__":
    main()
