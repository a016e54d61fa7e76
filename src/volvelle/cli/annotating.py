"""What `annotate` does: picture by picture, words from standard input, a preview on disk, and one JSON file."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from volvelle.cli.console import Progress, result, say
from volvelle.errors import UsageError, VolvelleError

if TYPE_CHECKING:
    import numpy as np

    from volvelle.data.coco_masks import MaskedObject
    from volvelle.data.promptable_clicks import Click
    from volvelle.systems.segmentation.sam.options import EverythingOptions
    from volvelle.systems.segmentation.sam.promptable import Promptable
    from volvelle.train.promptable_engine import Collection, Session

Step = Literal["assisted", "semi-automatic", "automatic"]
WORDS = """  120,80            a click for the object: x,y in pixels, from the upper left corner
  - 120,80          a click against it
  box 10,20,90,80   a box around a new object: x1,y1,x2,y2
  undo              take back the last click
  keep [NAME]       keep the mask as an object
  drop 3            take away kept object 3
  list              what is kept
  next              this picture is done
  skip              leave this picture out
  stop              end here; the pictures that are done are in the file"""
PREVIEW = "annotate-preview.png"
COLUMNS = 64


class _Stop(Exception):
    """The human has had enough."""


def annotate(model: str, data: Path, *, step: Step, out: Path | None, name: str, grid: EverythingOptions) -> int:
    """Go through the pictures of `data` that the file `out` does not hold yet; those that cannot be read are named."""
    from volvelle.data.images import list_images
    from volvelle.systems.segmentation.sam.load import load_sam
    from volvelle.systems.segmentation.sam.promptable import Promptable
    from volvelle.train.promptable_engine import Collection

    files = [data] if data.is_file() else [file for file in list_images(data) if file.name != PREVIEW]
    file = out or (data.parent if data.is_file() else data) / "objects.json"
    collection, prompted = Collection(file), Promptable(load_sam(model))
    left = [image for image in files if image not in collection]
    say(f"{len(left)} of {len(files)} pictures to do; {len(collection)} objects in {file}")
    done, bad = 0, list[Path]()
    progress = Progress("pictures", len(left)) if step == "automatic" else None
    try:
        for image in left:
            try:
                found = _objects(prompted, image, step, file.parent / PREVIEW, name, grid)
            except VolvelleError as error:
                say(f"passed over: {error}", *_tip(error))
                bad.append(image)
                found = None
            if found is not None:
                collection.add(image, *found)
                done += 1
            if progress:
                progress.advance()
    except _Stop:
        say("stopped; the same command goes on")
    return _finish(collection, done, bad)


def _finish(collection: Collection, done: int, bad: Sequence[Path]) -> int:
    """Say what is in the file; 1 where pictures could not be read and none was done."""
    file = collection.file
    if bad:
        say("", f"{len(bad)} pictures could not be read: {', '.join(map(str, bad[:5]))}{', …' if bad[5:] else ''}")
    facts = {"pictures": len(collection.entries), "objects": len(collection), "passed_over": [str(one) for one in bad]}
    if not collection.entries:
        say("nothing was kept, so nothing is written")
        result({"file": None, **facts})
        return int(bool(bad))
    say("", f"{done} pictures done, {len(collection)} objects in {file}")
    if len(collection):
        say(f"next     volvelle train promptable data={file}")
    result({"file": str(file), **facts})
    return 0


def _objects(
    prompted: Promptable, image: Path, step: Step, preview: Path, name: str, grid: EverythingOptions
) -> tuple[tuple[int, int], list[MaskedObject]] | None:
    """A picture's (width, height) and objects; None where the human leaves it out. VolvelleError for a bad file."""
    from volvelle.systems.segmentation.sam.pictures import open_picture, upright
    from volvelle.train.promptable_engine import Session, propose

    picture = upright(open_picture(image))
    if step == "automatic":
        proposals = propose(prompted, picture, grid)
        say(f"{image}: {len(proposals)} objects")
        return picture.size, proposals
    session = Session(prompted, picture)
    if step == "semi-automatic":
        session.kept = propose(prompted, session.embedding, grid)
    return (picture.size, session.kept) if _go_through(session, image, preview, name) else None


def _go_through(session: Session, image: Path, preview: Path, name: str) -> bool:
    """Let a human work on one picture; whether its objects are to be written."""
    say("", f"{image}: {session.image.width} x {session.image.height}; help lists the words")
    if session.kept:
        _list(session)
    _show(session, preview)
    for line in _typed():
        word, _, rest = line.partition(" ")
        try:
            if word in ("next", "skip"):
                if word == "next" and session.answer is not None:
                    say("the mask that was not kept is left out")
                return word == "next"
            if word == "stop":
                raise _Stop
            _obey(session, word, rest.strip(), line, name)
        except VolvelleError as error:
            say(f"{error}", *_tip(error))
            continue
        _show(session, preview)
    raise _Stop


def _obey(session: Session, word: str, rest: str, line: str, name: str) -> None:
    """Do what one line says; UsageError for one that says nothing."""
    if word == "help":
        say(*WORDS.split("\n"))
    elif word == "list":
        _list(session)
    elif word == "undo":
        session.undo()
    elif word == "keep":
        one = session.keep(rest or name)
        say(f"kept {len(session.kept)}: {one.name}, {one.mask.area:,} pixels")
    elif word == "drop":
        session.drop(int(_numbers(rest, 1, line)[0]))
    elif word == "box":
        x1, y1, x2, y2 = _numbers(rest, 4, line)
        session.draw((x1, y1, x2, y2))
    else:
        label = 0 if word == "-" else 1
        x, y = _numbers(rest if word in ("-", "+") else line, 2, line)
        session.click(int(x), int(y), label)


def _show(session: Session, preview: Path) -> None:
    """Write the preview, and say in words and letters what the newest answer is."""
    preview.parent.mkdir(parents=True, exist_ok=True)
    session.picture().save(preview)
    answer = session.answer
    if answer is None:
        say(f"  preview  {preview}")
        return
    say(*drawn(answer.mask, session.clicks))
    say(f"  a mask of {int(answer.mask.sum()):,} pixels, estimated IoU {answer.iou:.2f}; preview {preview}")


def drawn(mask: np.ndarray, clicks: Sequence[Click], columns: int = COLUMNS) -> list[str]:
    """A mask (y, x) in letters: # where it is, + and - for clicks. A letter is about twice as high as wide.

    >>> import numpy as np
    >>> drawn(np.array([[0, 1, 1, 0]] * 2, dtype=bool), [], columns=4)
    ['.##.']
    """
    high, wide = mask.shape
    columns = min(columns, wide)
    rows = max(1, round(high * columns / wide / 2))
    ys, xs = ([int((i + 0.5) * side / count) for i in range(count)] for side, count in ((high, rows), (wide, columns)))
    letters = [["#" if mask[y, x] else "." for x in xs] for y in ys]
    for click in clicks:
        letters[min(rows - 1, click.y * rows // high)][min(columns - 1, click.x * columns // wide)] = "-+"[click.label]
    return ["".join(row) for row in letters]


def _list(session: Session) -> None:
    for number, one in enumerate(session.kept, 1):
        x1, y1, x2, y2 = one.mask.box
        say(f"  {number:>3}  {one.name}, {one.mask.area:,} pixels in {x1},{y1},{x2},{y2}")


def _typed() -> Iterator[str]:
    """Lines that somebody typed, without empty ones, until there are no more."""
    for line in sys.stdin:
        if line.strip():
            yield line.strip()


def _tip(error: VolvelleError) -> list[str]:
    return [f"tip: {error.tip}"] if error.tip else []


def _numbers(text: str, count: int, line: str) -> list[float]:
    try:
        found = [float(word) for word in text.replace(",", " ").split()]
    except ValueError:
        found = []
    if len(found) != count or not all(map(math.isfinite, found)):
        raise UsageError(f"{line!r}: not understood", tip="help lists the words")
    return found
