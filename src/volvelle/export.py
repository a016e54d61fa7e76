"""Public names, apart from where the code lies.

A part marks what it offers, `@export("functional.apply_rope")`, and moves between files without breaking anybody:
users import `volvelle.functional` and `volvelle.nn`, two facades that `python -m volvelle.export` writes from these
records, next to a golden list of every name and signature (the idea of TensorFlow's tf_export). `--check` fails when
one of the three files is stale. This file does not import torch; only writing the facades imports the parts.
"""

from __future__ import annotations

import argparse
import difflib
import importlib
import inspect
import pkgutil
import re
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from volvelle.files import write_atomic

T = TypeVar("T", bound=Callable[..., Any])

FACADES = {
    "functional": "Every public function, re-exported from the file that holds it.",
    "nn": "Every public Module, re-exported from the file that holds it.",
}
LINE = 120


@dataclass(frozen=True)
class PublicName:
    """One public object: its canonical name ("functional.apply_rope"), its other names, and its history.

    `deprecated` maps an old public name to the version since which it should no longer be used. `twin` is, for a
    Module, the function that its forward calls. A `stable` name keeps its meaning and its arguments until a major
    version; others may change in a minor one before 1.0.
    """

    name: str
    target: Callable[..., Any]
    aliases: tuple[str, ...] = ()
    since: str = "0.1"
    deprecated: Mapping[str, str] = field(default_factory=dict)
    twin: Callable[..., Any] | None = None
    stable: bool = False

    @property
    def all_names(self) -> tuple[str, ...]:
        """The canonical name, the aliases and the deprecated names, in this order."""
        return (self.name, *self.aliases, *self.deprecated)

    @property
    def origin(self) -> str:
        """Where the object is defined, as a dotted path: `volvelle.parts.position.rope.apply_rope`."""
        return f"{self.target.__module__}.{self.target.__qualname__}"


class Registry:
    """The public names recorded so far. The library has one, `PUBLIC`; tests make their own."""

    def __init__(self) -> None:
        self._by_name: dict[str, PublicName] = {}

    def export(
        self,
        name: str,
        *,
        aliases: Sequence[str] = (),
        since: str = "0.1",
        deprecated: Mapping[str, str] | None = None,
        twin: Callable[..., Any] | None = None,
        stable: bool = False,
    ) -> Callable[[T], T]:
        """Mark a function or class as public under `name`; the decorated object itself comes back unchanged.

        Every name is written in full, `functional.NAME` or `nn.NAME`, also those in `aliases` (they stay) and in
        `deprecated` (old name -> version since which it warns). `twin` is the function that a Module wraps; `stable`
        promises that name and arguments stay.

        Raises:
            ValueError: a name outside the facades, or one that another object already has.

        >>> registry = Registry()
        >>> @registry.export("functional.double", deprecated={"functional.twice": "0.2"})
        ... def double(x):
        ...     return 2 * x
        >>> double(4), [entry.name for entry in registry]
        (8, ['functional.double'])
        """

        def record(target: T) -> T:
            self.add(PublicName(name, target, tuple(aliases), since, dict(deprecated or {}), twin, stable))
            return target

        return record

    def add(self, entry: PublicName) -> None:
        """Record `entry` under all its names; loading the same definition again replaces it."""
        for name in entry.all_names:
            _require_public(name, entry.origin)
            known = self._by_name.get(name)
            if known is not None and known.origin != entry.origin:
                raise ValueError(f"export: {name!r} names two objects, {known.origin} and {entry.origin}")
        for name in entry.all_names:
            self._by_name[name] = entry

    def __iter__(self) -> Iterator[PublicName]:
        return iter(sorted({entry.name: entry for entry in self._by_name.values()}.values(), key=lambda e: e.name))

    def __getitem__(self, name: str) -> PublicName:
        return self._by_name[name]

    def __contains__(self, name: object) -> bool:
        return name in self._by_name


PUBLIC = Registry()
export = PUBLIC.export


def _require_public(name: str, origin: str) -> None:
    facade, _, attribute = name.partition(".")
    if facade not in FACADES or not attribute.isidentifier():
        choices = " or ".join(f"{known}.NAME" for known in FACADES)
        raise ValueError(f"export: a public name is {choices}, got {name!r} for {origin}")


def import_parts(package: str = "volvelle.parts") -> None:
    """Import every module below `package`, so that all its public names are recorded."""
    root = importlib.import_module(package)
    for module in pkgutil.walk_packages(root.__path__, f"{package}."):
        try:
            importlib.import_module(module.name)
        except ModuleNotFoundError as missing:
            if missing.name != "triton":  # optional, and no kernel is a public name
                raise


def deprecated_alias(namespace: dict[str, Any], name: str, table: Mapping[str, tuple[str, str]]) -> Any:
    """Look up a deprecated name for a facade's `__getattr__`, with one DeprecationWarning a name.

    `table` maps the old name to (current name, version). The object is then stored in `namespace`, the facade's
    globals, so Python does not ask again and the warning is not repeated.
    """
    module = namespace["__name__"]
    if name not in table:
        raise AttributeError(f"module {module!r} has no attribute {name!r}", name=name)
    current, version = table[name]
    warnings.warn(
        f"{module}.{name} is deprecated since {version}: use {module}.{current}", DeprecationWarning, stacklevel=3
    )
    namespace[name] = namespace[current]
    return namespace[name]


def render_facade(facade: str, registry: Registry) -> str:
    """The source of `volvelle/{facade}.py`: explicit, typed re-exports that an editor can complete."""
    imports: dict[str, str] = {}  # public attribute -> import statement
    deprecated: dict[str, tuple[str, str]] = {}
    for entry in registry:
        for name in (entry.name, *entry.aliases):
            if name.startswith(f"{facade}."):
                imports[_attribute(name)] = _import_statement(entry.target, _attribute(name))
        for name, version in entry.deprecated.items():
            if name.startswith(f"{facade}."):
                deprecated[_attribute(name)] = (_current_name(facade, entry), version)
    lines = [f'"""{FACADES[facade]}', "", "Generated by `python -m volvelle.export`; edit the parts, not this file."]
    lines += ['"""', "", "from __future__ import annotations", ""]
    if deprecated:
        lines += ["from typing import TYPE_CHECKING, Any", "", "from volvelle.export import deprecated_alias"]
    lines += sorted(imports.values())
    lines += ["", "__all__ = [", *(f'    "{name}",' for name in sorted(imports)), "]", ""]
    if not imports:
        lines[-4:] = ["__all__: list[str] = []", ""]
    if deprecated:
        lines += _render_deprecated(deprecated)
    return "\n".join(lines)


def _render_deprecated(deprecated: Mapping[str, tuple[str, str]]) -> list[str]:
    rows = [f'    "{old}": ("{new}", "{version}"),' for old, (new, version) in sorted(deprecated.items())]
    return [
        "_DEPRECATED = {",
        *rows,
        "}",
        "",
        "if TYPE_CHECKING:",
        *(f"    {old} = {new}" for old, (new, _) in sorted(deprecated.items())),
        "else:",
        "",
        "    def __getattr__(name: str) -> Any:",
        "        return deprecated_alias(globals(), name, _DEPRECATED)",
        "",
    ]


def _attribute(name: str) -> str:
    return name.partition(".")[2]


def _current_name(facade: str, entry: PublicName) -> str:
    for name in (entry.name, *entry.aliases):
        if name.startswith(f"{facade}."):
            return _attribute(name)
    raise ValueError(f"export: {entry.name!r} has a deprecated name in {facade} but no current one there")


def _import_statement(target: Callable[..., Any], attribute: str) -> str:
    statement = f"from {target.__module__} import {target.__name__} as {attribute}"
    if len(statement) <= LINE:
        return statement
    return f"from {target.__module__} import (\n    {target.__name__} as {attribute},\n)"


def render_golden(registry: Registry) -> str:
    """The golden list: for every public object its name, signature, version and other names."""
    lines = [
        "# Every public name and signature. Written by `python -m volvelle.export`; a change here is an API change."
    ]
    for entry in registry:
        lines += ["", entry.name, f"    {signature_text(entry.target)}"]
        forward = getattr(entry.target, "forward", None) if inspect.isclass(entry.target) else None
        if forward is not None:
            lines.append(f"    forward{signature_text(forward)}")
        facts = [f"since {entry.since}", "stable" if entry.stable else "experimental"]
        facts += [f"wraps {entry.twin.__module__}.{entry.twin.__qualname__}"] if entry.twin else []
        facts += [f"also {name}" for name in entry.aliases]
        facts += [f"{name} deprecated since {version}" for name, version in sorted(entry.deprecated.items())]
        lines.append("    " + ", ".join(facts))
    return "\n".join(lines) + "\n"


class _Verbatim:
    """An annotation that prints as it was written, without the quotes that postponed evaluation adds."""

    def __init__(self, text: str):
        self.text = text

    def __repr__(self) -> str:
        return self.text


def signature_text(target: Callable[..., Any]) -> str:
    """The signature as one stable line, without `self`, the same on every run and Python version.

    >>> def f(x: Tensor, *, scale: float | None = None) -> Tensor: ...
    >>> signature_text(f)
    '(x: Tensor, *, scale: float | None = None) -> Tensor'
    """
    signature = inspect.signature(target)
    parameters = [_plain(p) for p in signature.parameters.values() if p.name != "self"]
    returns: Any = signature.empty if inspect.isclass(target) else signature.return_annotation
    text = str(signature.replace(parameters=parameters, return_annotation=_verbatim(returns)))
    return re.sub(r" at 0x[0-9a-fA-F]+", "", text)


def _plain(parameter: inspect.Parameter) -> inspect.Parameter:
    return parameter.replace(annotation=_verbatim(parameter.annotation))


def _verbatim(annotation: Any) -> Any:
    return _Verbatim(annotation) if isinstance(annotation, str) else annotation


def generated_files(registry: Registry, root: Path) -> dict[Path, str]:
    """What the facades and the golden list in the checkout at `root` should hold."""
    files = {root / "src" / "volvelle" / f"{facade}.py": render_facade(facade, registry) for facade in FACADES}
    files[root / "tests" / "cross" / "public_names.txt"] = render_golden(registry)
    return files


def stale_diff(path: Path, expected: str) -> str:
    """A unified diff from the file on disk to what it should hold; empty when it is fresh."""
    present = path.read_text(encoding="utf-8") if path.exists() else ""
    lines = difflib.unified_diff(
        present.splitlines(True), expected.splitlines(True), f"{path.name} (on disk)", f"{path.name} (from the parts)"
    )
    return "".join(lines)


def main(arguments: Sequence[str] | None = None, *, root: Path | None = None) -> int:
    """Write the facades and the golden list, or with `--check` compare them; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m volvelle.export", description=main.__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing, exit 1 with a diff when a file is stale")
    options = parser.parse_args(arguments)
    root = root or Path(__file__).resolve().parents[2]
    if not (root / "tests" / "cross").is_dir():
        print(f"error: {root} is not a checkout of Volvelle (no tests/cross)", file=sys.stderr)
        return 1
    import_parts()
    stale = 0
    for path, content in generated_files(PUBLIC, root).items():
        diff = stale_diff(path, content)
        stale += bool(diff)
        if diff and options.check:
            print(diff, end="")
        elif diff:
            write_atomic(path, content)
            print(f"wrote {path.relative_to(root)}")
    if stale and options.check:
        print("error: public names changed\ntip: when that is meant, run ./check fix", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    # Run through the imported module: under `python -m` this file is __main__, and the parts record elsewhere.
    raise SystemExit(importlib.import_module("volvelle.export").main())
