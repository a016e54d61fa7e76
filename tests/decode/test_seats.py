"""Continuous batching: whatever comes and goes around it, a text gets the answer it gets alone."""

import random

import pytest
import torch
from tests.decode.helpers import Guessing, V, decoder, late, lively

import volvelle.adapt as adapt
from volvelle.adapt.methods import LoRA
from volvelle.adapt.prefix_methods import PrefixTuning
from volvelle.decode import generate
from volvelle.decode.bitwise import is_any_width
from volvelle.decode.contract import ALWAYS
from volvelle.decode.drafters.draft_model import DraftModel
from volvelle.decode.drafters.first_of import FirstOf
from volvelle.decode.drafters.medusa import Medusa
from volvelle.decode.drafters.mtp import MTP
from volvelle.decode.drafters.ngram import NGram
from volvelle.decode.drafters.prompt_lookup import PromptLookup
from volvelle.decode.options import Sampling
from volvelle.decode.policy import Adaptive
from volvelle.decode.seats import Seats
from volvelle.errors import UsageError, VolvelleError
from volvelle.systems.language import config as c
from volvelle.systems.language.medusa import MedusaHeads
from volvelle.systems.language.mtp import KINDS as KINDS_OF_MTP

CONTEXT = 48


def texts(count, seed=0):
    """Prompts with repetitions, and how long their answers may be."""
    draw = random.Random(seed)
    found = []
    for _ in range(count):
        part = [draw.randrange(1, V) for _ in range(draw.randint(1, 6))]
        prompt = (part * 4)[: draw.randint(1, 20)]
        found.append((prompt, draw.randint(1, CONTEXT - len(prompt))))
    return found


def serve(seats, wanted, seed=0):
    """Let the texts come at random times; their answers, in order."""
    draw, waiting, reading = random.Random(seed), list(enumerate(wanted)), {}
    answers, streamed = {}, {}
    while waiting or reading or seats.taken:
        if waiting and draw.random() < 0.5:
            number, (prompt, options) = waiting.pop(0)
            reading[number] = seats.read(prompt, **options)
            answers[number] = reading[number]
        for number, one in list(reading.items()):
            if one.advance() and seats.free:
                streamed[number] = [seats.sit(one).token]
                del reading[number]
        rows = {answers[number].row: number for number in streamed if answers[number].request.finish is None}
        for row, token in seats.step():
            streamed[rows[row]].append(token)
    for number, tokens in streamed.items():
        assert [token.id for token in tokens] == answers[number].request.tokens
    return [answers[number].generation() for number in range(len(wanted))]


def drafters(model):
    small = decoder(seed=3, depth=1)
    torch.manual_seed(1)
    heads = MedusaHeads(model.config, 2).double()
    modules = {kind: lively(KINDS_OF_MTP[kind](model.config, 2)) for kind in ("sequential", "parallel")}
    return {
        "plain": None,
        "lookup": PromptLookup(n=2, k=4),
        "branches": PromptLookup(n=2, k=6, branches=2),
        "ngram": NGram(n=3, k=4),
        "model": DraftModel(small, k=3),
        "itself": DraftModel(model, k=3),
        "medusa": Medusa(heads, k=4, ranks=3),
        "sequential": MTP(modules["sequential"], k=3),
        "parallel": MTP(modules["parallel"], k=2),
        "first of": FirstOf(PromptLookup(n=3, least=2, k=4), DraftModel(small, k=2)),
        "first of mtp": FirstOf(PromptLookup(n=3, least=2, k=4), MTP(modules["sequential"], k=2)),
    }


KINDS = (
    "plain", "lookup", "branches", "ngram", "model", "itself", "medusa", "sequential", "parallel", "first of",
    "first of mtp",
)  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_every_answer_is_the_one_it_gets_alone(kind):
    model = decoder()
    drafter = drafters(model)[kind]
    ends = (late([generate(model, prompt, max_tokens=most, eos_ids=()).tokens for prompt, most in texts(9)], 3),)
    wanted = [(prompt, {"max_tokens": most, "eos_ids": ends}) for prompt, most in texts(9)]
    with Seats(model, 3, context=CONTEXT, drafter=drafter, policy=ALWAYS) as seats:
        seats.part = 7
        found = serve(seats, wanted)
    for (prompt, options), answer in zip(wanted, found, strict=True):
        alone = generate(model, prompt, **options)
        assert answer.tokens == alone.tokens
        assert answer.finish == alone.finish
    assert {answer.finish for answer in found} == {"eos", "length"}
    if kind == "itself":  # the joined rows' drafts are as good as those of rows that begin together
        assert sum(len(a.tokens) for a in found) > 2 * sum(a.steps for a in found)


@pytest.mark.parametrize("kind", ["plain", "lookup", "branches", "model", "sequential"])
def test_linear_attention_takes_seats_too(kind):
    """Its states are sums: a row's is exchanged whole when another text takes the seat."""
    model = decoder(attention=c.LinearAttention(chunk=4))
    wanted = [(prompt, {"max_tokens": most, "eos_ids": ()}) for prompt, most in texts(7, seed=9)]
    with Seats(model, 3, context=CONTEXT, drafter=drafters(model)[kind], policy=ALWAYS) as seats:
        seats.part = 5
        found = serve(seats, wanted)
    for (prompt, options), answer in zip(wanted, found, strict=True):
        assert answer.tokens == generate(model, prompt, **options).tokens


@pytest.mark.parametrize("kind", ["sequential", "parallel"])
def test_modules_draft_for_a_text_that_joins_as_for_one_alone(kind):
    """Whatever sat there before, and however full their caches are of others' tokens: the same drafts."""
    model = decoder()
    drafter = drafters(model)[kind]
    wanted = [(prompt, {"max_tokens": most, "eos_ids": ()}) for prompt, most in texts(9, seed=11)]
    with Seats(model, 3, context=CONTEXT, drafter=drafter, policy=ALWAYS) as seats:
        found = serve(seats, wanted)
    for (prompt, options), answer in zip(wanted, found, strict=True):
        alone = generate(model, prompt, drafter=drafter, policy=ALWAYS, **options)
        assert (answer.tokens, answer.accepted, answer.proposed) == (alone.tokens, alone.accepted, alone.proposed)


@pytest.mark.parametrize("kind", ["plain", "lookup", "itself", "sequential"])
def test_drawn_answers_too(kind):
    """Where nothing drafts the random numbers are those of `generate`; drafts use more of them."""
    model = decoder()
    wanted = [
        (prompt, {"max_tokens": most, "eos_ids": (5,), "sampling": Sampling(temperature=0.8, top_k=9, seed=i)})
        for i, (prompt, most) in enumerate(texts(6, seed=4))
    ]
    with Seats(model, 2, context=CONTEXT, drafter=drafters(model)[kind], policy=ALWAYS) as seats:
        found = serve(seats, wanted)
    for (prompt, options), answer in zip(wanted, found, strict=True):
        if kind == "plain":
            assert answer.tokens == generate(model, prompt, **options).tokens
        assert answer.lossless
        assert 1 <= len(answer.tokens) <= options["max_tokens"]


def test_adapters_are_mixed_by_row():
    """Two LoRAs, a prefix's keys that come before one text only, and the base."""
    model = decoder()
    torch.manual_seed(0)
    for name in ("a", "b"):
        adapt.apply(model, LoRA(rank=2, targets=("q_proj", "v_proj")), name=name)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora" in name or name.endswith((".a", ".b")):
                parameter.normal_(std=0.5)
    adapt.activate(model, None)
    names = ("a", None, "b", "a", "b", None)
    wanted = [
        (prompt, {"max_tokens": most, "eos_ids": (), "adapter": name})
        for (prompt, most), name in zip(texts(6, seed=2), names, strict=True)
    ]
    with Seats(model, 3, context=CONTEXT, drafter=PromptLookup(k=3), policy=ALWAYS) as seats:
        found = serve(seats, wanted)
    answers = []
    for (prompt, options), answer in zip(wanted, found, strict=True):
        with adapt.using(model, options["adapter"]):
            alone = generate(model, prompt, max_tokens=options["max_tokens"], eos_ids=())
        assert answer.tokens == alone.tokens
        answers.append(alone.tokens)
    with adapt.using(model, None):
        base = generate(model, wanted[0][0], max_tokens=wanted[0][1]["max_tokens"], eos_ids=())
    assert answers[0] != base.tokens


def test_a_prefix_comes_with_its_text():
    model = decoder()
    torch.manual_seed(0)
    adapt.apply(model, PrefixTuning(length=3, hidden=None, init="random"))
    wanted = [(prompt, {"max_tokens": min(most, 20), "eos_ids": ()}) for prompt, most in texts(5, seed=3)]
    with Seats(model, 2, context=45) as seats:
        found = serve(seats, wanted)
    for (prompt, options), answer in zip(wanted, found, strict=True):
        assert answer.tokens == generate(model, prompt, **options).tokens


def native(dtype):
    """A decoder that the compiled step takes."""
    model = decoder(width=64, heads=4, kv_heads=2, mlp=c.GatedMLP(96), vocabulary=64)
    return model.to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["plain", "lookup"])
def test_bitwise_answers_do_not_depend_on_the_others(dtype, kind):
    model = native(dtype)
    drafter = None if kind == "plain" else PromptLookup(n=2, k=6)
    wanted = [(prompt, {"max_tokens": most, "eos_ids": ()}) for prompt, most in texts(8, seed=7)]
    with Seats(model, 4, context=CONTEXT, drafter=drafter, policy=ALWAYS, exact="bitwise") as seats:
        if model.model.straight is None or model.model.straight.whole is None:
            pytest.skip("the compiled step is not to be had here")
        found = serve(seats, wanted)
    for (prompt, options), answer in zip(wanted, found, strict=True):
        assert answer.tokens == generate(model, prompt, exact="bitwise", **options).tokens


@pytest.mark.parametrize("count", [16, 17, 32])
@pytest.mark.parametrize("policy", [ALWAYS, None])
def test_many_seats_leave_no_room_for_drafts(count, policy):
    """A compiled step has 32 tokens: 16 seats may draft one each, more of them none."""
    model = native(torch.float32)
    with Seats(model, count, context=CONTEXT, drafter=NGram(n=3), policy=policy, exact="bitwise") as seats:
        if not is_any_width(model):
            pytest.skip("the compiled step is not to be had here")
        reading = seats.read([1, 2, 3, 1, 2, 3, 1, 2], max_tokens=30, eos_ids=())
        assert reading.advance()
        seats.sit(reading)
        while seats.taken:
            seats.step()
    answer = reading.generation()
    assert answer.tokens == generate(model, [1, 2, 3, 1, 2, 3, 1, 2], max_tokens=30, eos_ids=()).tokens
    assert len(answer.proposed) <= (1 if count == 16 else 0)


def test_bitwise_without_compiled_code_is_the_same_in_company_and_alone():
    model = decoder(position=c.ALiBi()).bfloat16()
    wanted = [(prompt, {"max_tokens": min(12, most), "eos_ids": ()}) for prompt, most in texts(6, seed=8)]
    with Seats(model, 3, context=CONTEXT, exact="bitwise") as seats:
        found = serve(seats, wanted)
        alone = [serve(seats, [one])[0] for one in wanted]
    assert [a.tokens for a in found] == [a.tokens for a in alone]


def test_a_text_can_leave_and_its_seat_is_free():
    model = decoder()
    with Seats(model, 1, context=CONTEXT, drafter=PromptLookup()) as seats:
        reading = seats.read([1, 2, 3], max_tokens=20, eos_ids=())
        reading.advance()
        seats.sit(reading)
        second = seats.read([4, 5], max_tokens=3, eos_ids=())
        second.advance()
        with pytest.raises(VolvelleError, match="all 1 are taken"):
            seats.sit(second)
        seats.step()
        seats.leave(0)
        assert (seats.taken, seats.free, seats.step()) == (0, 1, [])
        seats.leave(0)
        assert seats.sit(second).row == 0
        while seats.taken:
            seats.step()
        assert second.request.tokens == generate(model, [4, 5], max_tokens=3, eos_ids=()).tokens


def test_an_answer_of_one_token_takes_no_seat():
    model = decoder()
    with Seats(model, 1, context=CONTEXT) as seats:
        reading = seats.read([1, 2], max_tokens=1, eos_ids=())
        assert reading.advance()
        assert seats.sit(reading).row == -1
        assert (seats.taken, reading.generation().finish) == (0, "length")


def test_a_policy_may_switch_drafts_off_and_on():
    model = decoder()
    wanted = [(prompt, {"max_tokens": most, "eos_ids": ()}) for prompt, most in texts(7, seed=5)]
    policy = Adaptive()
    with Seats(model, 3, context=CONTEXT, drafter=PromptLookup(n=2, k=4), policy=policy) as seats:
        found = serve(seats, wanted)
    assert policy.figures.chosen[0] > 0
    for (prompt, options), answer in zip(wanted, found, strict=True):
        assert answer.tokens == generate(model, prompt, **options).tokens


@pytest.mark.parametrize("kind", ["plain", "lookup", "branches", "medusa"])
def test_what_became_of_each_draft_is_told(kind):
    """Kept tokens are those of the answer, one more comes from the model, and the counts are the request's own."""
    model = decoder()
    drafter, told = drafters(model)[kind], 0
    with Seats(model, 2, context=CONTEXT, drafter=drafter, policy=ALWAYS) as seats:
        for prompt, most in texts(4, seed=8):
            reading = seats.read(prompt, max_tokens=most, eos_ids=())
            while not reading.advance():
                pass
            seats.sit(reading)
            while seats.taken:
                events, checked = seats.step(), seats.checked(reading.row)
                gained = [event.token for event in events]
                if checked is None:
                    assert [token.drafted for token in gained] == [False]
                else:
                    told += 1
                    kept = [token for token, stays in zip(checked.tokens, checked.kept, strict=True) if stays]
                    assert kept == [token.id for token in gained if token.drafted]
                    assert len(gained) == len(kept) + 1
                    assert all(token >= 0 for token in checked.tokens)
            assert seats.checked(1 - reading.row) is None
    assert (told > 0) == (kind != "plain")


@pytest.mark.parametrize("kind", ["plain", "itself", "branches"])
def test_how_likely_tokens_were_is_noted(kind):
    """Against one pass over prompt and answer; drafts and company change nothing but the last bits."""
    model = decoder()
    wanted = [(p, {"max_tokens": most, "eos_ids": (), "logprobs": i % 3}) for i, (p, most) in enumerate(texts(5, 6))]
    with Seats(model, 2, context=CONTEXT, drafter=drafters(model)[kind], policy=ALWAYS) as seats:
        found = serve(seats, wanted)
    for (prompt, options), answer in zip(wanted, found, strict=True):
        with torch.no_grad():
            scores = model(torch.tensor([prompt + answer.tokens])).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
        assert len(answer.logprobs) == len(answer.tokens)
        for token, noted, row in zip(answer.tokens, answer.logprobs, scores, strict=True):
            assert noted.logprob == pytest.approx(float(row[token]), abs=1e-5)
            assert [one for one, _ in noted.top] == row.topk(options["logprobs"]).indices.tolist()
        assert generate(model, prompt, **{**options, "logprobs": None}).logprobs is None
        alone = generate(model, prompt, drafter=drafters(model)[kind], **options)
        assert [one.top for one in alone.logprobs] == [
            tuple((token, pytest.approx(value, abs=1e-5)) for token, value in one.top) for one in answer.logprobs
        ]
    with pytest.raises(UsageError, match="0 or more of the likeliest tokens can be noted, got -1"):
        generate(model, [1], logprobs=-1)


def test_penalties_by_count_hold_with_drafts():
    model = decoder()
    sampling = Sampling(frequency_penalty=1.2, presence_penalty=0.3)
    plain = generate(model, [1, 2, 1, 2], max_tokens=40, eos_ids=(), sampling=sampling)
    drafted = generate(
        model, [1, 2, 1, 2], max_tokens=40, eos_ids=(), sampling=sampling, drafter=DraftModel(model, k=3), policy=ALWAYS
    )
    assert drafted.tokens == plain.tokens != generate(model, [1, 2, 1, 2], max_tokens=40, eos_ids=()).tokens
    counts = torch.bincount(torch.tensor(plain.tokens))
    assert counts.max() < 6


def test_training_mode_comes_back():
    model = decoder().train()
    with Seats(model, 1, context=8):
        assert not model.training
    assert model.training


class Together(Guessing):
    """A drafter whose texts begin together."""


@pytest.mark.parametrize(
    ("wrong", "error", "said"),
    [
        (lambda m: Seats(m, 0, context=8), UsageError, "at least one is wanted, got 0"),
        (lambda m: Seats(m, 1, context=65), UsageError, "a context of 2 to 64 tokens is wanted, got 65"),
        (lambda m: Seats(m, 1, context=8).read([]), VolvelleError, "the prompt is empty"),
        (
            lambda m: Seats(m, 1, context=8).read([1] * 8),
            VolvelleError,
            "the prompt's 8 tokens exceed the context of 8",
        ),
        (lambda m: Seats(m, 1, context=8).read([1] * 6, max_tokens=3), VolvelleError, "and max_tokens=3 exceed"),
        (lambda m: Seats(m, 1, context=8, drafter=Together([])), VolvelleError, "come and go cannot be drafted for"),
        (
            lambda m: (s := Seats(m, 1, context=8)).sit(s.read([1], max_tokens=2)),
            VolvelleError,
            "when its prompt is read",
        ),
        (
            lambda m: Seats(decoder(attention=c.LinearAttention()), 1, context=8, exact="bitwise"),
            VolvelleError,
            "exact=bitwise needs softmax attention",
        ),
    ],
)
def test_what_cannot_be_is_said(wrong, error, said):
    with pytest.raises(error, match=said):
        wrong(decoder())
