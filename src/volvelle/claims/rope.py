"""What RoFormer says of its rotary embedding: relative in the inner product, decaying, and fit for linear attention."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import TYPE_CHECKING

from volvelle.claims.claim import Budget, Claim, Finding, Measurement, Paper, at_least, at_most

if TYPE_CHECKING:
    from torch import Tensor

CLAIM = Claim(
    title="RoPE: rotary position embedding",
    family="attention",
    paper=Paper(
        "Su et al.",
        2021,
        "RoFormer: Enhanced Transformer with Rotary Position Embedding",
        "sections 3.2 to 3.4",
        "https://arxiv.org/abs/2104.09864",
    ),
    sentence="valuable properties, including the flexibility of sequence length, decaying inter-token dependency with "
    "increasing relative distances, and the capability of equipping the linear self-attention with relative position "
    "encoding",
    measured_by="inner products of random queries and keys at shifted positions in fp64; the mean bound on their size "
    "(equation 37) by distance; linear attention with turned numerators: chunked and by a state against the "
    "written-out sum, at shifted positions, and (full) small language models with it, with and without RoPE",
    summary="Turns queries and keys by their position, so that scores depend on distance alone.",
    summary_zh="按位置旋转查询与键，使注意力分数只取决于相对距离。",
    seconds={"quick": 10, "full": 120},
    parts=("functional.apply_rope", "nn.RotaryEmbedding", "functional.linear_attention"),
)

DIM = 128


def measure(budget: Budget) -> Measurement:
    """Shift, bound and linear form (full: more pairs, longer texts, two small language models)."""
    pairs, far = (200, 512) if budget == "quick" else (2000, 4096)
    bound, errors = decay(DIM, far), _linear(far // 4)
    marks = [d for d in (1, 8, 32, 64, 128, 256) if d < far]
    findings = [
        at_most("change of an inner product when both positions move by up to a million", _shift(pairs), 1e-8),
        at_least("the same when one of them moves by one (must not be nothing)", _alone(pairs), 0.1),
        at_most("mean bound at distance 256 over that at 0", float(bound[256] / bound[0]), 0.25),
        at_least("share of doublings of distance at which the bound falls", _falls(bound), 1.0),
        at_most("linear attention, chunked against the sum over all pairs", errors["chunked"], 1e-12),
        at_most("the same, token by token from a state of fixed size", errors["by a state"], 1e-12),
        at_most("change of its result when all positions move by a million", errors["shifted"], 1e-8),
        at_least("the same when the positions are stretched (must not be nothing)", errors["stretched"], 1e-3),
        *(_learns() if budget == "full" else ()),
        *(Finding(f"mean bound at distance {d}", float(bound[d])) for d in (0, *marks)),
    ]
    from volvelle.train.charts import Series, line_chart, standalone

    chart = line_chart(
        [Series("mean |S|, d = 128", [(float(d), float(bound[d])) for d in range(min(far, 256))])],
        x_label="relative distance",
        y_label="mean bound",
    )
    setting = {"d": DIM, "base": 10000, "pairs": pairs, "dtype": "fp64", "longest distance": far}
    return Measurement(
        findings, peers={"equations": "16, 19 and 37, in fp64"}, setting=setting, pictures={"decay": standalone(chart)}
    )


def decay(dim: int, length: int) -> Tensor:
    """Return the mean of |S_i|, i = 1 .. d/2, S_i = Σ_{j<i} exp(ι m θ_j), at distances m = 0 .. length - 1 (eq. 37)."""
    import torch

    from volvelle.parts.position.rope import rope_frequencies

    angles = torch.arange(length, dtype=torch.float64)[:, None] * rope_frequencies(dim)
    return torch.polar(torch.ones_like(angles), angles).cumsum(-1).abs().mean(-1)


def _falls(bound: Tensor) -> float:
    """Over windows around doubling distances, for the curve oscillates."""
    edges = [1, 2, 4, 8, 16, 32, 64, 128, 256]
    means = [float(bound[a:b].mean()) for a, b in itertools.pairwise(edges)]
    return sum(b < a for a, b in itertools.pairwise(means)) / (len(means) - 1)


def _products(q: Tensor, k: Tensor, i: Tensor, j: Tensor) -> Tensor:
    """Inner products of rows of q turned to i and rows of k turned to j."""
    from volvelle.parts.position.rope import apply_rope

    turned_q = apply_rope(q[None, None], q[None, None], i)[0][0, 0]
    turned_k = apply_rope(k[None, None], k[None, None], j)[1][0, 0]
    return (turned_q * turned_k).sum(-1)


def _draw(pairs: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    import torch

    generator = torch.Generator().manual_seed(0)
    q, k = torch.randn(2, pairs, DIM, generator=generator, dtype=torch.float64)
    i, j = torch.randint(4096, (2, pairs), generator=generator)
    return q, k, i, j, torch.randint(1_000_000, (pairs,), generator=generator)


def _shift(pairs: int) -> float:
    q, k, i, j, s = _draw(pairs)
    return float((_products(q, k, i + s, j + s) - _products(q, k, i, j)).abs().max())


def _alone(pairs: int) -> float:
    q, k, i, j, _ = _draw(pairs)
    return float((_products(q, k, i + 1, j) - _products(q, k, i, j)).abs().mean())


def _linear(n: int) -> dict[str, float]:
    """Largest differences of linear attention over n tokens from equation 19, written out for positions 0 .. n - 1."""
    import torch

    from volvelle.parts.attention.linear import LinearState, linear_attention
    from volvelle.parts.position.rope import RotaryEmbedding

    generator = torch.Generator().manual_seed(1)
    q, k, v = torch.randn(3, 1, 2, n, 16, generator=generator, dtype=torch.float64)
    rope, at = RotaryEmbedding(16), torch.arange(n)

    def chunked(positions: Tensor) -> Tensor:
        rotation = rope.rotation(positions, torch.float64)
        return linear_attention(q, k, v, causal=True, rotation=rotation, chunk=50)

    state, rows = LinearState.empty(1, 2, 16, 16, torch.float64), []
    for i in range(n):
        token = (x[:, :, i : i + 1] for x in (q, k, v))
        row, state = linear_attention(*token, rotation=rope.rotation(at[i : i + 1], torch.float64), state=state)
        rows.append(row)
    feature_q, feature_k = (torch.nn.functional.elu(x) + 1 for x in (q, k))
    turned_q, turned_k = rope.rotation(at, torch.float64)(feature_q, feature_k)
    above, below = (turned_q @ turned_k.mT).tril(), (feature_q @ feature_k.mT).tril()
    written_out = above @ v / (below.sum(-1, keepdim=True) + 1e-6)
    found = {
        "chunked": chunked(at) - written_out,
        "by a state": torch.cat(rows, 2) - written_out,
        "shifted": chunked(at + 1_000_000) - written_out,
        "stretched": chunked(2 * at) - written_out,
    }
    return {name: float(difference.abs().max()) for name, difference in found.items()}


def _learns() -> Iterator[Finding]:
    """Held-out perplexity of small decoders with linear attention: what RoPE is worth to them."""
    from volvelle.claims import position_zoo as zoo

    texts = zoo.corpus()
    found = {name: zoo.run(f"{name}{zoo.LINEAR}", texts, 0, zoo.STEPS) for name in ("none", "rope")}
    without, turned = (found[name][f"{name}{zoo.LINEAR}"][1] for name in ("none", "rope"))
    yield Finding("perplexity of a small decoder with linear attention and no positions", without)
    yield Finding("the same with RoPE", turned)
    yield at_most("with RoPE over without", turned / without, 1.0)
