"""Drafting with a smaller model: the same answers, a cache in step with the texts, other vocabularies refused."""

from __future__ import annotations

import copy

import pytest
import torch
from tests.decode.helpers import Sometimes, V, bart, decoder, late
from tests.decode.test_drafts import MODELS, PROMPTS

from volvelle.decode import DraftModel, Sampling, generate, generate_batch
from volvelle.decode.contract import ALWAYS, Draft
from volvelle.decode.drafters.draft_model import ModelDrafting, check_tokens
from volvelle.decode.seats import Seats
from volvelle.errors import UsageError, VolvelleError
from volvelle.systems.language import config as c
from volvelle.systems.language.tokenizer import TextTokenizer


def near(model, noise=0.03, seed=2):
    """Nearly the same model: a good draft."""
    other = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(seed)) * noise)
    return other


@pytest.mark.parametrize("name", MODELS)
def test_greedy_answers_are_the_plain_ones(name):
    """The draft model of an adapted one, or one with a prefix, is a plain decoder."""
    model = MODELS[name]()
    small = near(decoder(7) if name in ("prefix", "lora") else model)
    free = [answer.tokens for answer in generate_batch(model, PROMPTS, max_tokens=30)]
    eos = [late(free, 5), late(free, 14)]
    plain = generate_batch(model, PROMPTS, max_tokens=30, eos_ids=eos)
    for policy in (Sometimes(), ALWAYS):
        drafter = DraftModel(small, 3)
        drafted = generate_batch(model, PROMPTS, max_tokens=30, eos_ids=eos, drafter=drafter, policy=policy)
        assert [answer.tokens for answer in drafted] == [answer.tokens for answer in plain]
    if name not in ("prefix", "lora"):
        assert sum(answer.steps for answer in drafted) < 0.9 * sum(answer.steps for answer in plain)


@pytest.mark.parametrize("name", ["rope", "linear", "bart"])
@pytest.mark.parametrize("sampling", [Sampling(), Sampling(1.0, seed=1)], ids=["greedy", "sampled"])
def test_drafts_are_those_of_the_whole_text(monkeypatch, name, sampling):
    """Whatever was accepted, skipped or finished, the next draft is what the model says of the text so far."""
    model = MODELS[name]()
    small, checked = near(model, 0.1), []
    propose = ModelDrafting.propose

    def compared(self, requests, seen, k):
        draft = propose(self, requests, seen, k)
        for row, request in enumerate(requests):
            if request.finish is not None:
                assert draft.tokens[row].tolist() == [-1] * k
                continue
            text = [*request.prompt, *request.tokens]
            for place in range(k):
                source = {"source": torch.tensor([request.source])} if request.source else {}
                logits = small(torch.tensor([[*text, *draft.tokens[row, :place].tolist()]]), **source).logits[0, -1]
                if sampling.greedy:
                    assert int(draft.tokens[row, place]) == int(logits.argmax())
                else:
                    torch.testing.assert_close(draft.q[row, place].double(), logits.softmax(-1), rtol=1e-5, atol=1e-7)
                checked.append(place)
        return draft

    monkeypatch.setattr(ModelDrafting, "propose", compared)
    free = generate_batch(model, PROMPTS, max_tokens=24)
    generate_batch(
        model, PROMPTS, max_tokens=24, sampling=sampling, drafter=DraftModel(small, 3),
        eos_ids=[late([answer.tokens for answer in free], 7)],
        policy=Sometimes(1),
    )  # fmt: skip
    assert len(checked) > 50


def test_a_perfect_draft_is_accepted_whole():
    model = decoder()
    answer = generate(model, PROMPTS[0], max_tokens=21, drafter=DraftModel(model, 4), policy=ALWAYS)
    assert answer.tokens == generate(model, PROMPTS[0], max_tokens=21).tokens
    assert answer.steps == 5
    assert answer.proposed == answer.accepted == [4, 4, 4, 4]
    assert answer.drafted == [False] + ([True] * 4 + [False]) * 4


def test_a_draft_model_of_shorter_context_stops_drafting_there():
    model = decoder()
    small = near(decoder(context=24))
    answers = generate_batch(model, PROMPTS, max_tokens=40, drafter=DraftModel(small, 4))
    assert [a.tokens for a in answers] == [a.tokens for a in generate_batch(model, PROMPTS, max_tokens=40)]
    learned = decoder(position=c.Learned(), context=64)
    short = near(decoder(position=c.Learned(), context=24))
    prompts = [[5] * 20, [7, 8]]
    answers = generate_batch(learned, prompts, max_tokens=40, eos_ids=(), drafter=DraftModel(short, 4), policy=ALWAYS)
    assert [a.tokens for a in answers] == [a.tokens for a in generate_batch(learned, prompts, max_tokens=40)]


def test_a_row_longer_than_the_draft_models_context_leaves_nothing_to_read():
    """What was written while it was there is read once it has finished, by the others only."""
    model = decoder(context=256)
    small, prompts = near(decoder(context=32)), [[(7 * i) % V for i in range(150)], [5, 17, 3]]
    eos = generate(model, prompts[0], max_tokens=1, eos_ids=()).tokens
    plain = generate_batch(model, prompts, max_tokens=20, eos_ids=eos)
    assert [answer.finish for answer in plain] == ["eos", "length"]
    found = generate_batch(model, prompts, max_tokens=20, eos_ids=eos, drafter=DraftModel(small), policy=ALWAYS)
    assert [answer.tokens for answer in found] == [answer.tokens for answer in plain]
    assert sum(found[1].drafted) > 3


def test_a_long_text_joins_another_in_a_cache_without_room_for_both_side_by_side(monkeypatch):
    monkeypatch.setattr("volvelle.decode.drafters.draft_model.slack", lambda length: 4)
    model, ids = decoder(context=128), [(11 * i) % V for i in range(180)]
    with Seats(model, 2, context=120, drafter=DraftModel(model, 3), policy=ALWAYS) as seats:
        readings = []
        for prompt in (ids[:90], ids[90:175]):
            readings.append(seats.read(prompt, max_tokens=25, eos_ids=()))
            while not readings[-1].advance():
                pass
            seats.sit(readings[-1])
            seats.step()
        while seats.taken:
            seats.step()
    for reading, prompt in zip(readings, (ids[:90], ids[90:175]), strict=True):
        answer = reading.generation()
        assert answer.tokens == generate(model, prompt, max_tokens=25, eos_ids=()).tokens
        assert answer.accepted == answer.proposed


def test_an_encoder_decoder_drafts_for_another_of_other_depth():
    model, small = bart(depth=3), bart(depth=1)
    plain = generate_batch(model, PROMPTS, max_tokens=20)
    drafted = generate_batch(model, PROMPTS, max_tokens=20, drafter=DraftModel(small, 3))
    assert [answer.tokens for answer in drafted] == [answer.tokens for answer in plain]
    with pytest.raises(VolvelleError, match="cannot draft for a decoder"):
        generate(decoder(), PROMPTS[0], max_tokens=9, drafter=DraftModel(small))


def words(names):
    from tokenizers import Tokenizer, models

    return TextTokenizer(Tokenizer(models.WordLevel({name: i for i, name in enumerate(names)}, unk_token=names[0])))


def test_another_vocabulary_is_refused():
    model, small = decoder(), decoder(1, vocabulary=V + 3)
    with pytest.raises(VolvelleError, match=f"it has {V + 3} tokens, the target {V}") as error:
        generate(model, PROMPTS[0], max_tokens=9, drafter=DraftModel(small))
    assert error.value.tip == "a draft model needs the target's tokenizer"
    letters = [f"w{i}" for i in range(V)]
    swapped = [letters[1], letters[0], *letters[2:]]
    model.tokenizer, small.tokenizer = words(letters), words(swapped)
    with pytest.raises(VolvelleError, match=r"token 'w\d+' is number \d there, \d in the target"):
        generate(model, PROMPTS[0], max_tokens=9, drafter=DraftModel(small))
    check_tokens(words(letters), words([*letters, "one more"]))


@pytest.mark.parametrize("more", [-5, 4])
def test_rows_of_padding_in_either_vocabulary_do_no_harm(more):
    """The tables of a family's models differ in unused rows, the tokens do not."""
    model, small = decoder(), decoder(1, vocabulary=V + more)
    model.tokenizer, small.tokenizer = words([f"w{i}" for i in range(V - 10)]), words([f"w{i}" for i in range(V - 10)])
    for sampling in (Sampling(), Sampling(1.5, seed=0)):
        drafted = generate(model, PROMPTS[0], max_tokens=20, sampling=sampling, drafter=DraftModel(small, 3))
        assert len(drafted.tokens) == 20
        assert max(drafted.tokens) < V
        if sampling.greedy:
            assert drafted.tokens == generate(model, PROMPTS[0], max_tokens=20).tokens
    with pytest.raises(UsageError, match="at least 1 token, got k=0"):
        DraftModel(small, 0)


def test_dropout_is_off_in_the_draft_model_and_its_modes_are_kept():
    model, small = decoder(), decoder(1, dropout=c.Dropout(residual=0.5, embedding=0.5)).train()
    small.model.norm.eval()
    modes = [module.training for module in small.modules()]
    drafters = [DraftModel(small, 3) for _ in range(2)]
    answers = [generate(model, PROMPTS[0], max_tokens=20, drafter=one, policy=ALWAYS) for one in drafters]
    assert answers[0].accepted == answers[1].accepted
    assert [module.training for module in small.modules()] == modes
    small(torch.tensor([[1, 2, 3]])).logits.sum().backward()  # its weights are still ordinary tensors


def test_the_cache_of_the_draft_stays_small(monkeypatch):
    """Rows that accept differently leave holes in its cache too."""
    monkeypatch.setattr("volvelle.decode.speculation.SLACK", 4)
    model = decoder(context=256)
    small, lengths = near(model, 0.1), []
    propose = ModelDrafting.propose

    def noted(self, requests, seen, k) -> Draft | None:
        draft = propose(self, requests, seen, k)
        lengths.append((self.cache.length, max(r.length for r in requests if not r.finish), self.cache.context))
        return draft

    monkeypatch.setattr(ModelDrafting, "propose", noted)
    plain = generate_batch(model, PROMPTS, max_tokens=100)
    drafted = generate_batch(model, PROMPTS, max_tokens=100, drafter=DraftModel(small, 5), policy=ALWAYS)
    assert [answer.tokens for answer in drafted] == [answer.tokens for answer in plain]
    assert all(used <= longest + max(longest // 4, 4) + 5 for used, longest, _ in lengths)
    assert lengths[0][2] <= 1.25 * 111 + 4 + 11
