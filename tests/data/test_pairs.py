"""Examples for an encoder-decoder: sources, answers, padding, and what is refused."""

from __future__ import annotations

import pytest
import torch

from volvelle.data.pairs import collate_pairs, encode_pairs, pairs
from volvelle.data.text import Corpus, Example
from volvelle.data.tokens import IGNORE, batch_tokens
from volvelle.errors import VolvelleError
from volvelle.train.summarize import train_tokenizer

EXAMPLES = [
    Example("the quick brown fox", ("a fox", "an animal"), source="x:1"),
    Example("lazy dog", ("a dog",), source="x:2"),
]


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(Corpus("x", examples=EXAMPLES), 300)


def test_texts_stand_between_their_marks(tokenizer):
    ids = tokenizer.encode_prompt("a fox")
    assert (ids[0], ids[-1]) == (0, 2)
    assert tokenizer.decode(ids) == "a fox"
    assert tokenizer.eos_ids == (2,)
    assert (tokenizer.bos_id, tokenizer.pad_id) == (0, 1)
    assert tokenizer.encode("</s>") != [2], "text cannot spell a mark"


def test_every_completion_is_an_answer_to_its_prompt(tokenizer):
    data = encode_pairs(Corpus("x", examples=EXAMPLES), tokenizer, context=32)
    assert len(data) == 3
    found = [(tokenizer.decode(ids[~learn].tolist()), tokenizer.decode(ids[learn].tolist())) for ids, learn in data]
    assert found == [("the quick brown fox", "a fox"), ("the quick brown fox", "an animal"), ("lazy dog", "a dog")]
    assert [data.source(i) for i in range(3)] == ["x:1", "x:1", "x:2"]


def test_the_answer_is_read_behind_the_start(tokenizer):
    layout = pairs(start=2)
    data = layout.encode(Corpus("x", examples=EXAMPLES), tokenizer, context=32)
    batch = layout.collate([data[i] for i in range(3)])
    assert {name: tensor.dtype for name, tensor in batch.items()} == {
        "source": torch.int64, "source_mask": torch.bool, "ids": torch.int64, "mask": torch.bool,
        "targets": torch.int64,
    }  # fmt: skip
    for row, (ids, learn) in enumerate(data):
        answer = ids[learn].tolist()
        n = len(answer)
        assert batch["source"][row, batch["source_mask"][row]].tolist() == ids[~learn].tolist()
        assert batch["ids"][row, :n].tolist() == [2, *answer[:-1]]
        assert batch["targets"][row].tolist() == answer + [IGNORE] * (batch["targets"].shape[1] - n)
        assert batch["mask"][row].sum() == n
    assert batch_tokens(batch) == sum(len(ids) for ids, _ in data)


def test_answers_of_one_token():
    batch = collate_pairs([(torch.tensor([5, 6]), torch.tensor([False, True]))], start=3)
    assert batch["ids"].tolist() == [[3]]
    assert batch["targets"].tolist() == [[6]]


def test_what_is_too_long_is_named_or_skipped(tokenizer):
    corpus = Corpus("x", examples=EXAMPLES)
    long = len(tokenizer.encode_prompt("the quick brown fox"))
    with pytest.raises(VolvelleError, match=f"x:1: {long} tokens, more than the context of {long - 1}"):
        encode_pairs(corpus, tokenizer, context=long - 1)
    data = encode_pairs(corpus, tokenizer, context=long - 1, on_bad="skip")
    assert len(data) == 1
    assert len(data.skipped) == 2


def test_texts_without_a_source_are_refused(tokenizer):
    with pytest.raises(VolvelleError, match="plain text, but an encoder-decoder"):
        encode_pairs(Corpus("x", documents=["text"]), tokenizer, context=9)
    turns = ({"role": "user", "content": "a"}, {"role": "assistant", "content": "b"})
    with pytest.raises(VolvelleError, match="x:9: a conversation"):
        encode_pairs(Corpus("x", examples=[Example("", ("b",), turns, "x:9")]), tokenizer, context=9)
