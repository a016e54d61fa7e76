"""`volvelle eval`: measure a model or a run on held-out data."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from tyro.conf import Positional

from volvelle.cli import classifying, coding, detecting, gans, generating, prompting, segmenting
from volvelle.cli.console import result, say
from volvelle.cli.measured import figures
from volvelle.cli.models import Precision, open_language_model
from volvelle.decode.options import Beams
from volvelle.train.recipes.segment import LookOptions

EXAMPLES = (
    "volvelle eval smollm2 data=dev.jsonl",
    "volvelle eval runs/adapt-smollm2-lora-1 data=dev.jsonl outputs=100",
    "volvelle eval runs/segment-1 data=camvid scales=0.75,1,1.5 mirror=true",
    "volvelle eval runs/detect-1 data=bccd",
    "volvelle eval runs/promptable-1 data=camvid",
    "volvelle eval sam_vit_b.pth data=camvid precision=fp32",
    "volvelle eval runs/vqgan-1 data=fashion-mnist",
    "volvelle eval runs/prior-1 data=fashion-mnist judge=runs/classify-1",
)


@dataclass(frozen=True)
class Options:
    """What to measure, and on what."""

    model: Positional[str]
    """A known model, a Hugging Face repo id, a folder, a run, or a checkpoint of Segment Anything's."""
    data: str
    """A .txt or .jsonl file, as for adapt; for a run on pictures a folder as for its training."""
    prompt: str | None = None
    """Template of the prompt; a run's own when left out."""
    completion: str | None = None
    """Template of the completion; a run's own when left out. An expression giving a list: several right answers."""
    outputs: int | None = None
    """Prompts to answer and score by BLEU and ROUGE, from the first on; all when left out, 0 for none."""
    beams: Beams = field(default_factory=lambda: Beams(width=1))
    """Beam search for the answers, where its width is above 1."""
    max_tokens: int = 64
    """The longest answer, in tokens."""
    batch: int = 16
    """Samples measured at once."""
    precision: Precision = "auto"
    """auto: bf16 where the hardware multiplies it, else fp32; a promptable run's own."""
    on_bad: Literal["stop", "skip"] = "stop"
    """What to do with lines that are broken, or longer than the context."""
    show: int = 3
    """Answers to print."""
    split: str | None = None
    """Runs on pictures: the part of the folder to measure on (train, val, test); None: val when there is one."""
    scales: tuple[float, ...] = (1.0,)
    """Segmenters: magnifications whose probabilities are averaged, such as 0.75,1,1.5."""
    mirror: bool = False
    """Segmenters: look at the mirror image too."""
    window: tuple[int, int] = (0, 0)
    """Segmenters: height and width of windows that slide over larger pictures; 0,0: the whole picture at once."""
    judge: str | None = None
    """Runs that draw: a run of train classify that says what the pictures show."""
    extractor: str | None = None
    """Runs that draw: whose features measure how far drawn pictures are from real ones: pixels, efficientnet-lite0, or
    a run of train classify; None: the judge's."""
    samples: int = 500
    """Runs that draw: pictures drawn for that."""


def main(options: Options) -> int:
    """Print loss, perplexity, BLEU and ROUGE, with a few answers; for runs on pictures what their kind is judged by."""
    if segmenting.is_segmentation(options.model):
        return segmenting.evaluate(
            Path(options.model),
            options.data,
            split=options.split,
            looks=LookOptions(scales=options.scales, mirror=options.mirror, window=options.window),
            on_bad=options.on_bad,
        )
    if coding.is_codec(options.model):
        return coding.evaluate(options.model, options.data, batch=options.batch, on_bad=options.on_bad)
    if generating.kind_of(options.model) == "prior":
        return generating.evaluate(
            options.model,
            options.data,
            judge=options.judge,
            extractor=options.extractor,
            samples=options.samples,
            batch=options.batch,
            on_bad=options.on_bad,
        )
    if gans.is_gan(options.model):
        return gans.evaluate(
            options.model,
            options.data,
            extractor=options.extractor,
            samples=options.samples,
            on_bad=options.on_bad,
        )
    if detecting.is_detection(options.model):
        return detecting.evaluate(Path(options.model), options.data, split=options.split, on_bad=options.on_bad)
    if prompting.is_promptable(options.model):
        return prompting.evaluate(
            Path(options.model),
            options.data,
            split=options.split,
            on_bad=options.on_bad,
            precision=options.precision,
        )
    if classifying.is_classification(options.model):
        return classifying.evaluate(options.model, options.data, batch=options.batch, on_bad=options.on_bad)
    return _evaluate_text(options)


def _evaluate_text(options: Options) -> int:
    """Measure a language model."""
    from volvelle.data.text import read_corpus

    templates = _templates(options)
    corpus = read_corpus(options.data, on_bad=options.on_bad, **templates)
    say(str(corpus))
    model = open_language_model(options.model, options.precision)
    from volvelle.cli.training import console
    from volvelle.train.evaluate import evaluate_language

    with console() as observer:
        found = evaluate_language(
            model,
            corpus,
            batch=options.batch,
            outputs=options.outputs,
            max_tokens=options.max_tokens,
            beams=options.beams if options.beams.width > 1 else None,
            on_bad=options.on_bad,
            progress=lambda done, total: observer.work("answers", done, total),
        )
    for prompt, output in list(zip(found.prompts, found.outputs, strict=True))[: options.show]:
        say("", f"prompt     {_line(prompt.example.prompt)}", f"answer     {_line(output)}")
        say(*(f"reference  {_line(text)}" for text in prompt.references))
    say()
    figures(found.metrics)
    result({"model": options.model, "data": options.data, **found.metrics, "outputs": found.outputs})
    return 0


def _templates(options: Options) -> dict[str, Any]:
    """The templates that were typed, else those that the run was trained with."""
    from volvelle.runs import RunFolder

    given = {"prompt": options.prompt, "completion": options.completion}
    folder = Path(options.model)
    if any(given.values()) or not (folder / "manifest.json").is_file():
        return given
    config = RunFolder.open(folder).config()
    found = {name: config.get(name) for name in given}
    if any(found.values()):
        say(f"templates from {folder / 'config.yaml'}: {json.dumps(found, ensure_ascii=False)}")
    return found


def _line(text: str) -> str:
    return " ".join(text.split())
