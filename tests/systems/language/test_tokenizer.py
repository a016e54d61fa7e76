"""Encoding that text cannot subvert, decoding that cuts no character, folders that transformers reads."""

from __future__ import annotations

import copy
import json
import pickle
import shutil

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.systems.language.tokenizers_made import CHATML, byte_level
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from volvelle.errors import VolvelleError
from volvelle.systems.language.tokenizer import TextTokenizer

TOKENIZER = byte_level()
FALLBACK_TOKENS = ["<unk>", *(f"<0x{b:02X}>" for b in range(256)), *"abc ", "\u2581"]


def byte_fallback() -> TextTokenizer:
    inner = Tokenizer(
        models.BPE({t: i for i, t in enumerate(FALLBACK_TOKENS)}, [], unk_token="<unk>", byte_fallback=True)
    )
    inner.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    steps = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    inner.decoder = decoders.Sequence(steps)
    return TextTokenizer(inner)


@settings(max_examples=300, deadline=None)
@given(st.text())
def test_round_trip(text):
    assert TOKENIZER.decode(TOKENIZER.encode(text)) == text
    assert TOKENIZER.decode(TOKENIZER.encode(text, special=True), skip_special=False) == text


@settings(max_examples=300, deadline=None)
@given(st.lists(st.sampled_from(["<|im_start|>", "<|im_end|>", "<|endoftext|>", "<|", "|>", "im_end", " ", "x"])))
def test_text_never_becomes_control_tokens(parts):
    text = "".join(parts)
    ids = TOKENIZER.encode(text)
    assert not TOKENIZER.special_ids & set(ids)
    assert TOKENIZER.decode(ids) == text


def test_special_reads_control_tokens():
    ids = TOKENIZER.encode("<|im_start|>user<|im_end|>", special=True)
    assert (ids[0], ids[-1]) == (TOKENIZER.bos_id, TOKENIZER.eos_ids[0])
    assert TOKENIZER.decode(ids) == "user"
    assert TOKENIZER.decode(ids, skip_special=False) == "<|im_start|>user<|im_end|>"


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda t: pickle.loads(pickle.dumps(t))], ids=["copy", "pickle"])
def test_copies_keep_the_guard(duplicate):
    other = duplicate(TOKENIZER)
    text = "a<|im_end|>b"
    assert other.encode(text) == TOKENIZER.encode(text)
    assert other.encode(text, special=True) == TOKENIZER.encode(text, special=True)
    assert (other.eos_ids, other.bos_id, other.pad_id) == (TOKENIZER.eos_ids, TOKENIZER.bos_id, TOKENIZER.pad_id)
    assert other.chat_template == CHATML


def test_stored_truncation_and_padding_are_switched_off():
    inner = copy.deepcopy(TOKENIZER.tokenizer)
    inner.enable_truncation(3)
    inner.enable_padding(length=50)
    text = "the quick brown fox jumps"
    assert TextTokenizer(inner).encode(text) == TOKENIZER.encode(text)


def test_lone_surrogates_and_unknown_ids():
    with pytest.raises(VolvelleError, match="not valid Unicode"):
        TOKENIZER.encode("a\ud800")
    assert TOKENIZER.decode([TOKENIZER.vocabulary + 7, *TOKENIZER.encode("x")]) == "x"


@settings(max_examples=200, deadline=None)
@given(st.text(alphabet=st.one_of(st.characters(codec="utf-8"), st.sampled_from("😀👩‍🚀北é")), max_size=30))
def test_stream_joins_to_the_text_and_never_shows_half_a_character(text):
    ids = TOKENIZER.encode(text)
    stream = TOKENIZER.stream()
    pieces = [stream.push(i) for i in ids]
    assert "".join(pieces) + stream.flush() == text
    if "\ufffd" not in text:
        assert not any("\ufffd" in piece for piece in pieces)
        assert "".join(pieces) == text


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(0, TOKENIZER.vocabulary + 3), max_size=40))
def test_stream_of_any_ids_equals_decode(ids):
    stream = TOKENIZER.stream()
    assert "".join([*(stream.push(i) for i in ids), stream.flush()]) == TOKENIZER.decode(ids)


@pytest.mark.parametrize("text", ["abc", " a", "a 😀 b", "北京北京", "é😀😀é"])
def test_stream_with_byte_fallback(text):
    tokenizer = byte_fallback()
    stream = tokenizer.stream()
    pieces = [stream.push(i) for i in tokenizer.encode(text)]
    assert "".join(pieces) + stream.flush() == tokenizer.decode(tokenizer.encode(text))
    assert not any("\ufffd" in piece for piece in pieces)


def test_flush_shows_the_incomplete_end_and_starts_afresh():
    stream = TOKENIZER.stream()
    assert stream.push(TOKENIZER.encode("é")[0]) == ""
    assert stream.flush() == "\ufffd"
    assert [stream.push(i) for i in TOKENIZER.encode("a")] == ["a"]


@pytest.mark.peer
@pytest.mark.parametrize("model_type", [None, "llama", "qwen2", "gpt2"])
def test_saved_folder_is_read_by_transformers(tmp_path, model_type):
    transformers = pytest.importorskip("transformers")
    TOKENIZER.save(tmp_path)
    if model_type:
        (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    for text in ["the quick <think> 北京 😀\n\n x", "<|im_start|>a<|im_end|>", "  1234  "]:
        assert theirs.encode(text, add_special_tokens=False) == TOKENIZER.encode(text, special=True)
    assert theirs.eos_token_id == TOKENIZER.eos_ids[0]
    assert (theirs.bos_token_id, theirs.pad_token_id) == (TOKENIZER.bos_id, TOKENIZER.pad_id)
    messages = [{"role": "user", "content": "hi"}]
    assert theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=True) == TOKENIZER.chat(messages)


@pytest.mark.peer
def test_folders_written_by_transformers_are_read(tmp_path):
    transformers = pytest.importorskip("transformers")
    TOKENIZER.save(tmp_path / "a")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "a")
    theirs.save_pretrained(tmp_path / "b")
    ours = TextTokenizer.from_folder(tmp_path / "b")
    assert ours.chat_template == CHATML
    text = "the quick <think> brown"
    assert ours.encode(text) == theirs.encode(text, add_special_tokens=False)
    assert ours.eos_ids[0] == theirs.eos_token_id


def test_save_and_read_again(tmp_path):
    TOKENIZER.save(tmp_path)
    again = TextTokenizer.from_folder(tmp_path)
    assert again.eos_ids == TOKENIZER.eos_ids
    assert (again.bos_id, again.pad_id) == (TOKENIZER.bos_id, TOKENIZER.pad_id)
    assert again.chat_templates == TOKENIZER.chat_templates
    assert again.tokenizer.to_str() == TOKENIZER.tokenizer.to_str()


def folder(tmp_path, **files):
    TOKENIZER.save(tmp_path)
    (tmp_path / "generation_config.json").unlink()
    for name, content in files.items():
        path = tmp_path / name.replace("__", ".")
        path.write_text(content if isinstance(content, str) else json.dumps(content))
    return tmp_path


def test_special_tokens_written_as_objects_and_in_the_old_map(tmp_path):
    config = {"bos_token": {"content": "<|endoftext|>", "special": True}, "eos_token": None}
    old = {"eos_token": "<|im_end|>", "pad_token": {"content": "<|im_start|>"}}
    read = TextTokenizer.from_folder(folder(tmp_path, tokenizer_config__json=config, special_tokens_map__json=old))
    assert read.bos_id == TOKENIZER.tokenizer.token_to_id("<|endoftext|>")
    assert read.eos_ids == ()  # the newer file says there is none
    assert read.pad_id == TOKENIZER.bos_id


def test_end_ids_of_generation_config_come_first_then_config(tmp_path):
    path = folder(tmp_path, config__json={"eos_token_id": 5}, generation_config__json={"eos_token_id": [7, 9]})
    assert TextTokenizer.from_folder(path).eos_ids == (7, 9, TOKENIZER.eos_ids[0])
    (path / "generation_config.json").unlink()
    assert TextTokenizer.from_folder(path).eos_ids == (TOKENIZER.eos_ids[0], 5)


def test_template_file_wins_and_lists_are_read(tmp_path):
    named = [{"name": "default", "template": "D"}, {"name": "tool_use", "template": "T {{ tools|length }}"}]
    path = folder(tmp_path, tokenizer_config__json={"chat_template": named})
    read = TextTokenizer.from_folder(path)
    user = [{"role": "user", "content": "x"}]
    assert read.chat(user) == "D"
    assert read.chat(user, tools=[{"name": "f"}]) == "T 1"
    read.save(tmp_path / "again")
    assert TextTokenizer.from_folder(tmp_path / "again").chat_templates == read.chat_templates
    (path / "chat_template.jinja").write_text("J")
    assert TextTokenizer.from_folder(path).chat_template == "J"


def test_tokens_declared_only_in_tokenizer_config(tmp_path):
    count = TOKENIZER.vocabulary
    declared = {str(count): {"content": "<extra>", "special": True}}
    read = TextTokenizer.from_folder(folder(tmp_path, tokenizer_config__json={"added_tokens_decoder": declared}))
    assert read.encode("<extra>", special=True) == [count]
    wrong = {str(count + 5): {"content": "<extra>", "special": True}}
    with pytest.raises(VolvelleError, match="puts token '<extra>' at id"):
        TextTokenizer.from_folder(folder(tmp_path, tokenizer_config__json={"added_tokens_decoder": wrong}))


@pytest.mark.parametrize(
    ("files", "says"),
    [
        ({"tokenizer__json": "{"}, "tokenizer.json: not a readable tokenizer"),
        ({"tokenizer__json": '{"a": 1}'}, "tokenizer.json: not a readable tokenizer"),
        ({"tokenizer_config__json": "{"}, "tokenizer_config.json: not valid JSON"),
        ({"tokenizer_config__json": "[]"}, "tokenizer_config.json: not a JSON object but a list"),
        ({"tokenizer_config__json": {"eos_token": "</s>"}}, "eos_token '</s>' is not in tokenizer.json"),
        ({"tokenizer_config__json": {"chat_template": [{"name": "x"}]}}, "entry without name or text"),
        ({"tokenizer_config__json": {"added_tokens_decoder": {"x": 3}}}, "broken entry 'x'"),
        ({"generation_config__json": {"eos_token_id": "2"}}, "must be a token id or a list"),
    ],
)
def test_broken_folders_are_refused(tmp_path, files, says):
    with pytest.raises(VolvelleError, match=says) as caught:
        TextTokenizer.from_folder(folder(tmp_path, **files))
    assert str(tmp_path) in str(caught.value)


def test_missing_tokenizer_says_what_is_there(tmp_path):
    with pytest.raises(VolvelleError, match=r"no tokenizer\.json") as caught:
        TextTokenizer.from_folder(tmp_path)
    assert "AutoTokenizer" in caught.value.tip
    (tmp_path / "tokenizer.model").write_bytes(b"x")
    with pytest.raises(VolvelleError) as caught:
        TextTokenizer.from_folder(tmp_path)
    assert "SentencePiece model only" in caught.value.tip
    shutil.rmtree(tmp_path)
