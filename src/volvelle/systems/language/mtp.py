"""Multi-token prediction: modules beside a decoder that predict the tokens after the next one.

The decoder predicts t_{i+1} at position i; depth k = 1 .. D predicts t_{i+k+1} there. Embedding and output head are the
decoder's own, and without the modules it is a plain decoder again.

`SequentialMTP`: one depth after the other, each given the token in between (DeepSeek-AI 2024, "DeepSeek-V3 Technical
Report", arXiv 2412.19437, section 2.2, equations 21 to 23). h^0 are the decoder's final states:

    h'_i^k = M_k [RMSNorm(Emb(t_{i+k})); RMSNorm(h_i^{k-1})]
    h^k    = TRM_k(h'^k)
    P_i^k  = OutHead(RMSNorm(h_i^k))

The paper writes the state before the embedding; the released weights hold M_k ("eh_proj") with the embedding's half
first, and a norm before the head ("shared_head.norm"). Both are followed here.

`ParallelMTP`: heads side by side, each one block over the trunk's output z (Gloeckle et al. 2024, "Better & Faster
Large Language Models via Multi-token Prediction", arXiv 2404.19737, section 2). The decoder's last block is the head of
the next token, and z is what it reads:

    P_i^k = f_u(f_{h_k}(z_i))

Shapes: b batch, n tokens, v vocabulary, D depths.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from volvelle.errors import VolvelleError
from volvelle.systems.language.components import PreNormBlock, Step, build_norm
from volvelle.systems.language.config import LanguageConfig
from volvelle.systems.language.decoder import Decoder, draw_weights
from volvelle.systems.language.draft_head import checked_tokens
from volvelle.systems.language.projections import Straight, apply_linear, prepare

if TYPE_CHECKING:
    from volvelle.parts.attention.cache import Cache

Branch = Callable[[Tensor], Tensor]


class MTPModule(nn.Module):
    """One depth of the sequential kind: two norms, a projection, a block, and the norm before the shared head."""

    def __init__(self, config: LanguageConfig):
        super().__init__()
        self.enorm, self.hnorm = (build_norm(config.norm, config.width) for _ in range(2))
        self.eh_proj = nn.Linear(2 * config.width, config.width, bias=False)
        self.block = PreNormBlock(config, 0)  # each depth has a cache of its own
        self.shared_head = nn.ModuleDict({"norm": build_norm(config.norm, config.width)})

    def forward(self, h: Tensor, embedded: Tensor, step: Step) -> tuple[Tensor, Tensor]:
        """Map h^{k-1} and Emb(t_{i+k}), both (b, n, width), to h^k and to what the output head reads."""
        x = self.block(self.enter(h, embedded), step)
        return x, self.shared_head["norm"](x)

    def enter(self, h: Tensor, embedded: Tensor) -> Tensor:
        """What the block reads, h' (b, n, width)."""
        both = torch.cat((self.enorm(embedded), self.hnorm(h)), -1)
        # Autocast would give a residual stream in 16 bits, where the decoder's own begins with its embeddings.
        return apply_linear(self.eh_proj, both).to(h.dtype)


class MTP(nn.Module):
    """What both kinds are: D modules, run over a decoder that is not part of them.

    Raises VolvelleError for decoders without causal order, and for those that put their norms after the branches.
    """

    kind: str
    tokens: Tensor | None
    """The tokens (r,) that are drafted, None: all (systems/language/draft_head.py)."""

    def __init__(self, config: LanguageConfig, depths: int, *, tokens: Tensor | None = None):
        super().__init__()
        if depths < 1:
            raise VolvelleError(f"multi-token prediction needs at least 1 depth, got {depths}")
        if not config.causal or config.order != "pre":
            raise VolvelleError(f"multi-token prediction needs a causal pre-norm decoder, not {config.family}")
        self.width = config.width
        self.layers = nn.ModuleList(self.module(config) for _ in range(depths))
        self.register_buffer("tokens", None if tokens is None else checked_tokens(tokens, config.vocabulary))
        draw_weights(self, config)
        self._paths: list[Straight | None] = []

    @staticmethod
    def block(module: nn.Module) -> nn.Module:
        """The block of one depth's module."""
        raise NotImplementedError

    def paths(self, model: Decoder) -> list[Straight | None]:
        """Of each depth the fast path through its block, made when first asked for and when a weight has moved."""
        if not self._paths or not all(path is not None and path.watch.unchanged() for path in self._paths):
            self._paths = [prepare(model, [self.block(layer)]) for layer in self.layers]
        return self._paths

    @staticmethod
    def module(config: LanguageConfig) -> nn.Module:
        """A fresh module of one depth."""
        raise NotImplementedError

    @property
    def depths(self) -> int:
        """D: the tokens predicted beyond the next one."""
        return len(self.layers)

    def forward(
        self, model: Decoder, ids: Tensor, *, positions: Tensor | None = None, mask: Tensor | None = None
    ) -> list[Tensor]:
        """Run decoder and modules over whole texts: D + 1 states (b, n, width), the decoder's own first.

        `model.logits(states[k])` at position i are those of t_{i+k+1}. Where a text has no t_{i+k}, states[k] means
        nothing. The arguments are those of `Decoder.hidden`.
        """
        raise NotImplementedError

    def read(
        self, model: Decoder, ids: Tensor, *, mask: Tensor | None = None, cache: Cache | None = None
    ) -> tuple[Tensor, Tensor]:
        """Run the decoder alone: its final states, for logits, and what drafting observes, both (b, n, width)."""
        raise NotImplementedError


class SequentialMTP(MTP):
    """DeepSeek-V3's modules.

    >>> from volvelle.systems.language.config import GatedMLP, RMSNorm, Rope
    >>> config = LanguageConfig(
    ...     "llama", vocabulary=100, width=48, depth=2, heads=4, context=64,
    ...     norm=RMSNorm(), mlp=GatedMLP(96), position=Rope())
    >>> model, mtp = Decoder(config), SequentialMTP(config, 2)
    >>> [tuple(model.logits(state).shape) for state in mtp(model, torch.zeros(1, 5, dtype=torch.long))]
    [(1, 5, 100), (1, 5, 100), (1, 5, 100)]
    """

    kind = "sequential"

    @staticmethod
    def module(config: LanguageConfig) -> nn.Module:
        """A fresh module of one depth."""
        return MTPModule(config)

    @staticmethod
    def block(module: nn.Module) -> nn.Module:
        """The block behind norms and projection."""
        assert isinstance(module, MTPModule)
        return module.block

    def forward(
        self, model: Decoder, ids: Tensor, *, positions: Tensor | None = None, mask: Tensor | None = None
    ) -> list[Tensor]:
        """States of every prediction; see `MTP.forward`."""
        _without_prefix(model)
        x, step = model.begin(ids, positions=positions, mask=mask)
        for layer in model.model.layers:
            x = model.run(layer, x, step)
        h = model.model.norm(x)
        states = [h]
        h = h.to(stored(self))
        for k, layer in enumerate(self.layers, 1):
            # The last k positions have no t_{i+k}: they read token 0, and no earlier position sees them.
            following = F.pad(ids[:, k:], (0, min(k, ids.shape[1])))
            h, state = model.run(layer, h, token_embeddings(model, following).to(h.dtype), step)
            states.append(state)
        return states

    def read(
        self, model: Decoder, ids: Tensor, *, mask: Tensor | None = None, cache: Cache | None = None
    ) -> tuple[Tensor, Tensor]:
        """The final states, twice."""
        hidden = model.hidden(ids, mask=mask, cache=cache)
        return hidden, hidden


class ParallelMTP(MTP):
    """The heads of Gloeckle et al. beside the decoder's last block; the final norm is shared, as in their release."""

    kind = "parallel"

    @staticmethod
    def module(config: LanguageConfig) -> nn.Module:
        """A fresh module of one depth."""
        return PreNormBlock(config, 0)

    @staticmethod
    def block(module: nn.Module) -> nn.Module:
        """The module itself."""
        return module

    def trunk(
        self,
        model: Decoder,
        ids: Tensor,
        *,
        positions: Tensor | None = None,
        mask: Tensor | None = None,
        cache: Cache | None = None,
    ) -> tuple[Tensor, list[Branch]]:
        """Return z (b, n, width), and for each prediction the function from z to what the output head reads."""
        if cache is None:
            _without_prefix(model)
        z, step = model.begin(ids, positions=positions, mask=mask, cache=cache)
        *below, last = model.model.layers
        for layer in below:
            z = model.run(layer, z, step)

        def branch(layer: nn.Module) -> Branch:
            return lambda z: model.model.norm(model.run(layer, z.to(stored(layer)), step).to(z.dtype))

        return z, [branch(layer) for layer in (last, *self.layers)]

    def forward(
        self, model: Decoder, ids: Tensor, *, positions: Tensor | None = None, mask: Tensor | None = None
    ) -> list[Tensor]:
        """States of every prediction; see `MTP.forward`."""
        z, branches = self.trunk(model, ids, positions=positions, mask=mask)
        return [branch(z) for branch in branches]

    def read(
        self, model: Decoder, ids: Tensor, *, mask: Tensor | None = None, cache: Cache | None = None
    ) -> tuple[Tensor, Tensor]:
        """The final states, and z."""
        z, branches = self.trunk(model, ids, mask=mask, cache=cache)
        return branches[0](z), z


class MultiToken(nn.Module):
    """A decoder and its modules as one, which is what training runs."""

    def __init__(self, model: Decoder, mtp: MTP):
        super().__init__()
        self.model, self.mtp = model, mtp

    def states(self, ids: Tensor, *, positions: Tensor | None = None, mask: Tensor | None = None) -> list[Tensor]:
        """What the modules return."""
        return self.mtp(self.model, ids, positions=positions, mask=mask)


KINDS: dict[str, type[MTP]] = {kind.kind: kind for kind in (SequentialMTP, ParallelMTP)}
"""The modules by the name of their kind."""


def _without_prefix(model: Decoder) -> None:
    if model.before is not None:
        raise VolvelleError(
            "multi-token prediction is trained without a prefix: the modules would not know what comes before a text",
            tip="train the modules first, and the prefix on the finished model",
        )


def stored(module: nn.Module) -> torch.dtype:
    """The dtype of its weights: modules may be trained in fp32 beside a frozen decoder of 16 bits."""
    return next(module.parameters()).dtype


def token_embeddings(model: Decoder, ids: Tensor) -> Tensor:
    """Map ids (b, n) -> (b, n, width): the tokens alone, without positions."""
    trunk = model.model
    return trunk.embed_proj(trunk.embed_tokens(ids) * trunk.scale)
