"""The loop with drafts: the plain greedy answers whatever is drafted, ends inside accepted runs, what drafters see."""

from __future__ import annotations

import pytest
import torch
from tests.adapt.prefix_models import shake
from tests.decode.helpers import Guessing, Sometimes, V, bart, decoder, late

from volvelle.adapt import LoRA, PrefixTuning, apply, using
from volvelle.decode import Rules, Sampling, generate, generate_batch, stream
from volvelle.decode.accept_exact import EXACT
from volvelle.decode.contract import ALWAYS, Accepted, Draft
from volvelle.decode.loop import Help, begin, reader, step, tree_mask
from volvelle.decode.near_ties import is_near, known_error, measure_error, scattered_error
from volvelle.decode.request import Limits, Request
from volvelle.decode.speculation import SLACK, cut, scattered
from volvelle.errors import UsageError
from volvelle.systems.language import config as c
from volvelle.systems.language.native.library import library

PROMPTS = [[5, 17, 3, 28, 41], [9], [50, 51, 52, 53, 54, 55, 56, 57, 58, 59, 60], [2, 2]]


def adapted(method):
    model = decoder(7)
    shake(apply(model, method))
    return model.eval()


MODELS = {
    "rope": decoder,
    "learned": lambda: decoder(position=c.Learned(), norm=c.LayerNorm(), mlp=c.MLP(40)),
    "alibi": lambda: decoder(position=c.ALiBi()),
    "t5": lambda: decoder(position=c.T5()),
    "linear": lambda: decoder(attention=c.LinearAttention(chunk=4)),
    "prefix": lambda: adapted(PrefixTuning(length=3, hidden=None, init="random")),
    "lora": lambda: adapted(LoRA(rank=2)),
    "bart": bart,
}


@pytest.mark.parametrize("tree", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_greedy_answers_are_the_plain_ones(name, tree):
    """Rows accept differently and finish at different times; the policy asks for anything."""
    model = MODELS[name]()
    free = [answer.tokens for answer in generate_batch(model, PROMPTS, max_tokens=40)]
    eos = [late(free, 6), late(free, 15)]
    plain = generate_batch(model, PROMPTS, max_tokens=40, eos_ids=eos)
    policy = Sometimes()
    drafted = generate_batch(
        model, PROMPTS, max_tokens=40, eos_ids=eos, drafter=Guessing(free, tree=tree), policy=policy
    )
    assert [answer.tokens for answer in drafted] == [answer.tokens for answer in plain]
    assert len({len(answer.tokens) for answer in plain}) > 1
    assert [answer.finish for answer in drafted] == [answer.finish for answer in plain]
    assert sum(answer.steps for answer in drafted) < 0.8 * sum(answer.steps for answer in plain)
    assert all(answer.lossless for answer in drafted)
    for answer in drafted:
        assert sum(answer.drafted) == sum(answer.accepted)
        assert all(kept <= made for kept, made in zip(answer.accepted, answer.proposed, strict=True))
        assert answer.accepted == sorted(answer.accepted, reverse=True)
    checked = [draft for _, draft in policy.told if draft is not None]
    assert checked
    assert max(len(nodes) for draft in checked for nodes in draft.kept) > 1


@pytest.mark.parametrize("right", [0.0, 1.0])
@pytest.mark.parametrize("tree", [False, True])
def test_nothing_accepted_and_everything_accepted(right, tree):
    model = decoder()
    plain = generate(model, PROMPTS[0], max_tokens=31)
    drafter = Guessing([plain.tokens], right=right, tree=tree, k=5)
    drafter.random.random = lambda: 0.5  # no draft is cut short
    answer = generate(model, PROMPTS[0], max_tokens=31, drafter=drafter, policy=ALWAYS)
    assert answer.tokens == plain.tokens
    if right:
        assert answer.accepted == answer.proposed
        depth = 3 if tree else 5
        assert answer.steps == 1 + -(-30 // (depth + 1))
        assert answer.accepted_per_step == 31 / answer.steps
    else:
        assert set(answer.accepted) == {0}
        assert answer.steps == 31
        assert answer.accepted_per_step == 1


@pytest.mark.parametrize("tree", [False, True])
@pytest.mark.parametrize("name", ["learned", "bart", "prefix"])
def test_drafts_longer_than_the_rest_of_the_context(name, tree):
    """Learned positions raise behind the context; rows of full contexts lie beside rows with room."""
    model = MODELS[name]()
    prompts = [[7] * 50, [3, 4], [9] * 30]
    plain = generate_batch(model, prompts, max_tokens=None)
    assert {answer.finish for answer in plain} == {"length"}
    drafted = generate_batch(
        model,
        prompts,
        max_tokens=None,
        policy=ALWAYS,
        drafter=Guessing([a.tokens for a in plain], tree=tree, right=0.9, k=7),
    )
    assert [answer.tokens for answer in drafted] == [answer.tokens for answer in plain]
    drafter = Guessing([plain[0].tokens], tree=tree, right=1.0)
    alone = generate(model, prompts[0], max_tokens=None, drafter=drafter, policy=ALWAYS)
    assert alone.tokens == plain[0].tokens


class Pieces:
    """A tokenizer for tests: token i is two letters."""

    eos_ids = ()

    def stream(self):
        return self

    def push(self, token):
        return chr(97 + token % 26) + chr(65 + token // 26)

    def flush(self):
        return ""


def test_ends_inside_an_accepted_run():
    model = decoder()
    model.tokenizer = Pieces()
    free = generate(model, PROMPTS[0], max_tokens=30)
    finishes = []
    end = late([free.tokens], 9)
    before = free.tokens[free.tokens.index(end) - 1]
    word = Pieces().push(before)[1] + Pieces().push(end)  # across two tokens
    for options in (
        {"max_tokens": 10},
        {"max_tokens": 30, "eos_ids": [end]},
        {"max_tokens": 30, "stop": [word]},
    ):
        plain_pieces, pieces = [], []
        plain = generate(model, PROMPTS[0], **options, on_token=plain_pieces.append)
        drafter = Guessing([free.tokens], right=1.0, k=16)
        drafter.random.random = lambda: 0.5  # no draft is cut short
        options = {**options, "drafter": drafter, "policy": ALWAYS}
        answer = generate(model, PROMPTS[0], **options, on_token=pieces.append)
        assert answer.tokens == plain.tokens
        assert answer.text == plain.text
        assert answer.finish == plain.finish
        finishes.append(answer.finish)
        assert [piece.text for piece in pieces] == [piece.text for piece in plain_pieces]
        assert [piece.drafted for piece in pieces] == answer.drafted
        assert answer.steps < plain.steps - 2
        assert list(stream(model, PROMPTS[0], **options)) == pieces
    assert finishes == ["length", "eos", "stop"]


@pytest.mark.parametrize("tree", [False, True])
@pytest.mark.parametrize("name", ["rope", "linear", "bart"])
@torch.no_grad()
def test_drafters_are_told_every_token_once(name, tree):
    """And never one of a finished row. The states are those of the whole text read at once."""
    model = MODELS[name]()
    free = [answer.tokens for answer in generate_batch(model, PROMPTS, max_tokens=30)]
    drafter = Guessing(free, tree=tree)
    answers = generate_batch(
        model, PROMPTS, max_tokens=30, eos_ids=[late(free, 9)], drafter=drafter, policy=Sometimes(3)
    )
    assert len({len(answer.tokens) for answer in answers}) > 1
    told = [[] for _ in PROMPTS]
    for number, (seen, finished, texts) in enumerate(drafter.seen):
        mask = torch.ones_like(seen.ids, dtype=torch.bool) if seen.mask is None else seen.mask
        for row, (finish, text) in enumerate(zip(finished, texts, strict=True)):
            if finish is not None:
                assert not mask[row].any()
                continue
            if number:
                assert mask[row, 0]
                assert int(seen.ids[row, 0]) == drafter.seen[number - 1][2][row][-1]
            told[row] += list(zip(seen.ids[row][mask[row]].tolist(), seen.hidden[row][mask[row]], strict=True))
            prompt = [model.config.start] if name == "bart" else PROMPTS[row]
            assert [token for token, _ in told[row]] == [*prompt, *text[:-1]]
    for row, prompt in enumerate(PROMPTS):
        ids = torch.tensor([[token for token, _ in told[row]]])
        options = {"source": torch.tensor([prompt])} if name == "bart" else {}
        whole = model.hidden(ids, **options)[0]
        torch.testing.assert_close(torch.stack([state for _, state in told[row]]), whole, rtol=0, atol=1e-9)


def test_texts_move_together_when_holes_are_many(monkeypatch):
    """One row takes whole drafts, the others nothing: the cache stays near the longest text."""
    monkeypatch.setattr("volvelle.decode.speculation.SLACK", 4)
    model = decoder(context=512)
    prompts = [[5, 6], [9, 1, 1], [2]]
    plain = generate_batch(model, prompts, max_tokens=90)
    wrong = [[(token + 1) % V for token in answer.tokens] for answer in plain]
    answers = [*wrong]

    class Turns(Guessing):
        """Right for one row at a time."""

        def propose(self, requests, seen, k):
            turn = len(self.seen) % 3
            self.answers = [plain[row].tokens if row == turn else wrong[row] for row in range(3)]
            return super().propose(requests, seen, k)

    rooms, cursors = [], []
    new_cache = type(model).new_cache

    def noted(self, batch, context, *rest, **options):
        rooms.append(context)
        cache = new_cache(self, batch, context, *rest, **options)
        commit = cache.commit

        def committed(path=None):
            commit(path)
            cursors.append((cache.length, int(cache.lengths.max())))

        cache.commit = committed
        return cache

    monkeypatch.setattr(type(model), "new_cache", noted)
    drafted = generate_batch(model, prompts, max_tokens=90, drafter=Turns(answers, right=1.0, k=6), policy=ALWAYS)
    assert [answer.tokens for answer in drafted] == [answer.tokens for answer in plain]
    assert rooms[0] <= 1.25 * 93 + 4 + 8
    assert max(length - longest for length, longest in cursors) <= 93 // 4 + 4 + 7
    assert SLACK == 64


def test_full_contexts_beside_others_without_drafts():
    """A finished row is run along, and must not leave the positions that were trained."""
    model = MODELS["learned"]()
    answers = generate_batch(model, [[7] * 60, [3, 4]], max_tokens=None)
    assert [len(answer.tokens) for answer in answers] == [4, 62]
    assert answers[1].tokens == generate(model, [3, 4], max_tokens=None).tokens


def test_per_row_adapters_take_part():
    model = decoder(7)
    for name in ("one", "two"):
        shake(apply(model, LoRA(rank=2), name=name), seed=ord(name[0]))
    with using(model, ["one", None, "two"]):
        plain = generate_batch(model, PROMPTS[:3], max_tokens=20)
        free = [answer.tokens for answer in plain]
        drafted = generate_batch(model, PROMPTS[:3], max_tokens=20, drafter=Guessing(free), policy=ALWAYS)
    assert [answer.tokens for answer in drafted] == free
    assert len({tuple(tokens) for tokens in free}) == 3


@pytest.mark.parametrize("name", ["rope", "alibi", "linear", "bart", "prefix"])
@torch.no_grad()
def test_a_tree_scores_as_each_of_its_paths_and_leaves_the_accepted_one(name):
    model = MODELS[name]()
    requests = [Request(model, prompt, Sampling(), Limits(20, (), ())) for prompt in PROMPTS[:2]]
    ids, mask = torch.tensor([[5, 17, 3], [0, 9, 9]]), torch.tensor([[True] * 3, [False, True, True]])
    writer, draft = reader(model, requests), Draft(torch.tensor([[4, 8, 6, 1], [7, 3, 2, 5]]), (-1, -1, 1, 0))
    cache = writer.new_cache(2, 30)
    step(writer, cache, ids, mask, 1)
    cache.commit()
    tokens = torch.cat((torch.tensor([[30], [31]]), draft.tokens), 1)
    logits, _ = step(writer, cache, tokens, tree_mask(draft, 2), 5)
    paths = [[0, 1, 4], [0, 2, 3]]
    for row, real in enumerate((ids[:1], ids[1:, 1:])):
        own = reader(model, requests[row : row + 1])
        for path in paths:
            text = torch.cat((real, tokens[row : row + 1, path]), 1)
            whole = own.logits(own.hidden(text))[0, -3:]
            torch.testing.assert_close(logits[row, path], whole, rtol=0, atol=1e-9)
    cache.commit(torch.tensor([[0, 2, 3], [0, 1, -1]]))
    following, _ = step(writer, cache, torch.tensor([[12], [13]]), None, 1)
    for row, text in enumerate(([5, 17, 3, 30, 8, 6, 12], [9, 9, 31, 7, 13])):
        own = reader(model, requests[row : row + 1])
        whole = own.logits(own.hidden(torch.tensor([text])))[0, -1]
        torch.testing.assert_close(following[row, 0], whole, rtol=0, atol=1e-9)


def test_near_ties_are_counted_where_the_choice_was_close():
    """Every token has a twin with the same logit, so every greedy choice is a tie."""
    model, clear = decoder(), decoder()
    with torch.no_grad():
        model.lm_head.weight[1::2] = model.lm_head.weight[0:-1:2]
    plain = generate(model, PROMPTS[0], max_tokens=20)
    assert plain.near_ties is None
    for one in (model, clear):
        change = torch.zeros(1, V)
        change[0, 3] = 1e-6
        assert measure_error(one, (one.dtype, "step"), torch.zeros(1, V), change) == pytest.approx(1e-6)
    options = {"max_tokens": 20, "policy": ALWAYS}
    drafter = Guessing([plain.tokens], right=1.0)
    answer = generate(model, PROMPTS[0], **options, drafter=drafter)
    assert answer.tokens == plain.tokens
    assert answer.near_ties == 20 - int(plain.tokens.count(60))  # the last token has no twin
    penalised = generate(model, PROMPTS[0], **options, drafter=drafter, sampling=Sampling(repetition_penalty=1.2))
    assert 0 < (penalised.near_ties or 0) < 20  # a token that has come is behind its twin
    assert generate(model, PROMPTS[0], **options, drafter=drafter, sampling=Sampling(1.0)).near_ties is None
    assert generate(clear, PROMPTS[0], **options, drafter=drafter).near_ties == 0
    assert is_near(torch.tensor([[1.0, 1.0]]), 1e-6).tolist() == [True]
    assert is_near(torch.tensor([[1.0, 1.0]]), 0.0).tolist() == [False]
    assert is_near(torch.tensor([[9.0, 9.0], [9.0, 8.9]], dtype=torch.bfloat16), 1e-4).tolist() == [True, False]


@pytest.mark.skipif(library() is None, reason="no compiled step on this machine")
def test_gaps_in_a_tree_turn_last_bits_where_the_width_of_a_step_does_not():
    """Every token has a twin that is 1e-7 behind: only a scattered path makes near ties of them, a chain does not."""
    config = {"width": 64, "heads": 2, "mlp": c.GatedMLP(96), "vocabulary": 64, "context": 96}
    model = decoder(**config).float()
    with torch.no_grad():
        model.lm_head.weight[1::2] = model.lm_head.weight[0::2] * (1 - 1e-7)
    options = {"max_tokens": 40, "policy": ALWAYS}
    plain = generate(model, PROMPTS[0], max_tokens=40)
    for tree in (False, True):
        drafter = Guessing([plain.tokens], right=1.0, tree=tree)
        drafter.random.random = lambda: 0.5  # no draft is cut short
        answer = generate(model, PROMPTS[0], **options, drafter=drafter)
        assert sum(answer.drafted) > 10
        assert known_error(model, (model.dtype, "step")) == 0
        assert bool(answer.near_ties) == tree


def test_a_path_is_scattered_where_other_branches_lie_in_it():
    for path in ([[0, 1, 2], [0, -1, -1]], [[0]]):
        assert not scattered(Accepted([[1]] * len(path), torch.tensor(path)))
    for path in ([[0, 1, 3], [0, 1, 2]], [[0, 2]]):
        assert scattered(Accepted([[1]] * len(path), torch.tensor(path)))
    assert is_near(torch.tensor([[100.0, 99.9995]]), 0.0, 1e-5).tolist() == [True]
    assert is_near(torch.tensor([[-100.0, -100.0005]]), 1e-3, 1e-9).tolist() == [True]
    assert scattered_error(torch.bfloat16) == 2**-7


def test_the_width_error_is_measured_once_where_nobody_knows_it():
    model, calls = decoder().float(), []
    plain = generate(model, PROMPTS[0], max_tokens=20)
    kind = model.dtype, "step"

    class Counting(Guessing):
        def read(self, writer, ids, mask, cache):
            calls.append(ids.shape[1])
            return super().read(writer, ids, mask, cache)

    options = {"max_tokens": 16, "policy": ALWAYS, "drafter": Counting([plain.tokens], right=1.0, k=4)}
    assert known_error(model, kind) is None
    first = generate(model, PROMPTS[0], **options)
    error = known_error(model, kind)
    assert error is not None
    assert 0 <= error < 1e-3
    assert calls.count(1) == 1
    second = generate(model, PROMPTS[0], **options)
    assert calls.count(1) == 1
    assert first.tokens == second.tokens == plain.tokens[:16]


def test_a_drafter_may_not_give_more_than_it_is_asked_for():
    model = decoder()

    class Greedy(Guessing):
        def propose(self, requests, seen, k):
            return Draft(torch.zeros(1, k + 1, dtype=torch.long))

    with pytest.raises(ValueError, match="was asked for 5 tokens and gave 6"):
        generate(model, PROMPTS[0], max_tokens=20, drafter=Greedy([[]], k=5), policy=ALWAYS)


def test_drafts_are_cut_by_depth():
    tokens, q = torch.arange(6)[None], torch.rand(1, 6, V)
    draft = cut(Draft(tokens, (-1, -1, 1, 0, 2, 2), q), 2)
    assert draft.tokens.tolist() == [[0, 1, 2, 3]]
    assert list(draft.parents or ()) == [-1, -1, 1, 0]
    assert torch.equal(draft.q, q[:, :4])
    assert cut(Draft(tokens, None, q), 2).q.shape == (1, 2, V)
    assert tree_mask(draft, 2)[1].int().tolist() == [
        [1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [1, 0, 1, 0, 0], [1, 0, 1, 1, 0], [1, 1, 0, 0, 1],
    ]  # fmt: skip


def test_a_run_without_drafts_asks_nothing_of_them():
    model = decoder()
    requests = [Request(model, PROMPTS[0], Sampling(), Limits(8, (), ()))]
    for _ in begin(model, requests):
        pass
    assert requests[0].near_ties is None
    assert requests[0].drafted == [False] * 8
    assert Help(Guessing([[]])).accept is EXACT
    assert generate(model, PROMPTS[0], max_tokens=4, rules=Rules(min_tokens=2)).proposed == []


def test_steps_that_are_all_alike():
    """exact="bitwise" goes through the same calls, and needs room for its wider steps."""
    model = decoder().to(torch.bfloat16)
    plain = generate(model, PROMPTS[0], max_tokens=20, exact="bitwise")
    drafter = Guessing([plain.tokens], right=0.8)
    drafted = generate(model, PROMPTS[0], max_tokens=20, exact="bitwise", drafter=drafter, policy=ALWAYS)
    assert drafted.tokens == plain.tokens
    assert drafted.steps < plain.steps
    assert drafted.near_ties == 0
    assert list(stream(model, PROMPTS[0], max_tokens=20, exact="bitwise"))[-1].id == plain.tokens[-1]
    with pytest.raises(UsageError, match="one of default, bitwise, got 'bits'"):
        generate(model, PROMPTS[0], max_tokens=20, exact="bits")  # pyright: ignore[reportArgumentType]
