"""N-gram drafts: chances against a formula written out, trees grown from the likeliest down, files, equal answers."""

from __future__ import annotations

import itertools
import random
from collections import Counter

import pytest
import torch
from tests.decode.helpers import V, decoder

from volvelle.decode import NGram, generate, generate_batch, open_drafter
from volvelle.decode.contract import ALWAYS, Seen
from volvelle.decode.drafters.ngram import chain, grow
from volvelle.decode.drafters.ngram_counts import FixedCounts, GrowingCounts
from volvelle.decode.drafters.ngram_files import read_ngram, write_ngram
from volvelle.decode.policy import Adaptive
from volvelle.errors import UsageError, VolvelleError


def texts(seed=0, count=5, symbols=6, longest=60):
    generator = random.Random(seed)
    return [[generator.randrange(symbols) for _ in range(generator.randrange(longest))] for _ in range(count)]


def followers(many, gram):
    """What followed `gram` in the texts, by looking at every place."""
    m = len(gram)
    return Counter(text[i] for text in many for i in range(m, len(text)) if tuple(text[i - m : i]) == tuple(gram))


def grams(many, longest):
    found = {tuple(text[i : i + m]) for text in many for m in range(1, longest + 1) for i in range(len(text) - m + 1)}
    return [*sorted(found), (99,), (0, 99)]


@pytest.mark.parametrize("n", [1, 2, 4])
def test_counts_are_those_of_a_scan(n):
    many = [*texts(), [], [3]]
    fixed, growing = FixedCounts(many, n), GrowingCounts(n)
    for text in many:
        growing.extend(text, apart=True)
    for gram in grams(many, n):
        wanted = followers(many, gram)
        found = growing.find(gram)
        assert found.nexts == wanted
        assert found.total == wanted.total()
        assert found.distinct == len(wanted)
        assert fixed.find(gram) == found  # 6 symbols: all of them are remembered
    assert fixed.find(tuple(range(n + 1))).total == 0


def test_fixed_counts_keep_the_most_frequent_of_many():
    text = [x for token in range(20) for x in [50, 100 + token] * (token + 1)]
    found = FixedCounts([text], 1).find((50,))
    assert (found.total, found.distinct) == (210, 20)
    assert found.nexts == {119 - rank: 20 - rank for rank in range(8)}


def test_grams_that_do_not_fit_into_a_number_are_shorter():
    generator = random.Random(0)
    text = [generator.randrange(2**20) for _ in range(70_000)]
    counts = FixedCounts([text], 6)
    assert counts.n == 3  # 17 bits a token
    assert counts.find(tuple(text[5:8])).nexts == {text[8]: 1}
    assert counts.find(tuple(text[5:9])).total == 0
    assert counts.largest == max(text)
    assert FixedCounts([], 4).largest == -1


def chance(token, context, sources, n, discount):
    """P by the recursion of the file's head; sources are (texts, weight)."""
    if not context:
        return 0.0
    gram = context[-n:]
    seen = [(followers(many, gram), weight) for many, weight in sources]
    total = sum(weight * found.total() for found, weight in seen)
    shorter = chance(token, gram[1:], sources, n, discount)
    if total == 0:
        return shorter
    share = total / (total + discount * sum(len(found) for found, _ in seen))
    return share * sum(weight * found[token] for found, weight in seen) / total + (1 - share) * shorter


@pytest.mark.parametrize(("n", "weight", "discount"), [(1, 4.0, 3.0), (3, 1.0, 1.0), (4, 2.5, 0.5)])
def test_chances_follow_the_formula(n, weight, discount):
    many, own = texts(1), GrowingCounts(n)
    own.extend(texts(2, count=1)[0])
    drafter = NGram(many, n=n, weight=weight, discount=discount)
    for context in [(0, 1, 2, 3), (5,), (2, 2), (), (77, 1), *(tuple(text[-4:]) for text in many)]:
        found = drafter.likely(context[-n:], own)
        assert sum(found.values()) <= 1 + 1e-12
        for token in range(7):
            wanted = chance(token, context, [([own.text], weight), (many, 1.0)], n, discount)
            assert found.get(token, 0.0) == pytest.approx(wanted, abs=1e-12)


def test_the_tree_holds_the_likeliest_paths():
    own = GrowingCounts(3)
    own.extend(texts(3, count=1, symbols=3)[0])
    drafter = NGram(texts(4, symbols=3), n=3)
    tokens, parents, chances = grow(drafter, own, 12)
    assert len(tokens) == 12
    assert chances == sorted(chances, reverse=True)
    paths = []
    for node, parent in enumerate(parents):
        assert parent < node
        paths.append((*(() if parent < 0 else paths[parent]), tokens[node]))
    assert len(set(paths)) == 12

    def product(path):
        whole, value = list(own.text), 1.0
        for token in path:
            value *= drafter.likely(tuple(whole[-3:]), own).get(token, 0.0)
            whole.append(token)
        return value

    assert [product(path) for path in paths] == pytest.approx(chances)
    every = [p for length in (1, 2, 3) for p in itertools.product(range(3), repeat=length)]
    best = sorted((product(path) for path in every), reverse=True)
    short = [value for path, value in zip(paths, chances, strict=True) if len(path) <= 3]
    assert short == pytest.approx(best[: len(short)])
    assert grow(drafter, own, 5) == (tokens[:5], parents[:5], chances[:5])


def test_a_text_that_repeats_gives_a_long_path_and_an_unknown_one_nothing():
    own = GrowingCounts(4)
    own.extend([*range(10), *range(10), 0, 1])
    tokens, parents, _ = grow(NGram(discount=0.5), own, 6)
    assert tokens[:4] == [2, 3, 4, 5]
    assert parents[:4] == [-1, 0, 1, 2]
    assert chain(NGram(discount=0.5), own, 4)[0] == [2, 3, 4, 5]
    fresh = GrowingCounts(4)
    fresh.extend([1, 2, 3])
    assert grow(NGram(), fresh, 6) == ([], [], [])
    assert chain(NGram(), fresh, 6) == ([], [])


class Row:
    def __init__(self, prompt, tokens=(), finish=None):
        self.prompt, self.tokens, self.finish, self.source = list(prompt), list(tokens), finish, None


def test_rows_get_a_chain_each_and_finished_ones_nothing():
    rows = [Row([1, 2, 3, 1, 2]), Row([5, 5, 5, 5]), Row([1, 2], finish="stop"), Row([7, 8])]
    drafting = NGram(n=2, k=3).begin(decoder(), rows, 50)
    draft = drafting.propose(rows, Seen(torch.empty(4, 0), torch.empty(4, 0, 0)), 3)
    assert draft.parents is None
    assert draft.tokens.tolist()[1:] == [[5, 5, 5], [-1, -1, -1], [-1, -1, -1]]
    assert draft.tokens[0].tolist()[:2] == [3, 1]
    assert list(draft.chances) == sorted(draft.chances, reverse=True)
    assert draft.chances[0] < 2 / 3  # the fourth row has nothing to draft


@pytest.mark.parametrize("policy", [ALWAYS, Adaptive()])
def test_answers_are_those_of_plain_decoding(policy):
    model = decoder()
    generator = random.Random(0)
    prompts = [[generator.randrange(V) for _ in range(n)] for n in (3, 9, 17)]
    plain = [generate(model, prompt, max_tokens=40, eos_ids=()).tokens for prompt in prompts]
    drafter = NGram(plain, k=9)
    drafted = [generate(model, p, max_tokens=40, eos_ids=(), drafter=drafter, policy=policy) for p in prompts]
    assert [one.tokens for one in drafted] == plain
    assert policy is not ALWAYS or sum(one.steps for one in drafted) < 60  # of 120 tokens: the answers are known
    together = generate_batch(model, prompts, max_tokens=40, eos_ids=(), drafter=drafter, policy=policy)
    assert [one.tokens for one in together] == plain


def test_files_keep_texts_and_options(tmp_path):
    many = [*texts(7), [], [4]]
    write_ngram(NGram(many, n=3, weight=2.0, discount=1.5), tmp_path / "ngram", vocabulary=V, base="some/model")
    for path in (tmp_path, tmp_path / "ngram"):
        opened = open_drafter(path, decoder(), k=7)
        assert isinstance(opened, NGram)
        assert [list(text) for text in opened.texts] == many
        assert (opened.n, opened.weight, opened.discount, opened.k) == (3, 2.0, 1.5, 7)
    assert read_ngram(tmp_path / "ngram", V, n=2).n == 2


def test_files_that_do_not_fit_are_refused(tmp_path):
    write_ngram(NGram([[1, 2]]), tmp_path, vocabulary=V + 1)
    with pytest.raises(VolvelleError, match=f"vocabulary of {V + 1}, the model has {V}"):
        read_ngram(tmp_path, V)
    content = (tmp_path / "texts.safetensors").read_bytes()
    (tmp_path / "texts.safetensors").write_bytes(content[:20])
    with pytest.raises(VolvelleError, match="cannot be read as n-grams' texts"):
        read_ngram(tmp_path, V + 1)


def test_bad_options_and_foreign_texts():
    for options, message in (({"n": 0}, "n and k"), ({"k": 0}, "n and k"), ({"discount": 0.0}, "discount")):
        with pytest.raises(UsageError, match=message):
            NGram(**options)
    with pytest.raises(VolvelleError, match=f"n-grams: token {V} of a text is outside"):
        generate(decoder(), [1, 2], max_tokens=3, drafter=NGram([[1, V]]))
