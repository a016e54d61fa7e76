"""The exact rule: the distribution of what it accepts, against all answers counted out; and wrong rules must fail."""

from __future__ import annotations

import functools
import itertools

import numpy
import pytest
import torch
from scipy import stats
from tests.decode.helpers import Guessing, decoder

from volvelle.decode import Rules, Sampling, accept_exact, generate, generate_batch
from volvelle.decode.accept_exact import EXACT, keep_one
from volvelle.decode.contract import ALWAYS, Draft
from volvelle.decode.drafters.draft_model import DraftModel
from volvelle.decode.sampling import guess_rows, probabilities

V = 8
"""Tokens of the small language; V stands before the first."""
LENGTH = 3
SAMPLINGS = [Sampling(temperature=1.0), Sampling(temperature=0.6, top_p=0.8)]


@functools.cache
def tables():
    """Logits of target and draft for the next token, given the two before: alike, but not too much."""
    noise = torch.Generator().manual_seed(5)
    target = torch.randn(V + 1, V + 1, V, generator=noise) * 1.5
    return target, target + torch.randn(target.shape, generator=noise)


class Row:
    """A request as the rule sees it, with nothing else to carry around for 100,000 of them."""

    finish = None

    def __init__(self, sampling, numbers):
        self.sampling = self.rule = sampling
        self.uniform = functools.partial(next, numbers)

    def binds(self, ahead):
        return False

    def seen(self, drafted):
        return None

    counts = seen

    def all_argmax(self, count):
        return False


def drawn_chain(draw, q, context, sampling):
    """Two tokens, one behind the other."""
    first = q(context)
    a = draw(first)
    second = q(torch.stack((context[:, 1], a), 1))
    return Draft(torch.stack((a, draw(second)), 1), None, torch.stack((first, second), 1))


def drawn_tree(draw, q, context, sampling):
    """Three siblings without replacement, two more behind the first and one behind the second."""
    first = q(context)
    [a, b, c] = without_replacement(draw, first, 3)
    behind_a, behind_b = (q(torch.stack((context[:, 1], x.clamp(min=0)), 1)) for x in (a, b))
    [d, e] = without_replacement(draw, behind_a, 2)
    [f] = without_replacement(draw, behind_b, 1)
    places = torch.stack((first, first, first, behind_a, behind_a, behind_b), 1)
    return Draft(torch.stack((a, b, c, d, e, f), 1), (-1, -1, -1, 0, 0, 1), places)


def chosen_chain(draw, q, context, sampling):
    """The likeliest tokens of the draft."""
    a = q(context).argmax(-1)
    return Draft(torch.stack((a, q(torch.stack((context[:, 1], a), 1)).argmax(-1)), 1))


def chosen_tree(draw, q, context, sampling):
    """The two likeliest, and the likeliest behind each."""
    a, b = q(context).topk(2).indices.unbind(1)
    behind = [q(torch.stack((context[:, 1], x), 1)).argmax(-1) for x in (a, b)]
    return Draft(torch.stack((a, b, *behind), 1), (-1, -1, 0, 1))


def drawn_but_not_told(draw, q, context, sampling):
    """Without q the rule draws for itself: that is exact whatever the tokens come from."""
    return drawn_chain(draw, q, context, sampling)._replace(q=None)


def drawn_with_replacement(draw, q, context, sampling):
    """A token drawn again says nothing and is passed over; what is left are draws without replacement."""
    first = q(context)
    return Draft(torch.stack((draw(first), draw(first), draw(first)), 1), (-1, -1, -1), torch.stack((first,) * 3, 1))


DRAFTERS = [drawn_chain, drawn_tree, chosen_chain, chosen_tree, drawn_but_not_told, drawn_with_replacement]


def without_replacement(draw, q, count):
    found = []
    for _ in range(count):
        none = q.sum(-1) <= 0
        token = draw(q)
        q = q.scatter(1, token[:, None], 0)
        found.append(token.masked_fill(none, -1))
    return found


def decoded(drafter, sampling, rows, seed=0):
    """Answers of LENGTH tokens to `rows` empty prompts, (rows, LENGTH)."""
    target, draft = tables()
    numbers = torch.Generator().manual_seed(seed)
    stream = iter(numpy.random.default_rng(seed).random(40 * rows).tolist())
    requests = [Row(sampling, stream) for _ in range(rows)]

    def draw(p):
        return guess_rows(p, torch.rand(len(p), dtype=torch.float64, generator=numbers))

    def q(context):
        return probabilities(draft[context[:, 0], context[:, 1]], sampling)

    answers = [[V, V] for _ in range(rows)]
    while open_rows := [i for i, answer in enumerate(answers) if len(answer) < 2 + LENGTH]:
        context = torch.tensor([answers[i][-2:] for i in open_rows])
        made = drafter(draw, q, context, sampling)
        parents = made.parents or range(-1, made.tokens.shape[1] - 1)
        before = [context]
        for node, parent in enumerate(parents):
            token = made.tokens[:, node].clamp(min=0)
            before.append(torch.stack((before[parent + 1][:, 1], token), 1))
        logits = torch.stack([target[pair[:, 0], pair[:, 1]] for pair in before], 1)
        gained = EXACT(logits, made, [requests[i] for i in open_rows]).tokens
        for i, tokens in zip(open_rows, gained, strict=True):
            answers[i] += tokens
    return torch.tensor([answer[2 : 2 + LENGTH] for answer in answers])


@functools.cache
def expected(sampling):
    """The probability of every answer under plain sampling."""
    target, _ = tables()
    p = probabilities(target, sampling).double()
    found = torch.ones(1, dtype=torch.double)
    joint = torch.zeros((V,) * LENGTH, dtype=torch.double)
    for answer in itertools.product(range(V), repeat=LENGTH):
        context, chance = (V, V), found.clone()
        for token in answer:
            chance *= p[context][token]
            context = context[1], token
        joint[answer] = chance
    return joint.flatten()


def p_value(answers, sampling):
    """Of a chi-square test against plain sampling; cells of fewer than 5 expected answers are one."""
    cells = answers @ torch.tensor([V**i for i in reversed(range(LENGTH))])
    counts = torch.bincount(cells, minlength=V**LENGTH).double()
    chances = expected(sampling) * len(answers)
    return chi_square(counts, chances)


def chi_square(counts, chances):
    """The p-value of counts where `chances` were expected; 0 where something came that cannot."""
    if counts[chances == 0].any():
        return 0.0
    small = chances < 5
    counts = torch.cat((counts[~small], counts[small].sum()[None]))
    chances = torch.cat((chances[~small], chances[small].sum()[None]))
    if chances[-1] == 0:
        counts, chances = counts[:-1], chances[:-1]
    return stats.chisquare(counts.numpy(), chances.numpy() * float(counts.sum() / chances.sum())).pvalue


@pytest.mark.parametrize("sampling", SAMPLINGS, ids=["t1", "t0.6 top_p"])
@pytest.mark.parametrize("drafter", DRAFTERS)
def test_answers_are_distributed_as_without_drafts(drafter, sampling):
    assert p_value(decoded(drafter, sampling, 6000), sampling) > 0.001


@pytest.mark.slow
@pytest.mark.parametrize("sampling", SAMPLINGS, ids=["t1", "t0.6 top_p"])
@pytest.mark.parametrize("drafter", DRAFTERS)
def test_a_hundred_thousand_answers_are_distributed_as_without_drafts(drafter, sampling):
    assert p_value(decoded(drafter, sampling, 100_000, seed=1), sampling) > 0.001


def accepts_whatever_q_likes(patch):
    """Accept the likeliest token of the draft, as if p were asked nothing."""
    patch.setattr(accept_exact, "keep_one", lambda p, q, tokens, uniform: (
        [0 if int(row.argmax()) == int(token) else -1 for row, token in zip(q, tokens[:, 0], strict=True)], p
    ))  # fmt: skip


def forgets_the_residual(patch):
    patch.setattr(accept_exact, "keep_one", lambda *given: (keep_one(*given)[0], given[0]))


def keeps_all_siblings_chances(patch):
    """q is not normalised over what remains."""

    def wrong(p, q, tokens, uniform):
        found = [-1] * len(p)
        for j in range(tokens.shape[1]):
            kept, rest = keep_one(p, q, tokens[:, j : j + 1], uniform)
            for i, place in enumerate(kept):
                if found[i] < 0 <= place:
                    found[i] = j
            p = torch.where(torch.tensor(found)[:, None] < 0, rest, p)
        return found, p

    patch.setattr(accept_exact, "keep_one", wrong)


def forgets_the_temperature_of_q(draw, q, context, sampling):
    made = drawn_chain(draw, q, context, sampling)
    _, draft = tables()
    warm = [probabilities(draft[pair[:, 0], pair[:, 1]], Sampling(temperature=1.0))
            for pair in (context, torch.stack((context[:, 1], made.tokens[:, 0]), 1))]  # fmt: skip
    return made._replace(q=torch.stack(warm, 1))


def scores_choices_with_q(draw, q, context, sampling):
    """The likeliest tokens, told as if they had been drawn."""
    a = q(context).argmax(-1)
    behind = q(torch.stack((context[:, 1], a), 1))
    return Draft(torch.stack((a, behind.argmax(-1)), 1), None, torch.stack((q(context), behind), 1))


def sorts_the_siblings(draw, q, context, sampling):
    """The likeliest sibling first, whichever was drawn first."""
    first = q(context)
    drawn = torch.stack(without_replacement(draw, first, 3), 1)
    order = first.gather(1, drawn).argsort(1, descending=True)
    return Draft(drawn.gather(1, order), (-1, -1, -1), torch.stack((first,) * 3, 1))


@pytest.mark.parametrize(
    ("rule", "drafter"),
    [
        (accepts_whatever_q_likes, drawn_chain),
        (forgets_the_residual, drawn_chain),
        (forgets_the_residual, drawn_tree),
        (keeps_all_siblings_chances, drawn_tree),
        (None, forgets_the_temperature_of_q),
        (None, scores_choices_with_q),
        (None, sorts_the_siblings),
    ],
)
def test_wrong_rules_are_found(monkeypatch, rule, drafter):
    if rule is not None:
        rule(monkeypatch)
    sampling = SAMPLINGS[0] if drafter in (drawn_tree, sorts_the_siblings) else SAMPLINGS[1]
    answers = decoded(drafter, sampling, 6000)
    chances = expected(sampling).view(V, -1).sum(1) * len(answers)
    first = chi_square(torch.bincount(answers[:, 0], minlength=V).double(), chances)
    assert min(first, p_value(answers, sampling)) < 1e-6


@pytest.mark.parametrize("rows", [3000, pytest.param(100_000, marks=pytest.mark.slow)])
def test_a_draft_model_through_the_whole_loop(rows):
    """The second and third token behind many equal prompts, each with its own random numbers; the first is plain."""
    options = {"vocabulary": V, "width": 8, "heads": 2, "kv_heads": 1, "depth": 1, "context": 8}
    model, small = decoder(1, **options).float(), decoder(2, **options).float()
    sampling = Sampling(temperature=1.3, top_p=0.9, seed=0)
    answers = generate_batch(
        model, [[1, 2]] * rows, sampling=sampling, max_tokens=4, drafter=DraftModel(small, 3), policy=ALWAYS
    )
    assert 0 < sum(sum(answer.drafted) for answer in answers) < 2 * rows
    with torch.no_grad():
        parts = []
        for behind in range(3):
            texts = torch.tensor([[1, 2, *text] for text in itertools.product(range(V), repeat=behind)])
            parts.append(probabilities(model(texts).logits[:, -1], sampling).double().view((V,) * (behind + 1)))
    chances = torch.einsum("a,ab,abc->bc", *parts).flatten() * rows
    cells = torch.tensor([V * answer.tokens[1] + answer.tokens[2] for answer in answers])
    assert chi_square(torch.bincount(cells, minlength=V * V).double(), chances) > 0.001


RULES = [
    ({"sampling": Sampling(temperature=1.0, top_k=20, seed=3)}, Rules()),
    ({"sampling": Sampling(temperature=0.8, min_p=0.05, repetition_penalty=1.4, seed=4)}, Rules()),
    ({"sampling": Sampling(repetition_penalty=1.4)}, Rules(min_tokens=9, no_repeat_ngram_size=2)),
    ({"sampling": Sampling()}, Rules(forced_last=11)),
    ({"sampling": Sampling(frequency_penalty=1.5)}, Rules()),
    ({"sampling": Sampling(temperature=0.8, presence_penalty=0.9, frequency_penalty=0.6, seed=4)}, Rules()),
    ({"sampling": Sampling(temperature=1.2, seed=5)}, Rules(forced_first=7, forced_last=11, no_repeat_ngram_size=3)),
]


@pytest.mark.parametrize(("options", "rules"), RULES)
@pytest.mark.parametrize("tree", [False, True])
def test_chosen_drafts_give_the_plain_answer_for_the_same_seed(options, rules, tree):
    """Every rule acts at each place of a path as it does without a draft, with the path's tokens as seen."""
    model, prompts = decoder(), [[5, 17, 3], [9], [2, 2, 30, 31, 4]]
    options = {**options, "max_tokens": 14, "eos_ids": list(range(20, 26)), "rules": rules}
    plain = generate_batch(model, prompts, **options)
    drafter = Guessing([answer.tokens for answer in plain], tree=tree)
    drafted = generate_batch(model, prompts, **options, drafter=drafter, policy=ALWAYS)
    assert [answer.tokens for answer in drafted] == [answer.tokens for answer in plain]
    assert sum(sum(answer.drafted) for answer in drafted) > 2


@pytest.mark.parametrize(("options", "rules"), RULES)
def test_a_draft_by_the_target_itself_is_accepted_whole(options, rules):
    """p and q come from one function: where the models agree, so do they, whatever the rules."""
    model = decoder()
    prompts = [[5, 17, 3], [9], [2, 2, 30, 31, 4]]
    options = {**options, "rules": rules, "max_tokens": 13, "policy": ALWAYS}
    answers = generate_batch(model, prompts, **options, drafter=DraftModel(model, 3))
    for answer in answers:
        assert answer.accepted == answer.proposed
        assert answer.steps == 4  # one for the prompt, and 4 tokens each of three more


def test_rows_of_different_samplings_and_a_token_that_cannot_come():
    model = decoder()
    samplings = [Sampling(), Sampling(1.1, seed=1), Sampling(0.7, top_p=0.5, seed=2)]
    prompts = [[5, 17, 3]] * 3
    alone = [
        generate(model, prompt, sampling=one, max_tokens=12, drafter=DraftModel(decoder(3), 3), policy=ALWAYS)
        for prompt, one in zip(prompts, samplings, strict=True)
    ]
    batch = generate_batch(
        model, prompts, sampling=samplings, max_tokens=12, drafter=DraftModel(decoder(3), 3), policy=ALWAYS
    )
    assert [answer.tokens for answer in batch] == [answer.tokens for answer in alone]
    p, q = torch.tensor([[0.0, 1.0]]), torch.tensor([[1.0, 0.0]])
    assert keep_one(p, q, torch.tensor([[0]]), [lambda: 0.0])[0] == [-1]
    found, rest = keep_one(p, q, torch.tensor([[1]]), [lambda: 0.0])  # q cannot have given token 1
    assert found == [-1]
    assert torch.equal(rest, p)
    found, rest = keep_one(p, p, torch.tensor([[1]]), [lambda: 1 - 1e-16])
    assert found == [0]
