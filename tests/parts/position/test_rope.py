"""RoPE: the paper's properties, both layouts, exact angles, immunity to casting, and derivatives."""

import math

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

from volvelle.parts.position.rope import (
    RotaryEmbedding,
    apply_rope,
    convert_rope_layout,
    rope_frequencies,
    rope_rotation,
)
from volvelle.parts.position.rope_scaling import DynamicNTKScaling, LinearScaling, LongRoPEScaling, NTKScaling

LAYOUTS = ("half", "interleaved")


def heads(b=2, h=3, n=7, d=8, dtype=torch.float64, seed=0):
    return torch.randn(b, h, n, d, dtype=dtype, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_each_pair_turns_by_position_times_frequency(layout):
    """Against complex multiplication, x_1 + i x_2 times exp(i m θ), pair by pair."""
    x, positions = heads(), torch.tensor([0, 1, 5, 2, 100, 3, 3])
    turned, _ = apply_rope(x, x, positions, layout=layout, base=100.0)
    theta = rope_frequencies(8, base=100.0)
    for i in range(4):
        first, second = (i, i + 4) if layout == "half" else (2 * i, 2 * i + 1)
        expected = torch.complex(x[..., first], x[..., second]) * torch.polar(
            torch.ones(7, dtype=torch.float64), positions * theta[i]
        )
        torch.testing.assert_close(turned[..., first], expected.real, rtol=0, atol=1e-14)
        torch.testing.assert_close(turned[..., second], expected.imag, rtol=0, atol=1e-14)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_inner_product_depends_on_the_distance_only(layout):
    q, k, positions = heads(seed=1), heads(seed=2), torch.tensor([0, 1, 4, 9, 10, 30, 31])
    q0, k0 = apply_rope(q, k, positions, layout=layout)
    for shift in (1, 1000, 1_000_000):
        q1, k1 = apply_rope(q, k, positions + shift, layout=layout)
        torch.testing.assert_close(q1 @ k1.mT, q0 @ k0.mT, rtol=0, atol=1e-8)
    # and it does depend on it: other distances give other products
    q2, _ = apply_rope(q, k, positions + 1, layout=layout)
    assert (q2 @ k0.mT - q0 @ k0.mT).abs().max() > 0.1


@pytest.mark.parametrize("layout", LAYOUTS)
def test_norms_are_kept(layout):
    x = heads()
    turned, _ = apply_rope(x, x, torch.arange(7), layout=layout)
    torch.testing.assert_close(turned.norm(dim=-1), x.norm(dim=-1))
    assert torch.equal(turned[:, :, 0], x[:, :, 0])  # position 0 does not turn


@pytest.mark.parametrize("dim", [None, 4])
def test_layouts_agree_once_the_weights_are_converted(dim):
    """Scores and their source: projections in one layout, converted, give the other layout's scores exactly."""
    b, n, h, h_kv, d, width = 2, 5, 4, 2, 8, 16
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(b, n, width, generator=generator, dtype=torch.float64)
    wq, wk = (torch.randn(heads * d, width, generator=generator, dtype=torch.float64) for heads in (h, h_kv))
    bias_q = torch.randn(h * d, generator=generator, dtype=torch.float64)

    def scores(wq, bias_q, wk, layout):
        q = (x @ wq.T + bias_q).view(b, n, h, d).transpose(1, 2)
        k = (x @ wk.T).view(b, n, h_kv, d).transpose(1, 2)
        q, k = apply_rope(q, k, torch.arange(n), layout=layout, dim=dim)
        return q @ k.repeat_interleave(h // h_kv, 1).mT

    interleaved = scores(wq, bias_q, wk, "interleaved")
    converted = [convert_rope_layout(w, m, to="half", dim=dim) for w, m in ((wq, h), (bias_q, h), (wk, h_kv))]
    torch.testing.assert_close(scores(*converted, "half"), interleaved, rtol=0, atol=1e-12)
    assert (scores(wq, bias_q, wk, "half") - interleaved).abs().max() > 0.1  # the silent mix-up
    back = convert_rope_layout(converted[0], h, to="interleaved", dim=dim)
    assert torch.equal(back, wq)


def test_partial_rotary_passes_the_rest():
    x = heads()
    turned, _ = apply_rope(x, x, torch.arange(7), dim=4)
    assert torch.equal(turned[..., 4:], x[..., 4:])
    torch.testing.assert_close(turned[..., :4], apply_rope(x[..., :4], x[..., :4], torch.arange(7))[0])


def test_positions_of_each_row():
    x, rows = heads(b=2), torch.stack((torch.arange(7), torch.arange(7) * 3 + 2))
    turned, _ = apply_rope(x, x, rows)
    for b in range(2):
        torch.testing.assert_close(turned[b], apply_rope(x[b : b + 1], x[b : b + 1], rows[b])[0][0])
    # one row of positions serves the whole batch
    torch.testing.assert_close(apply_rope(x, x, rows[:1])[0], apply_rope(x, x, rows[0])[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_exact_at_position_one_million(dtype):
    """The only error left is the last rounding, to half a unit in the last place of numbers up to 1."""
    positions, half_ulp = torch.tensor([1_000_000]), torch.finfo(dtype).eps / 4
    rotation = RotaryEmbedding(128).to(dtype).rotation(positions, dtype)
    expected = [math.cos(1_000_000 * 10000.0 ** (-2 * i / 128)) for i in range(64)] * 2
    error = (rotation.cos[0].double() - torch.tensor(expected, dtype=torch.float64)).abs().max()
    assert error <= half_ulp * 1.01 + 1e-9


def test_casting_and_moving_leave_the_frequencies_alone():
    rope = RotaryEmbedding(64)
    before = rope.frequencies.clone()
    for module in (rope.to(torch.bfloat16), rope.half(), rope.float(), rope.to("cpu", torch.bfloat16)):
        assert module.frequencies.dtype == torch.float64
        assert torch.equal(module.frequencies, before)
    assert rope.state_dict() == {}
    assert list(rope.parameters()) == []
    assert list(rope.buffers()) == []
    with torch.device("meta"):
        built_on_meta = RotaryEmbedding(64)
    assert torch.equal(built_on_meta.to_empty(device="cpu").frequencies, before)


def test_queries_and_keys_may_be_turned_as_one_tensor():
    q, k, positions = heads(h=3, seed=1), heads(h=1, seed=2), torch.arange(7)
    rotation = RotaryEmbedding(8).rotation(positions, q.dtype)
    joint = rotation.turn(torch.cat((q, k), dim=1))
    apart = rotation(q, k)
    assert torch.equal(joint[:, :3], apart[0])
    assert torch.equal(joint[:, 3:], apart[1])


def test_the_result_keeps_the_input_dtype_under_a_finer_table():
    x = heads(dtype=torch.bfloat16)
    turned = RotaryEmbedding(8).rotation(torch.arange(7), torch.float32).turn(x)
    assert turned.dtype == torch.bfloat16
    exact, _ = apply_rope(x.double(), x.double(), torch.arange(7))
    assert (turned.double() - exact).abs().max() <= 2**-8 * 4  # one rounding of values below 4


def test_autocast_does_not_touch_the_angles():
    x, positions = heads(dtype=torch.float32), torch.arange(7) + 100_000
    with torch.autocast("cpu", dtype=torch.bfloat16):
        turned, _ = apply_rope(x, x, positions)
    torch.testing.assert_close(turned, apply_rope(x, x, positions)[0], rtol=0, atol=0)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dim", [None, 2])
def test_derivatives(layout, dim):
    q = heads(1, 2, 3, 4).requires_grad_()
    k = heads(1, 1, 3, 4, seed=3).requires_grad_()
    positions = torch.tensor([2, 0, 11])

    def call(q, k):
        return apply_rope(q, k, positions, layout=layout, dim=dim)

    assert gradcheck(call, (q, k), check_forward_ad=True)
    assert gradgradcheck(call, (q, k))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_scaling_dependent_on_length(layout):
    """Within the trained context dynamic NTK and LongRoPE (short factors 1) are plain RoPE, beyond it they are not."""
    x = heads()
    for scaling in (
        DynamicNTKScaling(2.0, original_context=64),
        LongRoPEScaling([1.0] * 4, [2.0] * 4, original_context=64),
    ):
        module = RotaryEmbedding(8, layout=layout, scaling=scaling)
        near, far = torch.arange(7), torch.arange(7) + 100
        plain = RotaryEmbedding(8, layout=layout)
        torch.testing.assert_close(module(x, x, near)[0], plain(x, x, near)[0])
        assert (module(x, x, far)[0] - plain(x, x, far)[0]).abs().max() > 0.01
        torch.testing.assert_close(module(x, x, far), apply_rope(x, x, far, layout=layout, scaling=scaling))


def test_linear_scaling_divides_the_positions():
    x = heads()
    scaled, _ = apply_rope(x, x, torch.arange(7) * 4, scaling=LinearScaling(4.0))
    torch.testing.assert_close(scaled, apply_rope(x, x, torch.arange(7))[0])


def test_ntk_keeps_the_fastest_pair_and_stretches_the_slowest():
    plain, stretched = rope_frequencies(16), rope_frequencies(16, scaling=NTKScaling(8.0))
    ratio = plain / stretched
    torch.testing.assert_close(ratio, 8.0 ** (torch.arange(8, dtype=torch.float64) / 7), rtol=1e-12, atol=0)
    dynamic = DynamicNTKScaling(8.0, original_context=10).frequencies(16, 10000.0, torch.tensor(20))
    torch.testing.assert_close(dynamic, rope_frequencies(16, scaling=NTKScaling(9.0)))  # 8 * 2 - 7 at twice the length


@pytest.mark.parametrize(
    "scaling", [None, DynamicNTKScaling(2.0, original_context=5), LongRoPEScaling([1.0] * 4, [2.0] * 4, 5)]
)
def test_compiled_and_exported_equal_eager(scaling):
    q, k, positions = heads(dtype=torch.float32), heads(h=1, dtype=torch.float32), torch.arange(7)
    module = RotaryEmbedding(8, scaling=scaling)
    expected = module(q, k, positions)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(q, k, positions), expected)
    exported = torch.export.export(module, (q, k, positions)).module()
    torch.testing.assert_close(exported(q, k, positions), expected)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: apply_rope(torch.zeros(2, 7, 4, 63), torch.zeros(2, 7, 4, 63), torch.arange(4)),
            r"apply_rope: last dimension must be even, got q of shape \(2, 7, 4, 63\)",
        ),
        (lambda: apply_rope(torch.zeros(2, 7, 64), torch.zeros(2, 7, 64), torch.arange(7)), r"must have shape \(b, h"),
        (lambda: apply_rope(torch.zeros(1, 1, 4, 8), torch.zeros(1, 1, 4, 8), torch.arange(3)), "positions must be"),
        (lambda: apply_rope(torch.zeros(1, 1, 4, 8), torch.zeros(1, 1, 4, 8), torch.arange(4.0)), "must be integers"),
        (
            lambda: apply_rope(torch.zeros(1, 1, 4, 8), torch.zeros(1, 1, 4, 8), torch.arange(4), dim=10),
            "dim must be between",
        ),
        (
            lambda: apply_rope(torch.zeros(1, 1, 4, 8), torch.zeros(1, 1, 4, 8), torch.arange(4), layout="neox"),
            "layout must be",
        ),
        (lambda: rope_frequencies(7), "dim must be even and positive, got 7"),
        (lambda: convert_rope_layout(torch.zeros(10, 4), 3, to="half"), "10 rows do not divide into 3 heads"),
        (lambda: convert_rope_layout(torch.zeros(9, 4), 3, to="half"), "must be even"),
    ],
)
def test_errors_name_the_call_and_the_shape(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_rotation_in_fp64_matches_python_floats():
    rotation = rope_rotation(torch.tensor([3]), rope_frequencies(4), torch.float64, factor=2.0)
    assert rotation.cos[0].tolist() == pytest.approx([2 * math.cos(3), 2 * math.cos(0.03)] * 2, abs=1e-15)
    assert rotation.sin[0].tolist() == pytest.approx(
        [-2 * math.sin(3), -2 * math.sin(0.03), 2 * math.sin(3), 2 * math.sin(0.03)], abs=1e-15
    )
