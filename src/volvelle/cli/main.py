"""`volvelle VERB WHAT [key=value …]`: finds the verb, reads its options, calls it, and words every failure.

Nothing heavy is imported before the verb asks for it: help, `ls` and a typo must answer at once.
"""

from __future__ import annotations

import difflib
import importlib
import os
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from volvelle import __version__
from volvelle.errors import UsageError, VolvelleError, did_you_mean

if TYPE_CHECKING:
    from volvelle.cli.table import Verb

INTERRUPTED = 130  # 128 + SIGINT, as shells report it
BROKEN_PIPE = 141  # 128 + SIGPIPE


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command line and return the exit code: 0, 1 for a failure, 2 for wrong usage, 130 for Ctrl-C."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    # Output may go to a terminal or pipe that cannot show every letter; a question mark is better than a crash.
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # pyright: ignore[reportAttributeAccessIssue]
    try:
        code = run(words)
        sys.stdout.flush()
        return code
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        # The reader went away (| head). Python would complain once more when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return BROKEN_PIPE
    except Exception as error:  # noqa: BLE001 - the one place where every failure becomes a message
        return _explain(error)


def run(words: list[str]) -> int:
    """Dispatch one command line; failures leave as exceptions."""
    from volvelle.cli import help as pages
    from volvelle.cli.console import json_output
    from volvelle.cli.table import available

    before, after = _cut_at_dashes(words)
    as_json = "--json" in before
    before = [word for word in before if word != "--json"]
    asks_help = any(word in ("-h", "--help") for word in before)
    before = [word for word in before if word not in ("-h", "--help")]
    if before[:1] == ["help"]:
        asks_help, before = True, before[1:]
    if before[:1] in (["--version"], ["version"]):
        print(f"volvelle {__version__}")
        return 0
    if not before:
        print(pages.verbs_page(available()))
        return 0
    verb, rest = choose(before, asks_help=asks_help)
    if verb is None:
        print(pages.verbs_page([row for row in available() if row.name.startswith(f"{before[0]} ")]))
        return 0
    module = importlib.import_module(verb.module)
    if asks_help:
        print(pages.verb_page(verb, module.Options, module.EXAMPLES))
        return 0
    from volvelle.cli.options import parse

    options = parse(module.Options, [*rest, *after], verb=verb.name)
    with json_output(as_json):
        return module.main(options) or 0


def choose(words: Sequence[str], *, asks_help: bool = False) -> tuple[Verb | None, list[str]]:
    """Return the verb that the first one or two words name, and the words after it; two words win over one.

    With `asks_help`, the first word of a two-word verb alone ("train") gives None: its verbs are to be listed.
    """
    from volvelle.cli.table import available

    rows = {row.name: row for row in available()}
    pair = " ".join(words[:2])
    if len(words) > 1 and pair in rows:
        return rows[pair], list(words[2:])
    seconds = [name.partition(" ")[2] for name in rows if name.startswith(f"{words[0]} ")]
    if len(words) > 2 and f"{words[0]} {words[2]}" in rows:  # `inspect WHAT rf` as well as `inspect rf WHAT`
        return rows[f"{words[0]} {words[2]}"], [words[1], *words[3:]]
    if words[0] in rows:
        # `adapt extrct`: a model of nearly that name is less likely.
        close = difflib.get_close_matches(words[1], seconds, n=1, cutoff=0.8) if len(words) > 1 else []
        if close:
            raise UsageError(f"unknown verb {pair!r}", tip=f"did you mean {words[0]} {close[0]}?")
        return rows[words[0]], list(words[1:])
    if seconds and len(words) == 1 and asks_help:
        return None, []
    if seconds:
        if len(words) == 1 or "=" in words[1]:
            tip = f"volvelle {words[0]} {'|'.join(seconds)} …"
            raise UsageError(f"{words[0]} what? One of: {', '.join(seconds)}", tip=tip)
        tip = did_you_mean(words[1], seconds) or f"one of {', '.join(seconds)}"
        raise UsageError(f"unknown verb {pair!r}", tip=tip)
    firsts = {name.partition(" ")[0] for name in rows} | set(rows)
    raise UsageError(f"unknown verb {words[0]!r}", tip=did_you_mean(words[0], firsts) or "volvelle lists the verbs")


def _cut_at_dashes(words: list[str]) -> tuple[list[str], list[str]]:
    """Split before `--`: what follows it is text, never an option."""
    index = words.index("--") if "--" in words else len(words)
    return words[:index], words[index:]


def _explain(error: Exception) -> int:
    """Print an exception as `error:` and `tip:` and return its exit code; the traceback with VOLVELLE_DEBUG=1."""
    debug = os.environ.get("VOLVELLE_DEBUG", "") not in ("", "0")
    if debug:
        import traceback

        traceback.print_exception(error)
    if isinstance(error, VolvelleError):
        message, tip, code = str(error), error.tip, error.exit_code
    elif isinstance(error, ModuleNotFoundError) and not (error.name or "volvelle").startswith("volvelle"):
        message, tip, code = f"this needs the package {error.name}", f"pip install {error.name}", 1
    else:
        message = f"unexpected {type(error).__name__}: {error}"
        tip, code = None if debug else "set VOLVELLE_DEBUG=1 to see where it came from", 1
    print(f"error: {message}", file=sys.stderr)
    if tip:
        print(f"tip: {tip}", file=sys.stderr)
    return code
