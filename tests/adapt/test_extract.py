"""A full fine-tune as LoRA: exact on low-rank differences, the best of its rank elsewhere, PEFT reads what is saved."""

from __future__ import annotations

import copy
import itertools

import numpy as np
import pytest
import torch
from torch import nn

from volvelle import adapt
from volvelle.adapt import extract
from volvelle.errors import UsageError, VolvelleError


def change(module, rank, scale=1.0, seed=0):
    """Add a matrix of that rank to the module's weight, seen as a matrix by its first dimension."""
    generator = torch.Generator().manual_seed(seed)
    weight = module.weight.detach()
    d, k = weight.shape[0], weight[0].numel()
    left, right = (torch.randn(n, rank, generator=generator, dtype=weight.dtype) for n in (d, k))
    with torch.no_grad():
        module.weight.add_((scale * left @ right.T / rank).reshape(weight.shape))


class Net(nn.Module):
    """One layer of each kind that an adapter can go to, and some that it cannot."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(11, 12)
        self.linear = nn.Linear(12, 20)
        self.norm = nn.LayerNorm(20)
        self.conv = nn.Conv2d(1, 6, 3, padding=1)
        self.grouped = nn.Conv2d(6, 8, 3, groups=2)

    def forward(self, ids):
        x = self.norm(self.linear(self.embed(ids)))  # (b, n, 20)
        return self.grouped(self.conv(x[:, None]))


def pair(dtype=torch.float64):
    torch.manual_seed(0)
    base = Net().to(dtype)
    return base, copy.deepcopy(base)


IDS = torch.arange(15).reshape(3, 5) % 11


@pytest.mark.parametrize("asked", [{}, {"rank": 3}, {"energy": 1 - 1e-9}])
def test_a_low_rank_difference_is_recovered_exactly(asked):
    base, tuned = pair()
    before = base(IDS)
    change(tuned.linear, 3)
    change(tuned.embed, 2)
    found = adapt.extract_lora(base, tuned, **asked)
    assert found.unchanged == ["conv", "grouped"]
    assert found.left_out == {}
    if not asked or "energy" in asked:
        assert found.layers["linear"].rank <= 3
        assert found.layers["embed"].rank <= 2
    if asked:
        torch.testing.assert_close(base(IDS), tuned(IDS), rtol=1e-9, atol=1e-9)
        assert found.energy > 1 - 1e-9
    assert not torch.allclose(before, tuned(IDS))
    adapt.remove(base)
    assert torch.equal(base(IDS), before)


def test_every_kind_of_layer_at_full_energy_gives_the_tuned_model():
    base, tuned = pair()
    for layer in (tuned.embed, tuned.linear, tuned.conv, tuned.grouped):
        change(layer, 6)
    found = adapt.extract_lora(base, tuned, energy=1.0)
    assert set(found.layers) == {"embed", "linear", "conv", "grouped"}
    torch.testing.assert_close(base(IDS), tuned(IDS), rtol=1e-8, atol=1e-8)
    for path in found.layers:
        if path != "grouped":
            assert found.layers[path].rank <= 6
    assert found.layers["grouped"].rank % 2 == 0


@pytest.mark.parametrize("shape", [(7, 13), (13, 7), (600, 530), (530, 700)])
@pytest.mark.parametrize("rank", [1, 4])
def test_no_matrix_of_the_rank_is_nearer(shape, rank):
    """Eckart and Young: the error is that of numpy's truncated SVD, and the energy is what numpy says."""
    torch.manual_seed(0)
    base, tuned = (nn.Sequential(nn.Linear(shape[1], shape[0], bias=False)) for _ in range(2))
    delta = (tuned[0].weight.double() - base[0].weight.double()).detach().numpy()
    s = np.linalg.svd(delta, compute_uv=False)
    found = adapt.extract_lora(base, tuned, rank)
    update = base[0].adapters["default"].delta(base[0]).numpy().astype(np.float64)
    error = np.linalg.norm(delta - update)
    assert error == pytest.approx(np.sqrt((s[rank:] ** 2).sum()), rel=1e-6)
    assert found.layers["0"].energy == pytest.approx((s[:rank] ** 2).sum() / (s**2).sum(), rel=1e-9)
    a, b = (getattr(base[0].adapters["default"], name).detach().numpy() for name in "ab")
    # Evenly split: both factors carry the roots of the singular values.
    np.testing.assert_allclose((a**2).sum(1), s[:rank], rtol=1e-4)
    np.testing.assert_allclose((b**2).sum(0), s[:rank], rtol=1e-4)


def test_energy_grows_with_the_rank_and_decides_it():
    torch.manual_seed(0)
    base, tuned = nn.Sequential(nn.Linear(24, 16)), nn.Sequential(nn.Linear(24, 16))
    tuned[0].bias = base[0].bias
    kept = [adapt.extract_lora(copy.deepcopy(base), tuned, rank).energy for rank in range(1, 17)]
    assert all(a < b for a, b in itertools.pairwise(kept))
    assert kept[-1] == pytest.approx(1)
    for energy in (0.3, 0.9, 0.99):
        found = adapt.extract_lora(copy.deepcopy(base), tuned, energy=energy).layers["0"]
        assert found.energy >= energy
        assert found.rank == 1 + next(i for i, value in enumerate(kept) if value >= energy)


def test_a_large_matrix_is_sketched_as_well_as_decomposed(monkeypatch):
    monkeypatch.setattr(extract, "LARGE", 100)
    generator = torch.Generator().manual_seed(0)
    spectrum = torch.arange(1, 201, dtype=torch.float64) ** -0.7
    left, right = (torch.linalg.qr(torch.randn(n, 200, generator=generator, dtype=torch.float64)).Q for n in (260, 220))
    delta = left * spectrum @ right.T
    u, s, vt = extract._singular(delta, 8)
    assert len(s) == 18, "the sketch was not used"
    best, ours = float(spectrum[:8].square().sum()), float(s[:8].square().sum())
    assert best * (1 - 1e-4) <= ours <= best * (1 + 1e-12)
    left_over = float((delta - u[:, :8] * s[:8] @ vt[:8]).square().sum())
    assert left_over == pytest.approx(float(spectrum[8:].square().sum()), rel=1e-3)
    # What does not settle is decomposed as a whole.
    monkeypatch.setattr(extract, "SETTLED", -1.0)
    assert len(extract._singular(delta, 8)[1]) == 220


def test_what_an_adapter_cannot_hold_is_named_with_its_size():
    base, tuned = pair()
    change(tuned.linear, 1)
    with torch.no_grad():
        tuned.norm.weight.mul_(1.5)
        tuned.linear.bias.add_(base.linear.bias)
    found = adapt.extract_lora(base, tuned)
    assert found.left_out == pytest.approx({"linear.bias": 1.0, "norm.weight": 0.5})
    assert "2 changed parameters left out" in str(found)


def test_a_shared_weight_is_put_on_both_layers(tiny_llama, ids):
    base, tuned = tiny_llama(torch.float64), tiny_llama(torch.float64)
    change(tuned.model.embed_tokens, 2, 0.1)
    found = adapt.extract_lora(base, tuned, energy=1 - 1e-12)
    assert set(found.layers) == {"model.embed_tokens", "lm_head"}
    torch.testing.assert_close(base(ids).logits, tuned(ids).logits, rtol=1e-8, atol=1e-8)


@pytest.mark.peer
def test_peft_reads_it_with_equal_outputs(tiny_llama, ids, tmp_path):
    peft = pytest.importorskip("peft")
    base, tuned = tiny_llama(), tiny_llama()
    for number, layer in enumerate(tuned.model.layers):
        change(layer.self_attn.q_proj, 2 + number, 0.3, seed=number)
        change(layer.mlp.down_proj, 1, 0.3, seed=9 + number)
    found = adapt.extract_lora(base, tuned, energy=1 - 1e-6)
    assert {kept.rank for kept in found.layers.values()} == {1, 2, 3}
    folder = found.save(tmp_path / "adapter", base="tiny")
    theirs = peft.PeftModel.from_pretrained(tiny_llama(), str(folder))
    with torch.no_grad():
        torch.testing.assert_close(theirs(ids).logits, base(ids).logits, rtol=0, atol=1e-5)
        torch.testing.assert_close(theirs(ids).logits, tuned(ids).logits, rtol=0, atol=1e-4)
    again = tiny_llama()
    adapt.load(again, folder)
    assert torch.equal(again(ids).logits, base(ids).logits)


def test_half_precision_weights_are_subtracted_exactly():
    base, tuned = pair(torch.bfloat16)
    change(tuned.linear, 1, 4.0)
    found = adapt.extract_lora(base, tuned, energy=0.999)
    delta = (tuned.linear.weight.double() - adapt.remove(base).linear.weight.double()).detach()
    assert found.layers["linear"].change == pytest.approx(
        float(delta.norm() / base.linear.weight.detach().double().norm())
    )
    assert 1 <= found.layers["linear"].rank < 12  # bf16 rounded the sum, so that it is no longer of rank 1


def test_models_that_do_not_fit_are_refused_by_name():
    base = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 3))
    with pytest.raises(VolvelleError, match=r"1\.weight \(base 3 x 4, tuned 2 x 4\), 1\.bias"):
        adapt.extract_lora(base, nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2)))
    with pytest.raises(VolvelleError, match=r"0\.bias \(base 4, tuned has none\)"):
        adapt.extract_lora(base, nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 3)))
    with pytest.raises(VolvelleError, match=r"2\.weight \(base has none"):
        adapt.extract_lora(base, nn.Sequential(*copy.deepcopy(base), nn.Linear(3, 3)))
    with pytest.raises(VolvelleError, match="no layer that an adapter can go to has changed"):
        adapt.extract_lora(base, copy.deepcopy(base))
    broken = copy.deepcopy(base)
    with torch.no_grad():
        broken[0].weight[0, 0] = float("nan")
    with pytest.raises(VolvelleError, match=r"NaN or infinite values: 0\.weight"):
        adapt.extract_lora(base, broken)
    for options in ({"rank": 0}, {"rank": 2, "energy": 0.5}, {"energy": 0.0}, {"energy": 1.1}):
        with pytest.raises(UsageError, match="extract_lora"):
            adapt.extract_lora(base, copy.deepcopy(base), **options)
    carrying = copy.deepcopy(base)
    adapt.apply(carrying, adapt.LoRA(rank=1, targets=("0",)))
    with pytest.raises(VolvelleError, match="the base carries an adapter"):
        adapt.extract_lora(carrying, base)
    with pytest.raises(VolvelleError, match="the tuned model carries an adapter"):
        adapt.extract_lora(base, carrying)
