"""Absolute encodings that generate their vectors: fp64 oracles, the papers' properties, errors, derivatives."""

import numpy
import pytest
import torch
from scipy.integrate import solve_ivp
from tests.parts.position.zoo import VOCABULARY, WIDTH, ZOO
from torch import nn
from torch.autograd import gradcheck, gradgradcheck
from torch.func import functional_call

from volvelle.parts.position.complex_order import ComplexPositions, complex_positions
from volvelle.parts.position.convolutional import ConvPositions, conv_positions, position_readout
from volvelle.parts.position.hierarchical import HierarchicalPositions, hierarchical_positions
from volvelle.parts.position.learned import LearnedPositions
from volvelle.parts.position.multiplicative import MultiplicativePositions, multiplicative_positions
from volvelle.parts.position.recurrent import RecurrentPositions, recurrent_positions

ROWS = torch.tensor([[0, 3, 1], [7, 7, 2]])


def drawn(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


# Learned, beyond the trained length


@pytest.mark.parametrize("alpha", [0.4, 0.7])
def test_hierarchical_is_the_digit_formula(alpha):
    n, p = 5, drawn(5, 4)
    u = (p - alpha * p[0]) / (1 - alpha)
    ours = hierarchical_positions(torch.arange(n * n), p, alpha=alpha)
    for m in range(n * n):
        i, j = divmod(m, n)
        torch.testing.assert_close(ours[m], alpha * u[i] + (1 - alpha) * u[j], rtol=0, atol=1e-13)
    assert torch.equal(ours[:n], p)  # the trained positions, bit for bit
    assert torch.unique(ours, dim=0).shape[0] == n * n  # every position is its own vector


def test_a_trained_table_loads_and_reaches_its_square():
    trained, longer = LearnedPositions(6, 4), HierarchicalPositions(6, 4)
    longer.load_state_dict(trained.state_dict())
    assert torch.equal(longer(torch.arange(6)), trained(torch.arange(6)))
    assert longer(torch.tensor([[35, 6]])).shape == (1, 2, 4)
    with pytest.raises(ValueError, match="6 trained positions reach from 0 to 35, got position 36"):
        longer(torch.tensor([36]))
    for alpha in (0.5, 0.0, 1.0):
        with pytest.raises(ValueError, match="alpha must be in"):
            hierarchical_positions(torch.arange(2), trained.weight, alpha=alpha)


# Multiplicative


def test_multiplicative_multiplies():
    x, weight = drawn(2, 3, 4), drawn(8, 4, seed=1)
    ours = multiplicative_positions(x, ROWS, weight)
    for b in range(2):
        for n in range(3):
            torch.testing.assert_close(ours[b, n], x[b, n] * weight[ROWS[b, n]], rtol=0, atol=0)
    start = MultiplicativePositions(1000, 8)
    assert abs(start.weight.mean().item() - 1) < 0.01


# Complex-valued


def as_complex(x):
    return torch.complex(*x.chunk(2, dim=-1))


def test_complex_is_amplitude_times_phase():
    """f(j, pos) = r_j e^{i (ω_j pos + θ_j)}, from r and θ of the embedding."""
    r, theta, omega = drawn(2, 3, 4).abs(), drawn(2, 3, 4, seed=1), drawn(2, 3, 4, seed=2)
    x = torch.cat((r * theta.cos(), r * theta.sin()), dim=-1)
    expected = r.numpy() * numpy.exp(1j * (omega * ROWS[..., None] + theta).numpy())
    ours = as_complex(complex_positions(x, ROWS, omega))
    torch.testing.assert_close(ours, torch.from_numpy(expected), rtol=0, atol=1e-13)


def test_complex_offset_is_free_of_position_and_bounded():
    x, omega = drawn(1, 1, 8).expand(1, 50, 8), drawn(4, seed=1)
    f = as_complex(complex_positions(x, torch.arange(50), omega))
    torch.testing.assert_close(f[:, 7:] / f[:, :-7], torch.polar(torch.ones(4).double(), 7 * omega).expand(1, 43, 4))
    torch.testing.assert_close(f.abs(), as_complex(x).abs())
    far = complex_positions(x[:, :1].float(), torch.tensor([1_000_000]), omega.float())
    exact = complex_positions(x[:, :1], torch.tensor([1_000_000]), omega.float().double())
    torch.testing.assert_close(far.double(), exact, rtol=0, atol=1e-6)  # the angle is fp64


def test_complex_words_have_their_own_frequencies():
    module = ComplexPositions(8, vocabulary=VOCABULARY)
    nn.init.normal_(module.weight)
    x, ids = torch.randn(2, 3, 8), torch.tensor([[1, 2, 3], [3, 2, 9]])
    out = module.embed(x, torch.tensor([4, 4, 4]), ids)
    torch.testing.assert_close(out[0, 2], complex_positions(x[:1], torch.full((3,), 4), module.weight[3])[0, 2])
    with pytest.raises(ValueError, match="needs the ids"):
        module.embed(x, ROWS)
    with pytest.raises(ValueError, match="even and positive, got 7"):
        ComplexPositions(7)
    with pytest.raises(ValueError, match=r"must agree, got x of shape \(2, 3, 8\) and frequencies of shape \(3,\)"):
        complex_positions(x, ROWS, torch.ones(3))
    shared = ComplexPositions(8)
    assert torch.equal(shared.embed(x, ROWS), complex_positions(x, ROWS, shared.weight))


# Recurrent


def floater(dim=4, **options):
    torch.manual_seed(3)
    module = RecurrentPositions(dim, hidden=6, **options).double()
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.7)
    return module


def slope(module):
    w_1, b_1, w_2, b_2 = (weight.detach().numpy() for weight in module.dynamics)
    return lambda t, p: w_2 @ numpy.tanh(w_1 @ numpy.append(p, t) + b_1) + b_2


@pytest.mark.parametrize("solver", ["euler", "rk4"])
def test_recurrence_is_the_solvers_formula(solver):
    module = floater(delta=0.2, solver=solver)
    h, p, states, delta = slope(module), module.start.detach().numpy(), [], 0.2
    for m in range(8):
        states.append(p)
        k_1 = h(m * delta, p)
        if solver == "euler":
            p = p + delta * k_1  # the residual recurrent network
            continue
        k_2 = h(m * delta + delta / 2, p + delta / 2 * k_1)
        k_3 = h(m * delta + delta / 2, p + delta / 2 * k_2)
        k_4 = h(m * delta + delta, p + delta * k_3)
        p = p + delta * (k_1 + 2 * k_2 + 2 * k_3 + k_4) / 6
    expected = torch.from_numpy(numpy.array(states))
    torch.testing.assert_close(module(ROWS).detach(), expected[ROWS], rtol=0, atol=1e-13)


def test_positions_solve_the_differential_equation():
    """Against an adaptive solver of order 8, with the order of convergence that each method has."""
    time = 3.2
    start = floater()
    exact = solve_ivp(slope(start), (0, time), start.start.detach().numpy(), "DOP853", rtol=1e-12, atol=1e-12).y[:, -1]

    def error(solver, steps):
        module = floater(delta=time / steps, solver=solver)
        return float(numpy.abs(module(torch.tensor([steps]))[0].detach().numpy() - exact).max())

    assert error("rk4", 32) < 1e-4  # delta = 0.1, the default
    assert 12 < error("rk4", 64) / error("rk4", 128) < 20  # 2^4
    assert 1.7 < error("euler", 256) / error("euler", 512) < 2.3  # 2^1


def test_recurrence_has_no_last_position_unless_given():
    module = floater(length=6)
    assert torch.equal(module(torch.arange(6)), floater()(torch.arange(6)))
    with pytest.raises(ValueError, match="below length 6, got 6"):
        module(torch.tensor([6]))
    with pytest.raises(ValueError, match="got -1"):
        floater()(torch.tensor([-1]))
    with pytest.raises(ValueError, match="solver must be"):
        recurrent_positions(torch.arange(2), module.start, module.dynamics, solver="dopri5")  # type: ignore[arg-type]
    assert floater()(torch.empty(0, dtype=torch.int64)).shape == (0, 4)
    table = floater().frozen(9)
    assert torch.equal(table(torch.arange(9)), floater()(torch.arange(9)))
    assert not table.weight.requires_grad


# CNN-induced


def test_conv_is_the_padded_sum():
    layers, dim, w = 3, 2, 4
    kernels, biases = drawn(layers, dim, w), drawn(layers, dim, seed=1)

    def response(layer, channel, m):
        if m < 0:
            return 0.0
        if layer < 0:
            return 1.0
        taps = sum(float(kernels[layer, channel, w - 1 - t]) * response(layer - 1, channel, m - t) for t in range(w))
        value = taps + float(biases[layer, channel])
        return value if layer == layers - 1 else numpy.tanh(value)

    ours = conv_positions(torch.arange(12), kernels, biases)
    for m in range(12):
        for channel in range(dim):
            assert ours[m, channel].item() == pytest.approx(response(layers - 1, channel, m), abs=1e-12)
    reach = layers * (w - 1)
    assert torch.equal(ours[reach:], ours[reach].expand(12 - reach, dim))
    assert (ours[1 : reach + 1] - ours[:reach]).abs().amax(-1).min() > 1e-6  # all places within reach differ


def test_without_padding_a_convolution_knows_no_position():
    module = ConvPositions(4, width=5, layers=2, padding=False)
    out = module(torch.arange(100))
    assert torch.equal(out, out[:1].expand(100, 4))


@pytest.mark.parametrize(("padding", "leaks"), [("zeros", True), ("circular", False)])
def test_padding_and_nothing_else_leaks_position(padding, leaks):
    """Islam et al. 2020: random tokens through untrained convolutions; position is read off linearly on new rows."""
    torch.manual_seed(0)
    n, dim = 24, 32
    layers = [nn.Conv1d(dim, dim, 7, padding=3, padding_mode=padding) for _ in range(4)]
    net = nn.Sequential(*(part for layer in layers for part in (layer, nn.ReLU())))
    with torch.no_grad():
        features = net(torch.randn(256, dim, n)).transpose(1, 2)
    read = position_readout(features, torch.arange(n))
    assert read > 0.2 if leaks else read < 0.02


def test_readout_finds_position_where_it_is_and_only_there():
    positions = torch.arange(9)
    noise = drawn(40, 9, 5)
    told = noise.clone()
    told[..., 2] = 3 * positions - 1
    assert position_readout(told, positions) > 0.999
    assert position_readout(noise, positions) < 0.1
    assert position_readout(torch.ones(4, 9, 2), positions) == pytest.approx(0.0, abs=1e-9)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: conv_positions(torch.tensor([-1]), torch.ones(1, 2, 3), torch.ones(1, 2)), "must be >= 0, got -1"),
        (lambda: conv_positions(torch.arange(2), torch.ones(1, 2, 3), torch.ones(2)), r"biases \(L, dim\)"),
        (lambda: position_readout(torch.ones(1, 4, 2), torch.arange(4)), "b >= 2"),
        (lambda: position_readout(torch.ones(2, 4, 2), torch.arange(3)), r"\(2, 4, 2\) and \(3,\)"),
    ],
)
def test_errors_of_the_convolution(call, message):
    with pytest.raises(ValueError, match=message):
        call()


# All of them

GENERATED = ["hierarchical", "recurrent", "multiplicative", "complex", "cnn"]


@pytest.mark.parametrize("name", GENERATED)
def test_first_and_second_derivatives(name):
    torch.manual_seed(0)
    module = ZOO[name].build().double()
    names = [name for name, _ in module.named_parameters()]
    weights = [parameter.detach().clone().requires_grad_() for parameter in module.parameters()]
    x = drawn(2, 3, WIDTH).requires_grad_()
    ids = torch.tensor([[1, 2, 3], [3, 2, 9]])

    class Embed(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = module

        def forward(self, x):
            return self.inner.embed(x, ROWS, ids)

    def call(x, *weights):
        inner = dict(zip((f"inner.{name}" for name in names), weights, strict=True))
        return functional_call(Embed(), inner, (x,)).sin()

    assert gradcheck(call, (x, *weights), fast_mode=True, check_forward_ad=True)
    assert gradgradcheck(call, (x, *weights), fast_mode=True)


def test_generated_encodings_compile_and_export():
    class EmbedAll(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.encodings = nn.ModuleList(ZOO[name].build() for name in GENERATED)
            self.encodings[1].length = 8

        def forward(self, x, positions, ids):
            return tuple(encoding.embed(x, positions, ids) for encoding in self.encodings)

    module, inputs = EmbedAll(), (torch.randn(2, 3, WIDTH), ROWS, torch.tensor([[1, 2, 3], [3, 2, 9]]))
    expected = module(*inputs)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*inputs), expected)
    torch.testing.assert_close(torch.export.export(module, inputs).module()(*inputs), expected)
