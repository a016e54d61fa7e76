"""Which layers an adapter goes to: PEFT's rules for names, over plain strings (no torch here)."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Sequence

from volvelle.errors import UsageError, VolvelleError

ALL_LINEAR = "all-linear"


def matches(rule: str | Sequence[str], path: str) -> bool:
    r"""Tell whether `path` falls under a rule: a regular expression for the whole path, or a tuple of names.

    >>> matches(("q_proj",), "model.layers.0.self_attn.q_proj"), matches(("proj",), "model.layers.0.self_attn.q_proj")
    (True, False)
    >>> matches(r".*layers\.[01]\..*q_proj", "model.layers.1.self_attn.q_proj")
    True
    """
    if isinstance(rule, str):
        try:
            return re.fullmatch(rule, path) is not None
        except re.error as error:
            raise UsageError(f"target {rule!r} is not a regular expression: {error}") from None
    return any(path == name or path.endswith(f".{name}") for name in rule)


def one_rule(given: str | Sequence[str]) -> str | tuple[str, ...]:
    r"""Targets as they are meant: a single word that no layer can be called, as command lines give it, is a rule.

    >>> one_rule(("all-linear",)), one_rule((r".*\.1\..*_proj",)), one_rule(("self_attn.q_proj",))
    ('all-linear', '.*\\.1\\..*_proj', ('self_attn.q_proj',))
    """
    if isinstance(given, str):
        return given
    lone = given[0] if len(given) == 1 else ""
    return lone if lone == ALL_LINEAR or re.search(r"[^\w.\-]", lone) else tuple(given)


def matches_end(pattern: str, path: str) -> bool:
    r"""Tell whether the regular expression `pattern` matches the last parts of `path`, whole parts only.

    >>> matches_end(r"1\.self_attn\.q_proj", "layers.1.self_attn.q_proj"), matches_end("proj", "q_proj")
    (True, False)
    """
    return re.match(rf"(.*\.)?({pattern})$", path) is not None


def block_index(path: str) -> int | None:
    """The first number among the parts of a path: the index of the block a layer belongs to.

    >>> block_index("model.layers.11.mlp.experts.3.up_proj"), block_index("lm_head")
    (11, None)
    """
    return next((int(part) for part in path.split(".") if part.isdigit()), None)


def block_path(path: str) -> str | None:
    """The path of the block a layer belongs to: up to the first number among its parts.

    >>> block_path("model.layers.11.mlp.experts.3.up_proj"), block_path("lm_head")
    ('model.layers.11', None)
    """
    parts = path.split(".")
    end = next((end for end, part in enumerate(parts, 1) if part.isdigit()), None)
    return None if end is None else ".".join(parts[:end])


def absent_blocks(paths: Iterable[str], among: Iterable[str]) -> list[str]:
    """The blocks in which some of `paths` lie and none of the others.

    >>> absent_blocks(["layers.0.up", "layers.1.up", "norm"], ["layers.0.down"])
    ['layers.1']
    """
    there = set(map(block_path, among))
    return [block for block in dict.fromkeys(map(block_path, paths)) if block is not None and block not in there]


def select(
    paths: Sequence[str],
    targets: str | Sequence[str],
    *,
    exclude: str | Sequence[str] = (),
    layers: Sequence[int] | None = None,
    offer: Sequence[str] | None = None,
) -> list[str]:
    """Return the paths that the rules choose, in order; every name in `targets` must exist, else VolvelleError.

    The error lists the closest names among `offer` (default: all paths).

    >>> select(["a.q_proj", "a.k_proj", "b.q_proj"], ("q_proj",), exclude=("b.q_proj",))
    ['a.q_proj']
    """
    rules = [targets] if isinstance(targets, str) else [(name,) for name in targets]
    chosen: set[str] = set()
    for rule in rules:
        found = {path for path in paths if matches(rule, path)}
        if not found:
            raise missing_target(rule if isinstance(rule, str) else rule[0], paths if offer is None else offer)
        chosen |= found
    kept = [path for path in paths if path in chosen and not (exclude and matches(exclude, path))]
    if layers is not None:
        present = {block_index(path) for path in kept}
        absent = [index for index in layers if index not in present]
        if absent:
            blocks = sorted(index for index in present if index is not None)
            has = f"; the targets lie in {blocks[0]} to {blocks[-1]}" if blocks else "; the targets lie in no block"
            raise VolvelleError(f"layers={list(layers)}: no targeted layer in block {absent[0]}{has}")
        kept = [path for path in kept if block_index(path) in layers]
    if not kept:
        raise VolvelleError(f"targets={targets!r}: exclude={exclude!r} leaves no layer to adapt")
    return kept


def missing_target(target: str, paths: Sequence[str]) -> VolvelleError:
    """The error for a target that the model does not have, with the closest names it does have."""
    names = list(dict.fromkeys(path.rpartition(".")[2] for path in paths if not path.rpartition(".")[2].isdigit()))
    candidates = [*names, *paths] if "." in target else names
    close = difflib.get_close_matches(target, candidates, n=4, cutoff=0.5)
    tip = f"close names: {', '.join(close)}" if close else f"layers of this model: {', '.join(_some(names))}"
    return VolvelleError(f"target module {target!r} does not exist in this model", tip=tip)


def _some(names: Iterable[str], limit: int = 12) -> list[str]:
    names = list(names)
    return names if len(names) <= limit else [*names[:limit], "…"]
