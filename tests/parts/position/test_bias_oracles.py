"""Score biases against the papers' sums written as loops over numpy arrays, and mutants that the comparison must catch.

Each oracle computes attention outputs pair by pair in fp64; `deviation` is the largest difference from ours. The same
comparison is then run with a seeded fault in our code: it has to see every one of them.
"""

import math

import numpy
import pytest
import torch

from volvelle.parts.attention.attention import attention
from volvelle.parts.position import alibi, deberta, dynamic, encoding, shaw, t5, transformer_xl
from volvelle.parts.position.encoding import Bias, distances

B, H, H_KV, N_Q, N_K, D = 2, 4, 2, 5, 8, 6
Q_POSITIONS = torch.tensor([[3, 4, 5, 6, 7], [10, 2, 0, 40, 9]])
K_POSITIONS = torch.tensor([0, 1, 2, 3, 4, 5, 6, 41])


def drawn(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


Q, K, V = drawn(B, H, N_Q, D, seed=1), drawn(B, H_KV, N_K, D, seed=2), drawn(B, H_KV, N_K, D, seed=3)


def attend(score, value=None, scale=D**-0.5) -> numpy.ndarray:
    """Attention pair by pair: score(b, h, i, j, q_i, k_j) is added to scale * q·k, value(h, i, j) to v_j."""
    q, k, v = Q.numpy(), K.numpy(), V.numpy()
    out = numpy.zeros((B, H, N_Q, D))
    for b in range(B):
        for h in range(H):
            for row in range(N_Q):
                i, q_i = int(Q_POSITIONS[b, row]), q[b, h, row]
                e, values = [], []
                for column in range(N_K):
                    j, k_j = int(K_POSITIONS[column]), k[b, h // 2, column]
                    e.append(scale * float(q_i @ k_j) + float(score(h, i, j, q_i, k_j)))
                    values.append(v[b, h // 2, column] + (0 if value is None else value(i, j)))
                weights = numpy.exp(numpy.array(e) - max(e))
                out[b, h, row] = (weights / weights.sum()) @ numpy.array(values)
    return out


def deviation(bias: Bias, expected: numpy.ndarray) -> float:
    """The largest difference of our attention from the oracle's."""
    ours = attention(
        Q,
        K,
        V,
        bias=bias,
        q_positions=Q_POSITIONS,
        k_positions=K_POSITIONS,
        backend="reference",
    )
    return float((ours.detach() - torch.from_numpy(expected)).abs().max())


def of_alibi() -> float:
    right = [0.3, 0.2, 0.1, 0.05]
    module = alibi.ALiBi(H, right_slopes=right)
    slopes = [2.0 ** (-8 * (h + 1) / H) for h in range(H)]
    return deviation(
        module.bias(), attend(lambda h, i, j, q, k: -(slopes[h] * (i - j) if j <= i else right[h] * (j - i)))
    )


def t5_bucket(j_minus_i: int, buckets: int, far: int, bidirectional: bool) -> int:
    """Section 2.1 and the published code, in Python's fp64."""
    offset = 0
    if bidirectional:
        buckets //= 2
        offset = buckets if j_minus_i > 0 else 0
        distance = abs(j_minus_i)
    else:
        distance = max(-j_minus_i, 0)
    exact = buckets // 2
    if distance < exact:
        return offset + distance
    fraction = math.log(distance / exact) / math.log(far / exact) * (buckets - exact)
    return offset + min(exact + int(fraction + 1e-9), buckets - 1)


def of_t5(bidirectional: bool = True) -> float:
    module = t5.T5Bias(H, buckets=8, max_distance=12, bidirectional=bidirectional).double()
    weight = drawn(8, H, seed=4)
    module.weight.data.copy_(weight)
    expected = attend(lambda h, i, j, q, k: weight[t5_bucket(j - i, 8, 12, bidirectional), h])
    return deviation(module.bias(), expected)


def of_shaw() -> float:
    left, right = 3, 2
    module = shaw.ShawBias(D, k=left, right=right, value_width=D).double()
    keys, values = drawn(left + right + 1, D, seed=5), drawn(left + right + 1, D, seed=6)
    assert module.value is not None
    module.key.data.copy_(keys)
    module.value.data.copy_(values)

    def clip(i: int, j: int) -> int:
        return min(max(j - i, -left), right) + left

    expected = attend(
        lambda h, i, j, q, k: q @ keys[clip(i, j)].numpy() * D**-0.5, lambda i, j: values[clip(i, j)].numpy()
    )
    return deviation(module.bias(), expected)


def of_transformer_xl(swap: bool = False) -> float:
    width = 10
    module = transformer_xl.TransformerXLBias(H, D, width=width, base=50.0).double()
    u, v, w = drawn(H, D, seed=7), drawn(H, D, seed=8), drawn(H, D, width, seed=9)
    module.u.data.copy_(v if swap else u)
    module.v.data.copy_(u if swap else v)
    module.weight.data.copy_(w)

    def score(h, i, j, q, k):
        angle = [(i - j) * 50.0 ** (-2 * f / width) for f in range(width // 2)]
        r = w[h].numpy() @ numpy.concatenate((numpy.sin(angle), numpy.cos(angle)))
        return (q @ r + u[h].numpy() @ k + v[h].numpy() @ r) * D**-0.5

    return deviation(module.bias(), attend(score))


def deberta_bucket(distance: int, size: int, far: int) -> int:
    mid = size // 2
    if abs(distance) <= mid:
        return distance
    log = math.log(abs(distance) / mid) / math.log((far - 1) / mid) * (mid - 1)
    return (math.ceil(log - 1e-9) + mid) * (1 if distance > 0 else -1)


def of_deberta(
    far: int | None = None,
    p2c: deberta.P2C = "released",
    terms: tuple[str, ...] = ("c2p", "p2c"),
    forget_the_terms: bool = False,
) -> float:
    span = 6
    key, query = torch.nn.Linear(5, H * D).double(), torch.nn.Linear(5, H * D).double()
    module = deberta.DisentangledBias(
        H,
        key if "c2p" in terms else None,
        query if "p2c" in terms else None,
        k=span,
        max_position=far,
        p2c=p2c,
    ).double()
    torch.nn.init.normal_(module.table)
    k_r = key(module.table).view(2 * span, H, D).detach().numpy()
    q_r = query(module.table).view(2 * span, H, D).detach().numpy()
    scale = ((1 + len(terms)) * D) ** -0.5

    def delta(distance: int) -> int:
        distance = distance if far is None else deberta_bucket(distance, span, far)
        return min(max(distance, -span), span - 1) + span

    def score(h, i, j, q, k):
        swapped = j - i if p2c == "paper" else i - j
        c2p = q @ k_r[delta(i - j), h] if "c2p" in terms else 0.0
        return scale * (c2p + (k @ q_r[delta(swapped), h] if "p2c" in terms else 0.0))

    bias = module.bias()
    if forget_the_terms:
        bias.scale = None
    return deviation(bias, attend(score, scale=scale))


def of_dynamic(log: bool = False) -> float:
    torch.manual_seed(4)
    module = dynamic.DynamicBias(H, width=5, depth=2, log_distance=log).double()
    layers = [(weight.detach().numpy(), bias.detach().numpy()) for weight, bias in module.layers]

    def score(h, i, j, q, k):
        x = numpy.array([math.copysign(math.log(1 + abs(i - j)), i - j) if log else float(i - j)])
        for number, (weight, bias) in enumerate(layers):
            x = weight @ (x / (1 + numpy.exp(-x)) if number else x) + bias
        return x[h]

    return deviation(module.bias(), attend(score))


ORACLES = {
    "dynamic": of_dynamic,
    "dynamic log": lambda: of_dynamic(log=True),
    "alibi": of_alibi,
    "t5": of_t5,
    "t5 causal": lambda: of_t5(False),
    "shaw": of_shaw,
    "transformer-xl": of_transformer_xl,
    "deberta v1": of_deberta,
    "deberta v2": lambda: of_deberta(far=20),
    "deberta paper": lambda: of_deberta(p2c="paper"),
    "deberta c2p": lambda: of_deberta(terms=("c2p",)),
    "deberta p2c v2": lambda: of_deberta(far=30, terms=("p2c",)),
}


@pytest.mark.parametrize("name", ORACLES)
def test_attention_is_the_papers_sum(name):
    assert ORACLES[name]() < 1e-12


MODULES = {
    "alibi": encoding,
    "t5": encoding,
    "dynamic": encoding,
    "shaw": shaw,
    "deberta v1": deberta,
    "deberta paper": deberta,
}


@pytest.mark.parametrize("name", MODULES)
def test_mutant_wrong_sign_of_the_distance(name, monkeypatch):
    monkeypatch.setattr(MODULES[name], "distances", lambda q, k: -distances(q, k))
    assert ORACLES[name]() > 1e-2


@pytest.mark.parametrize("name", MODULES)
def test_mutant_distance_off_by_one(name, monkeypatch):
    monkeypatch.setattr(MODULES[name], "distances", lambda q, k: distances(q, k) + 1)
    assert ORACLES[name]() > 1e-2


@pytest.mark.parametrize(("name", "module"), [("t5", t5), ("t5 causal", t5), ("deberta v2", deberta)])
def test_mutant_bucket_edges_off_by_one(name, module, monkeypatch):
    right = module._edges
    monkeypatch.setattr(module, "_edges", lambda *a: tuple(edge + (edge > 3) for edge in right(*a)))
    assert ORACLES[name]() > 1e-4


def test_mutant_u_and_v_swapped():
    assert of_transformer_xl(swap=True) > 1e-2


def test_mutant_wrong_sign_in_transformer_xl(monkeypatch):
    right = transformer_xl._sines
    monkeypatch.setattr(transformer_xl, "_sines", lambda positions, *rest: right(-positions, *rest))
    assert of_transformer_xl() > 1e-2


@pytest.mark.parametrize("terms", [("c2p", "p2c"), ("c2p",)])
def test_mutant_content_scaled_without_the_number_of_terms(terms):
    assert of_deberta(terms=terms, forget_the_terms=True) > 1e-2


def test_the_two_readings_of_p2c_differ():
    """He et al. print δ(j, i) in equation 4; their code, and so every checkpoint, uses δ(i, j)."""
    q, k = drawn(1, H, 7, D, seed=1), drawn(1, H, 7, D, seed=2)
    table, positions = drawn(H, 12, D, seed=3), torch.arange(7)
    released = deberta.disentangled_bias(q, k, positions, positions, pos_query=table)
    paper = deberta.disentangled_bias(q, k, positions, positions, pos_query=table, p2c="paper")
    torch.testing.assert_close(released.diagonal(dim1=-2, dim2=-1), paper.diagonal(dim1=-2, dim2=-1))
    assert (released - paper).abs().max() > 0.1
    # the printed form with the table reversed about distance 0 is the released one, inside the clip
    mirrored = table.clone()
    mirrored[:, 1:] = table[:, 1:].flip(1)
    inside = deberta.disentangled_bias(
        q[:, :, :5], k[:, :, :5], positions[:5], positions[:5], pos_query=mirrored, p2c="paper"
    )
    torch.testing.assert_close(inside, released[:, :, :5, :5])


@pytest.mark.parametrize("offset", [0, 3])
def test_the_published_shift_gives_the_same_block(offset):
    """One row a distance, shifted (Dai et al. 2019, appendix B), against the product of sines and cosines."""
    n_q, n_k, width = 5, 5 + offset, 8
    module = transformer_xl.TransformerXLBias(H, D, width=width).double()
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter)
    q, k = drawn(B, H, n_q, D, seed=1), drawn(B, H, n_k, D, seed=2)
    far = torch.arange(n_k - 1, -n_q, -1)
    r = transformer_xl.sinusoidal_positions(far, width, layout="half", dtype=torch.float64)
    rows = torch.einsum("bhqd,hdw,rw->bhqr", q + module.v[:, None], module.weight, r)
    expected = transformer_xl.relative_shift(rows) + (k * module.u[:, None]).sum(-1)[:, :, None]
    ours = module(q, k, torch.arange(offset, n_k), torch.arange(n_k))
    torch.testing.assert_close(ours, expected * D**-0.5, rtol=0, atol=1e-12)


@pytest.mark.parametrize("log", [False, True])
def test_a_network_run_once_a_distance_gives_the_same(log):
    """A block of neighbours looks distances up, far pairs run the network each: one pair at a time is the oracle."""
    module = dynamic.DynamicBias(H, width=5, log_distance=log).double()
    i, j = torch.arange(3, 9), torch.arange(9)
    block = module(i, j)
    for row in range(6):
        for column in range(9):
            pair = module(i[row : row + 1], j[column : column + 1])
            torch.testing.assert_close(block[0, :, row, column], pair[0, :, 0, 0], rtol=0, atol=1e-13)


@pytest.mark.parametrize(("buckets", "far"), [(32, 128), (8, 20), (12, 50), (64, 1000)])
@pytest.mark.parametrize("bidirectional", [True, False])
def test_t5_buckets_are_monotone_exact_near_and_saturated_far(buckets, far, bidirectional):
    places = torch.arange(-2 * far, 2 * far + 1)
    found = t5.t5_relative_buckets(places, bidirectional, buckets, far)
    assert found.tolist() == [t5_bucket(int(place), buckets, far, bidirectional) for place in places]
    before = found[: 2 * far + 1].flip(0)
    assert (before.diff() >= 0).all()
    assert before[far] == before[-1] == (buckets // 2 if bidirectional else buckets) - 1
    assert t5.t5_relative_buckets(places[:, None], bidirectional, buckets, far).shape == (4 * far + 1, 1)


@pytest.mark.parametrize(("size", "far"), [(256, 512), (8, 32), (10, 50), (9, 30)])
def test_deberta_buckets_are_odd_monotone_and_saturated(size, far):
    places = torch.arange(-3 * far, 3 * far + 1)
    found = deberta.deberta_log_buckets(places, size, far)
    expected = [min(max(deberta_bucket(int(place), size, far), -size), size) for place in places]
    assert found.tolist() == expected
    assert torch.equal(found.flip(0), -found)
    assert deberta.deberta_log_buckets(torch.tensor([far - 1]), size, far).item() == 2 * (size // 2) - 1


@pytest.mark.parametrize(
    ("heads", "slopes"),
    [
        (1, [2.0**-8]),
        (8, [2.0**-h for h in range(1, 9)]),
        (12, [2.0**-h for h in range(1, 9)] + [2.0**-h for h in (0.5, 1.5, 2.5, 3.5)]),
        (6, [2.0**-2, 2.0**-4, 2.0**-6, 2.0**-8, 2.0**-1, 2.0**-3]),
    ],
)
def test_alibi_slopes(heads, slopes):
    assert alibi.alibi_slopes(heads, dtype=torch.float64).tolist() == pytest.approx(slopes, abs=1e-15)
    module = alibi.ALiBi(heads).to(torch.bfloat16)
    assert module.state_dict() == {}
    assert module.slopes.dtype == torch.float64
    assert module.bias().learnable is False
    with torch.device("meta"):
        built_on_meta = alibi.ALiBi(heads)
    assert torch.equal(built_on_meta.to_empty(device="cpu").slopes, module.slopes)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: alibi.alibi_slopes(0), "heads must be at least 1"),
        (lambda: alibi.ALiBi(3, right_slopes=(1.0,)), "must hold 3 slopes, got 1"),
        (lambda: dynamic.DynamicBias(4, depth=0), "depth must be at least 1, got 0"),
        (lambda: t5.T5Bias(4, buckets=2), "at least 4 buckets"),
        (lambda: t5.t5_relative_buckets(torch.arange(3), True, 32, 8), "max_distance above 8"),
        (lambda: shaw.ShawBias(4, k=-1), "must not be negative"),
        (lambda: shaw.shaw_key_bias(Q, Q_POSITIONS, K_POSITIONS, drawn(3, D, seed=1), left=3), "from 0 to 2"),
        (lambda: deberta.deberta_log_buckets(torch.arange(3), 3, 9), "at least 4"),
        (lambda: deberta.deberta_log_buckets(torch.arange(3), 8, 5), "above 5"),
        (lambda: deberta.disentangled_bias(Q, K, Q_POSITIONS, K_POSITIONS), "pos_key, pos_query or both"),
        (lambda: deberta.DisentangledBias(3, torch.nn.Linear(4, 8), None, k=4), "3 heads"),
        (lambda: deberta.DisentangledBias(2, torch.nn.Linear(4, 8), None, k=None).bias(), "must be given them"),
        (
            lambda: transformer_xl.transformer_xl_bias(
                Q,
                K,
                Q_POSITIONS,
                K_POSITIONS,
                u=drawn(D, seed=1),
                v=drawn(D, seed=1),
                weight=drawn(H, D, 4, seed=1),
            ),
            r"\(h, d\) = \(4, 6\)",
        ),
    ],
)
def test_errors_name_the_rule(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_layers_that_share_relative_vectors_answer_as_one_that_owns_them():
    key, query = torch.nn.Linear(5, H * D).double(), torch.nn.Linear(5, H * D).double()
    shared = deberta.RelativeVectors(4, 5).double()
    own = deberta.DisentangledBias(H, key, query, k=4, table=shared.weight)
    layer = deberta.DisentangledBias(H, key, query, k=None)
    assert len(list(layer.parameters())) == 4  # the projections alone
    expected = own.bias().tile(Q, K, Q_POSITIONS, K_POSITIONS)
    assert torch.equal(layer.bias(shared.vectors()).tile(Q, K, Q_POSITIONS, K_POSITIONS), expected)
    assert layer.bias(shared.vectors()).scale == own.bias().scale
    assert encoding.PositionEncoding().vectors() is None


def test_a_reset_network_of_distances_is_drawn_for_numbers_as_large_as_distances():
    module = dynamic.DynamicBias(4, width=64)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.fill_(0)
    module.reset_parameters()
    assert 0.4 < float(module.network[0].weight.detach().std()) < 0.8  # U(-1, 1), as for any layer with one input
