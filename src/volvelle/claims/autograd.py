"""Reverse-mode differentiation by a define-by-run tape, in one file, against torch.autograd on a real network.

Every operation of a `Var` computes its value at once and notes, on the result, its parents and how a gradient with
respect to the result becomes gradients with respect to them (a vector-Jacobian product). `backward` walks the notes in
reverse topological order. The graph is whatever the program did: loops and branches need no special treatment.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from volvelle.claims.claim import Budget, Claim, Finding, Measurement, Paper, at_most

CLAIM = Claim(
    title="Automatic differentiation by a define-by-run tape",
    family="train",
    paper=Paper(
        "Paszke et al.",
        2017,
        "Automatic differentiation in PyTorch",
        "sections 2 and 3",
        "https://openreview.net/forum?id=BJJsrmfCZ",
    ),
    sentence="a dynamic, define-by-run graph differentiates purely imperative programs, control flow included",
    measured_by="this file's numpy tape against torch.autograd: all parameter gradients of a Llama decoder in fp64, a "
    "data-dependent loop, accumulation into .grad, detach and no_grad",
    summary="How a framework gets gradients: record each operation as it runs, then walk the record backwards.",
    summary_zh="框架如何求梯度：运行时记录每个操作，再沿记录反向传播。",
    seconds={"quick": 20, "full": 60},
)

Array = np.ndarray
Vjp = Callable[[Array], Array]

_recording = True


@contextlib.contextmanager
def no_grad() -> Iterator[None]:
    """Inside, results carry no history."""
    global _recording
    before, _recording = _recording, False
    try:
        yield
    finally:
        _recording = before


class Var:
    """A value, and where it came from: pairs of (parent, vector-Jacobian product).

    >>> x = Var(np.array([1.0, 2.0]), leaf=True)
    >>> (x * x).sum().backward()
    >>> x.grad
    array([2., 4.])
    """

    __array_priority__ = 1.0  # numpy must let Var handle array * Var

    def __init__(self, value: Array | float, parents: Sequence[tuple[Var, Vjp]] = (), *, leaf: bool = False):
        self.value = np.asarray(value, dtype=np.float64)
        self.parents = [(p, vjp) for p, vjp in parents if p.tracked] if _recording else []
        self.tracked = leaf or bool(self.parents)
        self.leaf, self.grad = leaf, None

    def backward(self) -> None:
        """Add d self / d leaf to the .grad of every leaf above; self must be a scalar."""
        if self.value.size != 1:
            raise ValueError(f"backward: needs a scalar, got shape {self.value.shape}")
        pending: dict[int, Array] = {id(self): np.ones_like(self.value)}
        for node in reversed(_topological(self)):
            gradient = pending.pop(id(node))
            if node.leaf:
                node.grad = gradient if node.grad is None else node.grad + gradient
            for parent, vjp in node.parents:
                part = vjp(gradient)
                pending[id(parent)] = pending[id(parent)] + part if id(parent) in pending else part

    def detach(self) -> Var:
        """The same value without its history."""
        return Var(self.value)

    def __add__(self, other: Var | Array | float) -> Var:
        a, b = self, _var(other)
        return Var(a.value + b.value, [(a, _to(a)), (b, _to(b))])

    def __mul__(self, other: Var | Array | float) -> Var:
        a, b = self, _var(other)
        return Var(a.value * b.value, [(a, lambda g: _to(a)(g * b.value)), (b, lambda g: _to(b)(g * a.value))])

    def __matmul__(self, other: Var) -> Var:
        a, b = self, other
        return Var(
            a.value @ b.value,
            [(a, lambda g: _to(a)(g @ _t(b.value))), (b, lambda g: _to(b)(_t(a.value) @ g))],
        )

    def __neg__(self) -> Var:
        return self * -1.0

    def __sub__(self, other: Var | Array | float) -> Var:
        return self + -_var(other)

    def __pow__(self, n: float) -> Var:
        return Var(self.value**n, [(self, lambda g: g * n * self.value ** (n - 1))])

    def __getitem__(self, index: Any) -> Var:
        def scatter(g: Array) -> Array:
            full = np.zeros_like(self.value)
            np.add.at(full, index, g)  # an index that occurs twice receives both gradients
            return full

        return Var(self.value[index], [(self, scatter)])

    __radd__, __rmul__ = __add__, __mul__

    def exp(self) -> Var:
        """Elementwise e^x."""
        out = np.exp(self.value)
        return Var(out, [(self, lambda g: g * out)])

    def log(self) -> Var:
        """Elementwise natural logarithm."""
        return Var(np.log(self.value), [(self, lambda g: g / self.value)])

    def sum(self, axis: int | None = None) -> Var:
        """Sum over one axis, kept with length 1, or over everything."""
        spread = np.ones_like(self.value)
        return Var(self.value.sum(axis=axis, keepdims=axis is not None), [(self, lambda g: g * spread)])

    def mean(self, axis: int) -> Var:
        """Mean over one axis, kept with length 1."""
        return self.sum(axis) * (1.0 / self.value.shape[axis])

    def reshape(self, *shape: int) -> Var:
        """The same numbers in another shape."""
        before = self.value.shape
        return Var(self.value.reshape(shape), [(self, lambda g: g.reshape(before))])

    def swap(self, i: int, j: int) -> Var:
        """Two axes exchanged."""
        return Var(self.value.swapaxes(i, j), [(self, lambda g: g.swapaxes(i, j))])


def _var(value: Var | Array | float) -> Var:
    return value if isinstance(value, Var) else Var(value)


def _t(value: Array) -> Array:
    return value.swapaxes(-1, -2)


def _to(target: Var) -> Vjp:
    """Undo broadcasting: a gradient in the result's shape, summed to the target's."""
    shape = target.value.shape

    def reduce(g: Array) -> Array:
        g = g.sum(axis=tuple(range(g.ndim - len(shape))))
        axes = tuple(i for i, n in enumerate(shape) if n == 1 and g.shape[i] != 1)
        return g.sum(axis=axes, keepdims=True) if axes else g

    return reduce


def _topological(root: Var) -> list[Var]:
    """Parents before children, without recursion: graphs are deeper than Python's stack."""
    order: list[Var] = []
    seen: set[int] = set()
    stack: list[tuple[Var, bool]] = [(root, False)]
    while stack:
        node, done = stack.pop()
        if done:
            order.append(node)
        elif id(node) not in seen:
            seen.add(id(node))
            stack.append((node, True))
            stack.extend((parent, False) for parent, _ in node.parents)
    return order


def _softmax(x: Var) -> Var:
    e = (x - x.value.max(axis=-1, keepdims=True)).exp()
    return e * e.sum(-1) ** -1.0


def _norm(x: Var, weight: Var, eps: float) -> Var:
    return x * ((x * x).mean(-1) + eps) ** -0.5 * weight


def _silu(x: Var) -> Var:
    return x * ((-x).exp() + 1.0) ** -1.0


def _attend(x: Var, layer: dict[str, Var], turn: tuple[Array, Array], heads: tuple[int, int]) -> Var:
    """Causal grouped-query attention with RoPE in the half layout; x is (n, c)."""
    (cos, sin), (h, h_kv) = turn, heads
    n = x.value.shape[0]

    def split(name: str, count: int) -> Var:
        return (x @ layer[f"self_attn.{name}_proj.weight"].swap(0, 1)).reshape(n, count, -1).swap(0, 1)  # (h, n, d)

    def rotate(v: Var) -> Var:
        half = v.value.shape[-1] // 2
        low, high = v[..., :half], v[..., half:]
        place = [np.hstack([np.eye(half), np.zeros((half, half))]), np.hstack([np.zeros((half, half)), np.eye(half)])]
        return (low * cos - high * sin) @ Var(place[0]) + (high * cos + low * sin) @ Var(place[1])

    q, k, v = rotate(split("q", h)), rotate(split("k", h_kv)), split("v", h_kv)
    group = np.arange(h) // (h // h_kv)
    hidden = np.triu(np.full((n, n), -np.inf), 1)
    weights = _softmax(q @ k[group].swap(-1, -2) * q.value.shape[-1] ** -0.5 + hidden)
    return (weights @ v[group]).swap(0, 1).reshape(n, -1) @ layer["self_attn.o_proj.weight"].swap(0, 1)


def _decoder_loss(ids: Array, weights: dict[str, Var], heads: tuple[int, int], depth: int, eps: float) -> Var:
    """Mean next-token cross-entropy of a Llama decoder, on the tape."""
    x = weights["model.embed_tokens.weight"][ids[:-1]]
    d = weights["model.layers.0.self_attn.k_proj.weight"].value.shape[0] // heads[1]
    angle = np.outer(np.arange(len(ids) - 1), 10000.0 ** (-np.arange(0, d, 2) / d))
    for i in range(depth):
        layer = {k.split(".", 3)[3]: v for k, v in weights.items() if k.startswith(f"model.layers.{i}.")}
        normed = _norm(x, layer["input_layernorm.weight"], eps)
        x = x + _attend(normed, layer, (np.cos(angle), np.sin(angle)), heads)
        normed = _norm(x, layer["post_attention_layernorm.weight"], eps)
        gate = _silu(normed @ layer["mlp.gate_proj.weight"].swap(0, 1))
        up = normed @ layer["mlp.up_proj.weight"].swap(0, 1)
        x = x + (gate * up) @ layer["mlp.down_proj.weight"].swap(0, 1)
    logits = _norm(x, weights["model.norm.weight"], eps) @ weights["model.embed_tokens.weight"].swap(0, 1)
    picked = _softmax(logits)[np.arange(len(ids) - 1), ids[1:]]
    return -picked.log().sum() * (1.0 / (len(ids) - 1))


def _against_decoder(seed: int, depth: int) -> float:
    """Largest relative error over the gradients of every parameter, tape against torch.autograd, in fp64."""
    import torch

    from volvelle.systems.language.config import GatedMLP, Head, LanguageConfig, RMSNorm, Rope
    from volvelle.systems.language.decoder import Decoder

    torch.manual_seed(seed)
    config = LanguageConfig(
        family="llama", vocabulary=256, width=48, depth=depth, heads=4, kv_heads=2, context=128, norm=RMSNorm(1e-5),
        mlp=GatedMLP(96), position=Rope(), head=Head(tied=True),
    )  # fmt: skip
    model = Decoder(config).double()
    text = (__doc__ or "").encode()[seed : seed + 65]
    ids = torch.tensor(list(text))
    logits = model(ids[None, :-1]).logits[0]
    torch.nn.functional.cross_entropy(logits, ids[1:]).backward()
    theirs = dict(model.named_parameters())
    ours = {name: Var(p.detach().numpy(), leaf=True) for name, p in theirs.items()}
    _decoder_loss(np.array(list(text)), ours, (4, 2), depth, 1e-5).backward()
    errors = []
    for name, p in theirs.items():
        reference, found = p.grad, ours[name].grad
        if reference is None or found is None:
            raise AssertionError(f"{name}: a gradient is missing")
        errors.append(np.abs(found - reference.numpy()).max() / np.abs(reference.numpy()).max())
    return float(max(errors))


def _control_flow() -> float:
    """A loop whose length depends on the data: both differentiate the path that was taken."""
    import torch

    def program(x, half):
        steps = 0
        while float(half(x)) > 1.0:
            x, steps = x * 0.7 if steps % 2 else x * x * 0.02, steps + 1
        return x

    worst = 0.0
    for start in (2.0, 9.0, 30.0):
        ours, theirs = Var(start, leaf=True), torch.tensor(start, dtype=torch.float64, requires_grad=True)
        program(ours, lambda v: v.value).backward()
        program(theirs, lambda v: v.detach()).backward()
        if ours.grad is None or theirs.grad is None:
            raise AssertionError("a gradient is missing")
        worst = max(worst, abs(float(ours.grad) - float(theirs.grad)) / abs(float(theirs.grad)))
    return worst


def _rules() -> list[Finding]:
    """Accumulation, detach and no_grad, as torch has them."""
    x = Var(3.0, leaf=True)
    (x * x).backward()
    (x * x).backward()
    accumulated = x.grad is not None and float(x.grad) == 12.0
    y = Var(3.0, leaf=True)
    (y * y.detach()).backward()
    detached = y.grad is not None and float(y.grad) == 3.0
    with no_grad():
        silent = not (y * y).tracked
    return [
        Finding("two backward calls add up in .grad", str(accumulated), bound="true", held=accumulated),
        Finding("detach stops the gradient of one factor", str(detached), bound="true", held=detached),
        Finding("no_grad records nothing", str(silent), bound="true", held=silent),
    ]


def measure(budget: Budget) -> Measurement:
    """Compare the tape with torch.autograd."""
    import torch

    seeds = range(1 if budget == "quick" else 5)
    errors = [_against_decoder(seed, depth=2) for seed in seeds]
    findings = [
        at_most("decoder gradients, largest relative error", max(errors), 1e-10, spread=(min(errors), max(errors))),
        at_most("data-dependent loop, relative error", _control_flow(), 1e-12),
        *_rules(),
    ]
    setting = {
        "network": "Llama, 2 layers x 48, GQA 4/2, RoPE, SwiGLU, tied head",
        "dtype": "fp64",
        "seeds": len(errors),
    }
    return Measurement(findings, peers={"torch.autograd": torch.__version__}, setting=setting)
