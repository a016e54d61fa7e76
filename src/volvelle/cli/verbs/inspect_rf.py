"""`volvelle inspect WHAT rf`: what every layer of a network sees of its input, as a table and a drawing."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tyro.conf import Positional

from volvelle.cli.console import result, say

if TYPE_CHECKING:
    from volvelle.cli.inspected import Inspected

EXAMPLES = (
    "volvelle inspect efficientnet-b0 rf",
    "volvelle inspect resnet-18 rf input=photo.jpg effective=true verify=true",
)


@dataclass(frozen=True)
class Options:
    """The network, its input, and what is drawn."""

    model: Positional[str]
    """A backbone (efficientnet-b0), a run or folder of a classifier, or package.module:callable of your own."""
    shape: str | None = None
    """Shape of the input, such as 1x3x224x224; that of the network when left out."""
    input: Path | None = None
    """A picture, under the drawing."""
    svg: Path | None = None
    """Where the drawing goes; NAME-rf.svg when left out."""
    verify: bool = False
    """Compare units all over the network with the gradients of a copy with positive weights."""
    effective: bool = False
    """Also draw the effective field: how much each pixel matters with the network's own weights."""
    at: str | None = None
    """Layer of the effective field, by its path; the last features when left out."""
    seeds: int = 8
    """Noise inputs that the effective field is averaged over."""


def main(options: Options) -> int:
    """Print the table and write the drawing; the exit code is 1 when verify= finds a difference."""
    from volvelle.cli.inspected import find_module, parse_shape
    from volvelle.files import write_atomic

    shape = parse_shape(options.shape)
    picture = _picture(options.input)
    from volvelle.errors import UsageError
    from volvelle.inspect import effective_field, receptive_field

    found = find_module(options.model, shape)
    if found.ids:
        raise UsageError(f"inspect rf: {options.model} reads token ids, a field of pixels is looked for")
    say(f"{options.model}: {found.source}; traced on fake tensors, sizes as if the input had no border")
    field = receptive_field(found.module, found.shape, verify=options.verify)
    say("", str(field))
    stem = Path(options.model.replace(":", ".")).name
    drawing = options.svg or Path(f"{stem}-rf.svg")
    write_atomic(drawing, field.svg(_cropped(picture, found)))
    say("", f"wrote {drawing}")
    record: dict[str, Any] = {**field.record(), "source": found.source, "svg": str(drawing)}
    if options.effective:
        effective = effective_field(found.module, found.shape, at=options.at, seeds=options.seeds, field=field)
        heat = drawing.with_name(f"{drawing.stem}-effective.svg")
        write_atomic(heat, effective.svg())
        say(f"effective field of {effective.node}: {', '.join(effective.lines())}", f"wrote {heat}")
        record |= {"effective": effective.record(), "effective_svg": str(heat)}
    result(record)
    return 1 if field.agrees is False else 0


def _picture(path: Path | None) -> Any:
    """The picture, opened before anything is computed, so that a wrong name costs nothing."""
    if path is None:
        return None
    from volvelle.data.images import read_image

    return read_image(path)


def _cropped(picture: Any, found: Inspected) -> Any:
    """The part of the picture that the network would be given: its middle, in the shape of the input."""
    if picture is None or len(found.shape) != 4:
        return picture
    from PIL import ImageOps

    return ImageOps.fit(picture, (found.shape[3], found.shape[2]))
