"""Gradient penalties: a critic whose slope is held to 1 along lines between data and samples.

Gulrajani et al. 2017, "Improved Training of Wasserstein GANs", equation 3, and Petzka et al. 2018, "On the
Regularization of Wasserstein GANs", equation 8. With u uniform in [0, 1], one for each pair,

    x̂ = u x + (1 - u) x̃,     n = ‖∇_x̂ s(x̂)‖

    GP = E (n - 1)²            (two-sided: slopes below 1 are punished too)
    LP = E max(0, n - 1)²      (one-sided: only what breaks the Lipschitz condition)

A norm has no gradient at zero, where a plain square root gives NaN: here the gradient of n at 0 is 0. A critic with
batch normalisation has no slope of its own (samples of a batch depend on each other); take layer normalisation.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from volvelle.export import export

Critic = Callable[[Tensor], Tensor]


@export("functional.gradient_penalty", stable=True)
def gradient_penalty(
    critic: Critic,
    real: Tensor,
    fake: Tensor,
    *,
    one_sided: bool = False,
    norm: float = 1.0,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Return the mean of (n - norm)², or with `one_sided` of max(0, n - norm)², over one point for each pair.

    real and fake (b, …) of equal shape; both are detached. `critic` maps them to scores (b, …). The result can be
    differentiated with respect to the critic's weights (double backward). Computed in fp32 or wider, outside autocast:
    slopes of a critic in 16 bits overflow. `generator` draws u.

    Raises ValueError for unequal or empty batches, and for integers. Gulrajani et al. 2017; Petzka et al. 2018.

    >>> w = torch.tensor([3.0, 4.0], requires_grad=True)
    >>> x = torch.randn(8, 2)
    >>> penalty = gradient_penalty(lambda x: x @ w, x, torch.zeros(8, 2))  # the slope is 5 everywhere
    >>> penalty.backward()
    >>> round(penalty.item(), 4), w.grad
    (16.0, tensor([4.8000, 6.4000]))
    """
    if real.shape != fake.shape or not real.numel() or real.ndim < 2:
        raise ValueError(
            f"gradient_penalty: real and fake must be batches (b, …) of equal shape, got {tuple(real.shape)} and "
            f"{tuple(fake.shape)}"
        )
    if not (real.is_floating_point() and fake.is_floating_point()):
        raise ValueError(f"gradient_penalty: real and fake must be floating point, got {real.dtype} and {fake.dtype}")
    x, other = _wide(real), _wide(fake)
    shape = (len(x), *[1] * (x.ndim - 1))
    u = torch.rand(shape, generator=generator, device=x.device, dtype=x.dtype)
    excess = gradient_norms(critic, other + u * (x - other)) - norm
    return (excess.clamp(min=0) if one_sided else excess).square().mean()


@export("functional.r1_penalty")
def r1_penalty(critic: Critic, real: Tensor) -> Tensor:
    """Return half the mean squared slope on data, E ‖∇_x s(x)‖² / 2: with it a plain GAN converges locally.

    Shapes, precision and errors as `gradient_penalty`. Mescheder et al. 2018, "Which Training Methods for GANs do
    actually Converge?", equation 9 (without its factor γ).

    >>> float(r1_penalty(lambda x: 3 * x.sum(1), torch.randn(4, 2)))
    9.0
    """
    if real.ndim < 2 or not real.numel() or not real.is_floating_point():
        raise ValueError(
            f"r1_penalty: real must be a floating-point batch (b, …), got {real.dtype} {tuple(real.shape)}"
        )
    return gradient_norms(critic, _wide(real), squared=True).mean() / 2


@export("functional.gradient_norms")
def gradient_norms(critic: Critic, x: Tensor, *, squared: bool = False) -> Tensor:
    """Return the Euclidean norm of the critic's gradient at every point x (b, …), as (b); differentiable.

    The gradient of a norm at zero is taken as 0, one of its subgradients. Raises ValueError where the scores do not
    depend on x.

    >>> gradient_norms(lambda x: x.square().sum(1) / 2, torch.tensor([[3.0, 4.0], [0.0, 0.0]])).tolist()
    [5.0, 0.0]
    """
    point = x.detach().requires_grad_(True)
    with torch.enable_grad(), torch.autocast(x.device.type, enabled=False):
        scores = critic(point)
        # Scores of a sample depend on that sample alone, so the sum's gradient holds that of each.
        slope = torch.autograd.grad(scores.sum(), point, create_graph=True, allow_unused=True)[0]
        if slope is None:
            raise ValueError("gradient_norms: the critic's scores do not depend on their input")
        square = slope.flatten(1).square().sum(1)
        return square if squared else _root(square)


def _root(square: Tensor) -> Tensor:
    """Square root with a gradient of 0 at 0; NaN stays NaN."""
    zero = square == 0
    return torch.where(zero, 0.0, torch.where(zero, 1.0, square).sqrt())


def _wide(x: Tensor) -> Tensor:
    return x.detach().to(torch.promote_types(x.dtype, torch.float32))
