"""Losses of generative adversarial networks: five games over the same scores.

With s(x) the discriminator's score before any sigmoid, D = sigmoid(s), P the data and Q the generator's samples, the
discriminator minimises  E_P r(s) + E_Q f(s)  and the generator  E_Q g(s):

| kind | r: real | f: fake | g: generator | paper |
|---|---|---|---|---|
| minimax | -log D | -log(1 - D) | log(1 - D) | Goodfellow et al. 2014, equation 1 |
| non-saturating | -log D | -log(1 - D) | -log D | the same, section 3 |
| hinge | max(0, 1 - s) | max(0, 1 + s) | -s | Lim & Ye 2017; Miyato et al. 2018, equations 16 and 17 |
| least squares | (s - 1)² / 2 | s² / 2 | (s - 1)² / 2 | Mao et al. 2017, equation 9 |
| wasserstein | -s | s | -s | Arjovsky et al. 2017, equation 2 and algorithm 1 |

Where the discriminator is sure of the fakes (D near 0), minimax gives the generator a gradient that vanishes, which the
non-saturating loss does not. -log D is computed as softplus(-s), finite for every score.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from volvelle.export import export

GanLoss = Literal["minimax", "non-saturating", "hinge", "least-squares", "wasserstein"]
KINDS: tuple[GanLoss, ...] = ("minimax", "non-saturating", "hinge", "least-squares", "wasserstein")
Player = Literal["discriminator", "generator"]


@export("functional.gan_loss", stable=True)
def gan_loss(scores: Tensor, real: bool, kind: GanLoss = "non-saturating", *, for_: Player = "discriminator") -> Tensor:
    """Return the mean loss of scores that should say `real` (the table at the head of the file), a number.

    scores of any shape (those of a patch discriminator are averaged over their patches too), before any sigmoid;
    computed in fp32 or wider, whatever autocast says. `real` is what the scores should say, as in other libraries:
    for the discriminator True on data and False on samples; the generator wants its samples taken for data, so
    for_="generator" goes with True.

    Raises ValueError for an unknown kind or player, for no scores, and for a generator with real=False.

    >>> s = torch.tensor([0.0, 2.0])
    >>> [round(float(gan_loss(s, True, kind)), 4) for kind in KINDS]
    [0.41, 0.41, 0.5, 0.5, -1.0]
    >>> [round(float(gan_loss(s - 50, True, kind, for_="generator"))) for kind in KINDS[:2]]  # sure of the fakes
    [0, 49]
    """
    if kind not in KINDS:
        raise ValueError(f"gan_loss: kind must be one of {', '.join(KINDS)}, got {kind!r}")
    if for_ not in ("discriminator", "generator"):
        raise ValueError(f"gan_loss: for_ must be discriminator or generator, got {for_!r}")
    if for_ == "generator" and not real:
        raise ValueError("gan_loss: a generator wants its samples taken for real; give real=True, got real=False")
    if not scores.numel():
        raise ValueError(f"gan_loss: needs at least one score, got scores of shape {tuple(scores.shape)}")
    with torch.autocast(scores.device.type, enabled=False):
        return _each(scores.to(torch.promote_types(scores.dtype, torch.float32)), real, kind, for_).mean()


def _each(s: Tensor, real: bool, kind: GanLoss, player: Player) -> Tensor:
    """The loss of each score."""
    sign = 1.0 if real else -1.0
    if kind == "minimax" and player == "generator":
        return -F.softplus(s)
    if kind in ("minimax", "non-saturating"):
        return F.softplus(-sign * s)
    if kind == "least-squares":
        return (s - float(real)).square() / 2
    if kind == "hinge" and player == "discriminator":
        return F.relu(1 - sign * s)
    return -sign * s
