"""CNN-induced positions (Islam, Jia, Bruce 2020, "How much position information do convolutional neural networks
encode?"): zero padding marks where the text begins, and convolutions carry the mark inwards.

A convolution treats every place alike, so position can only come from the padding. Fed with a constant signal (the
paper's black and white images), a stack of L padded convolutions of width w still answers differently at each of the
first L (w - 1) places, and alike after them; without padding it answers alike everywhere:
    x⁰_m = 1 for m >= 0, padding: 0 for m < 0
    x^{l+1}_m = φ(Σ_{t<w} k^l_t x^l_{m-t} + b^l),   φ = tanh, the last layer linear
`conv_positions` is this response as an encoding: causal, a function of the position alone, so that a cache, packed
rows and trees need nothing more. `position_readout` measures how much position any features hold.

Shapes: L layers, w taps, dim channels; one kernel a channel.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from volvelle.export import export
from volvelle.parts.position.encoding import PositionEncoding


@export("functional.conv_positions")
def conv_positions(positions: Tensor, kernels: Tensor, biases: Tensor, *, padding: bool = True) -> Tensor:
    """Return the response at each position of a stack of causal convolutions to a constant signal.

    positions are integers >= 0, (n,) or (b, n); kernels are (L, dim, w), the last tap at the place itself, biases
    (L, dim); the result is (n, dim) or (b, n, dim). With `padding` zeros stand before position 0; without, the signal
    has no beginning, and every position gets the same vector. All positions from L (w - 1) on are alike.
    Raises ValueError on a negative position or shapes that do not fit. Islam et al. 2020, section 3.

    >>> kernels, biases = torch.tensor([[[4.0, 2.0, 1.0]]]), torch.zeros(1, 1)
    >>> conv_positions(torch.arange(5), kernels, biases).flatten()
    tensor([1., 3., 7., 7., 7.])
    >>> conv_positions(torch.arange(5), kernels, biases, padding=False).flatten()
    tensor([7., 7., 7., 7., 7.])
    """
    if kernels.dim() != 3 or biases.shape != kernels.shape[:2]:
        raise ValueError(
            "conv_positions: kernels must be (L, dim, w) and biases (L, dim), "
            f"got {tuple(kernels.shape)} and {tuple(biases.shape)}"
        )
    if not torch.compiler.is_compiling() and positions.numel() and int(positions.min()) < 0:
        raise ValueError(f"conv_positions: positions must be >= 0, got {int(positions.min())}")
    layers, dim, w = kernels.shape
    reach = layers * (w - 1)
    x = kernels.new_ones(1, dim, reach + 1)
    for layer, (kernel, bias) in enumerate(zip(kernels, biases, strict=True)):
        x = functional.pad(x, (w - 1, 0), mode="constant" if padding else "replicate")
        x = functional.conv1d(x, kernel.unsqueeze(1), bias, groups=dim)
        x = x if layer == layers - 1 else x.tanh()
    return x[0].t()[positions.clamp(max=reach)]


@export("nn.ConvPositions", twin=conv_positions)
class ConvPositions(PositionEncoding):
    """`conv_positions` with its weights; `embed` adds the response to the token embeddings.

    It tells apart the first layers * (width - 1) positions.

    >>> ConvPositions(8).embed(torch.zeros(1, 3, 8), torch.arange(3)).shape
    torch.Size([1, 3, 8])
    """

    def __init__(self, dim: int, *, width: int = 64, layers: int = 2, padding: bool = True) -> None:
        super().__init__()
        self.padding = padding
        self.kernels = nn.Parameter(torch.empty(layers, dim, width))
        self.biases = nn.Parameter(torch.empty(layers, dim))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw kernels of unit norm on average, biases 0."""
        nn.init.normal_(self.kernels, std=self.kernels.shape[-1] ** -0.5)
        nn.init.zeros_(self.biases)

    def forward(self, positions: Tensor) -> Tensor:
        """Return the vectors of these positions, (n, dim) or (b, n, dim)."""
        return conv_positions(positions, self.kernels, self.biases, padding=self.padding)

    def embed(self, x: Tensor, positions: Tensor, ids: Tensor | None = None) -> Tensor:
        """Return x (b, n, dim) plus the vectors of its positions."""
        return x + self(positions)

    def extra_repr(self) -> str:
        """Show the sizes."""
        layers, dim, width = self.kernels.shape
        return f"dim={dim}, width={width}, layers={layers}, padding={self.padding}"


@export("functional.position_readout")
def position_readout(features: Tensor, positions: Tensor, *, ridge: float = 1e-6) -> float:
    """Return how much of the position a linear readout finds in features: R² on rows that it was not fitted on.

    features are (b, n, d), b >= 2, positions (n,); the first half of the rows is fitted, with a constant and a ridge
    relative to the features' size, the rest is predicted. 1 = the position can be read off, 0 or less = it cannot. The
    idea of PosENet (Islam et al. 2020, section 3), with a linear map in place of a network.

    >>> positions = torch.arange(6)
    >>> told = torch.randn(4, 6, 3) + positions[:, None] * 1e3
    >>> round(position_readout(told, positions), 3)
    1.0
    """
    if features.dim() != 3 or features.shape[0] < 2 or positions.shape != features.shape[1:2]:
        raise ValueError(
            "position_readout: features must be (b, n, d) with b >= 2 and positions (n,), "
            f"got {tuple(features.shape)} and {tuple(positions.shape)}"
        )
    x = features.detach().double()
    target = positions.double().expand(x.shape[:2])
    half = x.shape[0] // 2
    mean, middle = x[:half].mean((0, 1)), target[:half].mean()
    fit = (x[:half] - mean).flatten(0, 1)
    gram = fit.T @ fit
    size = gram.diagonal().mean().clamp(min=1e-30)  # features may all be the same
    gram = gram + ridge * size * torch.eye(gram.shape[0], dtype=gram.dtype, device=gram.device)
    solution = torch.linalg.solve(gram, fit.T @ (target[:half] - middle).flatten())
    error = (x[half:] - mean) @ solution + middle - target[half:]
    spread = target[half:] - target[half:].mean()
    return 1.0 - float(error.square().sum() / spread.square().sum())
