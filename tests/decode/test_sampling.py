"""Sampling rules against transformers' processors, edge cases, and the drawn distribution against the exact one."""

from __future__ import annotations

import copy
import subprocess
import sys

import pytest
import torch
from scipy.stats import chisquare

from volvelle.decode import DraftModel, Rules, beam_search, generate, generate_batch
from volvelle.decode.accept_exact import EXACT
from volvelle.decode.contract import ALWAYS, Draft
from volvelle.decode.options import Sampling
from volvelle.decode.request import Limits, Request
from volvelle.decode.sampling import (
    choose,
    draw,
    keep_min_p,
    keep_top_k,
    keep_top_p,
    penalise_repetition,
    probabilities,
    process,
)
from volvelle.errors import UsageError, VolvelleError


@pytest.fixture
def theirs():
    return pytest.importorskip("transformers.generation.logits_process")


@pytest.fixture(params=[(1, 7), (3, 101), (2, 5000)], ids=str)
def logits(request):
    torch.manual_seed(request.param[1])
    return 4 * torch.randn(request.param)


@pytest.mark.peer
@pytest.mark.parametrize("k", [1, 5, 10_000])
def test_top_k_equals_transformers(theirs, logits, k):
    torch.testing.assert_close(keep_top_k(logits, k), theirs.TopKLogitsWarper(k)(None, logits))


@pytest.mark.peer
@pytest.mark.parametrize("p", [1e-6, 0.1, 0.5, 0.9, 0.99, 0.9999])
@pytest.mark.parametrize("scale", [0.01, 1.0, 5.0])
def test_top_p_equals_transformers(theirs, logits, p, scale):
    # scale 0.01 is nearly flat: more than the first 1024 tokens are needed
    torch.testing.assert_close(keep_top_p(scale * logits, p), theirs.TopPLogitsWarper(p)(None, scale * logits))


@pytest.mark.peer
@pytest.mark.parametrize("p", [0.01, 0.3, 1.0])
def test_min_p_equals_transformers(theirs, logits, p):
    torch.testing.assert_close(keep_min_p(logits, p), theirs.MinPLogitsWarper(p)(None, logits))


@pytest.mark.peer
@pytest.mark.parametrize("penalty", [0.8, 1.3])
def test_repetition_penalty_equals_transformers(theirs, logits, penalty):
    ids = torch.randint(0, logits.shape[1], (logits.shape[0], 6))
    seen = torch.zeros_like(logits, dtype=torch.bool).scatter_(1, ids, True)
    expected = theirs.RepetitionPenaltyLogitsProcessor(penalty)(ids, logits.clone())
    torch.testing.assert_close(penalise_repetition(logits, seen, penalty), expected)


@pytest.mark.peer
def test_all_rules_in_transformers_order(theirs, logits):
    ids = torch.randint(0, logits.shape[1], (logits.shape[0], 6))
    seen = torch.zeros_like(logits, dtype=torch.bool).scatter_(1, ids, True)
    expected = logits.clone()
    for rule in (
        theirs.RepetitionPenaltyLogitsProcessor(1.2),
        theirs.TemperatureLogitsWarper(1.7),
        theirs.TopKLogitsWarper(20),
        theirs.TopPLogitsWarper(0.95),
        theirs.MinPLogitsWarper(0.02),
    ):
        expected = rule(ids, expected)
    sampling = Sampling(temperature=1.7, top_k=20, top_p=0.95, min_p=0.02, repetition_penalty=1.2)
    torch.testing.assert_close(process(logits, sampling, seen), expected)


def test_top_p_edges():
    flat = torch.zeros(2, 8)
    assert keep_top_p(flat, 0.5).isfinite().sum(-1).tolist() == [4, 4], "ties: as many as the share needs"
    assert keep_top_p(flat, 1e-9).isfinite().sum(-1).tolist() == [1, 1], "a tiny share keeps one"
    logits = torch.randn(3, 50)
    assert torch.equal(process(logits, Sampling(temperature=1.0, top_p=1.0)), logits), "the whole share keeps all"
    one = torch.tensor([[100.0, 0.0, -100.0]])
    assert keep_top_p(one, 0.9).isfinite().tolist() == [[True, False, False]]
    after_top_k = keep_top_k(torch.arange(5.0), 2)
    assert keep_top_p(after_top_k, 0.999).isfinite().sum() == 2


def test_low_temperature_is_greedy(logits):
    sampling = Sampling(temperature=1e-4)
    greedy = probabilities(logits, Sampling())
    torch.testing.assert_close(probabilities(logits, sampling), greedy)
    assert greedy.sum(-1).tolist() == [1.0] * len(logits)
    for row in logits:
        assert choose(row, sampling, None, None) == choose(row, Sampling(), None, None) == int(row.argmax())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_logits(dtype):
    logits = torch.randn(4, 100).to(dtype)
    p = probabilities(logits, Sampling(temperature=0.8, top_p=0.9))
    assert p.dtype == torch.float32
    torch.testing.assert_close(p.sum(-1), torch.ones(4))


def counts(draw_one, v, n=6_000):
    tokens = torch.tensor([draw_one() for _ in range(n)])
    return torch.bincount(tokens, minlength=v).double()


@pytest.mark.parametrize(
    "sampling", [Sampling(temperature=1.3), Sampling(temperature=0.9, top_k=5, top_p=0.95), Sampling(1.0, min_p=0.2)]
)
def test_drawn_tokens_follow_the_distribution(sampling):
    torch.manual_seed(0)
    logits = torch.randn(9)
    p = probabilities(logits, sampling).double()
    p /= p.sum()
    generator = torch.Generator().manual_seed(1)
    observed = counts(lambda: choose(logits, sampling, None, generator), 9)
    support = p > 0
    assert observed[~support].sum() == 0
    assert chisquare(observed[support], p[support] * observed.sum()).pvalue > 1e-3
    # the test can fail: a rule that forgets the temperature does not pass
    wrong = logits.softmax(-1)
    if support.all():
        drawn = counts(lambda: draw(wrong, generator), 9)
        assert chisquare(drawn, p * drawn.sum()).pvalue < 1e-6


def test_tokens_of_probability_zero_are_never_drawn():
    p = torch.tensor([0.0, 0.5, 0.0, 0.5, 0.0])
    generator = torch.Generator().manual_seed(0)
    assert {draw(p, generator) for _ in range(500)} == {1, 3}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": -1.0}, "temperature must be 0"),
        ({"temperature": float("nan")}, "temperature must be 0"),
        ({"top_k": 0}, "top_k must be a whole number of at least 1, got 0"),
        ({"top_k": 2.5}, "top_k must be a whole number of at least 1, got 2.5"),
        ({"seed": 2**64}, "seed must be a whole number of 64 bits"),
        ({"seed": 1.5}, r"from -2\^63 to 2\^64 - 1, got 1.5"),
        ({"top_p": 0.0}, r"top_p must be in \(0, 1\], got 0.0"),
        ({"top_p": 1.5}, "top_p"),
        ({"min_p": -0.1}, "min_p"),
        ({"repetition_penalty": 0.0}, "repetition_penalty must be above 0"),
        ({"presence_penalty": 2.5}, r"presence_penalty must be in \[-2, 2\], got 2.5"),
        ({"frequency_penalty": float("nan")}, "frequency_penalty must be"),
    ],
)
def test_options_are_checked(options, message):
    with pytest.raises(UsageError, match=message):
        Sampling(**options)


def test_the_penalties_need_to_know_the_tokens():
    with pytest.raises(ValueError, match="needs `seen`"):
        process(torch.zeros(3), Sampling(repetition_penalty=1.1))
    with pytest.raises(ValueError, match="need `counts`"):
        process(torch.zeros(3), Sampling(presence_penalty=1.0))


def test_penalties_by_count_token_by_token(logits):
    """The definition of OpenAI's API reference, in a loop."""
    presence, frequency = 0.7, -0.4
    counts = torch.randint(0, 4, logits.shape)
    found = process(logits, Sampling(presence_penalty=presence, frequency_penalty=frequency), counts=counts)
    for row in range(len(logits)):
        for token in range(logits.shape[1]):
            times = int(counts[row, token])
            expected = float(logits[row, token]) - times * frequency - float(times > 0) * presence
            assert float(found[row, token]) == pytest.approx(expected, abs=1e-5)


def test_the_options_file_does_not_import_torch():
    code = "import sys; from volvelle.decode.options import Sampling; from volvelle.decode import Sampling as also"
    subprocess.run([sys.executable, "-c", f"{code}; sys.exit('torch' in sys.modules)"], check=True)


PROMPT = [5, 17, 3, 88, 41]


def broken(model):
    model = copy.deepcopy(model).double()
    with torch.no_grad():
        model.model.norm.weight[3] = float("nan")
    return model


@pytest.mark.parametrize(
    "sampling", [Sampling(), Sampling(1.0, seed=0), Sampling(0.9, top_p=0.9, seed=0), Sampling(repetition_penalty=1.2)]
)
def test_logits_that_are_no_numbers_are_no_answer(model, sampling):
    good, bad = copy.deepcopy(model).double(), broken(model)
    options = {"max_tokens": 6, "sampling": sampling, "eos_ids": ()}
    for rules in (Rules(), Rules(no_repeat_ngram_size=2)):
        with pytest.raises(VolvelleError, match="the model gives nan") as error:
            generate(bad, PROMPT, rules=rules, **options)
        assert "precision=bf16" in str(error.value.tip)
        with pytest.raises(VolvelleError, match="the model gives nan"):
            generate_batch(bad, [PROMPT, [9]], rules=rules, **options)
    # in a step with a draft; and a broken draft model costs its drafts, not the answer
    with torch.no_grad():
        request = Request(good, PROMPT, sampling, Limits(6, (), ()))
        with pytest.raises(VolvelleError, match="the model gives nan"):
            EXACT(torch.full((1, 2, 96), float("nan")), Draft(torch.tensor([[3]])), [request])
    answer = generate(good, PROMPT, drafter=DraftModel(bad, 2), policy=ALWAYS, **options)
    assert len(answer.tokens) == 6
    if sampling.greedy:
        assert answer.tokens == generate(good, PROMPT, **options).tokens
    with pytest.raises(VolvelleError, match="the model gives nan"):
        beam_search(bad, [PROMPT], max_tokens=3)
