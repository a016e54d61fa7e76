"""choose_rows: all rows at once, and each as it would be chosen alone."""

import pytest
import torch

from volvelle.decode.loop import choose_next, choose_rows
from volvelle.decode.options import Rules, Sampling
from volvelle.decode.request import Limits, Request

KINDS = (
    Sampling(),
    Sampling(temperature=1.0, seed=1),
    Sampling(temperature=0.7, top_p=0.8, seed=2),
    Sampling(temperature=1.3, top_k=5, seed=3),
    Sampling(temperature=1.0, min_p=0.1, seed=4),
    Sampling(temperature=0.9, repetition_penalty=1.5, seed=5),
    Sampling(temperature=0.9, presence_penalty=1.5, frequency_penalty=0.5, seed=5),
)


def requests(model, rules=Rules()):  # noqa: B008
    return [Request(model, [3, 4, 5], kind, Limits(max_tokens=9, rules=rules)) for kind in KINDS]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rules", [Rules(), Rules(forced_first=7), Rules(no_repeat_ngram_size=1)])
def test_each_row_is_chosen_as_alone(model, dtype, rules):
    draw = torch.Generator().manual_seed(0)
    alone, together = requests(model, rules), requests(model, rules)
    for _ in range(4):
        logits = (3 * torch.randn(len(KINDS), model.config.vocabulary, generator=draw)).to(dtype)
        expected = [request.choose(row) for request, row in zip(alone, logits, strict=True)]
        assert choose_rows(logits, together) == expected
        for one, other, token in zip(alone, together, expected, strict=True):
            one.add(token)
            other.add(token)


def test_finished_rows_take_nothing_and_no_random_numbers(model):
    rows, logits = requests(model), torch.randn(len(KINDS), 1, model.config.vocabulary)
    expected = [request.choose(row[0]) for request, row in zip(requests(model), logits, strict=True)]
    rows[1].finish = rows[4].finish = "length"
    found = choose_next(logits, None, rows).tokens
    assert found == [[] if i in (1, 4) else [expected[i]] for i in range(len(KINDS))]
    rows[1].finish = None
    assert rows[1].choose(logits[1, 0]) == expected[1]
