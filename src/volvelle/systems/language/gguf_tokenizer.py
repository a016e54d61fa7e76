"""The tokenizer that a GGUF file's metadata describes, rebuilt on `tokenizers`.

Two models are known: "gpt2" (byte-level BPE; `tokenizer.ggml.pre` names how text is split before merging) and "llama"
(SentencePiece BPE: scores become merges, bytes stand in for unknown characters).
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

import numpy as np
from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers, processors
from tokenizers.models import BPE

from volvelle.errors import VolvelleError, did_you_mean
from volvelle.systems.language.config import SpecialTokens
from volvelle.systems.language.gguf_file import GGUFFile
from volvelle.systems.language.tokenizer import TextTokenizer

_log = logging.getLogger(__name__)
_NORMAL, _CONTROL, _USER_DEFINED = 1, 3, 4
_SPACE = "\u2581"  # SentencePiece's visible space

# Contractions, words, numbers, punctuation with its line ends, line ends, trailing space: Llama 3's and Qwen2's split.
_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|{number}"
    r"| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_UPPER, _LOWER = r"\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}", r"\p{Ll}\p{Lm}\p{Lo}\p{M}"
_TEKKEN = (
    rf"[^\r\n\p{{L}}\p{{N}}]?[{_UPPER}]*[{_LOWER}]+|[^\r\n\p{{L}}\p{{N}}]?[{_UPPER}]+[{_LOWER}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@dataclass(frozen=True)
class _Split:
    """How text is cut before byte-level BPE. `expression` None is GPT-2's own; `digits` cuts each digit off first."""

    expression: str | None = None
    digits: bool = False
    nfc: bool = False
    whole_words: bool = False  # a word that is a token as it stands is taken without merging
    bos: bool = False


_GPT2 = _Split()
_LLAMA3 = _Split(_WORDS.format(number=r"\p{N}{1,3}"), whole_words=True, bos=True)
_QWEN2 = _Split(_WORDS.format(number=r"\p{N}"), nfc=True)
_DIGITS = _Split(digits=True)
SPLITS = {
    "gpt-2": _GPT2,
    "olmo": _GPT2,
    "smollm": _DIGITS,
    "starcoder": _DIGITS,
    "refact": _DIGITS,
    "llama-bpe": _LLAMA3,
    "llama3": _LLAMA3,
    "llama-v3": _LLAMA3,
    "falcon3": _LLAMA3,
    "smaug-bpe": _LLAMA3,
    "qwen2": _QWEN2,
    "deepseek-r1-qwen": _QWEN2,
    "megrez": _QWEN2,
    "tekken": _Split(_TEKKEN, whole_words=True, bos=True),
}
# What `tokenizer.ggml.pre` must have been when an old file does not say: only where one answer is possible.
_IMPLIED = {"gpt2": "gpt-2", "qwen2": "qwen2"}


def special_tokens(file: GGUFFile, vocabulary: int) -> SpecialTokens:
    """Ids of the begin, end (end of sequence, turn and message) and padding tokens.

    Raises VolvelleError for a begin or end token outside the vocabulary; a padding token outside it is dropped, with a
    warning, because many files carry a placeholder there.
    """

    def token(name: str) -> int | None:
        value = file.metadata.get(f"tokenizer.ggml.{name}_token_id")
        if value is None or (isinstance(value, int) and not isinstance(value, bool) and 0 <= value < vocabulary):
            return value
        if name == "padding":
            _log.warning("%s: padding token %s is outside the vocabulary, ignored", file.path, value)
            return None
        raise file.error(f"tokenizer.ggml.{name}_token_id is none of the {vocabulary} tokens: {str(value)[:80]}")

    ends = [token(name) for name in ("eos", "eot", "eom")]
    return SpecialTokens(token("bos"), tuple(dict.fromkeys(i for i in ends if i is not None)), token("padding"))


def read_tokenizer(file: GGUFFile, architecture: str) -> TextTokenizer:
    """Build the tokenizer. Raises VolvelleError for unknown models and splits (with the list), and broken tables."""
    model = file.metadata.get("tokenizer.ggml.model")
    if model not in _BUILDERS:
        if model is None:
            raise file.error("metadata key tokenizer.ggml.model is missing: the file holds no tokenizer")
        raise file.error(f"tokenizer {str(model)[:80]!r} is not supported", tip=f"known: {', '.join(_BUILDERS)}")
    tokens = _strings(file, "tokens")
    kinds = _numbers(file, "token_type", len(tokens), default=_NORMAL)
    if len(set(tokens)) != len(tokens):
        raise file.error("tokenizer.ggml.tokens holds the same token twice")
    special = special_tokens(file, len(tokens))
    try:
        tokenizer, bos = _BUILDERS[model](file, architecture, tokens, kinds)
        _add_tokens(tokenizer, tokens, kinds, special)
        _add_bos(file, tokenizer, tokens, special, bos)
    except VolvelleError:
        raise
    except Exception as error:
        # `tokenizers` reports a broken table with a bare Exception.
        raise file.error(f"the tokenizer cannot be built: {str(error)[:200]}") from error
    return TextTokenizer(
        tokenizer,
        eos_ids=special.eos,
        bos_id=special.bos,
        pad_id=special.pad,
        chat_template=_templates(file),
    )


def _byte_level(file: GGUFFile, architecture: str, tokens: list[str], _kinds: np.ndarray) -> tuple[Tokenizer, bool]:
    split = _split(file, architecture)
    # A token may begin with a space of its own, so the separator is the first space after the first character.
    merges = [(m[:cut], m[cut + 1 :]) for m in _strings(file, "merges") if (cut := m.find(" ", 1)) > 0]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    tokenizer = Tokenizer(BPE(vocabulary, merges, ignore_merges=split.whole_words))
    if split.nfc:
        tokenizer.normalizer = normalizers.NFC()
    first = []
    if split.digits:
        first.append(pre_tokenizers.Digits(individual_digits=True))
    if split.expression is not None:
        first.append(pre_tokenizers.Split(Regex(split.expression), "isolated"))
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=split.expression is None)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*first, level])
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer, split.bos


def _split(file: GGUFFile, architecture: str) -> _Split:
    name = file.metadata.get("tokenizer.ggml.pre")
    if name in SPLITS:
        return SPLITS[name]
    known = f"known: {', '.join(SPLITS)}"
    if name in {None, "default"} and architecture in _IMPLIED:
        return SPLITS[_IMPLIED[architecture]]
    if name is None:
        raise file.error("metadata key tokenizer.ggml.pre is missing: how text is split is unknown", tip=known)
    if name == "default":
        _log.warning("%s: tokenizer.ggml.pre is 'default': text is split as by GPT-2", file.path)
        return _GPT2
    near = did_you_mean(str(name), SPLITS)
    tip = f"{near} {known}" if near else known
    raise file.error(f"pre-tokenizer {str(name)[:80]!r} is not supported", tip=tip)


def _sentencepiece(file: GGUFFile, _architecture: str, tokens: list[str], kinds: np.ndarray) -> tuple[Tokenizer, bool]:
    scores = _numbers(file, "scores", len(tokens))
    vocabulary = {token: i for i, token in enumerate(tokens)}
    unknown = file.metadata.get("tokenizer.ggml.unknown_token_id", 0)
    if not isinstance(unknown, int) or not 0 <= unknown < len(tokens):
        raise file.error(f"tokenizer.ggml.unknown_token_id is none of the {len(tokens)} tokens: {str(unknown)[:80]}")
    merges = _merges(tokens, kinds, scores)
    bpe = BPE(vocabulary, merges, unk_token=tokens[unknown], fuse_unk=True, byte_fallback=True)
    tokenizer = Tokenizer(bpe)
    prefix = bool(file.metadata.get("tokenizer.ggml.add_space_prefix", True))
    # The dummy prefix as transformers applies it: at the start of the text only (llama.cpp repeats it after every
    # control token), and not before a space, so a single leading space of the text is lost in decoding.
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(_SPACE, "first" if prefix else "never", split=False)
    steps = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if prefix else steps)
    return tokenizer, True


def _merges(tokens: list[str], kinds: np.ndarray, scores: np.ndarray) -> list[tuple[str, str]]:
    """Every way to cut a piece into two pieces, best score first: BPE then merges as SentencePiece does.

    Control and byte tokens take no part: text must never grow into them.
    """
    pieces = {token: i for i, token in enumerate(tokens) if kinds[i] == _NORMAL}
    found = [
        (-scores[i], -cut, i, token[:cut], token[cut:])
        for token, i in pieces.items()
        for cut in range(1, len(token))
        if token[:cut] in pieces and token[cut:] in pieces
    ]
    # At equal score the longer left part goes first.
    return [(left, right) for *_, left, right in sorted(found)]


def _add_tokens(tokenizer: Tokenizer, tokens: list[str], kinds: np.ndarray, special: SpecialTokens) -> None:
    """Control tokens are special; user-defined ones are found whole in text, like control tokens, but are text."""
    named = {special.bos, special.pad, *special.eos} - {None}
    control = [i for i in range(len(tokens)) if (kinds[i] == _CONTROL or i in named) and tokens[i]]
    user = [i for i in range(len(tokens)) if kinds[i] == _USER_DEFINED and i not in named and tokens[i]]
    tokenizer.add_special_tokens([AddedToken(tokens[i], special=True, normalized=False) for i in control])
    tokenizer.add_tokens([AddedToken(tokens[i], special=False, normalized=False) for i in user])


def _add_bos(file: GGUFFile, tokenizer: Tokenizer, tokens: list[str], special: SpecialTokens, default: bool) -> None:
    wanted = file.metadata.get("tokenizer.ggml.add_bos_token", default)
    if wanted and special.bos is None:
        raise file.error("the tokenizer asks for a begin token and names none (tokenizer.ggml.bos_token_id)")
    start = [special.bos] if wanted and special.bos is not None else []
    stop = list(special.eos[:1]) if file.metadata.get("tokenizer.ggml.add_eos_token", False) else []
    if start or stop:
        # Named "bos" and "eos", because the little language of templates cannot spell every token.
        named = [("bos", i) for i in start] + [("eos", i) for i in stop]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=[*(["bos"] if start else []), "$A", *(["eos"] if stop else [])],
            special_tokens=[{"id": name, "ids": [i], "tokens": [tokens[i]]} for name, i in named],
        )


def _templates(file: GGUFFile) -> dict[str, str] | None:
    prefix = "tokenizer.chat_template"
    found = {
        key.removeprefix(prefix).removeprefix(".") or "default": value
        for key, value in file.metadata.items()
        if (key == prefix or key.startswith(prefix + ".")) and isinstance(value, str)
    }
    return found or None


def _strings(file: GGUFFile, name: str) -> list[str]:
    value = file.metadata.get(f"tokenizer.ggml.{name}")
    if value is None:
        raise file.error(f"metadata key tokenizer.ggml.{name} is missing")
    if not isinstance(value, list) or not value:
        raise file.error(f"metadata key tokenizer.ggml.{name} must be a list of texts")
    return value


def _numbers(file: GGUFFile, name: str, count: int, default: Any = None) -> np.ndarray:
    value = file.metadata.get(f"tokenizer.ggml.{name}")
    if value is None and default is not None:
        return np.full(count, default)
    if value is None:
        raise file.error(f"metadata key tokenizer.ggml.{name} is missing")
    if not isinstance(value, np.ndarray) or len(value) != count or not np.isfinite(value).all():
        raise file.error(f"metadata key tokenizer.ggml.{name} must hold {count} numbers, one a token")
    return value


_BUILDERS = {"gpt2": _byte_level, "llama": _sentencepiece}
