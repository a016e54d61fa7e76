"""What is asked for, completed by what a model's configuration has."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from tests.systems.language.bart_peers import as_ours, make_bart

from volvelle.decode import beam_search
from volvelle.decode.options import AskedBeams, AskedRules, Beams, Rules, settle
from volvelle.systems.language.config import MLP
from volvelle.systems.language.encoder_decoder_config import EncoderDecoderConfig, Stack, Writing

SIDE = Stack(depth=1, heads=2, mlp=MLP(8, "gelu"))
BART = EncoderDecoderConfig("bart", vocabulary=20, width=4, encoder=SIDE, decoder=SIDE, context=16, start=2)
WRITING = Writing(width=4, length_penalty=2.0, early_stopping=True, no_repeat_ngram_size=3)
SUMMARIES = dataclasses.replace(BART, writing=WRITING)


@pytest.mark.parametrize(
    ("config", "beams", "rules", "expected", "said"),
    [
        (BART, {}, {}, (Beams(width=1), Rules()), ""),
        (None, {"width": 3}, {"min_tokens": 2}, (Beams(width=3), Rules(min_tokens=2)), ""),
        (
            SUMMARIES, {}, {}, (Beams(4, 2.0, True), Rules(no_repeat_ngram_size=3)),
            "beams.width=4 beams.length_penalty=2.0 beams.early_stopping=true rules.no_repeat_ngram_size=3",
        ),
        (
            SUMMARIES, {"width": 2, "early_stopping": False}, {"no_repeat_ngram_size": 0, "forced_last": 2},
            (Beams(2, 2.0, False), Rules(forced_last=2)), "beams.length_penalty=2.0",
        ),
        (
            SUMMARIES, {"width": 1}, {}, (Beams(1, 2.0, True), Rules(no_repeat_ngram_size=3)),
            "rules.no_repeat_ngram_size=3",
        ),
    ],
)  # fmt: skip
def test_what_nobody_asks_for_is_the_models(config, beams, rules, expected, said):
    assert settle(config, AskedBeams(**beams), AskedRules(**rules)) == (*expected, said)


@pytest.mark.parametrize("kind", [AskedBeams, AskedRules])
def test_everything_can_be_asked_for(kind):
    """The fields are those of what they stand for."""
    names = [field.name for field in dataclasses.fields({AskedBeams: Beams, AskedRules: Rules}[kind])]
    assert [field.name for field in dataclasses.fields(kind)] == names
    assert all(getattr(kind(), name) is None for name in names)


@pytest.mark.peer
@pytest.mark.parametrize("seed", range(4))
def test_the_models_own_answers_are_transformers(seed):
    """What transformers' generate gives without any option."""
    pytest.importorskip("transformers")
    peer = make_bart(dtype=torch.float64, seed=seed)
    peer.final_logits_bias[0, 2] += 2.0
    wishes = {"num_beams": 3, "length_penalty": 0.5 * seed, "early_stopping": seed % 2 == 0, "no_repeat_ngram_size": 2}
    for name, value in (wishes | {"max_length": 18}).items():
        setattr(peer.generation_config, name, value)
    writing = Writing(wishes["num_beams"], wishes["length_penalty"], wishes["early_stopping"], 2)
    model = as_ours(peer)
    beams, rules, _ = settle(dataclasses.replace(model.config, writing=writing), AskedBeams(), AskedRules())
    prompt = [5, 9, 60, 4, 11, 30, 7]
    [answer] = beam_search(model, [prompt], beams=beams, rules=rules, max_tokens=17, eos_ids=[2])
    [expected] = peer.generate(torch.tensor([prompt])).tolist()
    assert [model.config.start, *answer.tokens] == expected
