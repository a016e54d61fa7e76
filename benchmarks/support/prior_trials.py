"""What was measured to choose how a prior knows where a code stands, and how it draws larger pictures."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from volvelle.data.codes import CodedPictures, collate_codes, encode_pictures
from volvelle.data.pictures import Framing, read_pictures
from volvelle.data.text import spread
from volvelle.parts.position.axial import axial_rotation
from volvelle.parts.position.encoding import PositionEncoding, Turning
from volvelle.parts.position.rope import rope_frequencies
from volvelle.runs import RunFolder
from volvelle.systems.generation.larger import Larger
from volvelle.systems.generation.layout import Layout
from volvelle.systems.generation.prior import Prior, read_prior
from volvelle.train.classify import data_folder
from volvelle.train.language import LanguageObjective
from volvelle.train.loop import fit
from volvelle.train.options import from_dict
from volvelle.train.prior import build_model
from volvelle.train.prior_data import CODES, Reading, held_loader, training_loader
from volvelle.train.recipes.choices import PositionName
from volvelle.train.recipes.prior import TrainPrior

KINDS: tuple[PositionName, ...] = ("rope", "learned", "sinusoidal", "alibi", "none")
GRID = "rope, rows and columns"
TIMES = 2
"""How much larger the pictures of `window` are."""


class GridRope(PositionEncoding):
    """RoPE on two axes: half of the pairs of features turn by a code's row, half by its column.

    What is said before the picture stands in row 0, columns below 0.
    """

    def __init__(self, layout: Layout, said: int, dim: int):
        super().__init__()
        self.layout, self.said, self.frequencies = layout, said, rope_frequencies(dim // 2)

    def rotation(self, positions: Tensor, dtype: torch.dtype) -> Turning:
        """Prepare cos and sin for raster positions (n,) or (b, n)."""
        code = positions - self.said
        row = torch.where(code < 0, 0, code // self.layout.columns)
        column = torch.where(code < 0, code, code % self.layout.columns)
        return axial_rotation(torch.stack((row, column), -1), self.frequencies, dtype)


def positions(run: Path, steps: int) -> dict[str, Any]:
    """Held-out nats a code of fresh priors of the run's recipe after so many steps, by their positions."""
    recipe, layout = _recipe(run, steps), read_prior(run).layout
    held, texts = (_texts(run / CODES / f"{name}.safetensors") for name in ("held", "train"))
    found: dict[str, float] = {}
    for kind in (*KINDS, GRID):
        torch.manual_seed(recipe.seed)
        name: PositionName = "rope" if kind == GRID else kind  # pyright: ignore[reportAssignmentType]
        model = build_model(replace(recipe, position=name), layout)
        if kind == GRID:
            model.model.position = GridRope(layout, len(layout.prompt()), model.config.head_width)
        objective = LanguageObjective(model, recipe, held_out=held_loader(held, recipe.batch))
        result = fit(objective, training_loader(recipe, texts, layout), options=recipe)
        found[kind] = result.held_out["loss"]
        print(f"positions: {kind}: {found[kind]:.4f} nats a code after {steps} steps", flush=True)
    return {"run": run.name, "steps": steps, "nats": found}


def _recipe(run: Path, steps: int) -> TrainPrior:
    """The run's recipe, shorter and without an average."""
    known = {k: v for k, v in RunFolder.open(run).config().items() if k in TrainPrior.__dataclass_fields__}
    return from_dict(TrainPrior, known | {"steps": steps, "average": None, "evaluate_every": None})


def _texts(file: Path) -> CodedPictures:
    from safetensors.torch import load_file

    tensors = load_file(file)
    prompts = tensors["prompts"].split(tensors["lengths"].tolist())
    return CodedPictures(tensors["codes"], [part.tolist() for part in prompts])


@torch.no_grad()
def window(prior: Prior, data: str, count: int) -> dict[str, Any]:
    """Nats a code outside the trained size, of pictures TIMES as wide and high, by three ways to read them."""
    layout, codec = prior.layout, prior.codec
    assert codec is not None
    train, held = read_pictures(data_folder(data))
    pictures = held or train
    pictures = pictures.part(spread(range(len(pictures)), count))
    rows, columns = TIMES * layout.rows, TIMES * layout.columns
    framing = Framing(TIMES * layout.rows * codec.factor, codec.channels)  # pyright: ignore[reportArgumentType]
    how = Reading(codec, Path(), layout, framing, prior.words)
    codes = encode_pictures(pictures, framing, how.encode)
    prompts = [prior.prompt(None)] * len(pictures)
    ids = collate_codes([CodedPictures(codes, prompts)[i] for i in range(len(pictures))])["ids"]
    said = len(prompts[0])
    wide = Larger(prior.model, layout, rows=rows, columns=columns, said=said)
    outside = torch.tensor(
        [k // columns >= layout.rows or k % columns >= layout.columns for k in range(rows * columns)]
    )
    ways: dict[str, Callable[[], Tensor]] = {
        "window, keys kept": lambda: _rolled(wide, ids),
        "window, run anew": lambda: _anew(prior, wide, ids, said),
        "positions go on": lambda: prior.model(ids[:, :-1]).logits[:, said - 1 :],
    }
    found = {who: _nats(way(), codes, outside) for who, way in ways.items()}
    print("window: " + ", ".join(f"{who} {nats:.4f}" for who, nats in found.items()), flush=True)
    return {"pictures": len(pictures), "rows": rows, "columns": columns, "nats": found}


def _nats(logits: Tensor, codes: Tensor, outside: Tensor) -> float:
    return float(F.cross_entropy(logits[:, outside].flatten(0, 1).float(), codes[:, outside].flatten()))


def _rolled(wide: Larger, ids: Tensor) -> Tensor:
    """Logits (b, places, v) by the cache of a window."""
    cache, found = wide.new_cache(len(ids), 0), []
    for part in (ids[:, : wide.said], *ids[:, wide.said : -1].split(1, 1)):
        found.append(wide.logits(wide.hidden(part, cache=cache)[:, -1:]))
        cache.commit()
    return torch.cat(found, 1)


def _anew(prior: Prior, wide: Larger, ids: Tensor, said: int) -> Tensor:
    """Logits (b, places, v), the model run over all of a window for every code."""
    w = prior.layout.columns
    cache, codes, found = wide.new_cache(len(ids), 0), ids[:, said:].unflatten(1, (wide.rows, wide.columns)), []
    for place in range(wide.rows * wide.columns):
        row, column = divmod(place, wide.columns)
        top, left = cache.origin(place)
        before = (row - top) * w + column - left
        shown = codes[:, top : row + 1, left : left + w].flatten(1)[:, :before]
        found.append(prior.model(torch.cat((ids[:, :said], shown), 1)).logits[:, -1:])
    return torch.cat(found, 1)
