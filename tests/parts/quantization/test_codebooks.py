"""Codebooks: gradients and both conventions of beta, running means, dead codes, k-means, usage."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from tests.train.many import run
from torch.nn import functional as F

from volvelle.parts.quantization.ema import EMAVectorQuantizer, ema_codebook
from volvelle.parts.quantization.kmeans import kmeans
from volvelle.parts.quantization.usage import codebook_usage
from volvelle.parts.quantization.vector_quantize import VectorQuantizer, vector_quantize


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_codes_come_out_to_the_bit_and_gradients_pass_straight_through(dtype):
    torch.manual_seed(0)
    z = torch.randn(2, 5, 3, 4, dtype=dtype, requires_grad=True)
    e = torch.randn(7, 5, dtype=dtype, requires_grad=True)
    found = vector_quantize(z, e, dim=1)
    assert torch.equal(found.quantized, e[found.codes].movedim(-1, 1))
    weight = torch.randn_like(found.quantized)
    grads = torch.autograd.grad((found.quantized * weight).sum(), (z, e), allow_unused=True)
    assert torch.equal(grads[0], weight)
    assert grads[1] is None


@pytest.mark.parametrize(("commitment", "codebook"), [(0.25, 1.0), (1.0, 0.25), (0.25, 0.0)])
def test_the_loss_and_whose_gradient_it_is(commitment, codebook):
    torch.manual_seed(1)
    z, e = torch.randn(6, 3, requires_grad=True), torch.randn(4, 3, requires_grad=True)
    found = vector_quantize(z, e, commitment=commitment, codebook_weight=codebook)
    apart = z - e[found.codes]
    torch.testing.assert_close(found.loss, (commitment + codebook) * apart.square().mean())
    grads = torch.autograd.grad(found.loss, (z, e), allow_unused=True)
    torch.testing.assert_close(grads[0], 2 * commitment * apart / apart.numel())
    expected = torch.zeros_like(e).index_add_(0, found.codes, -2 * codebook * apart / apart.numel())
    torch.testing.assert_close(torch.zeros_like(e) if grads[1] is None else grads[1], expected)


@pytest.mark.peer
@pytest.mark.parametrize("legacy", [False, True])
def test_both_conventions_agree_with_diffusers(legacy):
    vae = pytest.importorskip("diffusers.models.autoencoders.vae")
    torch.manual_seed(2)
    theirs = vae.VectorQuantizer(32, 6, beta=0.25, legacy=legacy)
    theirs.embedding.weight.data.normal_()
    z = torch.randn(2, 6, 5, 4, requires_grad=True)
    weights = {"commitment": 1.0, "codebook_weight": 0.25} if legacy else {"commitment": 0.25, "codebook_weight": 1.0}
    ours = vector_quantize(z, theirs.embedding.weight, dim=1, **weights)
    quantized, loss, (_, _, codes) = theirs(z)
    assert torch.equal(ours.codes.flatten(), codes.flatten())
    torch.testing.assert_close(ours.quantized, quantized)
    torch.testing.assert_close(ours.loss, loss)
    both = [torch.autograd.grad(found, (z, theirs.embedding.weight), retain_graph=True) for found in (ours.loss, loss)]
    torch.testing.assert_close(both[0], both[1])


def test_nan_shows_in_the_loss_and_half_precision_in_fp32():
    z = torch.zeros(3, 2)
    z[1, 0] = math.nan
    assert vector_quantize(z, torch.eye(2)).loss.isnan()
    assert vector_quantize(torch.zeros(3, 2).half(), torch.eye(2).half()).loss.dtype == torch.float32


def test_shapes_that_do_not_fit():
    with pytest.raises(ValueError, match="vector_quantize: codebook must be"):
        vector_quantize(torch.zeros(2, 3), torch.zeros(4, 2))
    with pytest.raises(ValueError, match=r"^VectorQuantizer: codes and width"):
        VectorQuantizer(0, 3)
    with pytest.raises(ValueError, match=r"^EMAVectorQuantizer: codes and width"):
        EMAVectorQuantizer(4, 0)
    with pytest.raises(ValueError, match=r"^EMAVectorQuantizer: decay and least"):
        EMAVectorQuantizer(4, 3, decay=1.0)
    with pytest.raises(ValueError, match="ema_codebook: decay"):
        ema_codebook(*(torch.zeros(1),) * 5, decay=1.5)


def test_a_codebook_learns_by_its_loss():
    torch.manual_seed(3)
    quantizer = VectorQuantizer(4, 2, dim=-1)
    centres = torch.tensor([[3.0, 0.0], [-3.0, 0.0]])
    quantizer.start_from(torch.tensor([[1.0, 1.0], [-1.0, 1.0], [9.0, 9.0], [9.0, 8.0]]))
    optimizer = torch.optim.SGD(quantizer.parameters(), lr=0.5)
    for _ in range(60):
        optimizer.zero_grad()
        quantizer(centres + 0.01 * torch.randn(2, 2)).loss.backward()
        optimizer.step()
    torch.testing.assert_close(quantizer.embedding.weight[:2], centres, atol=0.05, rtol=0)


# Running means


def test_running_means_are_those_of_a_loop():
    torch.manual_seed(4)
    quantizer = EMAVectorQuantizer(5, 3, dim=-1, decay=0.9, least=0.0)
    quantizer.start_from(torch.randn(5, 3))
    e = quantizer.embedding.weight.numpy().astype(np.float64).copy()
    sizes, sums = np.ones(5), e.copy()
    for step in range(4):
        batches = [torch.randn(6 + step, 3), torch.randn(2, 3)]  # two forward passes an update
        counts, totals = np.zeros(5), np.zeros((5, 3))
        for z in batches:
            codes = quantizer(z).codes
            for row, code in zip(z.numpy(), codes.tolist(), strict=True):
                assert code == ((row - e) ** 2).sum(1).argmin()
                counts[code] += 1
                totals[code] += row
        quantizer.update()
        sizes, sums = 0.9 * sizes + 0.1 * counts, 0.9 * sums + 0.1 * totals
        e = sums / sizes[:, None]
        np.testing.assert_allclose(quantizer.embedding.weight.numpy(), e, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(quantizer.embedding.cluster_size.numpy(), sizes, rtol=1e-5)


def test_nothing_seen_and_nothing_learnt_outside_of_training():
    quantizer = EMAVectorQuantizer(5, 3, dim=-1)
    before = {name: value.clone() for name, value in quantizer.state_dict().items()}
    assert quantizer.update() == 0
    quantizer.eval()(torch.randn(9, 3))
    assert quantizer.update() == 0
    for name, value in quantizer.state_dict().items():
        assert torch.equal(value, before[name])
    assert list(quantizer.parameters()) == []
    assert set(before) == {f"embedding.{name}" for name in ("weight", "cluster_size", "embed_avg")}


def dying(codes=16):
    """A codebook of which one code alone is near the data."""
    quantizer = EMAVectorQuantizer(codes, 2, dim=-1, decay=0.5, least=0.1)
    far = torch.full((codes, 2), 50.0)
    far[0] = 0.0
    quantizer.start_from(far)
    return quantizer


def test_dead_codes_begin_anew_with_their_sums_and_stay_where_they_are():
    torch.manual_seed(5)
    quantizer, data = dying(), torch.randn(400, 2)
    for _ in range(30):
        quantizer(data)
        quantizer.update()
    assert len(quantizer(data).codes.unique()) == 16
    assert quantizer.embedding.weight.abs().max() < 5
    held = quantizer.embedding
    torch.testing.assert_close(held.embed_avg / held.cluster_size[:, None], held.weight)


@pytest.mark.parametrize("forgetful", [False, True])
def test_a_code_that_begins_anew_stays_only_if_its_sums_came_along(forgetful):
    torch.manual_seed(5)
    quantizer = dying()
    held, old = quantizer.embedding, quantizer.embedding.embed_avg.clone()
    quantizer(torch.randn(400, 2))
    assert quantizer.update() == 15
    fresh = held.weight.clone()
    assert fresh.abs().max() < 5
    if forgetful:  # the bug this guards against
        held.embed_avg[1:] = old[1:]
    quantizer(torch.zeros(60, 2))  # nothing near most of them
    codes = quantizer(torch.zeros(1, 2)).codes
    quantizer.update()
    others = torch.arange(16) != codes
    assert torch.allclose(held.weight[others], fresh[others], atol=1e-5) != forgetful


def _codes_of_rank(ranks):
    torch.manual_seed(100 + ranks.rank)
    quantizer, data = dying(), torch.randn(50 + 20 * ranks.rank, 2) + ranks.rank
    everything = ranks.collect(data)
    for _ in range(6):
        quantizer(data)
        quantizer.update()
    return quantizer.embedding.weight.tolist(), len(quantizer(torch.cat(everything)).codes.unique())


@pytest.mark.slow
def test_two_processes_hold_the_same_codes(tmp_path):
    from volvelle.train.options import FitOptions

    outcomes = run(tmp_path / "said", 2, FitOptions(ranks=2), _codes_of_rank)
    (first, used), (second, _) = (outcome["value"] for outcome in outcomes)
    assert first == second
    assert used == 16


# K-means and usage


def test_kmeans_finds_clusters_and_lessens_the_error():
    torch.manual_seed(6)
    centres = torch.randn(12, 4) * 20
    points = (centres[torch.randint(12, (600,))] + torch.randn(600, 4)).float()
    draw = torch.Generator().manual_seed(0)
    found = kmeans(points, 12, iterations=25, generator=draw)
    error = torch.cdist(points, found).min(1).values.square().mean()
    assert error < 1.5 * 4  # the noise's own, four numbers of variance one, and a cluster parted unluckily
    assert torch.equal(found, kmeans(points, 12, iterations=25, generator=torch.Generator().manual_seed(0)))


def test_kmeans_of_as_many_as_there_are_and_of_too_few():
    points = torch.randn(5, 3)
    assert torch.equal(kmeans(points, 5).sort(0).values, points.sort(0).values)
    assert torch.isfinite(kmeans(torch.zeros(8, 2), 4)).all()
    with pytest.raises(ValueError, match="kmeans: vectors"):
        kmeans(points, 6)


def test_usage_of_a_histogram():
    counts = torch.bincount(torch.tensor([0, 1, 1, 3]), minlength=8)
    found = codebook_usage(counts)
    p = torch.tensor([0.25, 0.5, 0.25])
    assert found.share == 3 / 8
    assert found.perplexity == pytest.approx(float((-(p * p.log()).sum()).exp()))
    for bad in (torch.zeros(4), torch.tensor([-1.0, 2.0]), torch.ones(2, 2)):
        with pytest.raises(ValueError, match="codebook_usage: counts"):
            codebook_usage(bad)


def test_modules_look_up_what_they_quantize():
    for quantizer in (VectorQuantizer(6, 3), EMAVectorQuantizer(6, 3)):
        z = torch.randn(2, 3, 4, 5)
        found = quantizer.eval()(z)
        assert torch.equal(quantizer.look_up(found.codes), found.quantized)
        assert torch.equal(found.quantized, F.embedding(found.codes, quantizer.embedding.weight).movedim(-1, 1))
