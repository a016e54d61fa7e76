"""What `eval`, `predict` and `export` do with runs of `train vqgan`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from volvelle.cli.console import result, say
from volvelle.cli.measured import figures
from volvelle.runs import RunFolder

if TYPE_CHECKING:
    from volvelle.data.text import OnBad

KIND = "vqgan"
"""The kind of runs that this file knows."""


def is_codec(path: str | Path) -> bool:
    """Whether the path is a run folder of `train vqgan`."""
    folder = Path(path)
    return (folder / "manifest.json").is_file() and RunFolder.open(folder).manifest.get("kind") == KIND


def evaluate(path: str, data: str, *, batch: int, on_bad: OnBad) -> int:
    """Measure a run's codec on a folder of pictures (its val or test part, when it has one), and print it."""
    from volvelle.cli.training import console
    from volvelle.train.vqgan import evaluate_run

    with console() as observer:
        found = evaluate_run(Path(path), data, batch=batch, on_bad=on_bad, observer=observer)
    figures(found.metrics)
    result({"model": path, "data": data, **found.metrics})
    return 0


def predict(path: str, files: Sequence[Path], out: Path) -> list[dict[str, Any]]:
    """Write each picture beside what its codes show, and say what the codes are; a record of each."""
    import torch

    from volvelle.data.images_labelled import Files
    from volvelle.data.pictures import PictureSet, to_signed
    from volvelle.files import atomic_path
    from volvelle.systems.generation.load import load_vqgan
    from volvelle.train.vqgan_report import framing_of, reconstructions

    model = load_vqgan(path)
    side = model.size // model.factor
    say(f"{model.size} x {model.size} pixels as {side} x {side} codes of {model.vocabulary:,}; fp32 on the CPU")
    out.mkdir(parents=True, exist_ok=True)
    pictures, records = PictureSet(Files(files), range(len(files))), []
    for index, file in enumerate(files):
        target = out / f"{file.stem}-codes.png"
        with atomic_path(target) as temporary:
            reconstructions(model, pictures.part([index]), 1).save(temporary, format="PNG")
        pixels = to_signed(framing_of(model).middle(pictures[index])[None])
        with torch.no_grad():
            codes = model.encode(pixels)[0]
        say(f"{file}: {len(codes.unique())} different codes; above the picture, below what they show: {target}")
        records.append({"image": str(file), "codes": codes.tolist(), "reconstruction": str(target)})
    return records


def export(path: str, out: Path, to: Literal["taming", "diffusers", "transformers"]) -> str:
    """Write a codec in another library's format; how to load it there."""
    from volvelle.systems.generation.load import load_vqgan, write_vqgan

    model = load_vqgan(path)
    if to == "taming":
        out.mkdir(parents=True, exist_ok=True)
        write_vqgan(model, out / "vqgan.ckpt", to)
        return f"taming's VQModel as {out / 'vqgan.yaml'} says, with the state_dict of {out / 'vqgan.ckpt'}"
    write_vqgan(model, out, to)
    names = {"diffusers": "diffusers.VQModel", "transformers": "transformers.ChameleonVQVAE"}
    return f'{names[to]}.from_pretrained("{out}")'
