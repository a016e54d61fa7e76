"""Modules of multi-token prediction: the papers' equations, padded and packed texts, drafts, refusals."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from tests.systems.language.mtp_oracle import ORACLES
from tests.systems.language.test_decoder import GPT2, LLAMA, ROFORMER, build, some_ids

from volvelle.errors import VolvelleError
from volvelle.systems.language import config as c
from volvelle.systems.language import mtp_drafts
from volvelle.systems.language.mtp import KINDS, MTP, MultiToken
from volvelle.systems.language.mtp_drafts import drafts_of
from volvelle.train.scratch import POSITIONS

CLOSE = {"rtol": 0, "atol": 1e-10}
DEPTHS = 3


def pair(kind, config=LLAMA, depths=DEPTHS, seed=0):
    """A decoder with modules, in fp64, every weight random: gains too, so that no norm is without effect."""
    model = build(config, seed).double()
    mtp = KINDS[kind](config, depths).double().eval()
    generator = torch.Generator().manual_seed(seed + 5)
    with torch.no_grad():
        for p in (*model.parameters(), *mtp.parameters()):
            if p.ndim == 1:
                p.add_(0.3 * torch.randn(p.shape, generator=generator, dtype=p.dtype))
    return model, mtp


def logits_of(model, mtp, ids, **given):
    return [model.logits(state) for state in mtp(model, ids, **given)]


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_logits_are_the_papers(kind, tied):
    model, mtp = pair(kind, dataclasses.replace(LLAMA, head=c.Head(tied=tied)))
    ids = some_ids(2, 7)
    found = logits_of(model, mtp, ids)
    assert len(found) == 1 + DEPTHS
    for row in range(2):
        wanted = ORACLES[kind](model, mtp, ids[row])
        for k in range(1 + DEPTHS):
            n = 7 - k
            torch.testing.assert_close(found[k][row, :n], wanted[k][:n], **CLOSE)


@torch.no_grad()
def test_the_oracle_tells_the_halves_of_the_projection_apart():
    model, mtp = pair("sequential")
    wanted = ORACLES["sequential"](model, mtp, some_ids(1, 6)[0])
    for layer in mtp.layers:
        layer.eh_proj.weight.copy_(layer.eh_proj.weight.roll(LLAMA.width, 1))
    found = logits_of(model, mtp, some_ids(1, 6))
    assert not torch.allclose(found[1][0, :5], wanted[1], atol=1e-3)


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_the_decoder_beside_them_is_the_plain_one(kind):
    model, mtp = pair(kind)
    ids = some_ids(2, 6)
    assert torch.equal(mtp(model, ids)[0], model.hidden(ids))
    for mask in (None, torch.tensor([[1, 1, 1, 1, 1, 1], [0, 0, 1, 1, 1, 1]]).bool()):
        hidden, _ = mtp.read(model, ids, mask=mask)
        assert torch.equal(hidden, model.hidden(ids, mask=mask))
    assert not any(p is q for p in mtp.parameters() for q in model.parameters()), "nothing shared is theirs"


@pytest.mark.parametrize("position", POSITIONS)
@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_padded_and_packed_texts_are_those_alone(kind, position):
    model, mtp = pair(kind, dataclasses.replace(LLAMA, family="volvelle", position=POSITIONS[position]), 2)
    parts = some_ids(1, 5)[0], some_ids(1, 9)[0, 2:]
    alone = [logits_of(model, mtp, part[None]) for part in parts]
    padded, mask = torch.zeros(2, 7, dtype=torch.long), torch.zeros(2, 7, dtype=torch.bool)
    for row, part in enumerate(parts):
        padded[row, : len(part)], mask[row, : len(part)] = part, True
    owner = torch.tensor([0] * 5 + [1] * 7)
    together = (owner[:, None] == owner) & torch.ones(12, 12, dtype=torch.bool).tril()
    positions = torch.cat([torch.arange(5), torch.arange(7)])[None]
    by_rows = logits_of(model, mtp, padded, mask=mask)
    in_one = logits_of(model, mtp, torch.cat(parts)[None], mask=together[None], positions=positions)
    for k in range(3):
        for row, start, n in ((0, 0, 5 - k), (1, 5, 7 - k)):
            torch.testing.assert_close(by_rows[k][row, :n], alone[row][k][0, :n], **CLOSE)
            torch.testing.assert_close(in_one[k][0, start : start + n], alone[row][k][0, :n], **CLOSE)


@pytest.mark.parametrize("kind", KINDS)
def test_every_weight_learns_and_recomputing_changes_nothing(kind):
    model, mtp = pair(kind)
    both, ids = MultiToken(model, mtp), some_ids(2, 8)

    def gradients():
        both.zero_grad()
        sum(model.logits(state).logsumexp(-1).sum() for state in both.states(ids)).backward()
        return {name: p.grad.clone() for name, p in both.named_parameters()}

    plain = gradients()
    assert all(g.abs().sum() > 0 for g in plain.values())
    model.gradient_checkpointing = True
    again = gradients()
    assert all(torch.equal(again[name], plain[name]) for name in plain)


def test_fresh_weights_leave_those_of_the_decoder_alone():
    model, mtp = build(), KINDS["sequential"](LLAMA, 2)
    spread = {name: float(p.detach().std()) for name, p in mtp.named_parameters() if p.ndim == 2}
    back = LLAMA.init_std / (2 * LLAMA.depth) ** 0.5
    for name, found in spread.items():
        wanted = back if name.endswith(("o_proj.weight", "down_proj.weight")) else LLAMA.init_std
        assert found == pytest.approx(wanted, rel=0.15), name
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), build().parameters(), strict=True))


@pytest.mark.parametrize("config", [ROFORMER, dataclasses.replace(LLAMA, causal=False, family="volvelle")])
def test_masked_and_post_norm_models_are_refused(config):
    with pytest.raises(VolvelleError, match="needs a causal pre-norm decoder"):
        KINDS["sequential"](config, 1)
    with pytest.raises(VolvelleError, match="at least 1 depth, got 0"):
        KINDS["parallel"](LLAMA, 0)


# -- drafts ----------------------------------------------------------------------------------------------------------


class Told:
    """Chooses the tokens it was told, one call after the other."""

    def __init__(self, *tokens):
        self.tokens = list(tokens)

    def __call__(self, logits):
        return self.tokens.pop(0)


def observed(model, mtp, ids, cuts, *, rows=None):
    """Drafts that have read ids[:, :-1] in pieces of the lengths `cuts`, through the decoder's cache."""
    drafts = drafts_of(mtp, model, len(ids), 40)
    cache, at = model.new_cache(len(ids), 40), 0
    for n in cuts:
        _, states = mtp.read(model, ids[:, at : at + n], cache=cache)
        cache.commit()
        drafts.observe(states, ids[:, at + 1 : at + n + 1])
        at += n
    return drafts


def full_drafts(kind, model, mtp, ids, seen, k):
    """Logits (b, k, v) of the whole-text form for the tokens behind ids[:, seen], given those before each."""
    states = mtp(model, ids)
    return torch.stack([model.logits(states[j + 1][:, seen - 1]) for j in range(k)], 1)


@pytest.mark.parametrize("cuts", [(8,), (1,) * 8, (3, 1, 4), (5, 3)])
@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_drafts_step_by_step_are_the_whole_text(kind, cuts):
    model, mtp = pair(kind)
    ids = some_ids(3, 14)
    drafts = observed(model, mtp, ids, cuts)
    for _ in range(2):  # drafting leaves no trace
        drafted = drafts.draft(DEPTHS, Told(*(ids[:, 9 + j] for j in range(DEPTHS))))
        torch.testing.assert_close(drafted.logits, full_drafts(kind, model, mtp, ids, 8, DEPTHS), **CLOSE)
        assert torch.equal(drafted.tokens, ids[:, 9 : 9 + DEPTHS])
        drafts.draft(2, Told(ids[:, 0], ids[:, 1]))
    greedy = drafts.draft(DEPTHS)
    assert torch.equal(greedy.tokens, greedy.logits.argmax(-1))
    assert torch.equal(greedy.tokens[:, 0], drafted.logits[:, 0].argmax(-1))


OTHERS = {
    "gpt2": GPT2,
    "linear attention": dataclasses.replace(LLAMA, family="volvelle", attention=c.LinearAttention()),
}


@pytest.mark.parametrize("name", [*POSITIONS, *OTHERS])
@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_every_position_encoding_and_attention_drafts(kind, name):
    config = OTHERS.get(name) or dataclasses.replace(LLAMA, family="volvelle", position=POSITIONS[name])
    model, mtp = pair(kind, config, 2)
    ids = some_ids(2, 10)
    drafts = observed(model, mtp, ids, (4, 1, 2))
    drafted = drafts.draft(2, Told(ids[:, 8], ids[:, 9]))
    torch.testing.assert_close(drafted.logits, full_drafts(kind, model, mtp, ids, 7, 2), **CLOSE)


@pytest.mark.parametrize("config", [LLAMA, OTHERS["linear attention"]], ids=["softmax", "linear"])
@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_rows_that_accept_different_numbers(kind, config):
    """Four steps of up to three new tokens; each row keeps its own, with padding on either side, or none at all."""
    model, mtp = pair(kind, config)
    texts = some_ids(3, 16)
    kept = [(1, 2, 1, 3), (3, 0, 2, 0), (2, 3, 3, 1)]
    states = mtp(model, texts)[0] if kind == "sequential" else mtp.trunk(model, texts)[0]
    drafts, at = drafts_of(mtp, model, 3, 40), [0, 0, 0]
    for step in range(4):
        given, following = torch.full((3, 3, LLAMA.width), 7.0).double(), torch.full((3, 3), 60)
        mask = torch.zeros(3, 3, dtype=torch.bool)
        for row in range(3):
            n = kept[row][step]
            place = slice(0, n) if (row + step) % 2 else slice(3 - n, 3)
            part = slice(at[row], at[row] + n)
            given[row, place], mask[row, place] = states[row, part], True
            following[row, place] = texts[row, at[row] + 1 : at[row] + n + 1]
            at[row] += n
        drafts.observe(given, following, mask)
        told = Told(*(torch.stack([texts[row, at[row] + 1 + j] for row in range(3)]) for j in range(DEPTHS)))
        drafted = drafts.draft(DEPTHS, told)
        for row in range(3):
            wanted = full_drafts(kind, model, mtp, texts[row : row + 1], at[row], DEPTHS)
            torch.testing.assert_close(drafted.logits[row : row + 1], wanted, **CLOSE)
    assert at == [7, 5, 9]


@pytest.mark.parametrize("depths", [1, 2])
@torch.no_grad()
def test_beyond_its_depths_the_last_module_reads_its_own_state(depths):
    model, mtp = pair("sequential", depths=depths)
    ids = some_ids(2, 12)
    drafted = observed(model, mtp, ids, (4, 2)).draft(depths + 3, Told(*(ids[:, 7 + j] for j in range(depths + 3))))
    # Written out: the last module over all its inputs again, its newest state standing in for the one it lacks.
    states = [mtp(model, ids)[0]]
    for k in range(1, depths + 1):
        layer = mtp.layers[k - 1]
        tokens = ids[:, k : 6 + k]
        inputs = states[-1][:, : tokens.shape[1]]
        for j in range(4 if k == depths else 1):
            _, step = model.begin(tokens)
            h, normed = layer(inputs, model.model.embed_tokens(tokens), step)
            if k == depths:
                torch.testing.assert_close(drafted.logits[:, depths - 1 + j], model.logits(normed[:, -1]), **CLOSE)
                inputs = torch.cat((inputs, h[:, -1:]), 1)
                tokens = ids[:, k : 7 + k + j]
        states.append(h)


@torch.no_grad()
def test_in_16_bits_drafts_are_close_and_stay_in_their_dtype():
    model, mtp = pair("sequential")
    ids = some_ids(2, 12)
    wanted = full_drafts("sequential", model, mtp, ids, 8, 2)
    model, mtp = model.bfloat16(), mtp.bfloat16()
    drafted = observed(model, mtp, ids, (5, 3)).draft(2, Told(ids[:, 9], ids[:, 10]))
    assert drafted.logits.dtype == torch.bfloat16
    assert (drafted.logits.double() - wanted).norm() / wanted.norm() < 0.05


@torch.no_grad()
def test_what_cannot_be_drafted_is_said():
    model, mtp = pair("parallel", depths=2)
    drafts = drafts_of(mtp, model, 2, 8)
    with pytest.raises(VolvelleError, match="observe at least one position of each"):
        drafts.draft(1)
    ids = some_ids(2, 4)
    states = mtp.read(model, ids[:, :3])[1]
    with pytest.raises(VolvelleError, match=r"states \(2, 3, 24\) and next tokens \(2, 4\) do not fit"):
        drafts.observe(states, ids)
    drafts.observe(states, ids[:, 1:])
    with pytest.raises(VolvelleError, match="2 parallel heads draft at most as many tokens, got 3"):
        drafts.draft(3)
    first = drafts.draft(2)
    drafts.reset()
    with pytest.raises(VolvelleError, match="observe at least one"):
        drafts.draft(1)
    drafts.observe(states, ids[:, 1:])
    assert torch.equal(drafts.draft(2).logits, first.logits)


def test_a_mutant_that_reads_the_token_after_is_caught(monkeypatch):
    """Depth k given t_{i+k+1}, the token it is to predict: the equations must notice."""
    from volvelle.systems.language import mtp as module

    model, mtp = pair("sequential", depths=1)
    ids = some_ids(1, 6)
    wanted = ORACLES["sequential"](model, mtp, ids[0])
    original = module.token_embeddings
    monkeypatch.setattr(module, "token_embeddings", lambda model, ids: original(model, ids.roll(-1, 1)))
    assert isinstance(mtp, MTP)
    assert not torch.allclose(logits_of(model, mtp, ids)[1][0, :4], wanted[1][:4], atol=1e-3)


def unshifted(drafts, depth, h, mask):
    """The state of the same position, one too late."""
    drafts.newest[depth], drafts.known[depth] = h[:, -1], mask.any(1)
    return h, mask


def forgetful(drafts, k, choose):
    """Drafts that stay in the caches."""
    found = original_propose(drafts, k, choose)
    for cache in drafts.caches:
        cache.begin(1)
        cache.commit()
    return found


original_propose = mtp_drafts.SequentialDrafts._propose


@pytest.mark.parametrize(("method", "mutant"), [("_shift", unshifted), ("_propose", forgetful)])
@torch.no_grad()
def test_mutants_of_the_drafts_are_caught(method, mutant, monkeypatch):
    model, mtp = pair("sequential")
    ids = some_ids(2, 14)
    monkeypatch.setattr(mtp_drafts.SequentialDrafts, method, mutant)
    drafts = observed(model, mtp, ids, (3, 4))
    drafts.draft(2, Told(ids[:, 0], ids[:, 1]))
    states = mtp.read(model, ids[:, :8])[1]
    drafts.observe(states[:, 7:], ids[:, 8:9])
    told = Told(*(ids[:, 9 + j] for j in range(DEPTHS)))
    wanted = full_drafts("sequential", model, mtp, ids, 8, DEPTHS)
    assert (drafts.draft(DEPTHS, told).logits - wanted).abs().max() > 1e-3


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_a_greedy_loop_over_drafts_writes_what_plain_decoding_writes(kind):
    """Rows accept different numbers of drafts, most of them right; the logits stay those of whole texts."""
    model, mtp = pair(kind)
    written = some_ids(3, 4)
    for _ in range(36):
        written = torch.cat((written, model(written).logits[:, -1:].argmax(-1)), 1)
    cache, drafts, lucky = model.new_cache(3, 90), drafts_of(mtp, model, 3, 90), torch.Generator().manual_seed(0)
    hidden, states = mtp.read(model, written[:, :4], cache=cache)
    cache.commit()
    newest = model.logits(hidden)[:, -1].argmax(-1)
    drafts.observe(states, torch.cat((written[:, 1:4], newest[:, None]), 1))
    rows, at, accepted = torch.arange(3), torch.full((3,), 5), []
    while int(at.min()) < 20:
        good = torch.rand(3, DEPTHS, generator=lucky) < 0.6
        right = torch.stack([written[rows, (at + j).clamp(max=39)] for j in range(DEPTHS)], 1)
        told = torch.where(good, right, (right + 1) % 61)
        drafted = drafts.draft(DEPTHS, Told(*told.unbind(1)))
        for row in range(3):
            if int(at[row]) < 36 and bool(good[row, :-1].all()):
                wanted = full_drafts(kind, model, mtp, written[row : row + 1], int(at[row]) - 1, DEPTHS)
                torch.testing.assert_close(drafted.logits[row : row + 1], wanted, **CLOSE)
        hidden, states = mtp.read(model, torch.cat((newest[:, None], drafted.tokens), 1), cache=cache)
        greedy = model.logits(hidden).argmax(-1)
        taken = (greedy[:, :-1] == drafted.tokens).long().cumprod(1).sum(1)
        slots = torch.arange(1 + DEPTHS)
        cache.commit(torch.where(slots <= taken[:, None], slots, -1))
        drafts.observe(states, greedy, slots <= taken[:, None])
        newest, at = greedy[rows, taken], at + 1 + taken
        accepted += taken.tolist()
        for row in range(3):
            if int(at[row]) <= 40:
                assert int(newest[row]) == int(written[row, at[row] - 1])
    assert set(accepted) == set(range(1 + DEPTHS)), "all, none, and what lies between"
