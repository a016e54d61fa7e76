"""Prompt lookup: against a search through the whole text, its cost by count, its shapes, and lossless answers."""

from __future__ import annotations

import random
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from volvelle.decode import Sampling, generate, generate_batch
from volvelle.decode.contract import ALWAYS
from volvelle.decode.drafters.prompt_lookup import Index, PromptLookup, shares, side_by_side
from volvelle.errors import UsageError, VolvelleError


class Counted(int):
    """A token that counts how often it is hashed or compared, which is all that an index does with one."""

    operations = 0

    def __hash__(self):
        Counted.operations += 1
        return super().__hash__()

    def __eq__(self, other):
        Counted.operations += 1
        return int(self) == int(other)


def texts(count: int, length: int, letters: int):
    generator = random.Random(0)
    for _ in range(count):
        yield [generator.randrange(letters) for _ in range(length)]


def searched(text: list[int], ending: list[int], n: int, least: int, prefer: str) -> list[int]:
    """The places that an index is to find, by looking at every place of the text."""
    found: list[int] = []
    for size in range(n, least - 1, -1):
        if size > len(ending):
            continue
        places = [p for p in range(size, len(text)) if text[p - size : p] == ending[-size:]]
        newest = {text[place]: place for place in places}
        counts = {token: sum(text[place] == token for place in places) for token in newest}
        order = sorted(newest, key=lambda token: ((-counts[token] if prefer == "frequent" else 0), -newest[token]))
        found += [newest[token] for token in order if token not in {text[place] for place in found}]
    return found


@pytest.mark.parametrize("prefer", ["recent", "frequent"])
@pytest.mark.parametrize(("n", "least"), [(1, 1), (3, 1), (4, 2)])
def test_finds_what_a_search_finds(n, least, prefer):
    for text in texts(12, 60, letters=4):
        index = Index(n, least, prefer)
        for end in range(len(text)):
            assert list(index.places(text[:end])) == searched(text[:end], text[:end], n, least, prefer)
            index.extend(text[end : end + 1])
        other = text[::-1]
        assert list(index.places(other)) == searched(text, other, n, least, prefer)


def test_texts_apart_do_not_run_into_each_other():
    index = Index(2, 1)
    index.extend([1, 2])
    index.extend([3, 4], apart=True)
    assert list(index.places([1, 2])) == []
    assert [index.text[p] for p in index.places([9, 3])] == [4]


def test_each_token_costs_the_same_however_long_the_text():
    def operations(length: int, letters: int) -> float:
        (text,) = texts(1, length, letters)
        index, tokens = Index(3, 1), [Counted(token) for token in text]
        Counted.operations = 0
        for at, token in enumerate(tokens):
            index.extend([token])
            for place in list(index.places(tokens[: at + 1][-3:]))[:2]:
                index.following(place, 8)
        return Counted.operations / length

    for letters in (3, 500):
        assert operations(2400, letters) < 2 * operations(300, letters) < 200  # a search would take 8 times as many


def test_a_copy_goes_on_with_itself():
    index = Index(2, 1)
    index.extend([7, 1, 2, 3, 1, 2, 3])
    assert index.following(4, 8) == [1, 2, 3, 1, 2, 3, 1, 2]
    assert index.following(6, 4) == [3, 3, 3, 3]
    assert index.following(1, 2) == [1, 2]


def request(prompt: list[int], tokens: tuple[int, ...] = (), *, finish: str | None = None, source: Any = None) -> Any:
    last = tokens[-1] if tokens else prompt[-1]
    return SimpleNamespace(prompt=prompt, tokens=list(tokens), finish=finish, source=source, last=last)


def proposals(drafter: PromptLookup, requests: list[Any], k: int = 6):
    writer: Any = SimpleNamespace(config=SimpleNamespace(vocabulary=100), device=torch.device("cpu"))
    seen: Any = None
    return drafter.begin(writer, requests, 100).propose(requests, seen, k)


def test_ragged_rows_have_empty_places():
    rows = [request([1, 2, 3, 1, 2]), request([5, 6, 7, 8]), request([4, 4]), request([1, 1], finish="eos")]
    draft = proposals(PromptLookup(n=2, k=4), rows)
    assert draft is not None
    assert draft.parents is None
    assert draft.q is None
    assert draft.tokens.tolist() == [[3, 1, 2, 3], [-1] * 4, [4] * 4, [-1] * 4]
    assert proposals(PromptLookup(n=2, k=4), rows[1:2]) is None
    assert proposals(PromptLookup(n=2, k=4), rows, k=0) is None
    for wrong in ({"k": 0}, {"n": 0}):
        with pytest.raises(UsageError, match="lookup: n and k must be at least 1"):
            PromptLookup(**wrong)
    assert proposals(PromptLookup(n=2, k=4, least=2), rows[2:3]) is None


def test_different_continuations_are_a_tree():
    rows = [request([1, 2, 1, 3, 1]), request([5, 6, 5])]
    draft = proposals(PromptLookup(n=1, k=5, branches=2), rows)
    assert draft is not None
    assert draft.parents == [-1, 0, 1, 2, -1]
    assert draft.tokens.tolist() == [[3, 1, 3, 1, 2], [6, 5, 6, 5, -1]]
    one = proposals(PromptLookup(n=1, k=5, branches=2), rows, k=1)
    assert one is not None
    assert one.tokens.tolist() == [[3], [6]]
    assert one.parents is None
    assert shares(6, 3) == [4, 1, 1]
    assert side_by_side([1, 1, 2]) == [-1, -1, -1, 2]


def test_looks_in_the_answer_the_source_and_the_texts():
    drafter = PromptLookup(n=2, k=2, least=2)
    asked = request([9, 1], (4, 5, 6, 4, 5))
    draft = proposals(drafter, [asked])
    assert draft is not None
    assert draft.tokens.tolist() == [[6, 4]]
    draft = proposals(drafter, [request([1, 2], source=[1, 2, 8, 9])])
    assert draft is not None
    assert draft.tokens.tolist() == [[8, 9]]
    stored = PromptLookup(n=2, k=2, least=2, texts=([1, 2, 7], [7, 3, 4, 5]))
    draft = proposals(stored, [request([1, 2])])
    assert draft is not None
    assert draft.tokens.tolist() == [[7, 7]]
    assert proposals(stored, [request([7, 7])]) is None  # no ending runs from one text into the other


def test_an_answer_is_indexed_as_it_grows():
    asked = request([1, 2])
    writer: Any = SimpleNamespace(config=SimpleNamespace(vocabulary=100), device=torch.device("cpu"))
    seen: Any = None
    run = PromptLookup(n=2, k=3).begin(writer, [asked], 100)
    assert run.propose([asked], seen, 3) is None
    asked.tokens += [3, 1, 2]
    draft = run.propose([asked], seen, 3)
    assert draft is not None
    assert draft.tokens.tolist() == [[3, 1, 2]]


@pytest.mark.parametrize(
    "wrong", [{"n": 0}, {"n": 2, "least": 3}, {"branches": 0}, {"k": 2, "branches": 3}, {"prefer": "likely"}]
)
def test_wrong_options_are_named(wrong):
    with pytest.raises(UsageError, match="lookup"):
        PromptLookup(**wrong)


def test_texts_of_another_vocabulary_are_refused():
    with pytest.raises(VolvelleError, match="token 100 of a text is outside"):
        proposals(PromptLookup(texts=([3, 100],)), [request([1])])


@pytest.mark.parametrize("drafter", [PromptLookup(), PromptLookup(n=1, k=7, branches=3, prefer="frequent")])
def test_greedy_answers_are_those_of_plain_decoding(model, drafter):
    double = model.double()
    try:
        prompts = [[3, 4, 5, 3, 4], [7, 7, 7], [1, 2, 9, 8, 1, 2, 9]]
        plain = [generate(double, prompt, max_tokens=40, eos_ids=()).tokens for prompt in prompts]
        ours = [
            generate(double, prompt, max_tokens=40, eos_ids=(), drafter=drafter, policy=ALWAYS) for prompt in prompts
        ]
        assert [answer.tokens for answer in ours] == plain
        batch = generate_batch(double, prompts, max_tokens=40, eos_ids=(), drafter=drafter, policy=ALWAYS)
        assert [answer.tokens for answer in batch] == plain
        assert any(any(answer.drafted) for answer in ours)  # some draft was right
    finally:
        model.float()


def test_sampled_answers_end_and_repeat(model):
    sampling = Sampling(temperature=0.7, seed=4)
    first, second = (
        generate(model, [3, 4, 3], max_tokens=20, eos_ids=(), sampling=sampling, drafter=PromptLookup(n=2, k=4))
        for _ in range(2)
    )
    assert len(first.tokens) == 20
    assert first.tokens == second.tokens
