"""A config.json as typed fields, so that every complaint says which file, which field and what it holds."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from volvelle.errors import VolvelleError, did_you_mean
from volvelle.systems.language import config as c

_ACTIVATIONS: dict[str, c.Activation] = {
    "silu": "silu",
    "swish": "silu",
    "relu": "relu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
}


class Fields:
    """The values of a config.json (or of an object inside it) and the name of their file."""

    def __init__(self, values: Mapping[str, Any], source: str):
        self.values = values
        self.source = source

    def get(self, name: str, kind: type, default: Any) -> Any:
        """The value of a field; `default` when it is absent or null. An int serves where a float is asked for."""
        value = self.values.get(name)
        if value is None:
            return default
        # bool is an int to Python; a size of `true` is still a mistake.
        right = isinstance(value, kind) and (kind is bool or not isinstance(value, bool))
        if not right and not (kind is float and isinstance(value, int) and not isinstance(value, bool)):
            raise VolvelleError(f"{self.source}: {name} must be {kind.__name__}, got {value!r}")
        return value

    def size(self, name: str) -> int:
        """A number that must be there."""
        if self.values.get(name) is None:
            raise VolvelleError(f"{self.source}: {name} is missing", tip="is this the config.json of a language model?")
        return self.get(name, int, 0)

    def refuse(self, **allowed: Any) -> None:
        """Stop at a field whose value asks for a computation that is not built."""
        for name, only in allowed.items():
            value = self.values.get(name)
            if value is not None and value != only:
                raise VolvelleError(f"{self.source}: {name} = {value!r} is not supported, only {only!r}")

    def activation(self, name: str, default: c.Activation) -> c.Activation:
        """Our name of an activation function."""
        given = self.get(name, str, None)
        if given is None:
            return default
        if given not in _ACTIVATIONS:
            raise VolvelleError(
                f"{self.source}: {name} = {given!r} is not supported",
                tip=did_you_mean(given, _ACTIVATIONS) or f"known: {', '.join(_ACTIVATIONS)}",
            )
        return _ACTIVATIONS[given]

    def special(self, bos: int | None, eos: int | None, pad: int | None) -> c.SpecialTokens:
        """The token ids; the arguments are the family's for absent fields (a null in the file means none)."""
        ends = self.values.get("eos_token_id", eos)
        ends = () if ends is None else (ends,) if isinstance(ends, int) else tuple(ends)
        return c.SpecialTokens(self.values.get("bos_token_id", bos), ends, self.values.get("pad_token_id", pad))
