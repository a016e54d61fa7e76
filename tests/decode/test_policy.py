"""The policy on a simulated machine: never far below plain decoding, near the best draft length where drafts pay."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable
from dataclasses import dataclass

import pytest

from volvelle.decode.contract import Drafted
from volvelle.decode.cost import CostCurve, DraftCost, expected_tokens, measured_improvement, walltime_improvement
from volvelle.decode.policy import LADDER, Adaptive, NodeAcceptance, lengths

Curve = Callable[[int], float]
Right = Callable[[int, int], int]
CURVES: dict[str, Curve] = {
    "flat": lambda n: 1.0,
    "bf16": lambda n: 1 + 0.011 * (n - 1),
    "fp32": lambda n: 1.0 if n == 1 else 1.5 + 0.035 * n,
    "int4": lambda n: 1 + 0.125 * (n - 1),
    "proportional": lambda n: float(n),
    "tiles": lambda n: float(-(-n // 4)),
    "falls": lambda n: 1.0 if n == 1 else 0.9,
}


@dataclass
class Machine:
    """A simulated clock: steps of n tokens take curve(n), drafts of k take draft * k, in plain steps of `plain` s.

    right(tokens so far, step) says how many tokens of a draft are right.
    """

    curve: Curve
    draft: float
    right: Right
    width: int = 11
    plain: float = 0.02
    preparing: float = 0.0  # what the first step of each width takes besides

    def decode(self, policy: Adaptive, tokens: int, prompt: int = 50) -> float:
        """The time of an answer of so many tokens over that of plain decoding, without what was being prepared."""
        pacing, now, done, steps = policy.begin(), 0.0, 0, 0
        while done < tokens:
            k, kept = pacing.choose(min(self.width, tokens - done - 1), prompt + done), 0
            step, draft = self.curve(1 + k) * self.plain, self.draft * k * self.plain
            drafted = None
            if k > 0:
                kept = min(self.right(done, steps), k)
                drafted = Drafted(k, None, [list(range(kept))])
            prepare = 0.0 if policy.steps.knows(1 + k) else self.preparing
            pacing.observe(prompt + done, drafted, step_seconds=step + prepare, draft_seconds=draft)
            now, done, steps = now + step + draft, done + 1 + kept, steps + 1
        return now / (done * self.plain * self.curve(1))


def chance(a: float, seed: int = 0) -> Right:
    generator = random.Random(seed)
    return lambda done, step: next(kept for kept in itertools.count() if generator.random() >= a)


def adversaries() -> dict[str, Right]:
    return {
        "never": lambda done, step: 0,
        "always": lambda done, step: 99,
        "lures": lambda done, step: 99 if step < 6 else 0,
        "lures again": lambda done, step: 99 if done % 97 < 12 else 0,
        "every other": lambda done, step: 99 * (step % 2),
        "late": lambda done, step: 0 if done < 150 else 99,
        "turns": lambda done, step: 99 if done // 60 % 2 == 0 else 0,
        **{f"chance {a}": chance(a) for a in (0.2, 0.6)},
    }


@pytest.mark.parametrize("curve", CURVES)
@pytest.mark.parametrize("draft", [0.0, 0.6])
def test_never_below_097_of_plain(curve, draft):
    for name, right in adversaries().items():
        for tokens in (100, 250):
            policy = Adaptive()
            assert Machine(CURVES[curve], draft, right).decode(policy, tokens) <= 1 / 0.97, (
                name,
                tokens,
                policy.figures,
            )


def test_the_bound_catches_a_policy_that_always_drafts():
    class Stubborn(Adaptive):
        def begin(self):
            pacing = super().begin()
            pacing.choose = lambda limit, length: min(4, max(limit, 0))  # type: ignore[method-assign]
            return pacing

    assert Machine(CURVES["int4"], 0.0, lambda done, step: 0).decode(Stubborn(), 300) > 1 / 0.97


def best_gain(curve: Curve, draft: float, a: float, width: int = 11) -> float:
    """Plain time over the time a token of the best fixed draft length."""
    return max(expected_tokens(a, k) * curve(1) / (curve(1 + k) + draft * k) for k in range(width + 1))


@pytest.mark.parametrize("a", [0.5, 0.9])
@pytest.mark.parametrize("draft", [0.0, 0.1])
@pytest.mark.parametrize("curve", CURVES)
def test_finds_most_of_what_there_is_to_gain(curve, draft, a):
    policy, machine = Adaptive(), Machine(CURVES[curve], draft, chance(a))
    machine.decode(policy, 400)
    gained = 1 / machine.decode(policy, 800)
    assert gained >= 0.85 * best_gain(CURVES[curve], draft, a)


def test_length_follows_the_cost_and_the_acceptance():
    def asked(curve: Curve, a: float) -> int:
        policy, machine = Adaptive(), Machine(curve, 0.0, chance(a))
        machine.decode(policy, 800)
        machine.decode(policy, 800)
        return policy.figures.chosen.most_common(1)[0][0]

    assert asked(CURVES["flat"], 0.9) == 11
    assert asked(CURVES["proportional"], 0.9) == 0
    assert asked(CURVES["int4"], 0.5) < asked(CURVES["int4"], 0.9) <= asked(CURVES["bf16"], 0.9)


def test_switches_off_and_on_again():
    policy, machine = Adaptive(), Machine(CURVES["int4"], 0.1, lambda done, step: 0 if done < 300 else 99)
    machine.decode(policy, 300)
    assert policy.figures.switched_off == 1
    assert policy.figures.chosen[0] > 200
    assert 0 < policy.figures.lost < 0.03
    assert machine.decode(policy, 1500) < 1 / 1.7  # drafts are right from the 300th token on


def test_what_is_prepared_once_does_not_switch_drafting_off():
    policy, machine = Adaptive(), Machine(CURVES["bf16"], 0.0, lambda done, step: 99, preparing=30.0)
    assert machine.decode(policy, 400) < 1 / 3
    assert policy.steps.ratios(300)[12] == pytest.approx(CURVES["bf16"](12))


def test_no_draft_found_is_a_plain_step():
    policy = Adaptive()
    pacing = policy.begin()
    asked = []
    for done in range(50):
        asked.append(pacing.choose(10, done))
        pacing.observe(done, None, step_seconds=0.02, draft_seconds=1e-5)
    assert policy.figures.switched_off == 0
    assert asked.count(0) == 2  # the first ones, to know what a plain step takes
    assert policy.figures.chosen == {0: 50}
    assert policy.figures.lost == pytest.approx(1e-5 / 0.02)


def test_limits_and_ladder():
    assert lengths(0) == []
    assert lengths(8) == [1, 2, 3, 4, 5, 6, 7]
    assert lengths(99) == list(LADDER)
    policy, right = Adaptive(), chance(0.9)
    assert Machine(CURVES["flat"], 0.0, right, width=0).decode(policy, 50) == pytest.approx(1)
    assert set(policy.figures.chosen) == {0}
    Machine(CURVES["flat"], 0.0, right, width=3).decode(policy, 50)
    assert max(policy.figures.chosen) == 3


def test_node_acceptance_of_chains_trees_and_rows():
    seen = NodeAcceptance(memory=1e9, weight=1e-9)
    for _ in range(3):
        seen.observe(3, None, [[0, 1], [0]])  # two rows: node 0 always, node 1 in one of two, node 2 never
    assert seen.kept(3) == pytest.approx([1.0, 1.5, 1.5])
    tree = NodeAcceptance(memory=1e9, weight=1e-9)
    for nodes in ([1, 3], [0, 2], [], [1]):  # 0 and 1 are siblings, 2 follows 0, 3 follows 1
        tree.observe(4, [-1, -1, 0, 1], [nodes])
    assert tree.kept(4) == pytest.approx([0.25, 0.75, 1.0, 1.25])
    fading = NodeAcceptance()
    for kept in [[0]] * 100 + [[]] * 100:
        fading.observe(1, None, [kept])
    assert fading.kept(1)[0] < 0.05


def test_cost_curve_by_length_of_the_cache():
    curve = CostCurve()
    assert curve.seconds(1, 10) is None
    assert curve.at_most(4, 10) is None
    assert not curve.knows(1)
    for length, scale in ((100, 1.0), (1000, 2.0)):
        for n, seconds in ((1, 1.0), (5, 1.5), (9, 2.0)):
            for noise in (9.0, 1.0, 0.9, 1.1, 1.0, 5.0):  # the median is not moved by two of six
                if (length, n) != (1000, 9):
                    curve.observe(n, length, seconds * scale * noise)
    assert curve.ratios(100) == pytest.approx({1: 1.0, 5: 1.5, 9: 2.0}, rel=0.06)
    assert curve.seconds(9, 1000) == pytest.approx(4.0, rel=0.1)  # from the other class, scaled
    assert curve.seconds(7, 100) == pytest.approx(1.5625, rel=0.1)
    assert curve.at_most(20, 100) == pytest.approx(3 * 2.0, rel=0.1)  # three steps of nine, not four of five
    cost = DraftCost()
    for k, seconds in ((1, 0.1), (1, 0.1), (2, 0.2), (2, 0.2)):
        cost.observe(k, 100, seconds)
    assert cost.seconds(10, 100) == pytest.approx(1.0)


@pytest.mark.parametrize("a", [0.0, 0.3, 0.8, 1.0])
def test_formulas_against_a_sum(a):
    for k in range(5):
        assert expected_tokens(a, k) == pytest.approx(sum(a**i for i in range(k + 1)))
        flat = dict.fromkeys(range(1, 7), 1.0)
        kept = expected_tokens(a, k) - 1
        assert walltime_improvement(a, k, 0.2) == pytest.approx(measured_improvement(kept, k, flat, 0.2 * k))


def stated(policy: Adaptive, curve: Curve, tokens: int, *, scale: float, seed: int = 0, plain: float = 0.02) -> float:
    """The time of an answer over that of plain decoding where drafts state their chances, which are `scale` times true.

    Drafts are chains of 12 whose places a path reaches with probabilities that vary from step to step.
    """
    generator = random.Random(seed)
    pacing, now, done = policy.begin(), 0.0, 0
    while done < tokens:
        asked, drafted = pacing.choose_stated(12, 50 + done), None
        step, k = curve(1) * plain, 0
        if asked > 0:
            a = generator.choice((0.05, 0.3, 0.9))
            chances = [a**place for place in range(1, asked + 1)]
            k = pacing.worth(chances, 50 + done)
            if k > 0:
                fate = generator.random()
                kept = sum(fate < chance * scale for chance in chances[:k])
                drafted, step = Drafted(k, None, [list(range(kept))], chances[:k]), curve(1 + k) * plain
                done += kept
        pacing.observe(50 + done, drafted, step_seconds=step, draft_seconds=0.0)
        now, done = now + step, done + 1
    return now / (done * plain * curve(1))


@pytest.mark.parametrize("curve", CURVES)
@pytest.mark.parametrize("scale", [0.0, 0.1, 0.5, 1.0])
def test_stated_chances_are_not_believed_where_they_are_wrong(curve, scale):
    assert stated(Adaptive(), CURVES[curve], 300, scale=scale) <= 1 / 0.97


def test_each_draft_is_checked_as_far_as_its_own_chances_pay():
    policy = Adaptive()
    stated(policy, CURVES["int4"], 600, scale=1.0)
    pacing = policy.begin()
    sure, poor = [0.95**i for i in range(1, 13)], [0.04**i for i in range(1, 13)]
    assert pacing.worth(sure, 60) >= 5
    assert pacing.worth(poor, 60) == 0
    assert policy.figures.chosen == {}
    mean = Adaptive()  # one length for all drafts, chosen by their mean
    told = random.Random(0)
    pay = stated(policy, CURVES["int4"], 600, scale=1.0, seed=1)
    right = Machine(CURVES["int4"], 0.0, lambda done, step: chained(told), width=12).decode(mean, 600)
    assert pay < 0.9 * right


def mixed(policy: Adaptive, curve: Curve, tokens: int, *, draft: float, share: float, right: float) -> float:
    """The time over that of plain decoding where every so often a draft states its chances, and costs nothing.

    Else another drafter is asked, which says nothing, takes `draft` plain steps a token, and is `right` or not at all.
    """
    generator, plain = random.Random(0), 0.02
    pacing, now, done = policy.begin(), 0.0, 0
    while done < tokens:
        length, drafted, seconds, step = 50 + done, None, 0.0, curve(1) * plain
        asked = pacing.choose_stated(15, length)
        if asked > 0 and generator.random() < share:
            chances = [0.9**place for place in range(1, asked + 1)]
            k = pacing.worth(chances, length)
            fate = generator.random()
            kept = sum(fate < one for one in chances[:k])
            drafted = Drafted(k, None, [list(range(kept))], chances[:k]) if k else None
        elif asked > 0 and (k := pacing.choose(asked, length)) > 0:
            kept, seconds = k if generator.random() < right else 0, draft * k * plain
            drafted = Drafted(k, None, [list(range(kept))])
        if drafted is not None:
            step, done = curve(1 + drafted.k) * plain, done + len(drafted.kept[0])
        pacing.observe(length, drafted, step_seconds=step, draft_seconds=seconds)
        now, done = now + step + seconds, done + 1
    return now / (done * plain * curve(1))


@pytest.mark.parametrize("curve", CURVES)
@pytest.mark.parametrize("share", [0.02, 0.5])
def test_drafts_that_state_nothing_are_bounded_beside_those_that_do(curve, share):
    for draft in (0.0, 0.3, 1.0):
        policy = Adaptive()
        for tokens in (100, 300):
            assert mixed(policy, CURVES[curve], tokens, draft=draft, share=share, right=0.0) <= 1 / 0.97


def test_drafts_that_state_nothing_are_used_where_they_pay():
    policy = Adaptive()
    mixed(policy, CURVES["bf16"], 400, draft=0.02, share=0.1, right=0.95)
    assert mixed(policy, CURVES["bf16"], 400, draft=0.02, share=0.1, right=0.95) < 0.25


def test_a_draft_of_nothing_is_worth_nothing():
    policy = Adaptive()
    assert policy.begin().worth([], 50) == 0


def chained(generator: random.Random) -> int:
    """The places that a draft of `stated` keeps."""
    a, fate = generator.choice((0.05, 0.3, 0.9)), generator.random()
    return sum(fate < a**place for place in range(1, 13))
