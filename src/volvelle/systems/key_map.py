"""Which tensor of a foreign checkpoint is which of ours: declarative rules, from which both directions are derived.

A rule says `theirs = concat(ours...)`, transposed for (in, out) matrices. `Binding.split` reads, `Binding.join` writes,
and one undoes the other bit by bit. Placeholders: `{i}` and `{j}` numbers, `{p}` "weight" or "bias", `{rest}` whatever
is left of the name, `{side}` "encoder" or "decoder".
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from volvelle.errors import VolvelleError

_PLACEHOLDERS = {"i": r"(?P<i>\d+)", "j": r"(?P<j>\d+)", "p": r"(?P<p>weight|bias)", "rest": r"(?P<rest>.+)"}
_PLACEHOLDERS |= {"side": r"(?P<side>encoder|decoder)"}


@dataclass(frozen=True)
class Rule:
    """`theirs` holds `ours` one below the other (dimension 0), and lies transposed when `transposed`."""

    theirs: str
    ours: tuple[str, ...]
    transposed: bool = False

    def match(self, name: str) -> dict[str, str] | None:
        """The placeholders' values when `name` is this rule's first parameter, else None."""
        # Large networks have a thousand parameters and half as many rules: most pairs are told apart here.
        found = self._pattern.fullmatch(name) if name.startswith(self._literal) else None
        return found.groupdict() if found else None

    @cached_property
    def _literal(self) -> str:
        return self.ours[0].partition("{")[0]

    @cached_property
    def _pattern(self) -> re.Pattern[str]:
        return re.compile(re.sub(r"\\{(\w+)\\}", lambda m: _PLACEHOLDERS[m[1]], re.escape(self.ours[0])))


@dataclass(frozen=True)
class Binding:
    """A rule applied to one tensor: its name in the file, our parameters and their shapes."""

    theirs: str
    ours: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    transposed: bool

    @property
    def their_shape(self) -> tuple[int, ...]:
        """The shape the tensor has in the file."""
        shape = self.shapes[0]
        if len(self.shapes) > 1:
            shape = (sum(part[0] for part in self.shapes), *shape[1:])
        return shape[::-1] if self.transposed else shape

    def split(self, tensor: Tensor, *, source: str) -> dict[str, Tensor]:
        """File -> parameters. Views where possible. Raises VolvelleError with both shapes when they differ."""
        if tuple(tensor.shape) != self.their_shape:
            shapes = f"shape {tuple(tensor.shape)} in the file, {self.their_shape} by the configuration"
            raise VolvelleError(
                f"{source}: {self.theirs}: {shapes}",
                tip="config.json and the weights belong to different models",
            )
        upright = tensor.mT if self.transposed and tensor.ndim == 2 else tensor
        if len(self.ours) == 1:
            return {self.ours[0]: upright}
        return dict(zip(self.ours, upright.split([shape[0] for shape in self.shapes]), strict=True))

    def join(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """Parameters -> file: one contiguous tensor."""
        parts = [tensors[name].detach() for name in self.ours]
        whole = parts[0] if len(parts) == 1 else torch.cat(parts)
        return (whole.mT if self.transposed and whole.ndim == 2 else whole).contiguous()


@dataclass(frozen=True)
class KeyMap:
    """All rules of a family.

    `aliases` are names that hold the same values as another name (tied weights): either may be present in a file, we
    write the second only. `prefix` is what checkpoints of the bare model leave out. `ignored` are glob patterns of
    buffers that carry nothing to learn. A file may lack the names in `optional`, which are then zero.
    """

    rules: tuple[Rule, ...]
    aliases: Mapping[str, str] = field(default_factory=dict)
    prefix: str = ""
    ignored: tuple[str, ...] = ()
    optional: frozenset[str] = frozenset()

    def bind(self, shapes: Mapping[str, tuple[int, ...]]) -> list[Binding]:
        """Apply the rules to parameters given as name -> shape, in the order of `shapes`.

        Raises VolvelleError when a parameter has no place in this family's files.
        """
        bindings: list[Binding] = []
        seen: set[str] = set()
        for name in shapes:
            if name in seen:
                continue
            binding = self._bind_one(name, shapes)
            if binding is not None:
                bindings.append(binding)
                seen.update(binding.ours)
        left = [name for name in shapes if name not in seen]
        if left:
            raise VolvelleError(
                f"{some(left)}: no place for this in a checkpoint of the family",
                tip="merge adapters before saving the whole model, or save the adapters alone",
            )
        return bindings

    def _bind_one(self, name: str, shapes: Mapping[str, tuple[int, ...]]) -> Binding | None:
        for rule in self.rules:
            values = rule.match(name)
            if values is not None:
                ours = tuple(pattern.format(**values) for pattern in rule.ours)
                missing = [other for other in ours if other not in shapes]
                if missing:
                    raise VolvelleError(f"{name}: {some(missing)} must be there too, the file holds them as one tensor")
                parts = tuple(tuple(shapes[other]) for other in ours)
                return Binding(rule.theirs.format(**values), ours, parts, rule.transposed)
        return None

    def locate(self, names: Iterable[str], bindings: Iterable[Binding], *, source: str) -> dict[str, str]:
        """Find each binding's tensor among a file's `names`: name in the map -> name in the file.

        Raises VolvelleError that lists what is missing and what is unknown.
        """
        wanted = {binding.theirs for binding in bindings}
        found: dict[str, str] = {}
        spare: dict[str, str] = {}
        unknown: list[str] = []
        for name in names:
            canonical = next((c for c in (name, self.prefix + name) if c in wanted or c in self.aliases), None)
            if canonical is None:
                if not any(fnmatch.fnmatchcase(name, pattern) for pattern in self.ignored):
                    unknown.append(name)
            elif canonical in wanted:
                found[canonical] = name
            else:
                spare[self.aliases[canonical]] = name
        for canonical, name in spare.items():
            found.setdefault(canonical, name)
        missing = sorted(wanted - found.keys() - self.optional)
        if missing or unknown:
            parts = [f"missing {some(missing)}"] if missing else []
            parts += [f"unknown {some(unknown)}"] if unknown else []
            raise VolvelleError(f"{source}: {'; '.join(parts)}", tip=_tip(missing, self.aliases))
        return found

    def read(
        self, tensors: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]], *, source: str
    ) -> dict[str, Tensor]:
        """File -> parameters given as name -> shape. Views where possible.

        Raises VolvelleError that names what is missing, unknown or of another shape.
        """
        bindings = self.bind(shapes)
        places = self.locate(tensors, bindings, source=source)
        found: dict[str, Tensor] = {}
        for binding in bindings:
            if binding.theirs in places:
                found |= binding.split(tensors[places[binding.theirs]], source=source)
            else:
                found[binding.ours[0]] = torch.zeros(binding.shapes[0])
        return found

    def write(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Parameters -> file: all tensors under the family's names, on the CPU.

        Raises VolvelleError when a parameter has no place in this family's files.
        """
        bindings = self.bind({name: tuple(value.shape) for name, value in state.items()})
        return {binding.theirs: binding.join(state).cpu() for binding in bindings}

    def tied(self, names: Iterable[str], bindings: Iterable[Binding]) -> list[tuple[str, str]]:
        """Pairs of names of a file that must hold equal values, because the model ties them."""
        names = list(names)
        wanted = {binding.theirs for binding in bindings}
        pairs = [(alias, source) for alias, source in self.aliases.items() if alias not in wanted]
        return [
            (alias, held)
            for alias, source in pairs
            for held in (source, source.removeprefix(self.prefix))
            if alias in names and held in names
        ]


def some(names: list[str], limit: int = 5) -> str:
    """The first few names, and how many more there are."""
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more


def _tip(missing: list[str], aliases: Mapping[str, str]) -> str | None:
    if any(name in aliases for name in missing):
        return "set tie_word_embeddings to true in config.json if the output weights are those of the embeddings"
    return None
