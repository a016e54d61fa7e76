"""`volvelle export`: write a run so that other programs read it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tyro.conf import Positional

from volvelle.cli import coding, detecting, prompting
from volvelle.cli.console import result, say
from volvelle.cli.models import Floating
from volvelle.errors import UsageError, VolvelleError

EXAMPLES = (
    "volvelle export smollm2 to=hf out=smollm2-hf",
    "volvelle export runs/adapt-smollm2-lora-1 to=peft out=my-adapter",
    "volvelle export runs/vqgan-1 to=diffusers out=my-codec",
    "volvelle export runs/detect-1 to=onnx",
)


@dataclass(frozen=True)
class Options:
    """What to write, and in which format."""

    run: Positional[str]
    """A run, or a model."""
    to: Literal["hf", "peft", "adapter", "taming", "diffusers", "transformers", "onnx"] = "hf"
    """hf: a folder that transformers and vLLM load, adapters merged in; peft: the adapter alone, for PEFT and vLLM;
    adapter: the adapter alone, also where PEFT has no such method (bottleneck adapters).
    Image codecs: taming, for taming-transformers; diffusers, its VQModel; transformers, its ChameleonVQVAE.
    Detectors and promptable models: onnx, files for ONNX Runtime."""
    out: Path | None = None
    """Folder to write; RUN/export-hf and so on when left out. It must not exist yet, or be empty."""
    precision: Floating = "fp32"
    """Precision of the written weights (hf). fp32 keeps every bit of a dequantised or merged model."""
    shard: float = 5.0
    """The largest file of weights, in GB (hf); what is larger becomes several and an index."""


def main(options: Options) -> int:
    """Write the folder and say how to load it."""
    run = Path(options.run)
    if options.out is None and not run.is_dir():
        raise UsageError(f"export: {options.run} is not a folder here, so out= must say where to write")
    out = options.out or run / f"export-{options.to}"
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise VolvelleError(f"{out}: already there", tip="choose another folder with out=")
    load = _write(options, out)
    files = sorted(path for path in out.rglob("*") if path.is_file())
    say(*(f"{path}  {path.stat().st_size / 1e6:.1f} MB" for path in files), "", f"load it with: {load}")
    result({"out": out, "files": files})
    return 0


def _write(options: Options, out: Path) -> str:
    """Write the folder; how to load it."""
    if options.to == "onnx":
        return _write_onnx(options.run, out)
    if detecting.is_detection(options.run) or prompting.is_promptable(options.run):
        raise UsageError(f"export: {options.run} finds things in pictures; to={options.to} does not", tip="to=onnx")
    codec = coding.is_codec(options.run)
    if options.to in ("taming", "diffusers", "transformers"):
        if not codec:
            raise UsageError(
                f"export: to={options.to} is for image codecs, runs of train vqgan", tip="to=hf, or to=peft"
            )
        return coding.export(options.run, out, options.to)
    if codec:
        raise UsageError(
            f"export: {options.run} holds an image codec, and to={options.to} is for language models",
            tip="to=diffusers, to=taming or to=transformers",
        )
    return _write_merged(options, out) if options.to == "hf" else _write_adapter(options, out)


def _write_onnx(run: str, out: Path) -> str:
    if detecting.is_detection(run):
        return detecting.export(Path(run), out)
    if prompting.is_promptable(run):
        from volvelle.systems.segmentation.sam.onnx import export_onnx

        files = export_onnx(prompting.open_promptable(Path(run)), out)
        return ", ".join(f'onnxruntime.InferenceSession("{file}")' for file in files)
    raise UsageError(
        f"export: to=onnx is for runs of train detect and train promptable, and {run} is neither",
        tip="to=hf for language models, to=diffusers for image codecs",
    )


def _write_merged(options: Options, out: Path) -> str:
    from volvelle.cli.models import open_language_model
    from volvelle.systems.language.huggingface import write_folder

    if options.shard <= 0:
        raise UsageError(f"export: shard: a size above 0 GB is wanted, got {options.shard:g}")
    _check_merges(options.run)
    model = open_language_model(options.run, options.precision)
    if model.config.family == "volvelle":
        config = model.config
        raise VolvelleError(
            f"{options.run}: transformers has no model with position = {config.position!r} and {config.attention!r}",
            tip="our own folder of it, which load_language_model opens, is weights/ in the run",
        )
    write_folder(model, out, shard_size=max(1, round(options.shard * 1e9)))
    kind = "AutoModelForSeq2SeqLM" if model.config.family == "bart" else "AutoModelForCausalLM"
    return f'transformers.{kind}.from_pretrained("{out}")'


def _check_merges(run: str) -> None:
    """Raise VolvelleError for a run whose adapter is no sum with weights, before its base is opened."""
    from volvelle.adapt.files import CONFIG, peft_reads, read_config
    from volvelle.adapt.methods import LoRA

    folder = next((one for one in (Path(run) / "adapter", Path(run)) if (one / CONFIG).is_file()), None)
    if folder is None:
        return
    method = read_config(folder)
    if isinstance(method, LoRA):
        return
    other = "to=peft writes it alone, for PEFT" if peft_reads(folder) else "to=adapter writes it alone"
    raise VolvelleError(
        f"{run}: {method.label} cannot be folded into the weights, and transformers' models have no place for it",
        tip=f"{other}; volvelle serve MODEL adapters=NAME={run} serves it",
    )


def _write_adapter(options: Options, out: Path) -> str:
    from volvelle import adapt
    from volvelle.adapt.files import base_name, peft_reads
    from volvelle.runs import RunFolder

    model = adapt.load_run(options.run)
    found = adapt.adapted(model)
    if not found:
        raise VolvelleError(f"{options.run}: holds no adapter", tip="to=hf writes whole models")
    known = peft_reads(model)
    if options.to == "peft" and not known:
        what = f"{found.method.label} of this model"
        raise VolvelleError(f"{options.run}: PEFT has no {what}", tip="to=adapter writes a format of our own")
    folder = Path(options.run)
    is_run = (folder / "manifest.json").is_file()
    adapt.save(model, out, base=RunFolder.open(folder).manifest.get("base_model") if is_run else base_name(folder))
    return f'{"peft.PeftModel.from_pretrained" if known else "volvelle.adapt.load"}(base_model, "{out}")'
