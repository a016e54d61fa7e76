"""Fréchet distance between the features of two sets of pictures. Dowson & Landau 1982, "The Fréchet Distance between
Multivariate Normal Distributions"; for generators Heusel et al. 2017, "GANs Trained by a Two Time-Scale Update Rule
Converge to a Local Nash Equilibrium", equation 6.

    d² = ‖μ₁ - μ₂‖² + Tr(Σ₁ + Σ₂ - 2 (Σ₁ Σ₂)^½)

the squared W_2 distance between normal distributions of these means and covariances. Its value depends on what computes
the features, so it carries that network's name (FD-name); only with Inception's features of its own weights is it
called FID. It is biased upwards by about the number of features over the number of pictures: two halves of the same
data have a distance too, the floor to compare with.

Tr (Σ₁ Σ₂)^½ is the sum of the square roots of the eigenvalues of Σ₁^½ Σ₂ Σ₁^½, which is symmetric: no matrix square
root of an unsymmetric product is needed, and covariances without full rank (more features than pictures) need no
padding.

Shapes: features (n, d), μ (d), Σ (d, d).
"""

from __future__ import annotations

import torch
from torch import Tensor

from volvelle.export import export


@export("functional.feature_statistics")
def feature_statistics(features: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean (d) and unbiased covariance (d, d) of features (n, d), in fp64. Raises ValueError for n < 2.

    >>> feature_statistics(torch.tensor([[0.0], [2.0]]))
    (tensor([1.], dtype=torch.float64), tensor([[2.]], dtype=torch.float64))
    """
    if features.ndim != 2 or len(features) < 2:
        raise ValueError(
            f"feature_statistics: features must be (n, d) of two rows or more, got {tuple(features.shape)}"
        )
    x = features.double()
    mean = x.mean(0)
    centred = x - mean
    return mean, centred.T @ centred / (len(x) - 1)


@export("functional.frechet_distance", stable=True)
def frechet_distance(mu1: Tensor, sigma1: Tensor, mu2: Tensor, sigma2: Tensor) -> Tensor:
    """Return the squared Fréchet distance of two normal distributions, at least 0.

    mu1, mu2 (d), sigma1, sigma2 (d, d) symmetric; computed in fp64. Names and order are those of pytorch-fid's
    calculate_frechet_distance. Not meant to be differentiated where a covariance is singular. NaN gives NaN. Dowson &
    Landau 1982, equation 4.

    >>> one = torch.eye(2)
    >>> frechet_distance(torch.zeros(2), one, torch.tensor([3.0, 4.0]), 4 * one)  # 25 + 2 (1 + 4 - 2 * 2)
    tensor(27., dtype=torch.float64)
    """
    d = len(mu1)
    shapes = [tuple(t.shape) for t in (mu1, sigma1, mu2, sigma2)]
    if shapes != [(d,), (d, d), (d,), (d, d)]:
        raise ValueError(f"frechet_distance: wanted means (d) and covariances (d, d), got {shapes}")
    mu1, sigma1, mu2, sigma2 = (t.double() for t in (mu1, sigma1, mu2, sigma2))
    if not all(bool(torch.isfinite(t).all()) for t in (mu1, sigma1, mu2, sigma2)):
        return mu1.new_tensor(float("nan"))
    values, vectors = torch.linalg.eigh(sigma1)
    root = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
    inner = root @ sigma2 @ root
    cross = torch.linalg.eigvalsh((inner + inner.T) / 2).clamp(min=0).sqrt().sum()
    return ((mu1 - mu2).square().sum() + sigma1.trace() + sigma2.trace() - 2 * cross).clamp(min=0)
