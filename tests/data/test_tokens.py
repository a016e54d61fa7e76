from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from volvelle.data.packing import PackedExamples, Windows, collate_packed, collate_windows
from volvelle.data.text import Corpus, Example
from volvelle.data.tokens import Encoded, TokenDataset, batch_tokens, collate, encode, encode_corpus, prompt_ids
from volvelle.errors import VolvelleError

MARKS = {"<u>": 2, "<a>": 3, "</s>": 0}


class Letters:
    """One token a letter; 0 ends a text, 1 begins it; <u>, <a> and </s> are the markers of a chat template."""

    eos_ids = (0,)
    chat_template = "letters"
    marks = MARKS

    def encode(self, text, *, special=False):
        ids, i = [], 0
        while i < len(text):
            mark = next((m for m in self.marks if special and text.startswith(m, i)), None)
            ids.append(self.marks[mark] if mark else ord(text[i]) + 10)
            i += len(mark or " ")
        return ids

    def encode_prompt(self, text):
        return [1, *self.encode(text)]

    def chat(self, messages, *, add_generation_prompt=True):
        text = "".join(f"<{m['role'][0]}>{m['content']}</s>\n" for m in messages)
        return text + "<a>" * add_generation_prompt

    def chat_ids(self, messages, *, add_generation_prompt=True):
        return self.encode(self.chat(messages, add_generation_prompt=add_generation_prompt), special=True)


def shown(sample):
    """The tokens, those that are learnt in capitals of another sort: (text, learnt text)."""
    names = {0: "$", 1: "^", 2: "U", 3: "A"}
    text = "".join(names.get(i) or chr(i - 10) for i in sample.ids)
    return text, "".join(c for c, flag in zip(text, sample.learn, strict=True) if flag)


def test_only_completion_and_end_are_learnt():
    example = Example("ask:", ("yes", "no"))
    assert shown(encode(Letters(), example)) == ("^ask:yes$", "yes$")
    assert shown(encode(Letters(), example, 1)) == ("^ask:no$", "no$")


def test_every_turn_of_the_assistant_is_learnt_up_to_its_end_token():
    turns = [("user", "q"), ("assistant", "one"), ("user", "r"), ("assistant", "two")]
    messages = tuple({"role": role, "content": text} for role, text in turns)
    example = Example("", ("two",), messages)
    assert shown(encode(Letters(), example)) == ("Uq$\nAone$\nUr$\nAtwo$\n", "one$two$")
    assert prompt_ids(Letters(), example) == encode(Letters(), example).ids[: len("Uq$\nAone$\nUr$\nA")]


def test_training_prompt_is_the_generation_prompt_even_when_a_token_crosses_the_border():
    class Merging(Letters):
        def chat(self, messages, *, add_generation_prompt=True):
            return super().chat(messages, add_generation_prompt=add_generation_prompt).replace("<a>", "<a>\n")

        def chat_ids(self, messages, *, add_generation_prompt=True):
            ids = super().chat_ids(messages, add_generation_prompt=add_generation_prompt)
            merged = []
            for i in ids:  # two line breaks in a row are one token
                if merged and merged[-1] == i == 20:
                    merged[-1] = 21
                else:
                    merged.append(i)
            return merged

    messages = ({"role": "user", "content": "q"}, {"role": "assistant", "content": "\nyes"})
    sample = encode(Merging(), Example("", ("\nyes",), messages))
    prompt = Merging().chat_ids(messages[:1])
    assert sample.ids[: len(prompt)] == prompt
    assert shown(sample)[1] == "\nyes$"


def test_conversation_without_template_is_refused():
    class Base(Letters):
        chat_template = None

    messages = ({"role": "user", "content": "q"}, {"role": "assistant", "content": "a"})
    with pytest.raises(VolvelleError, match=r"f:3: .*no chat template"):
        encode(Base(), Example("", ("a",), messages, source="f:3"))


def test_template_that_rewrites_history_is_refused():
    class Forgetful(Letters):
        def chat_ids(self, messages, *, add_generation_prompt=True):
            return super().chat_ids(messages[-2:], add_generation_prompt=add_generation_prompt)

    turns = [("user", "q"), ("assistant", "one"), ("user", "r"), ("assistant", "two")]
    messages = tuple({"role": role, "content": text} for role, text in turns)
    with pytest.raises(VolvelleError, match="rewrites earlier turns, so turn 4"):
        encode(Forgetful(), Example("", ("two",), messages))


def test_too_long_is_never_cut():
    corpus = Corpus("f", [Example("ab", ("c",), source="f:1"), Example("ab", ("cd" * 9, "e"), source="f:2")])
    with pytest.raises(VolvelleError, match=r"f:2: 22 tokens, more than the context of 8"):
        encode_corpus(corpus, Letters(), context=8)
    dataset = encode_corpus(corpus, Letters(), context=8, on_bad="skip")
    assert dataset.lengths == [5, 5]
    assert dataset.skipped == ["f:2: 22 tokens, more than the context of 8"]
    assert [dataset.source(i) for i in range(2)] == ["f:1", "f:2"]


def test_collate_shifts_and_pads():
    dataset = encode_corpus(Corpus("f", [Example("ab", ("cd",)), Example("", ("e",))]), Letters(), context=99)
    batch = collate([dataset[0], dataset[1]])
    letter = {c: ord(c) + 10 for c in "abcde"}
    assert batch["ids"].tolist() == [
        [1, letter["a"], letter["b"], letter["c"], letter["d"], 0],
        [1, letter["e"], 0, 0, 0, 0],
    ]
    assert batch["mask"].sum(1).tolist() == [6, 3]
    assert batch["targets"].tolist() == [
        [-100, -100, letter["c"], letter["d"], 0, -100],
        [letter["e"], 0, -100, -100, -100, -100],
    ]


@settings(max_examples=60, deadline=None)
@given(st.integers(2, 60), st.integers(1, 20))
def test_windows_target_every_token_once(count, length):
    tokens = torch.randperm(count).int()
    windows = Windows(tokens, length)
    batch = collate_windows([windows[i] for i in range(len(windows))])
    wanted = batch["targets"][batch["targets"] != -100]
    assert sorted(wanted.tolist()) == sorted(tokens[1:].tolist())
    after = dict(itertools.pairwise(tokens.tolist()))
    for ids, targets in zip(batch["ids"].flatten().tolist(), batch["targets"].flatten().tolist(), strict=True):
        assert targets in (-100, after[ids])
    assert batch["ids"].shape[1] <= length


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(2, 12), min_size=1, max_size=25), st.integers(12, 30))
def test_packing_keeps_every_example_whole_and_apart(lengths, row):
    samples = [Encoded(list(range(100 * k, 100 * k + n)), [False] + [True] * (n - 1)) for k, n in enumerate(lengths)]
    packed = PackedExamples(TokenDataset(samples, [f"f:{k}" for k in range(len(lengths))]), row)
    assert sorted(i for r in packed.rows for i in r) == list(range(len(lengths)))
    assert all(sum(lengths[i] for i in r) <= row for r in packed.rows)
    batch = collate_packed([packed[i] for i in range(len(packed))])
    for r, row_examples in enumerate(packed.rows):
        at = 0
        for i in row_examples:
            part = slice(at, at + lengths[i])
            assert batch["positions"][r, part].tolist() == list(range(lengths[i]))
            assert batch["ids"][r, part].tolist() == samples[i].ids
            assert batch["targets"][r, part].tolist() == [*samples[i].ids[1:], -100]
            assert batch["mask"][r, part].unique().tolist() == [row_examples.index(i) + 1]
            at += lengths[i]
        assert (batch["mask"][r, at:] == 0).all()
    assert batch_tokens(batch) == sum(lengths)


def test_a_text_of_one_token_is_refused():
    with pytest.raises(VolvelleError, match="1 tokens"):
        Windows(torch.tensor([3]), 4)
