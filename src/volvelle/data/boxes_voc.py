"""Boxes in VOC's XML: one file a picture, read with the line of every object.

    <annotation> <size> <width/> <height/> </size>
      <object> <name/> <difficult/> <bndbox> <xmin/> <ymin/> <xmax/> <ymax/> </bndbox> </object>
    </annotation>

Corners are taken as they are written. Difficult objects are read as ignored ones.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from xml.parsers import expat

from volvelle.data.boxes_notes import Corners, Note, Object
from volvelle.errors import VolvelleError


@dataclass
class Element:
    """A tag with its text, its children, and the line that it begins on."""

    tag: str
    line: int
    text: str = ""
    children: list[Element] = field(default_factory=list)

    def child(self, tag: str) -> Element | None:
        """The first child of that tag."""
        return next((child for child in self.children if child.tag == tag), None)

    def word(self, tag: str) -> str | None:
        """The text of the first child of that tag, trimmed; None where there is none, or nothing in it."""
        found = self.child(tag)
        return (found.text.strip() or None) if found is not None else None


def parse_xml(path: Path) -> Element:
    """The root of an XML file. Raises VolvelleError with the line for one that is broken or declares entities."""
    parser = expat.ParserCreate()
    root, open_ones = Element("", 0), list[Element]()

    def start(tag: str, attributes: dict[str, str]) -> None:
        element = Element(tag, parser.CurrentLineNumber)
        (open_ones[-1] if open_ones else root).children.append(element)
        open_ones.append(element)

    def text(data: str) -> None:
        open_ones[-1].text += data

    def entity(name: str, *rest: object) -> None:
        raise VolvelleError(f"{path}:{parser.CurrentLineNumber}: declares the entity {name!r}, which is not read")

    parser.StartElementHandler, parser.CharacterDataHandler, parser.EntityDeclHandler = start, text, entity
    parser.EndElementHandler = lambda tag: open_ones.pop()
    try:
        parser.Parse(path.read_bytes(), True)
    except expat.ExpatError as error:
        raise VolvelleError(f"{path}:{error.lineno}: not XML ({expat.errors.messages[error.code]})") from error
    except OSError as error:
        raise VolvelleError(f"{path}: cannot be read ({error.strerror})") from error
    return root.children[0]


def read_note(path: Path, image: Path) -> Note:
    """What a file says of its picture; a file that cannot be understood is a note with a `problem`."""
    try:
        root = parse_xml(path)
        if root.tag != "annotation":
            raise VolvelleError(f"{path}:{root.line}: <{root.tag}>, where VOC has <annotation>")
        objects = tuple(_object(element, path) for element in root.children if element.tag == "object")
        return Note(image, str(path), objects, _size(root, path))
    except VolvelleError as error:
        return Note(image, str(path), problem=str(error))


def filename(path: Path) -> str | None:
    """The picture that a file names, for those whose picture is called otherwise."""
    try:
        return parse_xml(path).word("filename")
    except VolvelleError:
        return None


def _object(element: Element, path: Path) -> Object:
    where = f"{path}:{element.line}"
    name, box = element.word("name"), element.child("bndbox")
    if name is None or box is None:
        raise VolvelleError(f"{where}: an object without {'<name>' if name is None else '<bndbox>'}")
    corners: Corners = tuple(_number(box, tag, path) for tag in ("xmin", "ymin", "xmax", "ymax"))  # pyright: ignore[reportAssignmentType]
    return Object(name, corners, where, ignored=element.word("difficult") == "1")


def _number(parent: Element, tag: str, path: Path) -> float:
    element = parent.child(tag)
    if element is None:
        raise VolvelleError(f"{path}:{parent.line}: <{parent.tag}> without <{tag}>")
    try:
        value = float(element.text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise VolvelleError(f"{path}:{element.line}: <{tag}> is {element.text.strip()!r}, not a number")
    return value


def _size(root: Element, path: Path) -> tuple[int, int] | None:
    """(width, height); None where the file has none, or the zeros that some programs write."""
    size = root.child("size")
    if size is None:
        return None
    width, height = (round(_number(size, tag, path)) for tag in ("width", "height"))
    return (width, height) if width > 0 and height > 0 else None
