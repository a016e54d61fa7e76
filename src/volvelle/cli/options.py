"""From a verb's `Options` dataclass and the words on the command line to an instance of it.

Accepted: `key=value`, `group.key=value`, `--key value`, `--key=value`, positional values, and `config=FILE` with a
dumped config.yaml underneath. Keys are checked here, so that a typo gets a suggestion; values are read by tyro.
"""

from __future__ import annotations

import ast
import contextlib
import dataclasses
import functools
import inspect
import io
import itertools
import re
import textwrap
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from volvelle.errors import UsageError, did_you_mean

ASSIGNMENT = re.compile(r"(?:--)?([A-Za-z_][\w-]*(?:\.[A-Za-z_][\w-]*)*)=(.*)", re.DOTALL)
WORDS = {"true": True, "yes": True, "on": True, "1": True, "false": False, "no": False, "off": False, "0": False}
MISSING = dataclasses.MISSING


@dataclasses.dataclass(frozen=True)
class Field:
    """One thing the user can set: dotted `key`, its type without markers, its default (MISSING when required).

    A field called `from_`, after the Python keyword, is typed `from=`; `name` keeps the underscore.
    """

    key: str
    name: str
    type: Any
    default: Any
    help: str
    positional: bool

    @property
    def required(self) -> bool:
        """True when there is no default."""
        return self.default is MISSING

    @property
    def choices(self) -> tuple[str, ...]:
        """The values of a Literal (also inside Optional), as text; empty for other types."""
        return tuple(str(v) for part in _parts(self.type) if _is_literal(part) for v in typing.get_args(part))

    @property
    def is_flag(self) -> bool:
        """True for bool and bool | None."""
        return bool in _parts(self.type)

    @property
    def is_sequence(self) -> bool:
        """True when several values are taken: tuple[x, ...] or list[x]."""
        return any(typing.get_origin(part) in (tuple, list) for part in _parts(self.type))

    @property
    def is_optional(self) -> bool:
        """True when None is a value."""
        return type(None) in _parts(self.type)


@functools.cache
def fields_of(options: type) -> dict[str, Field]:
    """Return the settable fields of a dataclass by dotted key; nested dataclasses contribute `group.key`."""
    return {field.key: field for field in _walk(options, "", None)}


def parse(options: type, words: Sequence[str], *, verb: str) -> Any:
    """Return an `options` instance for the words after the verb. Every mistake is a UsageError.

    >>> @dataclasses.dataclass(frozen=True)
    ... class Options:
    ...     steps: int = 100
    ...     rate: float = 0.1
    >>> parse(Options, ["steps=5"], verb="demo")
    Options(steps=5, rate=0.1)
    >>> parse(Options, ["stpes=5"], verb="demo")
    Traceback (most recent call last):
    volvelle.errors.UsageError: demo: unknown option stpes
    """
    fields = fields_of(options)
    given, loose, config = _split(fields, words, verb)
    _place(fields, given, loose, verb)
    values = {**(_read_config(config, fields) if config is not None else {}), **given}
    missing = [field for field in fields.values() if field.required and field.key not in values]
    if missing:
        wanted = ", ".join(f.key.upper() if f.positional else f"{f.key}={metavar(f)}" for f in missing)
        raise UsageError(f"{verb}: missing {wanted}", tip=f"volvelle {verb} --help")
    for key, texts in values.items():
        _check_choice(fields[key], texts, verb)
    return _call_tyro(options, values, verb)


def metavar(field: Field) -> str:
    """Return how a value is written in help: INT, PATH, lora|full.

    >>> metavar(Field("data", "data", Path, MISSING, "", False))
    'PATH'
    """
    names = []
    for part in _parts(field.type):
        if part is type(None):
            continue
        if _is_literal(part):
            names.extend(str(value) for value in typing.get_args(part))
        elif part is bool:
            names.append("true|false")
        elif typing.get_origin(part) in (tuple, list):
            inner = Field(field.key, field.name, typing.get_args(part)[0], MISSING, "", False)
            names.append(f"{metavar(inner)},…")
        else:
            names.append({str: "TEXT"}.get(part, getattr(part, "__name__", str(part)).upper()))
    return "|".join(names)


def _walk(cls: type, prefix: str, instance: Any) -> typing.Iterator[Field]:
    import tyro

    marker = typing.get_args(tyro.conf.Positional[int])[1]
    hints = typing.get_type_hints(cls, include_extras=True)
    for field in _own_first(cls):
        kind, markers = hints[field.name], ()
        if hasattr(kind, "__metadata__"):
            kind, markers = kind.__origin__, kind.__metadata__
        if instance is not None:
            default = getattr(instance, field.name)
        elif field.default_factory is not MISSING:
            default = field.default_factory()
        else:
            default = field.default
        if dataclasses.is_dataclass(kind) and isinstance(kind, type):
            yield from _walk(kind, f"{prefix}{field.name}.", None if default is MISSING else default)
        else:
            name = prefix + field.name
            yield Field(name.rstrip("_"), name, kind, default, _field_doc(cls, field.name), marker in markers)


def _own_first(cls: type) -> list[dataclasses.Field]:
    """Return the fields, those that the class itself declares before those of its bases.

    So the special comes before the general, which is the order in which people look.
    """
    depth: dict[str, int] = {}
    for i, kind in enumerate(cls.__mro__):
        for name in vars(kind).get("__annotations__", ()):
            depth.setdefault(name, i)
    return sorted(dataclasses.fields(cls), key=lambda field: depth[field.name])


def _field_doc(cls: type, name: str) -> str:
    """Return what is written under the field, in the class or the nearest base that says something."""
    return next((docs[name] for kind in cls.__mro__ if name in (docs := _field_docs(kind))), "")


@functools.cache
def _field_docs(cls: type) -> dict[str, str]:
    """Return the string literal under each field of the class."""
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(cls))).body[0]
    except (OSError, TypeError, SyntaxError):  # classes made at run time, in a doctest, have no source
        return {}
    docs: dict[str, str] = {}
    body = tree.body if isinstance(tree, ast.ClassDef) else []
    for statement, following in itertools.pairwise(body):
        if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
            text = following.value if isinstance(following, ast.Expr) else None
            if isinstance(text, ast.Constant) and isinstance(text.value, str):
                docs[statement.target.id] = " ".join(text.value.split())
    return docs


def _split(
    fields: Mapping[str, Field], words: Sequence[str], verb: str
) -> tuple[dict[str, list[str]], list[str], str | None]:
    """Sort the words into assigned values, loose (positional) values, and the config file."""
    given: dict[str, list[str]] = {}
    loose: list[str] = []
    config = None
    queue = list(words)
    while queue:
        word = queue.pop(0)
        if word == "--":
            loose.extend(queue)
            break
        if matched := ASSIGNMENT.fullmatch(word):
            key, value = matched[1].replace("-", "_"), matched[2]
        elif word.startswith("--") and len(word) > 2:
            key = word[2:].replace("-", "_")
            if key not in fields and key.startswith("no_") and (off := fields.get(key[3:])) and off.is_flag:
                key, value = off.key, "false"
            elif (field := fields.get(key)) and field.is_flag and (not queue or queue[0].lower() not in WORDS):
                value = "true"
            else:
                _known(key, fields, verb)
                if not queue:
                    raise UsageError(f"{verb}: {word} needs a value")
                value = queue.pop(0)
        else:
            loose.append(word)
            continue
        if key == "config" and "config" not in fields:
            config = value
            continue
        given[key] = _texts(_known(key, fields, verb), value)
    return given, loose, config


def _known(key: str, fields: Mapping[str, Field], verb: str) -> Field | None:
    """Return the field of that key (None for config=); an unknown key is a UsageError with the close ones."""
    if key == "config" or key in fields:
        return fields.get(key)
    tip = did_you_mean(key, fields)
    ends = [known for known in fields if known.endswith(f".{key}")]
    if ends:  # `rank` where only `lora.rank` exists
        tip = f"did you mean {' or '.join(ends)}?"
    raise UsageError(
        f"{verb}: unknown option {key}", tip=tip or f"volvelle {verb} --help lists them; text goes after --"
    )


def _texts(field: Field | None, value: str) -> list[str]:
    """Write a value the way tyro reads it: true -> True, none -> None, a,b -> two values."""
    if field is None:
        return [value]
    if field.is_optional and value.lower() in ("none", "null"):
        return ["None"]
    if field.is_flag and value.lower() in WORDS:
        return [str(WORDS[value.lower()])]
    if field.is_sequence:
        inner = value.strip()
        if inner[:1] + inner[-1:] in ("[]", "()"):
            inner = inner[1:-1]
        return [part.strip().strip("'\"") for part in inner.split(",") if part.strip()]
    return [value]


def _read_config(path: str, fields: Mapping[str, Field]) -> dict[str, list[str]]:
    """Return the values of a dumped config.yaml (or of the run folder that holds one)."""
    import yaml

    file = Path(path).expanduser()
    if file.is_dir():
        file = file / "config.yaml"
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8")) or {}
    except FileNotFoundError:
        raise UsageError(f"config={path}: no such file", tip="a run's config.yaml, or its folder, is wanted") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UsageError(f"config={path}: not readable as YAML ({str(error).splitlines()[0]})") from error
    if not isinstance(content, dict):
        raise UsageError(f"config={path}: a mapping of options is wanted, got {type(content).__name__}")
    values: dict[str, list[str]] = {}
    for key, value in _flatten(content, ""):
        if key not in fields:
            raise UsageError(f"{file}: unknown option {key}", tip=did_you_mean(key, fields))
        values[key] = [str(v) for v in value] if isinstance(value, list) else [str(value)]
    return values


def _flatten(content: Mapping[Any, Any], prefix: str) -> typing.Iterator[tuple[str, Any]]:
    for key, value in content.items():
        if isinstance(value, Mapping):
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}".rstrip("_"), value


def _place(fields: Mapping[str, Field], given: dict[str, list[str]], loose: list[str], verb: str) -> None:
    """Give the loose words to the positional fields that no key has set, in order."""
    rest = list(loose)
    for field in fields.values():
        if not rest or not field.positional or field.key in given:
            continue
        if field.is_sequence:
            given[field.key], rest = rest, []
        else:
            given[field.key] = [rest.pop(0)]
    if rest:
        tip = did_you_mean(rest[0], [key for key, field in fields.items() if not field.positional])
        raise UsageError(
            f"{verb}: nothing to do with {rest[0]!r}",
            tip=tip or f"options are written key=value; volvelle {verb} --help lists them",
        )


def _check_choice(field: Field, texts: list[str], verb: str) -> None:
    kinds = [part for part in _parts(field.type) if part is not type(None)]
    if not field.choices or len(kinds) > 1 or (field.is_optional and texts == ["None"]):
        return
    for text in texts:
        if text not in field.choices:
            tip = did_you_mean(text, field.choices) or f"one of {', '.join(field.choices)}"
            word = text if field.positional else f"{field.key}={text}"
            raise UsageError(f"{verb}: {word} is not one of {', '.join(field.choices)}", tip=tip)


def _arguments(fields: Mapping[str, Field], values: Mapping[str, list[str]]) -> list[str]:
    """Write the values as arguments of tyro: the named ones first, then `--` and the positional ones in order."""
    named: list[str] = []
    positional: list[str] = []
    last = max((i for i, f in enumerate(fields.values()) if f.positional and f.key in values), default=-1)
    for index, field in enumerate(fields.values()):
        texts = values.get(field.key)
        if field.positional:
            if index <= last:
                positional.extend(texts if texts is not None else [str(field.default)])
        elif texts is not None:
            # --key=value keeps a value that begins with a dash from being taken for an option.
            named.extend([f"--{field.name}", *texts] if field.is_sequence else [f"--{field.name}={texts[0]}"])
    return [*named, "--", *positional] if positional else named


def _call_tyro(options: type, values: Mapping[str, list[str]], verb: str) -> Any:
    """Let tyro read the values; what it prints about a bad one is said again in one line."""
    import tyro

    fields = fields_of(options)
    printed = io.StringIO()
    try:
        with contextlib.redirect_stderr(printed), contextlib.redirect_stdout(printed):
            return tyro.cli(options, args=_arguments(fields, values), prog=verb, config=(tyro.conf.FlagConversionOff,))
    except SystemExit:
        text = " ".join(printed.getvalue().translate(str.maketrans("│─╭╮╰╯", "      ")).split())
        named = re.search(r"--([A-Za-z][\w.-]*)|argument '([A-Za-z][\w.-]*)'", text)
        key = (named[1] or named[2]).replace("-", "_").rstrip("._") if named else ""
        if key in values:
            text = f"{key}={','.join(values[key])} is not {metavar(fields[key])}"
        raise UsageError(f"{verb}: {text}", tip=f"volvelle {verb} --help") from None


def _parts(kind: Any) -> tuple[Any, ...]:
    """Return the members of a union, or the type itself."""
    if typing.get_origin(kind) in (typing.Union, types.UnionType):
        return typing.get_args(kind)
    return (kind,)


def _is_literal(kind: Any) -> bool:
    return typing.get_origin(kind) is typing.Literal
