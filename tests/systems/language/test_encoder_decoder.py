"""The EncoderDecoder's own promises: caches, padding, sharing of sources, derivatives, and errors by name."""

from __future__ import annotations

import copy
import subprocess
import sys

import pytest
import torch

from volvelle.errors import VolvelleError
from volvelle.systems.language.config import MLP, Dropout, Head, SpecialTokens
from volvelle.systems.language.encoder_decoder import Answering, EncoderDecoder
from volvelle.systems.language.encoder_decoder_config import EncoderDecoderConfig, Stack

VOCABULARY = 61


def make_config(**changes):
    values = {
        "vocabulary": VOCABULARY, "width": 24, "encoder": Stack(2, 4, MLP(40, "gelu")),
        "decoder": Stack(3, 2, MLP(32, "gelu")), "context": 32, "start": 2, "special": SpecialTokens(0, (2,), 1),
    }  # fmt: skip
    return EncoderDecoderConfig("bart", **(values | changes))


def make_model(seed=0, dtype=torch.float64, **changes):
    torch.manual_seed(seed)
    model = EncoderDecoder(make_config(**changes)).to(dtype).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return model


def some_ids(batch, length, seed=0):
    return torch.randint(3, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(seed))


def real(lengths, width, side):
    slots, lengths = torch.arange(width), torch.tensor(lengths)[:, None]
    return slots < lengths if side == "right" else slots >= width - lengths


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@torch.no_grad()
def test_cached_equals_whole(dtype):
    model, source, ids = make_model(dtype=dtype), some_ids(3, 9), some_ids(3, 11, seed=1)
    mask = real([9, 5, 1], 9, "left")
    whole = model(ids, source=source, source_mask=mask).logits
    cache, read, parts = model.new_cache(3, 11), model.read(source, mask=mask, keep=True), []
    for start, end in ((0, 1), (1, 5), (5, 6), (6, 11)):
        parts.append(model(ids[:, start:end], source=read, cache=cache).logits)
        cache.commit()
    close = {torch.float64: 1e-11, torch.float32: 1e-4, torch.bfloat16: 0.15}[dtype]
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=0, atol=close * whole.abs().max())


@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_padding_changes_nothing(side):
    model = make_model()
    lengths, answers = [7, 1, 4], [5, 3, 1]
    alone = [
        model(some_ids(1, n, seed=50 + row), source=some_ids(1, m, seed=row)).logits[0]
        for row, (m, n) in enumerate(zip(lengths, answers, strict=True))
    ]
    source_mask, mask = real(lengths, 10, side), real(answers, 8, side)
    source, ids = torch.full((3, 10), 9), torch.full((3, 8), 9)
    for row, (m, n) in enumerate(zip(lengths, answers, strict=True)):
        source[row, source_mask[row]] = some_ids(1, m, seed=row)[0]
        ids[row, mask[row]] = some_ids(1, n, seed=50 + row)[0]
    together = model(ids, source=source, source_mask=source_mask, mask=mask).logits
    for row, expected in enumerate(alone):
        torch.testing.assert_close(together[row, mask[row]], expected, rtol=0, atol=1e-11)
    cache = model.new_cache(3, 9)
    if side == "left":
        cached = model(ids, source=source, source_mask=source_mask, mask=mask, cache=cache).logits
        cache.commit()
        following = model(some_ids(3, 1, seed=8), source=source, source_mask=source_mask, cache=cache).logits
        for row, expected in enumerate(alone):
            torch.testing.assert_close(cached[row, mask[row]], expected, rtol=0, atol=1e-11)
            text = torch.cat((ids[row, mask[row]], some_ids(3, 1, seed=8)[row]))[None]
            last = model(text, source=source[row, source_mask[row]][None]).logits[0, -1]
            torch.testing.assert_close(following[row, 0], last, rtol=0, atol=1e-11)


@pytest.mark.parametrize("share", [1, 3])
@torch.no_grad()
def test_answers_share_their_source(share):
    model, source = make_model(), some_ids(2, 6)
    mask, ids = real([6, 3], 6, "right"), some_ids(2 * share, 4, seed=1)
    copied = model(ids, source=source.repeat_interleave(share, 0), source_mask=mask.repeat_interleave(share, 0)).logits
    read = model.read(source, mask=mask, keep=True)
    torch.testing.assert_close(model(ids, source=read).logits, copied, rtol=0, atol=1e-12)
    # and the same through the cache, one token after the other, as a decoding loop does it
    answering = Answering(model, read)
    cache = answering.new_cache(2 * share, 4)
    for at in range(4):
        found = answering.logits(answering.hidden(ids[:, at : at + 1], cache=cache))
        cache.commit()
        torch.testing.assert_close(found[:, 0], copied[:, at], rtol=0, atol=1e-12)


@torch.no_grad()
def test_a_source_is_read_once():
    model, calls = make_model(), []
    for layer in model.model.decoder.layers:
        layer.encoder_attn.k_proj.register_forward_hook(lambda *_: calls.append("keys"))
    model.model.encoder.layers[0].register_forward_hook(lambda *_: calls.append("encoder"))
    read = model.read(some_ids(2, 5), keep=True)
    for _ in range(4):
        model.hidden(some_ids(2, 3), source=read)
    assert calls == ["encoder"] + ["keys"] * 3
    read = model.read(some_ids(2, 5))
    for _ in range(2):
        model.hidden(some_ids(2, 3), source=read)
    assert calls == ["encoder"] + ["keys"] * 3 + ["encoder"] + ["keys"] * 6


def test_gradients_are_those_of_differences():
    side = Stack(1, 2, MLP(6, "gelu_tanh"))
    model = make_model(width=4, encoder=side, decoder=side, vocabulary=7, context=8)
    model.double()
    source, ids = torch.tensor([[3, 4, 5, 6], [4, 5, 0, 0]]), torch.tensor([[2, 3, 4], [2, 6, 3]])
    mask = real([4, 2], 4, "right")
    weights = {name: p.detach().clone().requires_grad_() for name, p in model.named_parameters()}

    def logits(*values):
        given = dict(zip(weights, values, strict=True))
        return torch.func.functional_call(
            model, given | {"lm_head.weight": given["model.shared.weight"]}, (ids,),
            {"source": source, "source_mask": mask},
        ).logits  # fmt: skip

    # The table of tokens is left out of the differences in its padding row, which gets no gradient by design.
    assert torch.autograd.gradcheck(logits, tuple(weights.values()), atol=1e-6, fast_mode=True)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_checkpointing_gives_the_same_gradients(dropout):
    model = make_model(dropout=Dropout(dropout, dropout, 0.0), activation_dropout=dropout).train()
    source, ids, gradients = some_ids(2, 9), some_ids(2, 5, seed=1), []
    mask = real([9, 4], 9, "right")
    for recompute in (False, True):
        model.gradient_checkpointing = recompute
        model.zero_grad()
        torch.manual_seed(4)
        model(ids, source=source, source_mask=mask).logits.square().mean().backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-14)


def test_dropout_acts_in_training_only():
    model = make_model(dropout=Dropout(0.2, 0.2, 0.2), activation_dropout=0.2)
    source, ids = some_ids(1, 5), some_ids(1, 5)
    assert torch.equal(model(ids, source=source).logits, model(ids, source=source).logits)
    model.train()
    assert not torch.equal(model(ids, source=source).logits, model(ids, source=source).logits)


def test_fresh_weights():
    model = EncoderDecoder(make_config(width=64, encoder=Stack(2, 4, MLP(256, "gelu")), init_std=0.03))
    assert model.lm_head.weight is model.model.shared.weight
    assert model.model.encoder.layers[0].fc1.weight.std().item() == pytest.approx(0.03, rel=0.05)
    assert not model.model.shared.weight[1].any(), "padding"
    assert not model.model.decoder.layers[0].encoder_attn.q_proj.bias.any()
    untied = EncoderDecoder(make_config(head=Head(tied=False)))
    assert untied.lm_head.weight is not untied.model.shared.weight


def test_a_copy_is_a_model_of_its_own():
    model = make_model()
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.model.shared.weight.zero_()
    assert other.lm_head.weight is other.model.shared.weight
    assert model.model.shared.weight.any()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: m.hidden(some_ids(2, 33), source=some_ids(2, 3)), "answer of 33 tokens: the model's context is 32"),
        (lambda m: m.read(some_ids(1, 40)), "source of 40 tokens: the model's context is 32"),
        (lambda m: m.hidden(some_ids(3, 3), source=some_ids(2, 3)), "3 answers cannot be shared out to 2 sources"),
        (lambda m: m.read(some_ids(2, 3), mask=torch.ones(2, 4, dtype=torch.bool)), r"mask must be bool of shape"),
        (lambda m: m.read(some_ids(2, 3), mask=torch.ones(2, 3, 3, dtype=torch.bool)), r"must be \(s, m\)"),
        (lambda m: m.read(some_ids(2, 3).double()), "source must be integers"),
        (lambda m: m.hidden(some_ids(2, 3)[0], source=some_ids(2, 3)), "token ids must be integers of shape"),
        (
            lambda m: m.hidden(
                some_ids(1, 2), source=m.read(some_ids(1, 2)), source_mask=torch.ones(1, 2, dtype=torch.bool)
            ),
            "has its mask already",
        ),
    ],
)
def test_wrong_shapes_are_named(call, message):
    with pytest.raises(VolvelleError, match=message):
        call(make_model())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"width": 26}, r"width \(26\) must be a multiple of encoder.heads \(4\)"),
        ({"decoder": Stack(0, 2, MLP(8))}, "decoder.depth must be positive, got 0"),
        ({"start": 61}, "start = 61 is outside the vocabulary 61"),
        ({"forced_last": 99}, "forced_last = 99 is outside"),
        ({"head": Head(bias=True)}, "the head is one matrix"),
    ],
)
def test_wrong_sizes_are_named(changes, message):
    with pytest.raises(ValueError, match=message):
        make_config(**changes)


def test_the_configuration_is_free_of_torch():
    code = (
        "import sys, volvelle.systems.language.bart, volvelle.systems.language.encoder_decoder_config, "
        "volvelle.train.recipes.summarize; print('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"
