"""Reading the text that people have: plain text, JSON lines of several shapes, and `input || output` lines.

| file | what a line is |
|---|---|
| .txt, .md | plain text to continue; or, when its lines hold `||`, one `prompt || completion` each |
| .jsonl | {"prompt", "completion"}, {"messages": [{"role", "content"}, …]}, {"text"}, or any fields with templates |

A bad line is named with its file, its number and the reason. Reading stops there by default, after the whole file has
been looked at; `on_bad="skip"` leaves such lines out and keeps the list.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, TypeVar

from volvelle.data.templates import Template, TemplateProblem
from volvelle.errors import UsageError, VolvelleError

T = TypeVar("T")
OnBad = Literal["stop", "skip"]
TEXT = (".txt", ".text", ".md")
LINES = (".jsonl", ".ndjson")
SHAPES = '{"prompt", "completion"}, {"messages"} or {"text"}'


@dataclass(frozen=True)
class Example:
    """One thing to learn: a prompt with one or several right completions, or a conversation.

    `source` is "file:line". In a conversation (`messages`) every turn of the assistant is learnt; `prompt` is empty
    and `completions` holds the last of these turns.
    """

    prompt: str
    completions: tuple[str, ...]
    messages: tuple[Mapping[str, str], ...] | None = None
    source: str = ""


@dataclass(frozen=True)
class Corpus:
    """What a file held: examples, or plain documents, and the bad lines that were left out (with reasons)."""

    path: str
    examples: list[Example] = field(default_factory=list)
    documents: list[str] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        parts = []
        if self.examples:
            answers = sum(len(example.completions) for example in self.examples)
            more = f" with {answers:,} completions" if answers != len(self.examples) else ""
            parts.append(f"{len(self.examples):,} examples{more}")
        if self.documents:
            parts.append(f"{sum(map(len, self.documents)):,} characters of text")
        if self.skipped:
            parts.append(f"{len(self.skipped):,} bad lines left out")
        return f"{self.path}: {', '.join(parts)}"


class Bad:
    """Collects bad lines; `finish` raises VolvelleError when there are any and they may not be skipped."""

    def __init__(self, path: str | os.PathLike[str], on_bad: OnBad):
        if on_bad not in ("stop", "skip"):
            raise UsageError(f"on_bad={on_bad}: must be stop or skip")
        self.path, self.on_bad = str(path), on_bad
        self.found: list[str] = []

    def add(self, where: str, reason: str) -> None:
        """Remember the bad line at `where` ("file:line")."""
        self.found.append(f"{where}: {reason}")

    def finish(self, left: int) -> list[str]:
        """The list of bad lines, when `left` good ones remain and skipping is allowed."""
        if self.found and (self.on_bad == "stop" or not left):
            shown = "\n  ".join(self.found[:5]) if len(self.found) > 1 else self.found[0]
            if len(self.found) == 1:
                message = shown
            else:
                more = f"\n  … and {len(self.found) - 5:,} more" if len(self.found) > 5 else ""
                message = f"{self.path}: {len(self.found):,} bad lines\n  {shown}{more}"
            tip = "mend them, or leave them out with on_bad=skip" if left else "no good line is left"
            raise VolvelleError(message, tip=tip)
        return self.found


def read_corpus(
    path: str | os.PathLike[str],
    *,
    prompt: str | None = None,
    completion: str | None = None,
    on_bad: OnBad = "stop",
) -> Corpus:
    """Read a text file as examples or documents; `prompt` and `completion` are templates over a record's fields.

    Raises UsageError for a missing file, an unknown kind of file or a broken template, VolvelleError for bad content.
    """
    file = Path(path)
    if file.is_dir():
        raise UsageError(f"{file}: a folder, but a text file is wanted", tip=f"kinds: {', '.join(TEXT + LINES)}")
    if not file.is_file():
        raise UsageError(f"{file}: no such file", tip=_beside(file))
    if completion is None and prompt is not None:
        raise UsageError("prompt= needs completion= beside it", tip='for example completion="{{ answer }}"')
    bad = Bad(path, on_bad)
    lines = list(_lines(file, bad))
    if not any(line.strip() for _, line in lines):
        raise VolvelleError(f"{file}: the file is empty") if not bad.found else VolvelleError(bad.found[0])
    if file.suffix.lower() in LINES:
        corpus = _records(file, lines, bad, prompt, completion)
    elif file.suffix.lower() in TEXT:
        corpus = _plain(file, lines, bad, prompt, completion)
    else:
        raise UsageError(f"{file}: unknown kind of text file {file.suffix!r}", tip=f"known: {', '.join(TEXT + LINES)}")
    return replace(corpus, skipped=bad.finish(len(corpus.examples) + len(corpus.documents)))


def _beside(file: Path) -> str | None:
    from volvelle.errors import did_you_mean

    folder = file.parent
    if not folder.is_dir():
        return f"the folder {folder} does not exist"
    return did_you_mean(file.name, [p.name for p in folder.iterdir() if p.is_file()])


def _lines(file: Path, bad: Bad) -> Iterator[tuple[int, str]]:
    """The lines with their numbers from 1. A line that is not UTF-8 is bad, and the rest is still read."""
    content = file.read_bytes()
    if content[:2] in (b"\xff\xfe", b"\xfe\xff"):
        raise VolvelleError(
            f"{file}: encoded as UTF-16, but UTF-8 is wanted",
            tip=f"iconv -f UTF-16 -t UTF-8 {file.name} > converted{file.suffix}",
        )
    for number, raw in enumerate(content.removeprefix(b"\xef\xbb\xbf").split(b"\n"), 1):
        try:
            yield number, raw.removesuffix(b"\r").decode("utf-8")
        except UnicodeDecodeError as error:
            byte = f"byte 0x{raw[error.start]:02x} in column {error.start + 1}"
            bad.add(f"{file}:{number}", f"not UTF-8 ({byte}; is the file Latin-1?)")


def _plain(file: Path, lines: list[tuple[int, str]], bad: Bad, prompt: str | None, completion: str | None) -> Corpus:
    filled = [(number, line) for number, line in lines if line.strip()]
    if not all("||" in line for _, line in filled[:5]):
        if completion is not None:
            raise UsageError(f"{file}: plain text has no fields for completion=", tip="templates need a .jsonl file")
        if bad.found and bad.on_bad == "stop":
            return Corpus(str(file))
        return Corpus(str(file), documents=["\n".join(line for _, line in lines)])
    examples = []
    fill = _templates(prompt, completion) if completion is not None else None
    for number, line in filled:
        source = f"{file}:{number}"
        left, mark, right = (part.strip() for part in line.partition("||"))
        if not mark or not right:
            bad.add(source, "no completion after ||" if mark else "no || between prompt and completion")
        elif fill is None:
            examples.append(Example(left + "\n", (right,), source=source))
        else:
            _take(
                examples, bad, source, lambda fields=(left, right): fill({"prompt": fields[0], "completion": fields[1]})
            )
    return Corpus(str(file), examples=examples)


def _records(file: Path, lines: list[tuple[int, str]], bad: Bad, prompt: str | None, completion: str | None) -> Corpus:
    fill = _templates(prompt, completion) if completion is not None else _known_shape
    examples: list[Example] = []
    documents: list[str] = []
    for number, line in lines:
        if not line.strip():
            continue
        source = f"{file}:{number}"
        try:
            record = json.loads(line)
        except ValueError as error:
            bad.add(source, f"not JSON ({error})")
            continue
        if not isinstance(record, dict):
            bad.add(source, f"not a JSON object but a {type(record).__name__}")
        elif completion is None and "text" in record and not {"messages", "completion"} & record.keys():
            text = record["text"]
            if isinstance(text, str) and text.strip():
                documents.append(text)
            else:
                bad.add(source, "its text is empty" if isinstance(text, str) else "its text is not a string")
        else:
            _take(examples, bad, source, lambda record=record: fill(record))
    if examples and documents:
        raise VolvelleError(
            f"{file}: holds both examples (first {examples[0].source}) and plain {{'text'}} records",
            tip="split them into two files",
        )
    return Corpus(str(file), examples=examples, documents=documents)


def _take(examples: list[Example], bad: Bad, source: str, make: Any) -> None:
    """Append what `make` gives, or remember why it could not."""
    try:
        example = make()
    except TemplateProblem as problem:
        bad.add(source, str(problem))
        return
    if not all(text.strip() for text in example.completions):
        bad.add(source, "the completion is empty")
        return
    examples.append(replace(example, source=source))


def _templates(prompt: str | None, completion: str | None) -> Any:
    """A function from a record to an Example, by the user's templates."""
    before, after = Template(prompt or "", option="prompt"), Template(completion or "", option="completion")
    return lambda record: Example(before.text(record), after.alternatives(record))


def _known_shape(record: dict[str, Any]) -> Example:
    """Records that need no template."""
    if "messages" in record:
        messages = _messages(record["messages"])
        return Example("", (messages[-1]["content"],), messages)
    if "completion" not in record:
        has = ", ".join(record) or "none"
        raise TemplateProblem(
            f"wants {SHAPES}; the record's fields are {has}. Name them with prompt= and completion= templates, "
            'such as completion="{{ field }}"'
        )
    prompt, completion = record.get("prompt", ""), record["completion"]
    texts = completion if isinstance(completion, list) else [completion]
    if not texts or not all(isinstance(text, str) for text in [prompt, *texts]):
        raise TemplateProblem("prompt and completion must be text (or completion a list of texts)")
    return Example(prompt, tuple(texts))


def _messages(found: Any) -> tuple[dict[str, str], ...]:
    """A conversation that ends with the assistant."""
    if not isinstance(found, list) or not found:
        raise TemplateProblem("messages must be a list that is not empty")
    for i, message in enumerate(found, 1):
        if not isinstance(message, dict) or not all(isinstance(message.get(k), str) for k in ("role", "content")):
            raise TemplateProblem(f"message {i} needs a role and a content, both text")
    if found[-1]["role"] != "assistant":
        raise TemplateProblem(f"the last message must be the assistant's, it is the {found[-1]['role']}'s")
    return tuple({"role": m["role"], "content": m["content"]} for m in found)


def spread(items: Sequence[T], count: int) -> list[T]:
    """At most `count` items at even distances: files are often sorted, and their beginning is no sample of them.

    >>> spread("abcdefgh", 3)
    ['a', 'c', 'f']
    """
    count = min(count, len(items))
    return [items[i * len(items) // count] for i in range(count)]
