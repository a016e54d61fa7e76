"""Medusa's heads and modules of multi-token prediction as drafters: what they draft, and that answers stay the same."""

from __future__ import annotations

import copy
import itertools
import random

import pytest
import torch
from scipy.stats import chisquare
from tests.decode.helpers import bart

from volvelle.decode import (
    Adaptive,
    DraftModel,
    EarlyExit,
    FirstOf,
    PromptLookup,
    Sampling,
    generate,
    generate_batch,
    speculation,
)
from volvelle.decode.contract import ALWAYS, Drafter
from volvelle.decode.drafters import medusa as medusa_file
from volvelle.decode.drafters import mtp as mtp_file
from volvelle.decode.drafters.medusa import Medusa
from volvelle.decode.drafters.mtp import MTP, following
from volvelle.decode.drafters.opening import kind_of, open_drafter
from volvelle.decode.policy import usual_policy
from volvelle.decode.trees import Tree, chain, product
from volvelle.errors import UsageError, VolvelleError
from volvelle.systems.language.config import GatedMLP, LanguageConfig, RMSNorm, Rope
from volvelle.systems.language.decoder import Decoder
from volvelle.systems.language.draft_head import DraftHead
from volvelle.systems.language.medusa import MedusaHeads
from volvelle.systems.language.medusa_files import write_medusa
from volvelle.systems.language.mtp import KINDS
from volvelle.systems.language.mtp_files import write_mtp

SOME = torch.arange(0, 96, 3)


def noisy(module, std=0.3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in module.parameters():
            if p.ndim > 1:
                p.normal_(std=std, generator=generator)
    return module.eval()


@pytest.fixture(scope="module")
def exact_model(model):
    """In fp64: there are no ties."""
    return copy.deepcopy(model).double()


def heads_of(model, count=3, tokens=None):
    # small blocks: the heads then often guess what the model itself would write next, as trained ones do
    return noisy(MedusaHeads.of(model, count, tokens=tokens).to(model.dtype), std=0.02)


def modules_of(model, kind, depths=2, tokens=None):
    return noisy(KINDS[kind](model.config, depths, tokens=tokens).to(model.dtype))


DRAFTERS = {
    "grown tree": lambda m: Medusa(heads_of(m), k=9, ranks=4),
    "fixed tree": lambda m: Medusa(heads_of(m), k=12, tree=product([3, 2, 1])),
    "chain": lambda m: Medusa(heads_of(m, tokens=SOME), k=3, tree=chain(3)),
    "drawn": lambda m: Medusa(heads_of(m), k=9, ranks=4, drawn=True),
    "sequential": lambda m: MTP(modules_of(m, "sequential"), k=4),
    "parallel": lambda m: MTP(modules_of(m, "parallel", tokens=SOME), k=2),
}
PROMPTS = [[5, 9, 2, 77, 31], [8], [40, 41, 42, 43, 44, 45, 46, 47, 48], [3, 3, 3]]


class Listening(Drafter):
    """A drafter whose drafts are noted, with the texts that they were made for."""

    def __init__(self, drafter):
        self.drafter, self.heard = drafter, []

    @property
    def modules(self):
        return self.drafter.modules

    def begin(self, writer, requests, room):
        drafting = self.drafter.begin(writer, requests, room)
        propose = drafting.propose

        def noting(requests, seen, k):
            draft = propose(requests, seen, k)
            texts = [None if r.finish else [*r.prompt, *r.tokens] for r in requests]
            self.heard.append((texts, draft))
            return draft

        drafting.propose = noting
        return drafting


class EveryThird:
    """A policy that drafts in every third step only, so that there is something to catch up on."""

    def begin(self):
        class Pacing:
            def __init__(self):
                self.count = itertools.count()

            def choose(self, limit, length):
                return limit if next(self.count) % 3 == 2 else 0

            def observe(self, *_, **__):
                pass

        return Pacing()


def rows_heard(listening):
    for texts, draft in listening.heard:
        if draft is not None:
            for row, text in enumerate(texts):
                if text is not None:
                    yield text, draft.tokens[row].tolist(), draft


@pytest.mark.parametrize("policy", [ALWAYS, EveryThird()], ids=["always", "every third"])
def test_heads_draft_what_they_say_over_whole_texts(policy, exact_model):
    heads = heads_of(exact_model, tokens=SOME)
    tree = product([3, 2, 2])
    listening = Listening(Medusa(heads, k=tree.size, tree=tree))
    generate_batch(exact_model, PROMPTS, max_tokens=14, eos_ids=(), drafter=listening, policy=policy)
    head, checked = DraftHead(exact_model, SOME), 0
    with torch.no_grad():
        for text, tokens, draft in rows_heard(listening):
            state = exact_model.hidden(torch.tensor([text]))[0, -2]
            best = SOME[heads.logits(state[None], head)[:, 0].topk(3).indices]
            part = tree.first(len(tokens)) if len(tokens) == tree.size else None
            if part is not None:  # near the end drafts are cut
                assert tokens == [int(best[h, r]) for h, r in zip(tree.heads, tree.ranks, strict=True)]
                assert tuple(draft.parents) == tree.parents
                checked += 1
    assert checked >= 8


@pytest.mark.parametrize("policy", [ALWAYS, EveryThird()], ids=["always", "every third"])
@pytest.mark.parametrize("kind", KINDS)
def test_modules_draft_what_they_say_over_whole_texts(kind, policy, exact_model):
    mtp = modules_of(exact_model, kind, tokens=SOME)
    listening = Listening(MTP(mtp, k=2))
    generate_batch(exact_model, PROMPTS, max_tokens=14, eos_ids=(), drafter=listening, policy=policy)
    head, checked = DraftHead(exact_model, SOME), 0
    with torch.no_grad():
        for text, tokens, _ in rows_heard(listening):
            at = len(text) - 2
            for place, token in enumerate(tokens):
                states = mtp(exact_model, torch.tensor([text + tokens[:place]]))
                assert int(SOME[head.logits(states[1 + place][0, at]).argmax()]) == token
                checked += 1
    assert checked >= 16


@pytest.mark.parametrize("name", DRAFTERS)
def test_greedy_answers_are_those_without_drafts(name, exact_model):
    drafter = DRAFTERS[name](exact_model)
    plain = generate_batch(exact_model, PROMPTS, max_tokens=30, eos_ids=())
    ending = plain[0].tokens[7], plain[2].tokens[11]
    plain = generate_batch(exact_model, PROMPTS, max_tokens=30, eos_ids=ending)
    assert len({len(answer.tokens) for answer in plain}) > 1, "rows should end at different times"
    for policy in (EveryThird(), ALWAYS):
        help = {"max_tokens": 30, "eos_ids": ending, "drafter": drafter, "policy": policy}
        found = generate_batch(exact_model, PROMPTS, **help)
        assert [(a.tokens, a.finish) for a in found] == [(a.tokens, a.finish) for a in plain]
        alone = generate(exact_model, PROMPTS[1], **help)
        assert alone.tokens == plain[1].tokens
    assert sum(a.steps for a in found) < sum(a.steps for a in plain) or name in ("sequential", "parallel")


def test_up_to_the_end_of_the_context(exact_model):
    prompt = PROMPTS[0]
    plain = generate(exact_model, prompt, max_tokens=None, eos_ids=())
    for name in ("grown tree", "sequential"):
        drafter = DRAFTERS[name](exact_model)
        found = generate(exact_model, prompt, max_tokens=None, eos_ids=(), drafter=drafter, policy=ALWAYS)
        assert found.tokens == plain.tokens


@pytest.mark.parametrize("name", ["grown tree", "fixed tree"])
def test_chosen_drafts_leave_sampled_answers_as_they_are(name, exact_model):
    sampling = Sampling(temperature=0.9, top_p=0.9, repetition_penalty=1.1, seed=3)
    plain = generate_batch(exact_model, PROMPTS, max_tokens=16, sampling=sampling, eos_ids=())
    drafter = DRAFTERS[name](exact_model)
    found = generate_batch(
        exact_model, PROMPTS, max_tokens=16, sampling=sampling, eos_ids=(), drafter=drafter, policy=ALWAYS
    )
    assert [a.tokens for a in found] == [a.tokens for a in plain]


@pytest.fixture(scope="module")
def five():
    """A model of five words, whose answers can be counted."""
    torch.manual_seed(1)
    config = LanguageConfig(
        "llama", vocabulary=5, width=16, depth=1, heads=2, context=16, norm=RMSNorm(), mlp=GatedMLP(24), position=Rope()
    )
    return noisy(Decoder(config).double(), std=0.6, seed=4)


def joint(model, prompt, sampling):
    """The probability of every answer of three tokens."""
    from volvelle.decode.sampling import probabilities

    found = {}
    for answer in itertools.product(range(5), repeat=3):
        p = 1.0
        with torch.no_grad():
            logits = model(torch.tensor([prompt + list(answer)])).logits[0]
        for i, token in enumerate(answer):
            p *= float(probabilities(logits[len(prompt) - 1 + i], sampling)[token])
        found[answer] = p
    return found


def p_value(model, drafter, count, sampling):
    prompt, wanted = [1, 2], joint(model, [1, 2], sampling)
    options = {"max_tokens": 3, "sampling": sampling, "eos_ids": ()}
    answers = generate_batch(model, [prompt] * count, **options, drafter=drafter, policy=ALWAYS)
    seen = dict.fromkeys(wanted, 0)
    for answer in answers:
        seen[tuple(answer.tokens)] += 1
    many = [a for a, p in wanted.items() if p * count >= 5]
    rest = [a for a in wanted if a not in many]
    found = [seen[a] for a in many] + [sum(seen[a] for a in rest)]
    expected = [wanted[a] * count for a in many] + [sum(wanted[a] for a in rest) * count]
    assert sum(answer.drafted.count(True) for answer in answers) > count / 10
    if expected[-1] == 0:
        found, expected = found[:-1], expected[:-1]
    # softmax in fp32: its sums are 1 up to rounding, and the test wants them equal
    return chisquare(found, [share * sum(found) / sum(expected) for share in expected]).pvalue


def drawing(model, kind):
    if kind == "heads":
        heads = noisy(MedusaHeads.of(model, 2).to(model.dtype), std=0.3, seed=2)
        return Medusa(heads, k=5, ranks=3, tree=product([2, 2], budget=5), drawn=True)
    return MTP(noisy(KINDS[kind](model.config, 2).to(model.dtype), std=0.5, seed=2), k=2)


@pytest.mark.parametrize("kind", ["heads", "sequential", "parallel"])
def test_drawn_drafts_leave_the_distribution_as_it_is(kind, five):
    """10^3 draws here, and 10^5 of the rule itself in its own tests; a wrong q is seen."""
    sampling = Sampling(temperature=1.1, seed=5)
    assert p_value(five, drawing(five, kind), 1500, sampling) > 1e-3


SECOND_FIRST = {  # trees in which a head's second guess comes before its first, or without it
    "grown": None,
    "only the second": Tree((-1,), (0,), (1,)),
    "sorted": Tree((-1, -1), (0, 0), (1, 0)),
}


@pytest.mark.parametrize("name", SECOND_FIRST)
def test_draws_are_tried_in_their_order_whatever_a_tree_prefers(name, five):
    heads = noisy(MedusaHeads.of(five, 2).to(five.dtype), std=0.3, seed=2)
    heads.acceptance = torch.tensor([[0.2, 0.5, 0.1], [0.1, 0.3, 0.5]])
    drafter = Medusa(heads, k=3, ranks=3, tree=SECOND_FIRST[name], drawn=True)
    assert p_value(five, drafter, 1500, Sampling(temperature=1.1, seed=5)) > 1e-3


@pytest.mark.parametrize("kind", ["heads", "sequential"])
def test_a_wrong_q_is_seen(kind, five, monkeypatch):
    drafting = medusa_file.MedusaDrafting if kind == "heads" else mtp_file.MTPDrafting
    propose = drafting.propose

    def lying(*given):
        draft = propose(*given)
        return None if draft is None else draft._replace(q=draft.q.flip(-1))

    monkeypatch.setattr(drafting, "propose", lying)
    assert p_value(five, drawing(five, kind), 1500, Sampling(temperature=1.1, seed=5)) < 1e-3


class Clock:
    """A clock that goes as it likes, another way each time."""

    def __init__(self, seed):
        self.random, self.now = random.Random(seed), 0.0

    def perf_counter(self):
        self.now += 10 ** self.random.uniform(-6, 0)
        return self.now


SEEDED = {
    "chosen heads": lambda m: Medusa(heads_of(m), k=9, ranks=4),
    "drawn heads": DRAFTERS["drawn"],
    "sequential": DRAFTERS["sequential"],
    "model": lambda m: DraftModel(noisy(copy.deepcopy(m), std=0.2), k=4),
    "some layers": lambda m: EarlyExit(1),
    "first of": lambda m: FirstOf(PromptLookup(n=2), DRAFTERS["sequential"](m)),
}


@pytest.mark.parametrize("name", SEEDED)
def test_a_seed_gives_the_same_answer_whatever_the_clock_says(name, exact_model, monkeypatch):
    drafter = SEEDED[name](exact_model)
    assert drafter.draws == (name != "chosen heads")

    def answers(**policy):
        for seed in range(4):
            monkeypatch.setattr(speculation, "time", Clock(seed))
            options = {"max_tokens": 40, "sampling": Sampling(1.2, seed=7), "eos_ids": (), **policy}
            yield tuple(generate(exact_model, PROMPTS[0], drafter=drafter, **options).tokens)

    assert len(set(answers())) == 1
    assert len(set(answers(policy=Adaptive()))) == 1 or drafter.draws, "chosen drafts take no random numbers"
    assert isinstance(usual_policy(drafter, [Sampling(1.2), Sampling(seed=7)]), Adaptive)


@pytest.mark.parametrize("name", ["fixed and drawn", "sequential", "parallel"])
def test_a_rows_random_numbers_do_not_depend_on_the_other_rows(name, exact_model):
    """Not even in its last steps, in which others may draft more than it may write."""
    drafter = DRAFTERS.get(name, lambda m: Medusa(heads_of(m), k=6, tree=product([2, 1, 1]), ranks=2, drawn=True))
    options = {"eos_ids": (), "drafter": drafter(exact_model), "policy": ALWAYS}
    for seed in range(0, 20, 4):
        sampling = Sampling(1.2, seed=seed)
        found = generate_batch(exact_model, PROMPTS, sampling=sampling, max_tokens=9, **options)
        for row, (prompt, answer) in enumerate(zip(PROMPTS, found, strict=True)):
            own = Sampling(1.2, seed=seed + row)
            assert generate(exact_model, prompt, sampling=own, max_tokens=9, **options).tokens == answer.tokens


def test_what_comes_behind_each_token():
    ids = torch.tensor([[1, 2, 3, 4], [5, 6, 7, 8]])
    mask = torch.tensor([[False, True, False, True], [True, True, True, False]])
    found = following(ids, torch.tensor([10, 20]), mask)
    assert found[mask].tolist() == [4, 10, 6, 7, 20]


def test_ranks_are_learned_in_a_run(exact_model):
    heads = heads_of(exact_model)
    drafting = Medusa(heads, k=4).begin(exact_model, [None], 64)
    before = [list(row) for row in drafting.acceptance.table]
    heads.acceptance = torch.tensor([[0.1, 0.6], [0.2, 0.3], [0.4, 0.1]])
    drafting = Medusa(heads, k=4, ranks=2).begin(exact_model, [None], 64)
    assert drafting.acceptance.table != before
    assert drafting.acceptance.tree(1).ranks == (1,), "grown from what training measured"


def test_opened_from_folders(exact_model, tmp_path):
    write_medusa(heads_of(exact_model), tmp_path / "run" / "medusa")
    write_mtp(modules_of(exact_model, "parallel"), exact_model, tmp_path / "other" / "mtp")
    assert (kind_of(tmp_path / "run"), kind_of(tmp_path / "run" / "medusa")) == ("medusa", "medusa")
    heads = open_drafter(tmp_path / "run", exact_model, k=5)
    assert isinstance(heads, Medusa)
    assert heads.k == 5
    assert heads.heads.count == 3
    mtp = open_drafter(tmp_path / "other" / "mtp", exact_model)
    assert isinstance(mtp, MTP)
    assert mtp.k == 2
    plain = generate(exact_model, PROMPTS[2], max_tokens=9, eos_ids=())
    for drafter in (heads, mtp):
        found = generate(exact_model, PROMPTS[2], max_tokens=9, eos_ids=(), drafter=drafter, policy=ALWAYS)
        assert found.tokens == plain.tokens


def test_what_does_not_fit_is_refused(exact_model, model, five):
    heads = heads_of(exact_model)
    with pytest.raises(VolvelleError, match=r"dtype torch\.float64, the model of torch\.float32"):
        generate(model, [1], max_tokens=2, drafter=Medusa(heads))
    with pytest.raises(VolvelleError, match="width 32, the model of 16"):
        generate(five, [1], max_tokens=2, drafter=MTP(modules_of(exact_model, "sequential")))
    for drafter in (Medusa(heads), MTP(modules_of(exact_model, "sequential"))):
        with pytest.raises(VolvelleError, match="are for a decoder, not for an encoder-decoder"):
            generate(bart(), [1], max_tokens=2, drafter=drafter)
    with pytest.raises(UsageError, match="asks for 4 heads"):
        Medusa(heads, tree=chain(4))
    with pytest.raises(UsageError, match="at most as many tokens"):
        MTP(modules_of(exact_model, "parallel"), k=3)
