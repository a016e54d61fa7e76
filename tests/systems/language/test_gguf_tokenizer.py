"""Tokenizers rebuilt from GGUF metadata split and merge as the originals do."""

from __future__ import annotations

import logging
import re
import unicodedata

import numpy as np
import pytest
import regex
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.systems.language.gguf_writing import byte_alphabet, tokenizer_metadata, write

from volvelle.errors import VolvelleError
from volvelle.systems.language.gguf_file import GGUFFile
from volvelle.systems.language.gguf_tokenizer import SPLITS, read_tokenizer

TEXTS = [
    "Hello, world! It's 2024; he'll pay $1,234.56.",
    "  leading and   inner    spaces \n\n\ttabs\r\nand lines  ",
    "naïve café — 北京 東京 Привет 😀👨‍👩‍👧 e\u0301",
    "snake_case camelCase HTTPServer 3.14e-10 12345678 ½ ²",
    "def f(x):\n    return x**2  # DON'T\n",
    "",
    " ",
    "\u00a0\u2003x",
]
WORDS = (
    "'s|'t|'re|'ve|'m|'ll|'d| ?\\p{L}+| ?\\p{N}+| ?[^\\s\\p{L}\\p{N}]+|\\s+(?!\\S)|\\s+",
    "(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\\r\\n\\p{L}\\p{N}]?\\p{L}+|\\p{N}{1,3}"
    "| ?[^\\s\\p{L}\\p{N}]+[\\r\\n]*|\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+",
)
STAND_INS = dict(zip(byte_alphabet(), [*range(33, 127), *range(161, 173), *range(174, 256)], strict=False))


def load(tmp_path, metadata, architecture="llama"):
    path = write(tmp_path / "t.gguf", metadata, {"t": np.ones(1, np.float32)}, architecture)
    return read_tokenizer(GGUFFile(path), architecture)


def pieces(tokenizer, text):
    """The pieces the text is cut into before merging, as text."""
    rest = [b for b in range(256) if b not in STAND_INS.values()]
    table = STAND_INS | {chr(256 + i): b for i, b in enumerate(rest)}
    cut = tokenizer.tokenizer.pre_tokenizer.pre_tokenize_str(text)
    return [bytes(table[c] for c in piece).decode() for piece, _ in cut]


@pytest.mark.parametrize("text", TEXTS)
def test_splits_are_those_of_the_original_expressions(tmp_path, text):
    """Oracle: the expressions that the models' authors published, run by another regex engine."""
    gpt2, llama3 = WORDS
    digits = [p for part in regex.findall(r"\p{N}|[^\p{N}]+", text) for p in regex.findall(gpt2, part)]
    expected = {
        "gpt-2": regex.findall(gpt2, text),
        "smollm": digits,
        "llama-bpe": regex.findall(llama3, text),
        "qwen2": regex.findall(llama3.replace("{1,3}", ""), text),
    }
    for name, words in expected.items():
        tokenizer = load(tmp_path, tokenizer_metadata() | {"tokenizer.ggml.pre": name})
        assert pieces(tokenizer, text) == words, name


@pytest.mark.peer
@pytest.mark.parametrize(
    ("pre", "architecture"), [("gpt-2", "gpt2"), ("qwen2", "qwen2"), ("llama-bpe", "llama"), ("tekken", "llama")]
)
def test_ids_equal_transformers_reading_of_the_same_file(tmp_path, pre, architecture):
    transformers = pytest.importorskip("transformers")
    metadata = tokenizer_metadata(200) | {"tokenizer.ggml.pre": pre, f"{architecture}.block_count": 1}
    ours = load(tmp_path, metadata, architecture)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path, gguf_file="t.gguf")
    for text in TEXTS:
        # Qwen2's own tokenizer.json composes characters first; transformers' reading of GGUF files leaves that out.
        given = unicodedata.normalize("NFC", text) if pre == "qwen2" else text
        assert ours.encode(text) == theirs.encode(given, add_special_tokens=False), text
    assert ours.encode("a<|im_end|>b", special=True) == theirs.encode("a<|im_end|>b", add_special_tokens=False)


@pytest.mark.peer
def test_smollm2_equals_transformers_reading_of_the_file(smollm2_path):
    """Without digits. With digits ours differs on purpose: transformers' reading of GGUF files ignores that SmolLM
    cuts each digit off, which its own tokenizer.json does (next test)."""
    transformers = pytest.importorskip("transformers")
    ours = read_tokenizer(GGUFFile(smollm2_path), "llama")
    theirs = transformers.AutoTokenizer.from_pretrained(smollm2_path.parent, gguf_file=smollm2_path.name)
    for text in TEXTS:
        text = re.sub(r"[\d½²]", "", text)
        assert ours.encode(text) == theirs.encode(text, add_special_tokens=False), text
        assert ours.decode(ours.encode(text)) == text
    assert ours.vocabulary == 49152
    assert (ours.bos_id, ours.eos_ids, ours.pad_id) == (1, (2,), 2)
    assert ours.special_ids >= {0, 1, 2}
    messages = [{"role": "user", "content": "Hi"}]
    text = theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert ours.chat(messages) == text


def test_smollm2_cuts_off_every_digit(smollm2_path):
    """The published ids of SmolLM2's tokenizer: digits 0 to 9 are the tokens 32 to 41, alone and in numbers."""
    tokenizer = read_tokenizer(GGUFFile(smollm2_path), "llama")
    digits = [tokenizer.tokenizer.token_to_id(str(d)) for d in range(10)]
    assert tokenizer.encode("2024") == [digits[2], digits[0], digits[2], digits[4]]
    space = tokenizer.tokenizer.token_to_id("Ġ")
    assert tokenizer.encode("in 1995")[-5:] == [space, digits[1], digits[9], digits[9], digits[5]]


def sentencepiece(**changes):
    """A Llama-2-like table: control, 256 bytes, letters, and pieces with scores."""
    letters = ["\u2581", *"abcdefghijklmnopqrstuvwxyz<s>/"]
    letters = list(dict.fromkeys(letters))
    made = [
        "\u2581a",
        "th",
        "he",
        "the",
        "\u2581the",
        "in",
        "ing",
        "an",
        "and",
        "\u2581and",
        "s>",
        "<s",
        "\u2581\u2581",
    ]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256)), *made, *letters, "<think>"]
    scores = [0.0] * 259 + [-float(i) for i in range(len(made))] + [-1000.0 - i for i in range(len(letters))] + [0.0]
    kinds = [2, 3, 3, *([6] * 256), *([1] * (len(made) + len(letters))), 4]
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": scores,
        "tokenizer.ggml.token_type": kinds,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
        **changes,
    }


@pytest.mark.peer
def test_sentencepiece_ids_equal_transformers(tmp_path):
    transformers = pytest.importorskip("transformers")
    ours = load(tmp_path, sentencepiece(**{"llama.block_count": 1}))
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path, gguf_file="t.gguf")
    for text in [
        "the thing and the end",
        " leading",
        "  two",
        "two  spaces",
        "北京 é",
        "ananthe<think>x",
        "a\nb",
        "thethethe",
        "",
    ]:
        assert ours.encode(text) == theirs.encode(text, add_special_tokens=False), text
    assert ours.encode_prompt("the") == theirs.encode("the")


def test_sentencepiece_round_trip_and_control_tokens(tmp_path):
    tokenizer = load(tmp_path, sentencepiece())
    for text in ["the thing", "a  b", "北京😀", "x ", "tab\tline\n"]:
        assert tokenizer.decode(tokenizer.encode(text)) == text
    # The pieces "<s" and ">" exist, but text must not grow into the control token 1.
    assert 1 not in tokenizer.encode("<s>")
    assert tokenizer.decode(tokenizer.encode("<s>")) == "<s>"
    assert 1 in tokenizer.encode("<s>", special=True)
    assert tokenizer.encode_prompt("a")[0] == 1


def test_scores_decide_the_merges(tmp_path):
    """Where th + e and t + he compete, the better score wins."""
    for better, expected in (("th", ["\u2581", "th", "e"]), ("he", ["\u2581", "t", "he"])):
        metadata = sentencepiece()
        tokens = metadata["tokenizer.ggml.tokens"]
        metadata["tokenizer.ggml.scores"][tokens.index(better)] = 5.0
        for word in ("the", "\u2581the"):
            metadata["tokenizer.ggml.token_type"][tokens.index(word)] = 5  # unused
        tokenizer = load(tmp_path, metadata)
        assert [tokenizer.tokenizer.id_to_token(i) for i in tokenizer.encode("the")] == expected


def test_without_prefix_space(tmp_path):
    tokenizer = load(tmp_path, sentencepiece(**{"tokenizer.ggml.add_space_prefix": False}))
    assert tokenizer.decode(tokenizer.encode("the")) == "the"
    assert tokenizer.tokenizer.id_to_token(tokenizer.encode("the")[0]) == "the"


@settings(max_examples=150, deadline=None)
@given(st.text())
def test_byte_level_round_trip(tmp_path_factory, text):
    for name in ("gpt-2", "smollm", "llama-bpe", "tekken"):
        tokenizer = _CACHE.get(name)
        if tokenizer is None:
            folder = tmp_path_factory.mktemp("t")
            tokenizer = _CACHE[name] = load(folder, tokenizer_metadata(100) | {"tokenizer.ggml.pre": name})
        assert tokenizer.decode(tokenizer.encode(text)) == text


_CACHE: dict = {}


def test_begin_token_is_added_only_to_prompts(tmp_path):
    tokenizer = load(tmp_path, tokenizer_metadata() | {"tokenizer.ggml.add_bos_token": True})
    assert tokenizer.encode_prompt("hi") == [tokenizer.bos_id, *tokenizer.encode("hi")]


def test_several_end_tokens_and_templates(tmp_path):
    metadata = tokenizer_metadata(control=("<a>", "<b>", "<c>"))
    end = len(metadata["tokenizer.ggml.tokens"])
    metadata |= {
        "tokenizer.ggml.eot_token_id": end - 3,
        "tokenizer.chat_template": "T",
        "tokenizer.chat_template.x": "X",
    }
    tokenizer = load(tmp_path, metadata)
    assert tokenizer.eos_ids == (end - 1, end - 3)
    assert tokenizer.chat_templates == {"default": "T", "x": "X"}


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"tokenizer.ggml.model": "bert"}, "tokenizer 'bert' is not supported"),
        ({"tokenizer.ggml.model": None}, "tokenizer.ggml.model is missing"),
        ({"tokenizer.ggml.pre": "qwen3"}, "pre-tokenizer 'qwen3' is not supported"),
        ({"tokenizer.ggml.pre": None}, "tokenizer.ggml.pre is missing"),
        ({"tokenizer.ggml.merges": ["a zzz"]}, "the tokenizer cannot be built"),
        ({"tokenizer.ggml.merges": None}, "tokenizer.ggml.merges is missing"),
        ({"tokenizer.ggml.token_type": [1, 2]}, "must hold"),
        ({"tokenizer.ggml.tokens": ["a", "a"]}, "same token twice"),
        ({"tokenizer.ggml.tokens": [1, 2]}, "must be a list of texts"),
        ({"tokenizer.ggml.bos_token_id": None, "tokenizer.ggml.add_bos_token": True}, "asks for a begin token"),
    ],
)
def test_broken_tables_are_refused(tmp_path, changes, says):
    if "tokens" in str(changes) and "tokenizer.ggml.tokens" in changes:
        changes = changes | {"tokenizer.ggml.token_type": None}
    with pytest.raises(VolvelleError, match=says) as caught:
        load(tmp_path, tokenizer_metadata() | changes)
    assert "t.gguf" in str(caught.value)
    if "pre" in says:
        assert all(name in caught.value.tip for name in SPLITS)


def test_default_split_is_said(tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        load(tmp_path, tokenizer_metadata() | {"tokenizer.ggml.pre": "default"})
    assert "split as by GPT-2" in caplog.text


def test_old_files_without_split_name(tmp_path):
    assert load(tmp_path, tokenizer_metadata() | {"tokenizer.ggml.pre": None}, "qwen2").encode("12")


def test_padding_placeholder_is_dropped_with_a_warning(tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        tokenizer = load(tmp_path, tokenizer_metadata() | {"tokenizer.ggml.padding_token_id": 2**32 - 1})
    assert tokenizer.pad_id is None
    assert "padding token 4294967295" in caplog.text
