"""Sinusoidal and learned positions: the formula, the shift property, clear errors, and the hooks of the protocol."""

import math

import pytest
import torch

from volvelle.parts.position.encoding import PositionEncoding
from volvelle.parts.position.learned import LearnedPositions, learned_positions
from volvelle.parts.position.rope import RotaryEmbedding
from volvelle.parts.position.sinusoidal import SinusoidalPositions, sinusoidal_positions


def test_sinusoidal_is_the_papers_formula():
    table = sinusoidal_positions(torch.tensor([[0, 3], [1_000_000, 7]]), 6, dtype=torch.float64)
    assert table.shape == (2, 2, 6)
    for row, m in zip(table.view(4, 6), (0, 3, 1_000_000, 7), strict=True):
        for i in range(3):
            angle = m * 10000.0 ** (-2 * i / 6)
            assert row[2 * i].item() == pytest.approx(math.sin(angle), abs=1e-9)
            assert row[2 * i + 1].item() == pytest.approx(math.cos(angle), abs=1e-9)


def test_sinusoidal_layouts_hold_the_same_numbers():
    pairs = sinusoidal_positions(torch.arange(5), 8)
    halves = sinusoidal_positions(torch.arange(5), 8, layout="half")
    assert torch.equal(halves[:, :4], pairs[:, ::2])
    assert torch.equal(halves[:, 4:], pairs[:, 1::2])


def test_sinusoidal_products_depend_on_the_distance_only():
    here = sinusoidal_positions(torch.arange(9), 32, dtype=torch.float64)
    there = sinusoidal_positions(torch.arange(9) + 5000, 32, dtype=torch.float64)
    torch.testing.assert_close(there @ there.T, here @ here.T, rtol=0, atol=1e-9)


@pytest.mark.parametrize("positions", [torch.arange(3), torch.tensor([[0, 1, 2], [0, 0, 1]])])
def test_embed_adds_the_vectors_in_the_dtype_of_x(positions):
    x = torch.randn(2, 3, 8, dtype=torch.bfloat16)
    module = SinusoidalPositions(8).to(torch.bfloat16)
    assert module.state_dict() == {}
    out = module.embed(x, positions)
    assert out.dtype == torch.bfloat16
    assert torch.equal(out, x + sinusoidal_positions(positions, 8, dtype=torch.bfloat16))


def test_learned_looks_up_and_trains_the_rows_used():
    module = LearnedPositions(4, 8)
    module.embed(torch.zeros(2, 3, 8), torch.tensor([[0, 1, 3], [0, 0, 1]])).sum().backward()
    assert module.weight.grad is not None
    assert module.weight.grad[:, 0].tolist() == [3.0, 2.0, 0.0, 1.0]


@pytest.mark.parametrize(("positions", "bad"), [([0, 4], 4), ([-1, 2], -1)])
def test_learned_refuses_positions_that_were_not_trained(positions, bad):
    message = rf"learned_positions: 4 positions were trained \(0 to 3\), got position {bad}"
    with pytest.raises(ValueError, match=message):
        learned_positions(torch.tensor(positions), torch.zeros(4, 8))


def test_errors_of_sinusoidal():
    with pytest.raises(ValueError, match="dim must be even and positive, got 5"):
        sinusoidal_positions(torch.arange(2), 5)
    with pytest.raises(ValueError, match="layout must be"):
        sinusoidal_positions(torch.arange(2), 4, layout="both")  # type: ignore[arg-type]


@pytest.mark.parametrize("module", [SinusoidalPositions(8), LearnedPositions(16, 8)])
def test_absolute_encodings_compile_and_export(module):
    class Embed(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = module

        def forward(self, x, positions):
            return self.inner.embed(x, positions)

    x, positions = torch.randn(2, 5, 8), torch.arange(5)
    expected = module.embed(x, positions)
    compiled = torch.compile(Embed(), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, positions), expected)
    torch.testing.assert_close(torch.export.export(Embed(), (x, positions)).module()(x, positions), expected)


def test_hooks_not_used_leave_the_model_alone():
    x, q, positions = torch.randn(1, 3, 8), torch.randn(1, 2, 3, 8), torch.arange(3)
    nothing = PositionEncoding()
    assert nothing.embed(x, positions) is x
    assert nothing.rotate(q, q, positions) == (q, q)
    assert LearnedPositions(4, 8).rotation(positions, x.dtype) is None
    assert RotaryEmbedding(8).embed(x, positions) is x
    assert RotaryEmbedding(8).bias() is None
    one_shot = RotaryEmbedding(8).rotate(q, q, positions)
    torch.testing.assert_close(one_shot, RotaryEmbedding(8)(q, q, positions))
