"""The tokenizer files of a Hugging Face folder, read and written.

tokenizer.json holds the tokenizer; tokenizer_config.json (before it special_tokens_map.json) names the special tokens
and may hold the chat template, which newer folders put into chat_template.jinja; generation_config.json and
config.json list the ids that end a generation.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer

from volvelle.errors import VolvelleError
from volvelle.files import read_json, write_atomic
from volvelle.systems.language.tokenizer import TextTokenizer

_NAMES = ("bos_token", "eos_token", "pad_token", "unk_token")


def read_tokenizer_folder(folder: Path) -> TextTokenizer:
    """Read the tokenizer of a folder. Raises VolvelleError that names the missing or broken file."""
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise VolvelleError(f"{folder}: no tokenizer.json", tip=_other_tokenizer(folder))
    settings = _read_json(folder / "special_tokens_map.json") | _read_json(folder / "tokenizer_config.json")
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:
        # `tokenizers` raises a bare Exception for bad files.
        raise VolvelleError(f"{path}: not a readable tokenizer: {str(error)[:200]}") from error
    _add_declared(tokenizer, settings, folder)
    generation, model = _read_json(folder / "generation_config.json"), _read_json(folder / "config.json")
    ids = {name: _id_of(tokenizer, settings, name, folder) for name in _NAMES}
    eos = [*_ids(generation, folder), *(() if ids["eos_token"] is None else (ids["eos_token"],))]
    if not generation:
        eos += _ids(model, folder)
    return TextTokenizer(
        tokenizer,
        eos_ids=eos,
        bos_id=ids["bos_token"],
        pad_id=ids["pad_token"],
        chat_template=_templates(folder, settings),
    )


def write_tokenizer_folder(tokenizer: TextTokenizer, folder: Path) -> None:
    """Write tokenizer.json and tokenizer_config.json, and generation_config.json when several ids end a generation."""
    inner = tokenizer.tokenizer
    ids = {
        "bos_token": tokenizer.bos_id,
        "eos_token": next(iter(tokenizer.eos_ids), None),
        "pad_token": tokenizer.pad_id,
    }
    named = {name: inner.id_to_token(i) for name, i in ids.items() if i is not None}
    settings: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", **named}
    # transformers 4 would otherwise tidy spaces before punctuation when decoding.
    settings["clean_up_tokenization_spaces"] = False
    templates = tokenizer.chat_templates
    if list(templates) == ["default"]:
        settings["chat_template"] = templates["default"]
    elif templates:
        settings["chat_template"] = [{"name": name, "template": text} for name, text in templates.items()]
    write_atomic(folder / "tokenizer.json", inner.to_str(pretty=True))
    _write_json(folder / "tokenizer_config.json", settings)
    if len(tokenizer.eos_ids) > 1:
        generation = {"bos_token_id": tokenizer.bos_id, "pad_token_id": tokenizer.pad_id}
        kept = _read_json(folder / "generation_config.json")
        generation = {name: value for name, value in generation.items() if value is not None}
        _write_json(folder / "generation_config.json", kept | generation | {"eos_token_id": list(tokenizer.eos_ids)})


def _write_json(path: Path, values: Mapping[str, Any]) -> None:
    write_atomic(path, json.dumps(values, indent=2, ensure_ascii=False) + "\n")


def _read_json(path: Path) -> dict[str, Any]:
    """What the file holds; nothing where there is none."""
    return read_json(path) if path.is_file() else {}


def _other_tokenizer(folder: Path) -> str:
    others = {
        "tokenizer.model": "a SentencePiece model",
        "vocab.json": "the old vocab.json with merges.txt",
        "vocab.txt": "a WordPiece vocabulary",
    }
    found = [what for name, what in others.items() if (folder / name).is_file()]
    made = "transformers' AutoTokenizer.from_pretrained(folder).save_pretrained(folder) writes tokenizer.json"
    return f"the folder has {found[0]} only; {made}" if found else made


def _content(value: Any) -> str | None:
    """A token is written as its text or as an object with `content`."""
    if isinstance(value, Mapping):
        value = value.get("content")
    return value if isinstance(value, str) else None


def _id_of(tokenizer: Tokenizer, settings: Mapping[str, Any], name: str, folder: Path) -> int | None:
    content = _content(settings.get(name))
    if content is None:
        return None
    found = tokenizer.token_to_id(content)
    if found is None and name != "unk_token":
        raise VolvelleError(f"{folder}: {name} {content!r} is not in tokenizer.json")
    return found


def _ids(values: Mapping[str, Any], folder: Path) -> list[int]:
    value = values.get("eos_token_id")
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if not all(isinstance(i, int) and not isinstance(i, bool) and i >= 0 for i in ids):
        raise VolvelleError(f"{folder}: eos_token_id must be a token id or a list of them, got {value!r}")
    return ids


def _add_declared(tokenizer: Tokenizer, settings: Mapping[str, Any], folder: Path) -> None:
    """Tokens that only tokenizer_config.json knows (`added_tokens_decoder`), at the ids it gives them."""
    declared = settings.get("added_tokens_decoder")
    if not isinstance(declared, Mapping):
        return
    have = tokenizer.get_added_tokens_decoder()
    for key, value in sorted(declared.items(), key=lambda item: int(item[0]) if str(item[0]).isdigit() else -1):
        content = _content(value)
        if content is None or not isinstance(value, Mapping) or not str(key).isdigit():
            raise VolvelleError(f"{folder}/tokenizer_config.json: added_tokens_decoder has a broken entry {key!r}")
        if int(key) in have and have[int(key)].content == content:
            continue
        sides = {name: bool(value.get(name, False)) for name in ("lstrip", "rstrip", "normalized", "single_word")}
        tokenizer.add_tokens([AddedToken(content, special=bool(value.get("special", False)), **sides)])
        if tokenizer.token_to_id(content) != int(key):
            raise VolvelleError(
                f"{folder}: tokenizer_config.json puts token {content!r} at id {key}, "
                f"tokenizer.json at {tokenizer.token_to_id(content)}"
            )


def _templates(folder: Path, settings: Mapping[str, Any]) -> dict[str, str]:
    """The template file wins over the embedded one, as in transformers."""
    templates: dict[str, str] = {}
    embedded = settings.get("chat_template")
    if isinstance(embedded, str):
        templates["default"] = embedded
    elif isinstance(embedded, list):
        for entry in embedded:
            if not isinstance(entry, Mapping) or not all(isinstance(entry.get(k), str) for k in ("name", "template")):
                raise VolvelleError(f"{folder}/tokenizer_config.json: chat_template has an entry without name or text")
            templates[entry["name"]] = entry["template"]
    single = folder / "chat_template.jinja"
    more = sorted((folder / "additional_chat_templates").glob("*.jinja"))
    for path in [*([single] if single.is_file() else []), *more]:
        try:
            templates["default" if path == single else path.stem] = path.read_text("utf-8")
        except (OSError, ValueError) as error:
            raise VolvelleError(f"{path}: not readable text: {error}") from error
    return templates
