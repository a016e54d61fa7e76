"""A call for every cell of the capability table: the cells served agree with the formula in fp64, the others raise."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from tests.parts.attention.test_attention import TOLERANCE, Distances, random_mask
from tests.parts.attention.test_tiled import ByDistance
from torch.autograd import forward_ad, gradcheck, gradgradcheck

from volvelle.parts.attention import attention as module
from volvelle.parts.attention import flex, tiles
from volvelle.parts.attention.attention import BACKENDS, attention
from volvelle.parts.attention.capabilities import DTYPES, KINDS, LEVELS, spec, table
from volvelle.parts.attention.spec import Shape
from volvelle.parts.position.encoding import Bias

VALUES, GRADIENTS, SECOND, FORWARD = LEVELS
# batch above 1, grouped heads, lengths that no block divides; more than a block of 128 keys, more than a tile of 64
SIZES = {"small": Shape(2, 4, 2, 70, 133, 16, 16), "large": Shape(2, 4, 2, 131, 142, 16, 16)}
TINY = Shape(2, 2, 1, 3, 4, 2, 2)


class FromBoth(Bias):
    """A term computed from q and k and a table of vectors, with a value term when asked."""

    def __init__(self, vectors, values=None):
        self.vectors, self.values, self.has_value_term = vectors, values, values is not None

    def tensors(self):
        return (self.vectors,) if self.values is None else (self.vectors, self.values)

    def tile(self, q, k, q_positions, k_positions):
        wide = torch.promote_types(q.dtype, torch.float32)
        at, keys = Distances.distance(q_positions, k_positions), k.repeat_interleave(q.shape[1] // k.shape[1], 1)
        vectors = self.vectors.double()[at].to(wide)  # whose gradients are then summed in fp64
        score = torch.einsum("bhid,ijd->bhij", q.to(wide), vectors)
        return score + torch.einsum("bhjd,ijd->bhij", keys.to(wide).sin(), vectors)

    def value_term(self, weights, q_positions, k_positions):
        assert self.values is not None
        values = self.values.double()[Distances.distance(q_positions, k_positions)].to(weights.dtype)
        return torch.einsum("bhij,ijd->bhid", weights, values)


class Made:
    """The tensors and options of a call, rounded to `low` and held in `dtype`; `leaves` are to get gradients."""

    def __init__(self, kind: str, shape: Shape, low: torch.dtype, dtype: torch.dtype):
        self.generator, self.low, self.dtype = torch.Generator().manual_seed(7), low, dtype
        b, h, h_kv, n_q, n_k, d, d_v = shape
        self.inputs = [self.leaf(b, h, n_q, d), self.leaf(b, h_kv, n_k, d), self.leaf(b, h_kv, n_k, d_v)]
        self.leaves = list(self.inputs)
        self.options: dict[str, Any] = getattr(self, "_" + re.sub(r"\W+", "_", kind))(shape)

    def leaf(self, *sizes):
        drawn = torch.randn(*sizes, generator=self.generator, dtype=torch.float64)
        return drawn.to(self.low).to(self.dtype).requires_grad_()

    def _plain(self, shape):
        return {}

    def _causal(self, shape):
        return {"causal": True}

    def _boolean_mask(self, shape):
        mask = random_mask(shape.b, 1, shape.n_q, shape.n_k)
        mask[0, :, 1] = False
        return {"mask": mask}

    def _window(self, shape):
        return {"window": (5, 2)}

    def _packed_segments(self, shape):
        keys = torch.randint(0, 4, (shape.b, shape.n_k), generator=self.generator).sort(1).values
        queries = keys[:, -shape.n_q :].clone()
        queries[1, 2] = 9  # which no key has
        return {"segments": (queries, keys)}

    def _bias_a_tensor(self, shape):
        return {"bias": self.leaf(shape.h, shape.n_q, shape.n_k).detach()}

    def _bias_by_distance(self, shape):
        return {"bias": ByDistance(self.leaf(shape.h, 9).detach())}

    def _learnable_bias_a_tensor(self, shape):
        self.leaves.append(self.leaf(shape.b, 1, shape.n_q, shape.n_k))
        return {"bias": self.leaves[-1]}

    def _learnable_bias_by_distance(self, shape):
        self.leaves.append(self.leaf(shape.h, 9))
        return {"bias": ByDistance(self.leaves[-1])}

    def _bias_from_q_and_k(self, shape):
        self.leaves.append(self.leaf(7, shape.d))
        return {"bias": FromBoth(self.leaves[-1])}

    def _bias_with_a_value_term(self, shape):
        self.leaves += [self.leaf(7, shape.d), self.leaf(7, shape.d_v)]
        return {"bias": FromBoth(*self.leaves[-2:])}

    def _dropout(self, shape):
        return {"dropout": 0.3}

    def _log_sum_exp(self, shape):
        return {"return_lse": True}

    def run(self, backend: str, **more: Any) -> tuple[torch.Tensor, ...]:
        """The outputs, (out,) or (out, lse)."""
        torch.manual_seed(3)
        found: Any = attention(*self.inputs, backend=backend, **self.options, **more)
        return found if isinstance(found, tuple) else (found,)

    def gradients(self, outputs: tuple[torch.Tensor, ...], create_graph: bool = False) -> tuple[torch.Tensor, ...]:
        """Of a sum of the outputs with weights of their own."""
        loss = torch.zeros((), dtype=torch.float64)
        for out in outputs:
            weight = torch.linspace(-1, 1, out.numel(), dtype=torch.float64).view(out.shape)
            loss = loss + (out.double() * weight).masked_fill(out == -torch.inf, 0).sum()
        return torch.autograd.grad(loss, self.leaves, create_graph=create_graph)


def refusal(backend, kind, dtype, level, shape=SIZES["small"], **facts):
    return BACKENDS[backend].supports(spec(kind, dtype, level, shape=shape)._replace(**facts))


def close(found, exact, dtype):
    for one, other in zip(found, exact, strict=True):
        assert one.isfinite().all() or (other == -torch.inf).any()
        same = (one == -torch.inf) == (other == -torch.inf)
        error = (one.double() - other).masked_fill(other == -torch.inf, 0).abs().max()
        assert same.all()
        assert error <= TOLERANCE[dtype] * max(1.0, other.masked_fill(other == -torch.inf, 0).abs().max().item())


@pytest.fixture(autouse=True)
def small_and_uncompiled(monkeypatch):
    """Several tiles a call; FlexAttention's own arithmetic, whose generated kernels test_flex.py compares with it."""
    from torch.nn.attention import flex_attention

    monkeypatch.setattr(tiles, "LARGEST", 64)
    monkeypatch.setattr(flex, "uncompiled", lambda *_: "not in these tests")
    monkeypatch.setattr(flex_attention, "_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", True)


def cells():
    found = []
    for backend in BACKENDS:
        for kind in KINDS:
            for dtype, name in DTYPES.items():
                sizes = [
                    s
                    for s in SIZES
                    if s == "small" or len({refusal(backend, kind, dtype, GRADIENTS, x) for x in SIZES.values()}) > 1
                ]
                for size in sizes:
                    found.append(pytest.param(backend, kind, dtype, SIZES[size], id=f"{backend}-{kind}-{name}-{size}"))
    return found


@pytest.mark.parametrize(("backend", "kind", "dtype", "shape"), cells())
def test_a_cell_agrees_with_the_formula_or_raises_by_name(backend, kind, dtype, shape):
    made, exact = Made(kind, shape, dtype, dtype), Made(kind, shape, dtype, torch.float64)
    values, gradients = (refusal(backend, kind, dtype, level, shape) for level in (VALUES, GRADIENTS))
    with torch.no_grad():
        if values is None:
            close(made.run(backend), exact.run("reference"), dtype)
        else:
            with pytest.raises(ValueError, match=re.escape(f"back end {backend!r} cannot serve this call: {values}")):
                made.run(backend)
    if gradients is None:
        close(made.gradients(made.run(backend)), exact.gradients(exact.run("reference")), dtype)
    else:
        with pytest.raises(ValueError, match=re.escape(f"back end {backend!r} cannot serve this call: {gradients}")):
            made.run(backend)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_second_derivatives_are_right_or_refused_by_name(backend, kind):
    for dtype in DTYPES:
        made, exact = Made(kind, TINY, dtype, dtype), Made(kind, TINY, dtype, torch.float64)
        reason = refusal(backend, kind, dtype, SECOND, TINY)
        if reason is None:
            found = []
            for one, name in ((made, backend), (exact, "reference")):
                first = one.gradients(one.run(name, derivatives=2), create_graph=True)
                loss = sum(x.double().square().sum() for x in first)
                found.append(torch.autograd.grad(loss, one.leaves, allow_unused=True))
            for ours, theirs in zip(*found, strict=True):
                close((ours,), (theirs,), dtype)
        else:
            with pytest.raises(ValueError, match=re.escape(reason)):
                made.run(backend, derivatives=2)
    if backend == "reference":
        made = Made(kind, TINY, torch.float64, torch.float64)

        def call(*leaves):
            again = Made(kind, TINY, torch.float64, torch.float64)
            replace(again, leaves)
            return tuple(out.masked_fill(out == -torch.inf, 0) for out in again.run(backend, derivatives=2))

        assert gradcheck(call, made.leaves)
        assert gradgradcheck(call, made.leaves)


def replace(made: Made, leaves) -> None:
    """Let the call be computed from other tensors than it made itself."""
    made.inputs, bias = list(leaves[:3]), made.options.get("bias")
    if isinstance(bias, ByDistance) and len(leaves) > 3:
        made.options["bias"] = ByDistance(leaves[3])
    elif isinstance(bias, FromBoth):
        made.options["bias"] = FromBoth(*leaves[3:])
    elif bias is not None and len(leaves) > 3:
        made.options["bias"] = leaves[3]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_forward_mode_is_right_or_refused_by_name(backend, kind):
    for dtype in DTYPES:
        made = Made(kind, TINY, dtype, dtype)
        reason = refusal(backend, kind, dtype, FORWARD, TINY)
        direction = torch.ones_like(made.inputs[0])
        with torch.no_grad(), forward_ad.dual_level():
            plain = made.inputs[0]
            made.inputs[0] = forward_ad.make_dual(plain.detach(), direction)
            if reason is not None:
                with pytest.raises(ValueError, match=re.escape(reason)):
                    made.run(backend)
                continue
            (found,) = (forward_ad.unpack_dual(x).tangent for x in made.run(backend)[:1])
        made.inputs[0] = plain
        out = made.run("reference", derivatives=2)[0].double()
        # The transpose of the derivative, applied twice: d/dw of w · J^T u is J w for any w.
        probe = torch.ones_like(out).requires_grad_()
        (back,) = torch.autograd.grad(out, plain, probe, create_graph=True)
        (expected,) = torch.autograd.grad(back.double().sum(), probe)
        close((found,), (expected,), dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_row_that_sees_nothing_gives_zero_and_finite_gradients(backend, kind, dtype):
    shape = SIZES["small"]
    made = Made(kind, shape, dtype, dtype)
    mask = torch.ones(shape.b, 1, shape.n_q, shape.n_k, dtype=torch.bool)
    mask[1, :, 3] = False
    made.options["mask"] = mask & made.options.get("mask", mask)
    if refusal(backend, kind, dtype, VALUES, masked=True) is None:
        with torch.no_grad():
            assert (made.run(backend)[0][1, :, 3] == 0).all()
    if refusal(backend, kind, dtype, GRADIENTS, masked=True) is None:
        outputs = made.run(backend)
        assert (outputs[0][1, :, 3] == 0).all()
        assert (outputs[0][0, :, 3] != 0).any()
        gradients = made.gradients(outputs)
        assert all(x.isfinite().all() for x in gradients)
        assert (gradients[0][1, :, 3] == 0).all()


@pytest.mark.parametrize("kind", [kind for kind in KINDS if refusal("sdpa", kind, torch.bfloat16, GRADIENTS) is None])
@pytest.mark.parametrize("backend", [name for name in BACKENDS if name != "sdpa"])
def test_bf16_is_at_most_twice_as_wrong_as_the_fused_kernel(backend, kind):
    exact = Made(kind, SIZES["small"], torch.bfloat16, torch.float64)
    truth = exact.run("reference")
    right = (*truth, *exact.gradients(truth))
    errors = {}
    for name in (backend, "sdpa"):
        made = Made(kind, SIZES["small"], torch.bfloat16, torch.bfloat16)
        if refusal(name, kind, torch.bfloat16, GRADIENTS) is None:
            outputs = made.run(name)
            found = (*outputs, *made.gradients(outputs))
        elif refusal(name, kind, torch.bfloat16, VALUES) is None:
            with torch.no_grad():
                found = made.run(name)
        else:
            found = ()
        errors[name] = [float((x.double() - y).detach().abs().max()) for x, y in zip(found, right, strict=False)]
    for ours, theirs in zip(errors[backend], errors["sdpa"], strict=False):
        assert ours <= 2 * theirs


@pytest.mark.parametrize("kind", KINDS)
def test_the_table_asks_about_the_calls_that_are_made(kind, monkeypatch):
    asked = []
    choose = module._choose
    monkeypatch.setattr(module, "_choose", lambda spec, backend: asked.append(spec) or choose(spec, backend))
    for level, more in ((GRADIENTS, {}), (SECOND, {"derivatives": 2})):
        Made(kind, TINY, torch.float32, torch.float32).run("reference", **more)
        expected = spec(kind, torch.float32, level, shape=TINY)
        assert asked[-1].blockwise() == expected.blockwise()
        assert asked[-1]._replace(blockwise=bool) == expected._replace(blockwise=bool)
    with torch.no_grad():
        Made(kind, TINY, torch.float32, torch.float32).run("reference")
    assert asked[-1]._replace(blockwise=bool) == spec(kind, torch.float32, VALUES, shape=TINY)._replace(blockwise=bool)


def test_auto_goes_to_the_reference_for_what_only_it_can():
    made = Made("plain", TINY, torch.float64, torch.float64)
    assert attention(*made.inputs, derivatives=2, explain=True)[1].backend == "reference"
    with forward_ad.dual_level():
        q = forward_ad.make_dual(made.inputs[0], torch.ones_like(made.inputs[0]))
        why = attention(q, *made.inputs[1:], explain=True)[1]
    assert why.backend == "reference"
    assert "forward-mode" in why.rejected["sdpa"]
    _, pushed = torch.func.jvp(lambda q: attention(q, *made.inputs[1:]), (made.inputs[0],), (made.inputs[0],))
    _, expected = torch.func.jvp(
        lambda q: attention(q, *made.inputs[1:], backend="reference"), (made.inputs[0],), (made.inputs[0],)
    )
    torch.testing.assert_close(pushed, expected)
    with pytest.raises(ValueError, match="derivatives must be 1 or 2, got 3"):
        attention(*made.inputs, derivatives=3)


def test_a_back_end_that_serves_less_is_a_changed_table(monkeypatch):
    before = table("cpu")
    assert len(before) >= len(KINDS) + 2
    monkeypatch.setattr(BACKENDS["tiled"], "supports", lambda spec: "broken" if spec.dropout else None, raising=False)
    assert table("cpu") != before
