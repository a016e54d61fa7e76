"""Adapters of an encoder-decoder: on our BART and on transformers', in PEFT's files, with equal outputs."""

from __future__ import annotations

import pytest
import torch
from tests.systems.language.bart_peers import as_ours, make_bart, some_ids

from volvelle import adapt

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.peer

TARGETS = {
    "attention": ("q_proj", "v_proj"),
    "feed-forward": ("fc1", "out_proj"),
    "all": "all-linear",
}


@torch.no_grad()
def logits(model, *, ours):
    source, ids = some_ids(2, 8), some_ids(2, 5, seed=1)
    return model(ids, source=source).logits if ours else model(source, decoder_input_ids=ids).logits


def shaken(parameters):
    """Fresh adapters change nothing; these do."""
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in parameters:
            parameter.add_(0.1 * torch.randn_like(parameter))


@pytest.mark.parametrize("targets", TARGETS)
def test_peft_opens_ours_on_transformers_bart(tmp_path, targets):
    peer = make_bart()
    ours = as_ours(peer)
    plain = logits(ours, ours=True)
    adapted = adapt.apply(ours, adapt.LoRA(rank=3, targets=TARGETS[targets]))
    assert torch.equal(logits(ours, ours=True), plain)
    shaken(adapted.trainable.values())
    adapt.save(ours, tmp_path)
    theirs = peft.PeftModel.from_pretrained(peer, tmp_path).eval()
    assert (logits(ours, ours=True) - plain).abs().max() > 0.1
    torch.testing.assert_close(logits(ours, ours=True), logits(theirs, ours=False), rtol=0, atol=1e-4)


@pytest.mark.parametrize("targets", TARGETS)
def test_ours_opens_pefts(tmp_path, targets):
    peer = make_bart()
    ours = as_ours(peer)
    wanted = TARGETS[targets] if isinstance(TARGETS[targets], str) else list(TARGETS[targets])
    config = peft.LoraConfig(r=3, target_modules=wanted, task_type="SEQ_2_SEQ_LM")
    theirs = peft.get_peft_model(peer, config).eval()
    shaken(p for p in theirs.parameters() if p.requires_grad)
    theirs.save_pretrained(tmp_path)
    adapt.load(ours, tmp_path)
    torch.testing.assert_close(logits(ours, ours=True), logits(theirs, ours=False), rtol=0, atol=1e-4)


def test_merging_gives_the_plain_model_and_the_same_outputs():
    model = as_ours(make_bart()).double()
    names = [name for name, _ in model.named_modules()]
    adapted = adapt.apply(model, adapt.LoRA(rank=3, targets="all-linear"))
    shaken(adapted.trainable.values())
    expected = logits(model, ours=True)
    adapt.merge(model, keep=False)
    assert [name for name, _ in model.named_modules()] == names
    torch.testing.assert_close(logits(model, ours=True), expected, rtol=0, atol=1e-6)
