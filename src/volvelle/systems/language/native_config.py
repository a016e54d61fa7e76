"""Our own config.json: a `LanguageConfig` field by field, for models that no other family's file can hold.

Every component is an object with its class under "kind": `"position": {"kind": "ALiBi"}`.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from volvelle.errors import VolvelleError, did_you_mean
from volvelle.systems.language import config as c
from volvelle.systems.language.config_fields import Fields

ARCHITECTURE = "VolvelleDecoder"
_KINDS = {kind.__name__: kind for kind in vars(c).values() if dataclasses.is_dataclass(kind) and isinstance(kind, type)}


def read_native(fields: Fields) -> c.LanguageConfig:
    """Undo `write_native`. Raises VolvelleError that names the field, and ValueError where sizes do not fit."""
    given = fields.get("config", dict, None)
    if given is None:
        raise VolvelleError(f"{fields.source}: config is missing")
    return _build(c.LanguageConfig, {"family": "volvelle", **given}, f"{fields.source}: config")


def write_native(config: c.LanguageConfig) -> dict[str, Any]:
    """The content of a config.json, with the token ids where other tools look for them."""
    eos = config.special.eos
    values = {field.name: _plain(getattr(config, field.name)) for field in dataclasses.fields(config)}
    del values["family"]
    return {
        "architectures": [ARCHITECTURE],
        "model_type": "volvelle",
        "config": values,
        "bos_token_id": config.special.bos,
        "eos_token_id": list(eos) if len(eos) > 1 else next(iter(eos), None),
        "pad_token_id": config.special.pad,
    }


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {field.name: _plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
        return {"kind": type(value).__name__, **fields}
    return [_plain(item) for item in value] if isinstance(value, tuple) else value


def _build(kind: type, values: dict[str, Any], where: str) -> Any:
    known = {field.name: field for field in dataclasses.fields(kind)}
    unknown = sorted(set(values) - set(known))
    if unknown:
        raise VolvelleError(f"{where}: unknown field {unknown[0]!r}", tip=f"it has: {', '.join(known)}")
    needed = (dataclasses.MISSING, dataclasses.MISSING)
    missing = [name for name, f in known.items() if name not in values and (f.default, f.default_factory) == needed]
    if missing:
        raise VolvelleError(f"{where}: {missing[0]} is missing")
    return kind(**{name: _value(value, f"{where}.{name}") for name, value in values.items()})


def _value(value: Any, where: str) -> Any:
    if isinstance(value, list):
        return tuple(_value(item, where) for item in value)
    if not isinstance(value, dict):
        return value
    name = value.get("kind")
    if name not in _KINDS:
        tip = did_you_mean(str(name), _KINDS) or f"known: {', '.join(_KINDS)}"
        raise VolvelleError(f"{where}: kind {name!r} is not known", tip=tip)
    return _build(_KINDS[name], {key: item for key, item in value.items() if key != "kind"}, where)
