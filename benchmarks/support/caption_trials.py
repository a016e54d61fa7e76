"""Whether a prior that was told captions of scenes draws what they say."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from volvelle.data.pictures import read_pictures, to_bytes
from volvelle.data.scenes import CLASSES, COLOURS, Scenes
from volvelle.decode.images import draw_images
from volvelle.decode.options import Sampling
from volvelle.systems.generation.prior import Prior, read_prior
from volvelle.train.classify import data_folder
from volvelle.train.prior_measure import measure_prior

PLAIN = "plain"
TOLD = "a {colour} {garment} on a plain background"
_PALETTE = np.array(list(COLOURS.values()), dtype=float)


def colour(picture: np.ndarray) -> int:
    """Which of COLOURS a garment on a plain ground has, from a picture uint8 (y, x, 3); -1 where there is no garment.

    The ground is a plane in each channel; what is far from it is garment and votes for the colour nearest to it, at any
    shade.
    """
    y, x = np.mgrid[: picture.shape[0], : picture.shape[1]] / max(picture.shape[:2])
    plane = np.stack((np.ones_like(x), x, y), -1).reshape(-1, 3)
    values = picture.reshape(-1, 3).astype(float)
    ground = np.ones(len(values), dtype=bool)
    for _ in range(6):
        fitted, *_ = np.linalg.lstsq(plane[ground], values[ground], rcond=None)
        far = np.linalg.norm(values - plane @ fitted, axis=1)
        ground = far < max(25, 1.5 * float(np.median(far)))
    garment = values[~ground]
    if len(garment) < 8:
        return -1
    nearest = (garment @ (_PALETTE / np.linalg.norm(_PALETTE, axis=1, keepdims=True)).T).argmax(1)
    return int(np.bincount(nearest, weights=np.linalg.norm(garment, axis=1)).argmax())


def captions(run: Path, data: str, times: int = 2) -> dict[str, Any]:
    """Nats a held-out code with the right caption, none, and another's; how often the colour asked for is drawn.

    Every colour and garment is asked for `times`; real scenes, as they are and behind the codec, stand beside.
    """
    prior = read_prior(run)
    _, held = read_pictures(data_folder(data))
    assert held is not None
    found = measure_prior(prior, held).metrics
    asked = [(i, TOLD.format(colour=name, garment=g)) for i, name in enumerate(COLOURS) for g in CLASSES[1:]] * times
    sampling = Sampling(temperature=1.0, seed=0)
    drawn = draw_images(prior, [text for _, text in asked], sampling=sampling)
    seen = [colour(one) for one in _bytes(prior.pictures(drawn.codes))]
    real, behind = _real(prior, len(asked))
    return {
        "drawn": len(asked),
        "after": {
            **{name.replace(" ", "_"): value for name, value in found.items()},
            "colour": float(np.mean([i == got for (i, _), got in zip(asked, seen, strict=True)])),
            "colour_codec": behind,
            "colour_real": real,
        },
    }


def _real(prior: Prior, count: int) -> tuple[float, float]:
    """How often the colour of real scenes on plain grounds is found: as they are, and behind the codec."""
    assert prior.codec is not None
    size = prior.layout.rows * prior.codec.factor
    scenes = Scenes(8 * count, size=size, part="val", garments=(1, 1), sides=(0.4, 0.65))
    chosen = [one for one in map(scenes.scene, range(len(scenes))) if one.ground == PLAIN][:count]
    wanted = [list(COLOURS).index(one.garments[0].colour) for one in chosen]
    pixels = torch.stack([torch.from_numpy(one.image).movedim(-1, 0) for one in chosen]).float() / 127.5 - 1
    kept = prior.pictures(prior.codec.encode(pixels))
    return tuple(
        float(np.mean([i == colour(one) for i, one in zip(wanted, shown, strict=True)]))
        for shown in ([one.image for one in chosen], _bytes(kept))
    )  # pyright: ignore[reportReturnType]


def _bytes(pictures: torch.Tensor) -> list[np.ndarray]:
    """Pictures (n, 3, y, x) in [-1, 1] as uint8 (y, x, 3)."""
    return list(to_bytes(pictures).movedim(1, -1).numpy())
