"""Beam search: transformers' answers token for token, the true best answer where all can be tried, and mutants."""

from __future__ import annotations

import copy
import itertools
import random

import pytest
import torch
from tests.systems.language.bart_peers import as_ours, make_bart
from tests.systems.language.peer_models import as_ours as as_decoder
from tests.systems.language.peer_models import make_peer

from volvelle.decode import Beams, Rules, Sampling, beam_search, generate, generate_batch
from volvelle.decode.beam import BeamSearch
from volvelle.errors import UsageError, VolvelleError
from volvelle.parts.attention.cache import KVCache
from volvelle.systems.language.config import MLP, SpecialTokens
from volvelle.systems.language.encoder_decoder import EncoderDecoder
from volvelle.systems.language.encoder_decoder_config import EncoderDecoderConfig, Stack

PAD = 1


def settings(seed):
    """Options of one comparison, in our names."""
    draw = random.Random(seed)
    beams = Beams(
        width=draw.choice([2, 3, 5]),
        length_penalty=draw.choice([-0.5, 0.0, 0.6, 1.0, 2.0]),
        early_stopping=draw.choice([True, False, "never"]),
    )
    rules = Rules(min_tokens=draw.choice([0, 0, 4]), no_repeat_ngram_size=draw.choice([0, 2, 3]))
    return beams, rules, draw.choice([1, 6, 17] if not rules.min_tokens else [6, 17])


def ragged(seed, vocabulary=97):
    draw = random.Random(seed)
    return [[draw.randrange(4, vocabulary) for _ in range(length)] for length in (7, 3, draw.randrange(1, 12))]


def padded(prompts, side):
    longest = max(map(len, prompts))
    rows = [([PAD] * (longest - len(p)), list(p)) for p in prompts]
    ids = torch.tensor([p + pad if side == "right" else pad + p for pad, p in rows])
    mask = [([0] * len(pad), [1] * len(p)) for pad, p in rows]
    return ids, torch.tensor([m + none if side == "right" else none + m for none, m in mask])


def cut(row, eos):
    """Tokens up to the first end."""
    ends = [row.index(token) for token in eos if token in row]
    return row[: min(ends) + 1] if ends else row


def theirs(peer, prompts, side, eos, beams, rules, max_tokens):
    ids, mask = padded(prompts, side)
    out = peer.generate(
        ids,
        attention_mask=mask,
        num_beams=beams.width,
        length_penalty=beams.length_penalty,
        early_stopping=beams.early_stopping,
        no_repeat_ngram_size=rules.no_repeat_ngram_size,
        min_new_tokens=rules.min_tokens,
        max_new_tokens=max_tokens,
        do_sample=False,
        eos_token_id=eos,
        pad_token_id=PAD,
        forced_bos_token_id=rules.forced_first,
        forced_eos_token_id=rules.forced_last,
    )
    new = out[:, 1 if side == "right" else ids.shape[1] :]
    return [cut(row, eos)[:max_tokens] for row in new.tolist()]


def random_bart(seed):
    """fp64, so that no near tie falls to rounding; an end is likely enough to come up."""
    pytest.importorskip("transformers")
    peer = make_bart(dtype=torch.float64, seed=seed)
    peer.final_logits_bias[0, 2] += 3.0
    return peer


@pytest.mark.peer
@pytest.mark.parametrize("seed", range(20))
def test_encoder_decoder_answers_equal_transformers(seed):
    peer = random_bart(seed)
    beams, rules, max_tokens = settings(seed)
    rules = Rules(rules.min_tokens, rules.no_repeat_ngram_size, *((0, 2) if seed % 3 else (None, 2)))
    prompts = ragged(seed)
    answers = beam_search(as_ours(peer), prompts, beams=beams, rules=rules, max_tokens=max_tokens, eos_ids=[2])
    expected = theirs(peer, prompts, "right", [2], beams, rules, max_tokens)
    assert [answer.tokens for answer in answers] == expected
    assert [answer.prompt_tokens for answer in answers] == [len(prompt) for prompt in prompts]


@pytest.mark.peer
@pytest.mark.parametrize("seed", range(20))
def test_decoder_answers_equal_transformers(seed):
    pytest.importorskip("transformers")
    peer = make_peer(["smollm2", "gpt2"][seed % 2], torch.float64)
    beams, rules, max_tokens = settings(100 + seed)
    prompts, eos = ragged(seed), [[2], [5, 9, 60], list(range(30, 42))][seed % 3]
    model = as_decoder(peer)
    answers = beam_search(model, prompts, beams=beams, rules=rules, max_tokens=max_tokens, eos_ids=eos)
    if rules.no_repeat_ngram_size:  # transformers takes padding for tokens: without any
        found = [theirs(peer, [p], "left", eos, beams, rules, max_tokens)[0] for p in prompts]
    else:
        found = theirs(peer, prompts, "left", eos, beams, rules, max_tokens)
    assert [answer.tokens for answer in answers] == found


@pytest.mark.peer
@pytest.mark.parametrize("seed", range(4))
def test_greedy_answers_of_an_encoder_decoder_equal_transformers(seed):
    peer = random_bart(seed)
    _, rules, _ = settings(seed)
    rules = Rules(rules.min_tokens, 2 * (seed % 2), 0 if seed else None, 2)
    prompts = ragged(seed)
    answers = generate_batch(as_ours(peer), prompts, max_tokens=25, rules=rules, eos_ids=[2])
    one = Beams(width=1)
    assert [answer.tokens for answer in answers] == theirs(peer, prompts, "right", [2], one, rules, 25)


def digits(seed, count):
    """Sources of digits (tokens 4 to 13), and answers: the same, backwards."""
    draw = random.Random(seed)
    rows = [[draw.randrange(4, 14) for _ in range(draw.randrange(2, 6))] for _ in range(count)]
    return rows, [[*reversed(row), 2] for row in rows]


@pytest.fixture(scope="module")
def trained():
    """A tiny model that has learnt, mostly, to say digits backwards."""
    torch.manual_seed(0)
    side = Stack(1, 4, MLP(96, "gelu"))
    config = EncoderDecoderConfig(
        "bart", vocabulary=14, width=48, encoder=side, decoder=side, context=16, start=2,
        special=SpecialTokens(0, (2,), 1), forced_last=2,
    )  # fmt: skip
    model = EncoderDecoder(config)
    optimiser = torch.optim.Adam(model.parameters(), lr=4e-3)
    for step in range(150):
        from volvelle.data.pairs import collate_pairs
        from volvelle.train.language import completion_loss

        rows = zip(*digits(step, 32), strict=True)
        items = [(torch.tensor(a + b), torch.arange(len(a + b)) >= len(a)) for a, b in rows]
        completion_loss(model, collate_pairs(items, start=2)).value.backward()
        optimiser.step()
        optimiser.zero_grad()
    return model.eval()


def test_a_trained_model_answers(trained):
    sources, answers = digits(-1, 30)
    for found in (
        generate_batch(trained, sources, max_tokens=8, eos_ids=[2]),
        beam_search(trained, sources, max_tokens=8, eos_ids=[2]),
    ):
        right = sum(answer.tokens == expected for answer, expected in zip(found, answers, strict=True))
        assert right >= 20, f"{right} of 30"
        assert {answer.finish for answer in found} == {"eos"}


@pytest.mark.peer
@pytest.mark.parametrize("early_stopping", [True, False, "never"])
def test_answers_of_a_trained_model_equal_transformers(trained, tmp_path, early_stopping):
    transformers = pytest.importorskip("transformers")
    from volvelle.systems.language import write_folder

    write_folder(trained, tmp_path)
    peer = transformers.BartForConditionalGeneration.from_pretrained(tmp_path).eval().double()
    model = copy.deepcopy(trained).double()
    sources, _ = digits(-2, 12)
    for width, penalty in ((4, 1.0), (2, 2.0), (7, 0.0)):
        beams = Beams(width, penalty, early_stopping)
        answers = beam_search(model, sources, beams=beams, max_tokens=9, eos_ids=[2])
        expected = theirs(peer, sources, "right", [2], beams, Rules(forced_last=2), 9)
        assert [answer.tokens for answer in answers] == expected


@torch.no_grad()
def score(model, source, tokens):
    ids = torch.tensor([[model.config.start, *tokens[:-1]]])
    logits = model(ids, source=torch.tensor([source])).logits[0].float().log_softmax(-1)
    return logits[torch.arange(len(tokens)), torch.tensor(tokens)].sum().item()


@pytest.mark.parametrize("penalty", [0.0, 1.0])
def test_a_search_wide_enough_finds_the_best_of_all_answers(penalty):
    torch.manual_seed(5)
    side, eos, most = Stack(1, 2, MLP(12, "gelu")), 2, 4
    config = EncoderDecoderConfig("bart", vocabulary=5, width=8, encoder=side, decoder=side, context=8, start=2)
    model = EncoderDecoder(config).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.6)
    others = [token for token in range(5) if token != eos]
    answers = [[*text, eos] for n in range(most) for text in itertools.product(others, repeat=n)]
    answers += [list(text) for text in itertools.product(others, repeat=most)]
    for source in ([3, 4, 1], [1], [4, 4, 3, 0, 1]):
        best = max(answers, key=lambda tokens: score(model, source, tokens) / len(tokens) ** penalty)
        beams = Beams(width=4**3, length_penalty=penalty, early_stopping="never")
        [found] = beam_search(model, [source], beams=beams, max_tokens=most, eos_ids=[eos])
        assert found.tokens == best


def test_a_batch_equals_its_rows(model):
    model = copy.deepcopy(model).double()
    prompts, eos = ragged(3, 96), list(range(10, 20))
    for beams in (Beams(3), Beams(4, 2.0, True), Beams(2, 0.5, "never")):
        together = beam_search(model, prompts, beams=beams, max_tokens=20, eos_ids=eos)
        for prompt, answer in zip(prompts, together, strict=True):
            [alone] = beam_search(model, [prompt], beams=beams, max_tokens=20, eos_ids=eos)
            assert answer.tokens == alone.tokens
            assert answer.finish == alone.finish
    assert len({len(answer.tokens) for answer in together}) > 1
    assert beam_search(model, []) == []


def test_a_state_in_place_of_a_cache_is_reordered_too():
    from volvelle.systems.language import config as c
    from volvelle.systems.language.decoder import Decoder

    torch.manual_seed(2)
    config = c.LanguageConfig(
        "volvelle", vocabulary=96, width=32, depth=2, heads=4, context=64, norm=c.RMSNorm(), mlp=c.GatedMLP(48),
        position=c.Rope(), attention=c.LinearAttention(),
    )  # fmt: skip
    model = Decoder(config).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.3)
    prompts, eos, beams = ragged(6, 96), list(range(10, 20)), Beams(3, 1.5)
    together = beam_search(model, prompts, beams=beams, max_tokens=12, eos_ids=eos)
    for prompt, answer in zip(prompts, together, strict=True):
        [alone] = beam_search(model, [prompt], beams=beams, max_tokens=12, eos_ids=eos)
        assert answer.tokens == alone.tokens
        # the oracle: the same search, with the whole text read again for every beam and step
        assert answer.tokens == slow_beam_search(model, prompt, beams, 12, set(eos))


@torch.no_grad()
def slow_beam_search(model, prompt, beams, most, eos):
    """One prompt, plain lists, no cache; early_stopping False."""
    k, penalty = beams.width, beams.length_penalty
    going, done = [(0.0, [])], []
    for length in range(1, most + 1):
        options = []
        for score, text in going:
            logits = model(torch.tensor([[*prompt, *text]])).logits[0, -1].float().log_softmax(-1)
            options += [(score + p, [*text, token]) for token, p in enumerate(logits.tolist())]
        options.sort(key=lambda option: -option[0])
        kept = options[: (1 + len(eos)) * k]
        ends = [text[-1] in eos or length == most for _, text in kept]
        done += [(s / length**penalty, t) for (s, t), end in zip(kept[:k], ends, strict=False) if end]
        done = sorted(done, key=lambda answer: -answer[0])[:k]
        going = [option for option, end in zip(kept, ends, strict=True) if not end][:k]
        if not going or (len(done) == k and going[0][0] / length**penalty <= done[-1][0]):
            break
    return done[0][1]


def test_text_and_finish(speaking):
    answers = beam_search(speaking, [[5, 17, 3], [9]], max_tokens=12)
    for answer in answers:
        ended = answer.tokens[-1] == 0
        assert answer.text == speaking.tokenizer.decode(answer.tokens)
        assert answer.finish == ("eos" if ended else "length")
        assert answer.steps >= len(answer.tokens)
        assert answer.seconds >= answer.prompt_seconds > 0


def test_a_full_context_ends_the_search(model):
    prompts = [[5] * 120, [6] * 125]
    answers = beam_search(model, prompts, max_tokens=None, eos_ids=())
    assert [len(answer.tokens) for answer in answers] == [8, 3]


def not_reordered(patch):
    plain = KVCache.reorder

    def reorder(self, rows):
        if len(rows) != self.batch:
            plain(self, rows)

    patch.setattr(KVCache, "reorder", reorder)


def no_penalty(patch):
    patch.setattr(BeamSearch, "_penalty", lambda self, lengths: torch.ones(len(lengths), 1))


def all_beams_alike(patch):
    plain = BeamSearch.__init__

    def alike(self, requests, beams):
        plain(self, requests, beams)
        self.open = torch.zeros_like(self.open)

    patch.setattr(BeamSearch, "__init__", alike)


def greedy_beams(patch):
    patch.setattr(
        BeamSearch, "_go_on", lambda self, scores, ended: torch.arange(self.beams.width).repeat(len(scores), 1)
    )


@pytest.mark.parametrize("mutate", [None, not_reordered, no_penalty, all_beams_alike, greedy_beams])
def test_mutants_find_other_answers(monkeypatch, model, mutate):
    model, eos = copy.deepcopy(model).double(), list(range(10, 20))
    prompts = ragged(4, 96) + ragged(5, 96)
    found = [a.tokens for a in beam_search(model, prompts, beams=Beams(4, 1.5), max_tokens=16, eos_ids=eos)]
    if mutate is not None:
        mutate(monkeypatch)
    again = [a.tokens for a in beam_search(model, prompts, beams=Beams(4, 1.5), max_tokens=16, eos_ids=eos)]
    assert (again == found) is (mutate is None)


def test_encoder_decoders_stream_sample_and_refuse(trained):
    sources, _ = digits(7, 3)
    tokens = []
    answer = generate(trained, sources[0], max_tokens=8, eos_ids=[2], on_token=tokens.append)
    assert [token.id for token in tokens] == answer.tokens
    sampled = generate(trained, sources[0], sampling=Sampling(2.0, seed=3), max_tokens=8, eos_ids=[2])
    assert (
        sampled.tokens
        == generate(trained, sources[0], sampling=Sampling(2.0, seed=3), max_tokens=8, eos_ids=[2]).tokens
    )
    assert len(generate(trained, sources[0], max_tokens=None, eos_ids=()).tokens) == 15
    with pytest.raises(VolvelleError, match="the prompt has 17 tokens, the model's context is 16"):
        generate(trained, [4] * 17)
    with pytest.raises(VolvelleError, match="the prompt is empty"):
        beam_search(trained, [[]])
    with pytest.raises(VolvelleError, match="max_tokens=16 exceed the model's context of 16") as error:
        beam_search(trained, sources, max_tokens=16)
    assert error.value.tip == "max_tokens=15 fits"


def test_wrong_options_are_named(trained):
    with pytest.raises(UsageError, match=r"beams.width must be at least 1, got 0"):
        Beams(width=0)
    with pytest.raises(UsageError, match="early_stopping must be true, false or never, got 'soon'"):
        Beams(early_stopping="soon")
    with pytest.raises(UsageError, match=r"beams.width=1: needs 15 continuations, a vocabulary of 14 has 14"):
        beam_search(trained, [[4]], beams=Beams(1), max_tokens=4, eos_ids=list(range(14)))
