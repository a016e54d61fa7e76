"""What a source file says of itself: its docstring as text and formulas, and its code as coloured pieces."""

from __future__ import annotations

import ast
import builtins
import io
import keyword
import re
import tokenize
from collections.abc import Iterator
from typing import Literal, NamedTuple

Piece = tuple[str, str]
"""Text and what it is: "k" keyword, "s" string, "c" comment, "n" number, "d" defined name, "b" builtin, "" the rest."""


class Block(NamedTuple):
    """A paragraph, or lines that are to stand as they are."""

    kind: Literal["text", "lines"]
    text: str


class Paper(NamedTuple):
    """A citation as docstrings write it: authors, year, title where it is given."""

    authors: str
    year: int
    title: str | None


_NAME = r"(?:(?:van|von|de|den|der|dos|le) )*[A-ZÀ-Ý][a-zà-ÿ][\w'’-]*"
_PAPER = re.compile(
    rf"((?:{_NAME})(?:(?:, | and | & ){_NAME})*(?: et al\.)?),? (\d{{4}})(?:, \"([^\"]+)\")?", re.DOTALL
)
_SIGNS = re.compile(r"[=←≤≥∈≈]")
_WORDS = re.compile(r"(?<![\w.])[A-Za-z]{4,}(?![\w(])")
_FUNCTIONS = {"softmax", "mean", "round", "sqrt", "clip", "norm", "sign", "base", "scale", "bias", "floor"}


def blocks(text: str) -> list[Block]:
    """Cut a docstring into paragraphs and what must keep its lines: formulas and tables; examples are left out."""
    found: list[Block] = []
    for paragraph in re.split(r"\n\s*\n", text.strip("\n")):
        if paragraph.lstrip().startswith(">>>"):
            continue
        for number, line in enumerate(paragraph.split("\n")):
            kind = "lines" if line.startswith(("    ", "|")) or is_formula(line) else "text"
            if number and found[-1].kind == kind:
                joint = "\n" if kind == "lines" else " "
                found[-1] = Block(kind, found[-1].text + joint + line)
            else:
                found.append(Block(kind, line))
    return [Block(kind, dedent(text) if kind == "lines" else text.strip()) for kind, text in found if text.strip()]


def dedent(text: str) -> str:
    """Take away the space that all lines begin with, also where the first has less."""
    lines = text.split("\n")
    least = min(len(line) - len(line.lstrip()) for line in lines if line.strip())
    return "\n".join(line[least:] for line in lines).rstrip()


def is_formula(line: str) -> bool:
    """Whether a line is mathematics rather than prose: a sign of relation among few plain words.

    >>> is_formula("PE(m, 2i) = sin(m θ_i)"), is_formula("it is zero where x = 0 holds twice")
    (True, False)
    """
    prose = [word for word in _WORDS.findall(line) if word.lower() not in _FUNCTIONS]
    plain = '"' not in line and not line.startswith("Shapes")
    return plain and bool(_SIGNS.search(line)) and len(prose) <= len(line) / 30


def formulas(tree: ast.Module, names: frozenset[str] = frozenset()) -> list[str]:
    """The formulas of a file: of its docstring, or of those of its definitions where that has none.

    `names` narrows the definitions; a definition without a block of its own gives what its first sentence says after
    the colon.
    """
    if own := _formulas(ast.get_docstring(tree) or ""):
        return own
    found = []
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and (node.name in names or not names):
            text = ast.get_docstring(node) or ""
            inside = _formulas(text)
            _, colon, tail = first_sentence(text).partition(": ")
            if not inside and colon and re.search(r"[=·²ᵀΣ√+∂]", tail):
                inside = [tail]
            found += inside
    return list(dict.fromkeys(found))[:4]


def _formulas(text: str) -> list[str]:
    """The blocks of lines that are no tables."""
    found = (re.sub(r"^\|.*$", "", block.text, flags=re.M) for block in blocks(text) if block.kind == "lines")
    return [dedent(text.strip("\n")) for text in found if text.strip()]


def first_sentence(text: str) -> str:
    """The first sentence of a docstring, on one line; "et al. 2021" and "2.1" do not end one."""
    flat = " ".join(text.split("\n\n")[0].split())
    return re.split(r"(?<!\bal)\. (?=[A-Z`\"])", flat)[0].rstrip(".")


def title_of(text: str) -> tuple[str, str]:
    """The title that a file's docstring begins with, and what it says of it: ("GroupSort", "an activation that …").

    >>> title_of('Sinusoidal positions (Vaswani et al. 2017, "Attention is all you need"): sines added once.')
    ('Sinusoidal positions', 'sines added once')
    """
    whole = first_sentence(text)
    bare = re.sub(r" \((?=[^()]*\d{4})(?:[^()]|\([^()]*\))*\)", "", whole)
    head, _, tail = bare.partition(": ")
    cited = _PAPER.match(tail)
    return head.strip(), "" if cited and cited.start() == 0 else tail.strip()


def paper_of(text: str) -> Paper | None:
    """The first paper that a docstring cites."""
    found = _PAPER.search(" ".join(text.split()))
    return Paper(found[1], int(found[2]), found[3]) if found else None


def coloured(source: str) -> list[Piece]:
    """Python source as pieces whose texts together are the source.

    >>> coloured("x = 1  # one")
    [('', 'x = '), ('n', '1'), ('', '  '), ('c', '# one')]
    """
    lines = source.split("\n")
    starts = [0]
    for line in lines:
        starts.append(starts[-1] + len(line) + 1)
    pieces: list[Piece] = []
    at = 0
    for kind, (row, column), (end_row, end_column) in _tokens(source):
        begin, end = starts[row - 1] + column, starts[end_row - 1] + end_column
        pieces += [("", source[at:begin]), (kind, source[begin:end])]
        at = end
    return [piece for piece in [*pieces, ("", source[at:])] if piece[1]]


def _tokens(source: str) -> Iterator[tuple[str, tuple[int, int], tuple[int, int]]]:
    before = ""
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        kind = _kind(token, before)
        if token.type not in (tokenize.NL, tokenize.NEWLINE, tokenize.COMMENT):
            before = token.string
        if kind:
            yield kind, token.start, token.end


def _kind(token: tokenize.TokenInfo, before: str) -> str:
    if token.type == tokenize.COMMENT:
        return "c"
    if token.type == tokenize.NUMBER:
        return "n"
    if token.type == tokenize.STRING or tokenize.tok_name[token.type].startswith("FSTRING"):
        return "s"
    if token.type == tokenize.NAME:
        if keyword.iskeyword(token.string):
            return "k"
        if before in ("def", "class"):
            return "d"
        if before != "." and hasattr(builtins, token.string):
            return "b"
        return "d" if before == "@" else ""
    return ""
