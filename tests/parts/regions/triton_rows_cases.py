"""What the Triton kernels of row sums must do, against plain PyTorch. test_rows.py runs this file in a process of its
own: in Triton's interpreter (TRITON_INTERPRET must be set before Triton is imported), or on a CUDA device.
"""

from __future__ import annotations

import pytest
import torch
from tests.parts.regions.test_pooling import EVERY, maps, rois

from volvelle.functional import deform_conv2d
from volvelle.parts.regions import rows, triton_rows

DEVICE = "cpu" if rows.INTERPRETED else "cuda"
CASES = {  # n, c, m, t
    "one": (1, 1, 1, 1),
    "odd": (20, 7, 13, 4),
    "two blocks of columns": (11, triton_rows.WIDEST + 3, 9, 2),
    "many taps": (6, 16, 8, 33),
    "no result": (5, 4, 0, 4),
    "no column": (5, 0, 3, 4),
}


def close(ours, theirs, dtype):
    assert ours.dtype == theirs.dtype == dtype
    torch.testing.assert_close(ours, theirs, atol=64 * torch.finfo(dtype).eps, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("case", CASES)
def test_sums_and_gradients(case, dtype):
    (n, c, m, t), g = CASES[case], torch.Generator().manual_seed(0)
    table = torch.randn(n, c, generator=g, dtype=dtype).to(DEVICE)
    at = torch.randint(0, n, (m, t), generator=g).to(DEVICE)
    weight = torch.randn(m, t, generator=g, dtype=dtype).to(DEVICE)
    weight[at == n - 1] = 0  # reads outside
    weight[:1, :1] = 1.5  # but for one
    grad = torch.randn(m, c, generator=g, dtype=dtype).to(DEVICE)
    table, weight = table.requires_grad_(), weight.requires_grad_()
    sums = (table[at] * weight[..., None]).sum(1)
    for_table, for_weight = torch.autograd.grad(sums, (table, weight), grad)
    close(rows.fused_sums(table, at, weight), sums, dtype)
    close(rows.fused_table_gradient(grad, at, weight, n), for_table, dtype)
    close(rows.fused_weight_gradient(table, at, grad), for_weight, dtype)
    shifted = torch.stack((table.detach(), -table.detach()), 2)[..., 0]  # no neighbours in memory
    close(rows.fused_sums(shifted, at.flip(1).flip(1), weight), sums, dtype)


def test_a_nan_stays_in_what_reads_it():
    table = torch.ones(4, 3, device=DEVICE)
    table[1] = torch.nan
    at, weight = torch.tensor([[0, 2], [1, 2], [3, 3]], device=DEVICE), torch.ones(3, 2, device=DEVICE)
    assert rows.fused_sums(table, at, weight).isnan().any(1).tolist() == [False, True, False]


def served(monkeypatch, call, inputs, grad):
    """What a call and its gradients are with the kernels."""
    with monkeypatch.context() as patch:
        patch.setattr(rows, "served", lambda table: True)
        out = call(*inputs)
        return out, *torch.autograd.grad(out, inputs, grad)


SLOW = ("ps_roi_align", "ps_roi_align, thundernet", "deform_roi_pool")


@pytest.mark.parametrize("name", ["roi_align", *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)])
def test_poolings_are_what_they_are_without(name, monkeypatch):
    function, channels = EVERY[name]
    x = maps(channels).to(DEVICE).requires_grad_()
    image, corners = rois()[:, :1].to(DEVICE), rois()[:, 1:].to(DEVICE).requires_grad_()

    def call(x, corners):
        return function(x, torch.cat((image, corners), 1))

    out = call(x, corners)
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=out.dtype).to(DEVICE)
    expected = (out, *torch.autograd.grad(out, (x, corners), grad))
    for ours, theirs in zip(served(monkeypatch, call, (x, corners), grad), expected, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-11, rtol=1e-9)


@pytest.mark.slow
def test_deformable_convolution_is_what_it_is_without(monkeypatch):
    g = torch.Generator().manual_seed(0)
    shapes = ((2, 4, 5, 6), (2, 36, 5, 6), (6, 2, 3, 3), (2, 18, 5, 6))
    inputs = [torch.randn(*shape, generator=g, dtype=torch.float64).to(DEVICE).requires_grad_() for shape in shapes]

    def call(x, offset, weight, mask):
        return deform_conv2d(x, offset, weight, padding=1, mask=mask)

    out = call(*inputs)
    grad = torch.randn(out.shape, generator=g, dtype=out.dtype).to(DEVICE)
    expected = (out, *torch.autograd.grad(out, inputs, grad))
    for ours, theirs in zip(served(monkeypatch, call, inputs, grad), expected, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-11, rtol=1e-9)


def test_a_broken_kernel_is_found_out(monkeypatch):
    """The comparisons above reach the kernels."""
    right = triton_rows.sums
    monkeypatch.setattr(triton_rows, "sums", lambda table, at, weight: right(table, at, weight) * 1.001)
    with pytest.raises(AssertionError):
        test_sums_and_gradients("odd", torch.float64)
    with pytest.raises(AssertionError):
        test_poolings_are_what_they_are_without("roi_align", monkeypatch)
