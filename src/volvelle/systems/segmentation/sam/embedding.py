"""An embedded picture: what Segment Anything computes once, to be kept, saved, and asked as often as one likes."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from volvelle.errors import VolvelleError
from volvelle.files import atomic_path

_MARK = "volvelle.sam.embedding"


@dataclass(eq=False)
class Embedding:
    """Features (1, c, g, g) of a picture of `original` (height, width), resized to `scaled` in an input of `size`.

    `model` is the name of the model that computed them: no other can read them, nor one with other weights. `fine` are
    the finer maps of an encoder that gives some.
    """

    features: Tensor
    original: tuple[int, int]
    scaled: tuple[int, int]
    size: int
    model: str
    fine: tuple[Tensor, ...] = ()
    weights: str = ""
    """The `fingerprint` of the image encoder's weights; empty in files that were written before there was one."""

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a .safetensors file: the features as they are, and the sizes."""
        from safetensors.torch import save_file

        facts = {name: getattr(self, name) for name in ("original", "scaled", "size", "model", "weights")}
        target = Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        with atomic_path(target) as temporary:
            maps = {"features": self.features, **{f"fine.{i}": one for i, one in enumerate(self.fine)}}
            tensors = {name: one.detach().cpu().contiguous() for name, one in maps.items()}
            save_file(tensors, temporary, metadata={"format": "pt", _MARK: json.dumps(facts)})

    @classmethod
    def load(cls, path: str | os.PathLike[str], *, device: torch.device | str | None = None) -> Embedding:
        """Read what `save` wrote. Raises VolvelleError for a file that is missing, broken or something else."""
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(os.fspath(path), framework="pt") as file:
                facts = json.loads((file.metadata() or {}).get(_MARK, "null"))
                features = file.get_tensor("features") if facts else torch.empty(0)
                fine = [file.get_tensor(name) for name in sorted(file.keys()) if name.startswith("fine.")]
        except FileNotFoundError:
            raise VolvelleError(f"{path}: no such file") from None
        except (OSError, SafetensorError, ValueError) as error:
            raise VolvelleError(f"{path}: cannot be read ({str(error).splitlines()[0]})") from error
        if not isinstance(facts, dict) or features.dim() != 4:
            raise VolvelleError(f"{path}: not an embedding that Promptable saved")
        (height, width), (y, x) = facts["original"], facts["scaled"]
        features, *fine = (one.to(device or "cpu") for one in (features, *fine))
        return cls(
            features, (height, width), (y, x), facts["size"], facts["model"], tuple(fine), facts.get("weights", "")
        )
