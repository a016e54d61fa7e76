"""Medusa's heads: residual blocks over the final states, each of which predicts one token further ahead.

    p_t^k = softmax(W_2^k (SiLU(W_1^k h_t) + h_t))        predicts t_{t+k+1}, k = 1 .. K

(Cai et al. 2024, "Medusa: Simple LLM Inference Acceleration Framework with Multiple Decoding Heads", arXiv 2401.10774,
section 2.1.1.) h_t are the decoder's final normed states, from which its own head predicts t_{t+1}. W_1 begins at zero
and W_2 as the decoder's own matrix, so that every head begins as the decoder's own prediction of the next token.

W_2^k may stay the decoder's own, for all heads ("tied", as in the authors' second release): then a head costs W_1
alone, and one product with the vocabulary serves all of them.

Shapes: b batch, n tokens, K heads, r tokens that can be drafted.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from volvelle.errors import VolvelleError
from volvelle.systems.language.config import LanguageConfig
from volvelle.systems.language.decoder import Decoder
from volvelle.systems.language.draft_head import DraftHead, checked_tokens
from volvelle.systems.language.projections import apply_linear


class ResBlock(nn.Module):
    """x + SiLU(W x + bias), beginning as the identity."""

    def __init__(self, width: int):
        super().__init__()
        self.linear = nn.Linear(width, width)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, x: Tensor) -> Tensor:
        """(..., width) -> (..., width)."""
        return x + F.silu(apply_linear(self.linear, x))


class MedusaHeads(nn.Module):
    """K heads of `layers` residual blocks each, beside a decoder that is not part of them.

    With `own` each head has a vocabulary projection of its own, else all use the decoder's. `tokens` (r,) are the
    tokens that can be drafted, None: all. `acceptance` (K, ranks), where known, is how often the token that a head
    ranks so high was the right one. Parameters are named as in the authors' release.

    >>> from volvelle.systems.language.config import GatedMLP, RMSNorm, Rope
    >>> config = LanguageConfig("llama", 20, 8, 1, 2, context=9, norm=RMSNorm(), mlp=GatedMLP(8), position=Rope())
    >>> heads = MedusaHeads(config, 3)
    >>> heads(torch.ones(2, 8)).shape
    torch.Size([3, 2, 8])
    """

    tokens: Tensor | None

    def __init__(
        self,
        config: LanguageConfig,
        heads: int,
        *,
        layers: int = 1,
        own: bool = False,
        tokens: Tensor | None = None,
    ):
        super().__init__()
        if heads < 1 or layers < 1:
            raise VolvelleError(f"Medusa needs at least 1 head of 1 layer, got {heads} of {layers}")
        self.width, self.layers, self.own = config.width, layers, own
        self.acceptance: Tensor | None = None
        self.register_buffer("tokens", None if tokens is None else checked_tokens(tokens, config.vocabulary))
        size = config.vocabulary if tokens is None else len(tokens)
        self.medusa_head = nn.ModuleList(
            nn.ModuleList(
                [
                    *(ResBlock(config.width) for _ in range(layers)),
                    *([nn.Linear(config.width, size, bias=False)] if own else []),
                ]
            )
            for _ in range(heads)
        )

    @classmethod
    def of(
        cls, model: Decoder, heads: int, *, layers: int = 1, own: bool = False, tokens: Tensor | None = None
    ) -> MedusaHeads:
        """Fresh heads for `model`, on its device, in fp32; every one predicts what the model's own head does."""
        made = cls(model.config, heads, layers=layers, own=own, tokens=tokens).to(model.device)
        if not own:
            return made
        matrix = DraftHead(model, tokens).plain
        if matrix is None:
            raise VolvelleError("Medusa: this model's head is more than one matrix, so a head cannot begin as its copy")
        with torch.no_grad():
            for k in range(heads):
                made.projection(k).weight.copy_(matrix)
        return made

    @property
    def count(self) -> int:
        """K."""
        return len(self.medusa_head)

    def forward(self, hidden: Tensor) -> Tensor:
        """The decoder's final states (..., width) to what the heads' projections read, (K, ..., width)."""
        return torch.stack([self.state(k, hidden) for k in range(self.count)])

    def state(self, k: int, hidden: Tensor) -> Tensor:
        """What the projection of head k, counted from 0, reads: (..., width)."""
        for block in list(self.medusa_head[k])[: self.layers]:  # type: ignore[arg-type]
            hidden = block(hidden)
        return hidden

    def logits(self, hidden: Tensor, head: DraftHead) -> Tensor:
        """The decoder's final states (..., width) to logits (K, ..., r); `head` is the decoder's projection."""
        states = self(hidden)
        if not self.own:
            return head.logits(states)
        return torch.stack([apply_linear(self.projection(k), x) for k, x in enumerate(states)])

    def projection(self, k: int) -> nn.Linear:
        """The projection (r, width) of head k, where heads have their own."""
        return self.medusa_head[k][-1]  # type: ignore[index,return-value]
