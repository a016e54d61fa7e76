"""The help texts: the list of verbs, and one page a verb. Written in the same key=value form that is typed."""

from __future__ import annotations

import shutil
import textwrap
from collections.abc import Iterable, Sequence
from dataclasses import MISSING

from volvelle.cli.options import Field, fields_of, metavar
from volvelle.cli.table import GROUPS, Verb

USAGE = "usage: volvelle VERB WHAT [key=value …]"


def verbs_page(verbs: Sequence[Verb]) -> str:
    """Return the page of `volvelle` without arguments: every verb, by group."""
    width = max(len(verb.name) for verb in verbs) + 2
    lines = ["Deep-learning papers as working instruments.", "", USAGE]
    for group in GROUPS:
        rows = [verb for verb in verbs if verb.group == group]
        if rows:
            lines += ["", f"{group}:", *(f"  {verb.name:<{width}}{verb.help}" for verb in rows)]
    lines += ["", "volvelle VERB --help shows a verb's options and examples; --json prints results for programs."]
    return "\n".join(lines)


def verb_page(verb: Verb, options: type, examples: Iterable[str], *, width: int | None = None) -> str:
    """Return the page of `volvelle VERB --help`: usage, what it does, every option with its default, examples."""
    width = width or min(shutil.get_terminal_size().columns, 110)
    fields = fields_of(options)
    required = filter(None, map(_usage_word, fields.values()))
    usage = " ".join(["usage: volvelle", verb.name, *required])
    lines = [f"{usage} [key=value …]", "", f"{verb.help[:1].upper()}{verb.help[1:]}.", ""]
    heads = {key: key.upper() if field.positional else f"{key}={metavar(field)}" for key, field in fields.items()}
    indent = min(max(max((len(head) for head in heads.values()), default=0), len("config=FILE")) + 4, 30)
    # Positional first, then what must be given; the rest keeps the order of the class.
    for key, field in sorted(fields.items(), key=lambda item: (not item[1].positional, not item[1].required)):
        lines += _entry(heads[key], _describe(field), indent, width)
    lines += _entry("config=FILE", "options from a run's config.yaml; what is typed here wins", indent, width)
    lines += _entry("--json", "one JSON object on stdout, everything else on stderr", indent, width)
    lines += ["", "examples:", *(f"  {example}" for example in examples)]
    return "\n".join(lines)


def _usage_word(field: Field) -> str:
    if field.positional:
        word = field.key.upper() + ("…" if field.is_sequence else "")
        return word if field.required else f"[{word}]"
    return f"{field.key}={metavar(field)}" if field.required else ""


def _describe(field: Field) -> str:
    """Return the field's docstring, the choices of a positional, and the default."""
    text = field.help
    if field.positional and field.choices:
        text += f" One of: {', '.join(field.choices)}."
    if field.required:
        return f"{text} (required)".strip()
    default = field.default
    if default is MISSING or default is None or default in ("", (), []):
        return text
    if isinstance(default, bool):
        default = str(default).lower()
    elif isinstance(default, (tuple, list)):
        default = ",".join(map(str, default))
    return f"{text} (default: {default})".strip()


def _entry(head: str, text: str, indent: int, width: int) -> list[str]:
    body = textwrap.wrap(text, max(width - indent, 30)) or [""]
    first = f"  {head}"
    if len(first) + 2 > indent:
        return [first, *(" " * indent + line for line in body if line)]
    return [(first.ljust(indent) + body[0]).rstrip(), *(" " * indent + line for line in body[1:])]
