"""Medusa's heads: the paper's equation, where they begin, and files that the authors' code and servers read."""

from __future__ import annotations

import dataclasses
import json
import os

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.systems.language.test_decoder import GPT2, LLAMA, build

from volvelle.errors import VolvelleError
from volvelle.systems.language.draft_head import DraftHead, DraftHeads
from volvelle.systems.language.medusa import MedusaHeads
from volvelle.systems.language.medusa_files import PICKLED, SAFE, read_medusa, write_medusa

SOME = torch.tensor([2, 3, 5, 40])


def noisy(heads):
    with torch.no_grad():
        for number, p in enumerate(heads.parameters()):
            p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(number)) * 0.3)
    return heads


@pytest.mark.parametrize("tokens", [None, SOME], ids=["all", "some"])
@pytest.mark.parametrize("own", [False, True])
def test_they_begin_as_the_models_own_prediction(own, tokens):
    model = build().double()
    hidden = torch.randn(2, 3, 24, dtype=torch.double)
    heads = MedusaHeads.of(model, 3, layers=2, own=own, tokens=tokens).double()
    wanted = model.logits(hidden) if tokens is None else model.logits(hidden)[..., tokens]
    found = heads.logits(hidden, DraftHead(model, tokens))
    torch.testing.assert_close(found, wanted.expand(3, *wanted.shape))


def test_a_head_is_the_papers_equation():
    model = build().double()
    heads = noisy(MedusaHeads.of(model, 2, own=True).double())
    h = torch.randn(24, dtype=torch.double)
    found = heads.logits(h[None], DraftHead(model))[:, 0]
    for k, (block, matrix) in enumerate(heads.medusa_head):
        z = block.linear.weight @ h + block.linear.bias
        torch.testing.assert_close(found[k], matrix.weight @ (z * torch.sigmoid(z) + h))


@pytest.mark.parametrize("config", [LLAMA, GPT2], ids=lambda c: c.family)
def test_some_rows_of_the_head(config):
    model = build(config)
    head, whole = DraftHead(model, SOME), DraftHead(model)
    hidden = torch.randn(2, 3, config.width)
    torch.testing.assert_close(head.logits(hidden), model.logits(hidden)[..., SOME])
    assert torch.equal(whole.logits(hidden), model.logits(hidden))
    wide = head.widened(head.logits(hidden))
    assert torch.equal(wide[..., SOME], head.logits(hidden))
    assert int(torch.isinf(wide).sum()) == wide.numel() - wide[..., SOME].numel()
    assert head.places(torch.tensor([[40, 1], [-100, 2]]), absent=-7).tolist() == [[3, -7], [-7, 0]]


def test_rows_of_a_head_with_an_adapter_have_it():
    from volvelle.adapt import apply
    from volvelle.adapt.methods import LoRA

    model = build(dataclasses.replace(LLAMA, head=dataclasses.replace(LLAMA.head, tied=False)))
    apply(model, LoRA(rank=2, targets=("lm_head",)))
    noisy(model)
    hidden = torch.randn(3, 24)
    head = DraftHead(model, SOME)
    assert head.plain is None
    assert torch.equal(head.logits(hidden), model.logits(hidden)[..., SOME])


def test_copied_rows_are_kept_until_the_head_changes():
    model = build()
    heads = DraftHeads(SOME)
    first = heads.of(model)
    assert heads.of(model).rows is first.rows
    hidden = torch.randn(2, 24)
    with torch.no_grad():
        model.lm_head.weight.mul_(2)
    torch.testing.assert_close(heads.of(model).logits(hidden), 2 * first.logits(hidden))
    assert DraftHeads(None).of(model).tokens is None


@pytest.mark.parametrize("count", [32, 5])
def test_rows_of_a_quantised_head_are_its_own(count):
    from volvelle.parts.quantization.int8 import Int8Linear

    model = build(dataclasses.replace(LLAMA, vocabulary=64, width=32, embedding_width=32, head_width=8))
    model.lm_head = Int8Linear.from_linear(model.lm_head)
    tokens = torch.arange(0, 2 * count, 2)
    hidden = torch.randn(3, 32)
    head = DraftHead(model, tokens)
    assert isinstance(head.rows, Int8Linear) == (count == 32)
    torch.testing.assert_close(head.logits(hidden), model.logits(hidden)[..., tokens])


@pytest.mark.parametrize("pickled", [False, True])
@pytest.mark.parametrize("tokens", [None, SOME], ids=["all", "some"])
@pytest.mark.parametrize("own", [False, True])
def test_written_and_read_they_are_the_same_bits(own, tokens, pickled, tmp_path):
    model = build()
    heads = noisy(MedusaHeads.of(model, 2, layers=2, own=own, tokens=tokens))
    heads.acceptance = torch.tensor([[0.5, 0.25], [0.25, 0.125]])
    write_medusa(heads, tmp_path, base="owner/model", pickled=not pickled)
    write_medusa(heads, tmp_path, base="owner/model", pickled=pickled)
    assert {p.name for p in tmp_path.iterdir()} == {"config.json", PICKLED if pickled else SAFE}
    again = read_medusa(tmp_path, model)
    ours, theirs = heads.state_dict(), again.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert (again.own, again.layers, again.training) == (own, 2, False)
    assert torch.equal(again.acceptance, heads.acceptance)
    small = read_medusa(tmp_path, model.bfloat16())
    assert {p.dtype for p in small.parameters()} == {torch.bfloat16}


def test_names_and_configuration_are_the_authors(tmp_path):
    """medusa_lm_head.pt of github.com/FasterDecoding/Medusa is the state dict of a list of sequences of blocks."""
    model = build()
    write_medusa(MedusaHeads.of(model, 2, own=True), tmp_path / "first", base="lmsys/vicuna-7b-v1.3")
    held = load_file(tmp_path / "first" / SAFE)
    blocks = {f"{i}.0.linear.{part}" for i in range(2) for part in ("weight", "bias")}
    assert set(held) == blocks | {"0.1.weight", "1.1.weight"}
    assert {name: tuple(held[name].shape) for name in ("0.0.linear.weight", "0.1.weight")} == {
        "0.0.linear.weight": (24, 24),
        "0.1.weight": (61, 24),
    }
    values = json.loads((tmp_path / "first" / "config.json").read_text())
    assert values == {
        "medusa_num_heads": 2,
        "medusa_num_layers": 1,
        "base_model_name_or_path": "lmsys/vicuna-7b-v1.3",
        "hidden_size": 24,
    }
    write_medusa(MedusaHeads.of(model, 2), tmp_path / "second")
    assert set(load_file(tmp_path / "second" / SAFE)) == blocks
    assert json.loads((tmp_path / "second" / "config.json").read_text())["version"] == "2"


def test_files_of_others_are_read(tmp_path):
    """Whole models name the heads' list; configurations of the authors hold no width; a bias may be missing."""
    model = build()
    (tmp_path / "config.json").write_text(json.dumps({"medusa_num_heads": 1, "model_type": "llama"}))
    weight = torch.randn(24, 24)
    torch.save({"medusa_head.0.0.linear.weight": weight}, tmp_path / PICKLED)
    heads = read_medusa(tmp_path, model)
    x = torch.randn(2, 24)
    torch.testing.assert_close(heads.state(0, x), x + torch.nn.functional.silu(x @ weight.T))


class Code:
    """What a pickled file must not be able to run."""

    def __reduce__(self):
        return os.system, ("touch it-ran",)


def test_a_file_runs_no_code(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "config.json").write_text('{"medusa_num_heads": 1}')
    torch.save({"0.0.linear.weight": Code()}, tmp_path / PICKLED)
    with pytest.raises(VolvelleError, match="not readable as tensors alone"):
        read_medusa(tmp_path, build())
    assert not (tmp_path / "it-ran").exists()


@pytest.mark.parametrize(
    ("values", "change", "message"),
    [
        ({}, {}, "medusa_num_heads must be a number"),
        ({"medusa_num_heads": 2}, {}, "missing 1.0.linear.weight"),
        ({"medusa_num_heads": 1}, {"7.0.linear.weight": torch.zeros(1)}, "unknown 7.0"),
        ({"medusa_num_heads": 1}, {"0.0.linear.weight": torch.zeros(32, 32)}, "shape \\(32, 32\\), the model asks"),
        ({"medusa_num_heads": 1}, {"token_map": torch.tensor([70])}, "outside the model's vocabulary of 61"),
        ({"medusa_num_heads": 1, "medusa_acceptance": [[0.1], [0.2]]}, {}, "must hold 1 rows"),
    ],
)
def test_what_does_not_fit_is_named(values, change, message, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(values))
    save_file({"0.0.linear.weight": torch.zeros(24, 24)} | change, tmp_path / SAFE)
    with pytest.raises(VolvelleError, match=message):
        read_medusa(tmp_path, build())


@pytest.mark.parametrize("damage", ["none", "short", "text"])
@pytest.mark.parametrize("name", [SAFE, PICKLED])
def test_a_damaged_file_is_named(name, damage, tmp_path):
    model = build()
    write_medusa(MedusaHeads.of(model, 1), tmp_path, pickled=name == PICKLED)
    file = tmp_path / name
    content = file.read_bytes()
    if damage == "none":
        file.unlink()
    else:
        file.write_bytes(content[: len(content) // 2] if damage == "short" else b"not weights at all")
    with pytest.raises(VolvelleError, match="neither" if damage == "none" else "not readable"):
        read_medusa(tmp_path, model)
