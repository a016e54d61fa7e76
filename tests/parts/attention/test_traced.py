"""torch.compile(fullgraph) and torch.export: every back end gives what it gives eagerly, or refuses by name."""

from __future__ import annotations

import pytest
import torch
from tests.parts.attention.test_attention import DIRECT
from tests.parts.attention.test_capabilities import TINY, Made, refusal

from volvelle.parts.attention.attention import BACKENDS, Attention, attention
from volvelle.parts.attention.capabilities import KINDS, LEVELS

VALUES, GRADIENTS, *_ = LEVELS
QUICK = {("tiled", "learnable bias by distance"), ("tiled", "packed segments"), ("tiled", "dropout")}
CASES = [
    pytest.param(backend, kind, marks=() if (backend, kind) in QUICK else pytest.mark.slow)
    for backend in BACKENDS
    for kind in KINDS
    if refusal(backend, kind, torch.float32, VALUES, TINY) is None
]


def flat(found):
    return found if isinstance(found, tuple) else (found,)


@pytest.mark.parametrize(("backend", "kind"), CASES)
def test_compiled_equals_eager(backend, kind):
    torch.compiler.reset()
    made = Made(kind, TINY, torch.float32, torch.float32)
    differentiable = refusal(backend, kind, torch.float32, GRADIENTS, TINY) is None

    def call(q, k, v):
        return flat(attention(q, k, v, backend=backend, **made.options))

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    level = GRADIENTS if differentiable else VALUES
    with torch.set_grad_enabled(differentiable):
        reason = refusal(backend, kind, torch.float32, level, TINY, traced=True)
        if reason is not None:
            with pytest.raises(torch._dynamo.exc.Unsupported, match=reason.partition(",")[0]):
                compiled(*made.inputs)
            return
        eager, traced = call(*made.inputs), compiled(*made.inputs)
    if kind == "dropout":  # a graph draws for itself
        assert all(x.isfinite().all() for x in traced)
        return
    torch.testing.assert_close(traced, eager, rtol=0, atol=2e-6)
    if differentiable:
        for ours, theirs in zip(made.gradients(traced), made.gradients(eager), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=5e-6)


def test_a_traced_graph_drops_as_often_as_asked():
    torch.compiler.reset()
    v = torch.eye(64).expand(1, 1, 64, 64)
    q = torch.zeros(1, 1, 64, 64)

    def call(q, v):
        return attention(q, v, v, dropout=0.25)

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    first, second = compiled(q, v), compiled(q, v)
    assert not torch.equal(first, second)
    assert abs(float((first == 0).float().mean()) - 0.25) < 0.04
    assert abs(float(first.sum(-1).mean()) - 1) < 0.05


@pytest.mark.parametrize("backend", [*DIRECT, pytest.param("flex", marks=pytest.mark.slow)])
def test_exported_equals_eager(backend):
    made = Made("packed segments", TINY, torch.float32, torch.float32)
    module = Attention(causal=True, backend=backend)
    inputs, options = tuple(x.detach() for x in made.inputs), made.options
    with torch.no_grad():
        program = torch.export.export(module, inputs, options)
        torch.testing.assert_close(program.module()(*inputs, **options), module(*inputs, **options))
