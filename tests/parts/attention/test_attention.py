"""attention(): every back end against the written-out formula in fp64, values and gradients, all kinds of calls."""

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

from volvelle.parts.attention.attention import BACKENDS, Attention, attention
from volvelle.parts.attention.sdpa import SDPA
from volvelle.parts.position.alibi import ALiBi
from volvelle.parts.position.encoding import Bias, PositionEncoding

DIRECT = ("sdpa", "tiled", "reference")
"""The back ends that need nothing but torch's own operations; the others have test files of their own."""


def oracle(q, k, v, *, mask=None, bias=None, causal=False, scale=None):
    """Loops over batch, head and query in fp64: softmax over the allowed keys, 0 where there are none."""
    q, k, v = q.double(), k.double(), v.double()
    (b, h, n_q, d), (h_kv, n_k) = q.shape, k.shape[1:3]
    scale = d**-0.5 if scale is None else scale
    mask = torch.ones(b, h, n_q, n_k, dtype=torch.bool) if mask is None else mask.expand(b, h, n_q, n_k)
    bias = torch.zeros(b, h, n_q, n_k, dtype=torch.float64) if bias is None else bias.double().expand(b, h, n_q, n_k)
    rows = []
    for ib in range(b):
        for ih in range(h):
            kv = ih // (h // h_kv)
            for i in range(n_q):
                keys = [j for j in range(n_k) if mask[ib, ih, i, j] and (not causal or j <= i + n_k - n_q)]
                if not keys:
                    rows.append(v.new_zeros(v.shape[3]))
                    continue
                scores = torch.stack([q[ib, ih, i] @ k[ib, kv, j] * scale + bias[ib, ih, i, j] for j in keys])
                rows.append(scores.softmax(0) @ v[ib, kv, keys])
    return torch.stack(rows).view(b, h, n_q, -1)


def tensors(b, h, h_kv, n_q, n_k, d, *, d_v=None, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    shapes = ((b, h, n_q, d), (b, h_kv, n_k, d), (b, h_kv, n_k, d_v or d))
    return tuple(torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes)


def random_mask(*shape, seed=1):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed)) < 0.6


# b, h, h_kv, n_q, n_k, d
SHAPES = {
    "square": (2, 4, 4, 5, 5, 8),
    "grouped": (3, 6, 2, 7, 7, 4),
    "ragged": (2, 3, 1, 11, 13, 6),
    "few grouped queries": (2, 6, 2, 3, 9, 8),
    "more queries": (2, 2, 2, 6, 3, 4),
    "one query": (2, 6, 2, 1, 9, 8),
    "one query, one head": (2, 3, 3, 1, 4, 8),
    "one key": (2, 4, 2, 3, 1, 4),
    "beyond a block": (1, 2, 1, 70, 130, 16),
}
# kinds of call: (b, h, n_q, n_k) -> options
KINDS = {
    "plain": lambda b, h, q, k: {},
    "scale": lambda b, h, q, k: {"scale": 0.7},
    "causal": lambda b, h, q, k: {"causal": True},
    "mask (q, k)": lambda b, h, q, k: {"mask": random_mask(q, k)},
    "mask of a row": lambda b, h, q, k: {"mask": random_mask(b, 1, 1, k)},
    "mask of a head": lambda b, h, q, k: {"mask": random_mask(1, h, q, k)},
    "full mask": lambda b, h, q, k: {"mask": random_mask(b, h, q, k)},
    "mask and causal": lambda b, h, q, k: {"mask": random_mask(b, 1, q, k), "causal": True},
    "nothing allowed": lambda b, h, q, k: {"mask": torch.zeros(b, 1, 1, k, dtype=torch.bool)},
    "bias (q, k)": lambda b, h, q, k: {"bias": torch.linspace(-2, 2, q * k, dtype=torch.float64).view(q, k)},
    "bias of a head": lambda b, h, q, k: {"bias": torch.linspace(-2, 2, h * k, dtype=torch.float64).view(h, 1, k)},
    "bias, mask, causal": lambda b, h, q, k: {
        "bias": torch.linspace(-2, 2, b * h * q * k, dtype=torch.float64).view(b, h, q, k),
        "mask": random_mask(b, 1, 1, k),
        "causal": True,
    },
}
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 2e-2, torch.float16: 3e-3}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES)
def test_reference_is_the_formula(shape, kind):
    b, h, h_kv, n_q, n_k, d = SHAPES[shape]
    q, k, v = tensors(b, h, h_kv, n_q, n_k, d)
    options = KINDS[kind](b, h, n_q, n_k)
    ours = attention(q, k, v, backend="reference", **options)
    torch.testing.assert_close(ours, oracle(q, k, v, **options), rtol=0, atol=1e-13)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("backend", DIRECT)
def test_values_and_gradients_agree_with_the_reference_in_fp64(backend, shape, kind, dtype):
    b, h, h_kv, n_q, n_k, d = SHAPES[shape]
    q, k, v = tensors(b, h, h_kv, n_q, n_k, d, dtype=dtype)
    options = KINDS[kind](b, h, n_q, n_k)
    for bias_grad in (False, True) if "bias" in options else (False,):
        results = []
        for wide, name in ((False, backend), (True, "reference")):
            inputs = [x.double().requires_grad_() if wide else x.clone().requires_grad_() for x in (q, k, v)]
            if "bias" in options:
                # dtype's own rounding of the bias belongs to the input, not to the back end
                bias = options["bias"].to(dtype).to(torch.float64 if wide else dtype).requires_grad_(bias_grad)
                options = {**options, "bias": bias}
                inputs += [bias] if bias_grad else []
            out = attention(*inputs[:3], backend=name, **options)
            weight = torch.linspace(-1, 1, out.numel(), dtype=torch.float64).view(out.shape).to(out.dtype)
            results.append((out, *torch.autograd.grad(out, inputs, weight)))
            assert out.dtype == inputs[0].dtype
        for ours, exact in zip(*results, strict=True):
            assert ours.isfinite().all()
            error = (ours.double() - exact).abs().max()
            assert error <= TOLERANCE[dtype] * max(1.0, exact.abs().max().item())


@pytest.fixture
def guarded(monkeypatch):
    """SDPA as it runs on a device whose kernels are not known to give 0 for masked rows."""
    monkeypatch.setitem(BACKENDS, "guarded", SDPA(zero_rows_on=()))


@pytest.mark.usefixtures("guarded")
@pytest.mark.parametrize("backend", [*DIRECT, "guarded"])
@pytest.mark.parametrize("with_bias", [None, "fixed", "learnable"])
def test_a_query_that_may_attend_to_nothing_gives_zero_with_zero_gradient(backend, with_bias):
    q, k, v = (x.requires_grad_() for x in tensors(2, 4, 2, 3, 5, 8))
    mask = torch.ones(2, 1, 3, 5, dtype=torch.bool)
    mask[0, :, 1] = False
    bias = None if with_bias is None else torch.randn(4, 3, 5, dtype=torch.float64)
    if bias is not None and with_bias == "learnable":
        bias.requires_grad_()
    out = attention(q, k, v, mask=mask, bias=bias, backend=backend)
    assert (out[0, :, 1] == 0).all()
    assert (out[0, :, 0] != 0).all()
    grads = torch.autograd.grad(out.square().sum(), (q, k, v) + ((bias,) if with_bias == "learnable" else ()))
    assert all(g.isfinite().all() for g in grads)
    assert (grads[0][0, :, 1] == 0).all()


@pytest.mark.usefixtures("guarded")
@pytest.mark.parametrize("kind", [kind for kind in KINDS if "mask" in kind or kind in {"causal", "nothing allowed"}])
@pytest.mark.parametrize("shape", ["grouped", "more queries", "one query"])
def test_the_guard_of_masked_rows_changes_nothing_else(shape, kind):
    b, h, h_kv, n_q, n_k, d = SHAPES[shape]
    q, k, v = tensors(b, h, h_kv, n_q, n_k, d)
    options = KINDS[kind](b, h, n_q, n_k)
    expected = attention(q, k, v, backend="reference", **options)
    torch.testing.assert_close(attention(q, k, v, backend="guarded", **options), expected, rtol=0, atol=1e-12)


def test_the_reference_has_second_and_forward_derivatives():
    q, k, v = (x.requires_grad_() for x in tensors(1, 2, 1, 3, 4, 2))
    bias = torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True)
    mask = torch.tensor([[True, True, False, True], [False] * 4, [True] * 4])

    def call(q, k, v, bias):
        return attention(q, k, v, bias=bias, mask=mask, backend="reference")

    assert gradcheck(call, (q, k, v, bias), check_forward_ad=True)
    assert gradgradcheck(call, (q, k, v, bias))


@pytest.mark.parametrize("backend", DIRECT)
def test_autocast_casts_the_inputs_and_the_reference_still_computes_in_fp32(backend):
    q, k, v = tensors(2, 4, 2, 3, 5, 8, dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = attention(q, k.bfloat16(), v, backend=backend)  # as with a norm in fp32 before the product
        kept = attention(q.double(), k.double(), v.double(), backend=backend)
    assert (out.dtype, kept.dtype) == (torch.bfloat16, torch.float64)
    expected = attention(*(x.bfloat16().double() for x in (q, k, v)), backend="reference")
    error = (out.double() - expected).abs().max()
    assert error <= (2**-8 if backend == "reference" else 2e-2) * expected.abs().max()


@pytest.mark.parametrize("heads", [1, 2])
@pytest.mark.parametrize("option", ["causal", "mask", "factored"])
def test_the_fused_kernel_says_what_to_pass_for_a_second_derivative(option, heads):
    q, k, v = (x.requires_grad_() for x in tensors(1, 2, heads, 3, 3, 4))
    mask = torch.tensor([True, True, False])
    options = {"causal": {"causal": True}, "mask": {"mask": mask}, "factored": {"bias": ALiBi(2).bias()}}[option]
    out, why = attention(q, k, v, **options, explain=True)
    assert why.backend == "sdpa"
    gradients = torch.autograd.grad(out.square().sum(), (q, k, v), create_graph=True)
    for first in gradients:
        with pytest.raises(RuntimeError, match="the sdpa back end has no second derivative; pass derivatives=2"):
            torch.autograd.grad(first.sum(), q, retain_graph=True)
    known = torch.autograd.grad(
        attention(q, k, v, **options, derivatives=2).square().sum(), (q, k, v), create_graph=True
    )
    torch.testing.assert_close(gradients, known)
    assert torch.autograd.grad(known[0].sum(), q)[0].abs().sum() > 0


def test_a_graph_of_gradients_that_nobody_differentiates_is_no_error():
    q, k, v = (x.requires_grad_() for x in tensors(1, 2, 2, 3, 3, 4))
    (first,) = torch.autograd.grad(attention(q, k, v).square().sum(), q, create_graph=True)
    (plain,) = torch.autograd.grad(attention(q, k, v).square().sum(), q)
    assert torch.equal(first, plain)
    other = (first.detach() * q).sum() + q.square().sum()
    assert torch.equal(torch.autograd.grad(other, q)[0], first.detach() + 2 * q)


def test_values_may_be_of_another_width():
    q, k, v = tensors(2, 4, 2, 3, 5, 8, d_v=3)
    for backend in DIRECT:
        out = attention(q, k, v, causal=True, backend=backend)
        torch.testing.assert_close(out, oracle(q, k, v, causal=True), rtol=0, atol=1e-12)


def test_strided_views_and_expanded_tensors_give_the_same():
    """As a cache gives them: a slice of a longer buffer, heads transposed in."""
    q, k, v = tensors(2, 4, 2, 3, 5, 8)
    buffer = torch.zeros(2, 2, 9, 8, dtype=torch.float64)
    buffer[:, :, :5] = k
    q_view = q.transpose(1, 2).contiguous().transpose(1, 2)
    for backend in DIRECT:
        expected = attention(q, k, v, backend=backend)
        torch.testing.assert_close(attention(q_view, buffer[:, :, :5], v, backend=backend), expected)
        one = attention(q_view[:, :, :1], buffer[:, :, :5], v, backend=backend)
        torch.testing.assert_close(one, expected[:, :, :1])


class Distances(Bias):
    """A learnable bias by distance and head, given at positions, plus a value term when asked."""

    def __init__(self, table, values=None):
        self.table, self.values = table, values
        self.has_value_term = values is not None

    @staticmethod
    def distance(q_positions, k_positions):
        return (q_positions[..., :, None] - k_positions[..., None, :]).clamp(-3, 3) + 3

    def tile(self, q, k, q_positions, k_positions):
        block = self.table[:, self.distance(q_positions, k_positions)]
        return block[None] if block.dim() == 3 else block.transpose(0, 1)

    def value_term(self, weights, q_positions, k_positions):
        assert self.values is not None
        return torch.einsum("bhij,ijd->bhid", weights, self.values[self.distance(q_positions, k_positions)])


@pytest.mark.parametrize("backend", DIRECT)
@pytest.mark.parametrize("rows", [False, True])
def test_a_bias_object_is_asked_at_the_positions(backend, rows):
    table = torch.randn(4, 7, dtype=torch.float64, requires_grad=True)
    q, k, v = tensors(2, 4, 2, 2, 5, 8)
    q_positions, k_positions = torch.tensor([10, 3]), torch.tensor([0, 2, 9, 10, 11])
    if rows:
        q_positions, k_positions = torch.stack((q_positions, q_positions + 1)), torch.stack((k_positions,) * 2)
    ours = attention(q, k, v, bias=Distances(table), q_positions=q_positions, k_positions=k_positions, backend=backend)
    whole = Distances(table).tile(q, k, q_positions, k_positions)
    expected = attention(q, k, v, bias=whole, backend="reference")
    torch.testing.assert_close(ours, expected)
    grads = [torch.autograd.grad(out.square().sum(), table, retain_graph=True)[0] for out in (ours, expected)]
    torch.testing.assert_close(*grads)
    # by default the queries stand at the end of the keys
    ours = attention(q, k, v, bias=Distances(table), backend=backend)
    ends = attention(
        q, k, v, bias=Distances(table), q_positions=torch.arange(3, 5), k_positions=torch.arange(5), backend=backend
    )
    assert torch.equal(ours, ends)


def test_a_value_term_goes_to_a_back_end_that_has_it():
    table, values = torch.randn(4, 7, dtype=torch.float64), torch.randn(7, 8, dtype=torch.float64)
    q, k, v = tensors(2, 4, 4, 3, 3, 8)
    bias = Distances(table, values)
    out, why = attention(q, k, v, bias=bias, explain=True)
    assert why.backend == "tiled"
    assert "value term" in why.rejected["sdpa"]
    # every key's value is v_j plus the vector of its distance (Shaw et al., equation 3)
    positions = torch.arange(3)
    scores = q @ k.mT * 8**-0.5 + bias.tile(q, k, positions, positions)
    moved = v[:, :, None] + values[Distances.distance(positions, positions)]
    torch.testing.assert_close(out, torch.einsum("bhij,bhijd->bhid", scores.softmax(-1), moved))
    with pytest.raises(ValueError, match="back end 'sdpa' cannot serve this call: the bias adds a value term"):
        attention(q, k, v, bias=bias, backend="sdpa")


def test_explain_says_what_was_chosen_and_changes_nothing():
    q, k, v = tensors(1, 2, 2, 3, 3, 4)
    out, why = attention(q, k, v, explain=True)
    assert torch.equal(out, attention(q, k, v))
    assert why.backend == "sdpa"
    assert attention(q, k, v, backend="reference", explain=True)[1].why == "asked for by name"


def test_the_module_supplies_the_bias_of_its_encoding():
    class Encoding(PositionEncoding):
        def __init__(self):
            super().__init__()
            self.table = torch.nn.Parameter(torch.randn(2, 7))

        def bias(self):
            return Distances(self.table)

    encoding = Encoding()
    module = Attention(causal=True, position=encoding)
    q, k, v = tensors(2, 2, 2, 5, 5, 4, dtype=torch.float32)
    out = module(q, k, v)
    assert torch.equal(out, attention(q, k, v, causal=True, bias=encoding.bias()))
    out.sum().backward()
    assert encoding.table.grad is not None
    assert list(module.state_dict()) == ["position.table"]


OPTIONS = [
    {"causal": True},
    {"mask": torch.ones(1, 1, 4, 6, dtype=torch.bool).tril(2)},
    {"bias": torch.linspace(-1, 1, 24).view(4, 6)},
]


@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: next(iter(o)))
@pytest.mark.parametrize("backend", DIRECT)
def test_compiled_equals_eager(backend, options):
    torch.compiler.reset()  # a function compiled under other options counts towards the recompile limit
    q, k, v = tensors(2, 4, 2, 4, 6, 8, dtype=torch.float32)

    def call(q, k, v):
        return attention(q, k, v, backend=backend, **options)

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(q, k, v), call(q, k, v))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(compiled(q, k, v), call(q, k, v))


def test_a_compiled_decoding_step_equals_eager():
    """Other numbers of keys do not need another graph after the first change."""
    torch.compiler.reset()
    decode = torch.compile(lambda q, k, v: attention(q, k, v), fullgraph=True, backend="aot_eager")
    for n_k in (6, 7, 8, 9):
        q, k, v = tensors(2, 4, 2, 1, n_k, 8, dtype=torch.float32)
        torch.testing.assert_close(decode(q, k, v), attention(q, k, v))


def test_exported_equals_eager():
    q, k, v = tensors(2, 4, 2, 6, 6, 8, dtype=torch.float32)
    module = Attention(causal=True)
    torch.testing.assert_close(torch.export.export(module, (q, k, v)).module()(q, k, v), module(q, k, v))


@pytest.mark.parametrize(
    ("options", "folded"),
    [
        ({"causal": True}, False),
        ({"mask": torch.ones(64, 64, dtype=torch.bool).tril()}, False),
        ({"mask": torch.ones(2, 1, 1, 64, dtype=torch.bool)}, False),
        ({"bias": torch.zeros(6, 64, 64)}, False),
        ({}, True),
        ({"mask": torch.ones(2, 1, 1, 64, dtype=torch.bool)}, True),
    ],
    ids=["causal", "tree mask", "padding", "bias", "decode", "decode, padding"],
)
def test_the_fused_cpu_kernel_is_taken(options, folded):
    """Grouped queries included, and without repeating keys and values for it."""
    q, k, v = tensors(2, 6, 2, 1 if folded else 64, 64, 16, dtype=torch.float32)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        attention(q, k, v, **options)
    names = {event.key for event in profile.key_averages()}
    assert "aten::_scaled_dot_product_flash_attention_for_cpu" in names
    assert not names & {"aten::repeat_interleave", "aten::softmax", "aten::_softmax", "aten::clone"}


Q = torch.zeros(2, 4, 3, 8)
K = torch.zeros(2, 2, 5, 8)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: attention(Q[0], K, K), ValueError, r"q must have shape \(b, h, n, d\), got q of \(4, 3, 8\)"),
        (lambda: attention(Q, K, K[:, :, :4]), ValueError, "must agree"),
        (lambda: attention(Q, K[..., :4], K), ValueError, "must agree"),
        (lambda: attention(Q[:1], K, K), ValueError, "must agree"),
        (lambda: attention(Q[:, :3], K, K), ValueError, "the 3 heads of q must be a multiple of the 2 heads of k"),
        (lambda: attention(Q, K[:, :, :0], K[:, :, :0]), ValueError, "k must hold at least one key"),
        (lambda: attention(Q, K.double(), K), TypeError, "must share one floating-point dtype"),
        (lambda: attention(Q.long(), K.long(), K.long()), TypeError, "must share one floating-point dtype"),
        (lambda: attention(Q, K, K, mask=torch.zeros(3, 5)), TypeError, "mask must be bool"),
        (lambda: attention(Q, K, K, mask=torch.ones(3, 4).bool()), ValueError, r"mask must broadcast to \(b, h, n_q"),
        (lambda: attention(Q, K, K, mask=torch.ones(2, 2, 3, 5).bool()), ValueError, r"got mask of \(2, 2, 3, 5\)"),
        (lambda: attention(Q, K, K, mask=torch.ones(1, 2, 1, 3, 5).bool()), ValueError, "mask must broadcast"),
        (lambda: attention(Q, K, K, bias=torch.ones(3, 5).bool()), TypeError, "bias must be floating point"),
        (lambda: attention(Q, K, K, bias=torch.zeros(2, 3, 5)), ValueError, "bias must broadcast"),
        (
            lambda: attention(Q, K, K, backend="flash"),
            ValueError,
            r"backend must be 'auto' or one of \[.*'reference', 'sdpa'",
        ),
    ],
)
def test_errors_name_the_tensor_and_the_shape(call, error, message):
    with pytest.raises(error, match=f"attention: .*{message}"):
        call()
