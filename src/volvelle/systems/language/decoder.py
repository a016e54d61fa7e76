"""One decoder for Llama, SmolLM2, Qwen2, GPT-2 and RoFormer, composed from the components its configuration names.

Parameters carry Hugging Face's Llama names in every family; key_maps.py says where each lies in a foreign file.

Shapes: b batch, n new tokens, m tokens in reach (cache included), v vocabulary.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from volvelle.errors import VolvelleError
from volvelle.parts.attention.cache import KVCache
from volvelle.parts.position.encoding import Bias, PositionEncoding
from volvelle.parts.position.hierarchical import HierarchicalPositions
from volvelle.parts.position.learned import LearnedPositions
from volvelle.systems.language.components import (
    HeadTransform,
    PostNormBlock,
    PreNormBlock,
    Step,
    build_norm,
    build_position,
    drop,
)
from volvelle.systems.language.config import LanguageConfig, Shaw, TransformerXL
from volvelle.systems.language.projections import Straight, apply_linear

if TYPE_CHECKING:
    from volvelle.systems.language.tokenizer import TextTokenizer


class Output(NamedTuple):
    """What a forward returns: logits (b, n, v) and the hidden states (b, n, width) they were made from."""

    logits: Tensor
    hidden: Tensor


class Trunk(nn.Module):
    """Embeddings, blocks and the last norm: everything before the vocabulary head."""

    def __init__(self, config: LanguageConfig):
        super().__init__()
        post = config.order == "post"
        block = PostNormBlock if post else PreNormBlock
        self.embed_tokens = nn.Embedding(config.vocabulary, config.embedding_width)
        self.embed_segments = nn.Embedding(config.segments, config.embedding_width) if config.segments else None
        self.scale = config.embedding_scale
        self.position = build_position(config)
        self.embed_norm = build_norm(config.norm, config.embedding_width) if post else nn.Identity()
        projected = config.embedding_width != config.width
        self.embed_proj = nn.Linear(config.embedding_width, config.width) if projected else nn.Identity()
        self.layers = nn.ModuleList(block(config, index) for index in range(config.depth))
        self.norm = nn.Identity() if post else build_norm(config.norm, config.width)
        self.dropout = config.dropout.embedding
        self.straight: Straight | None = None  # the fast path through the blocks, once `fuse_projections` prepared it

    def prepared(self, x: Tensor) -> Straight | None:
        """The fast path where it is there, still true, and gradients, dropout, autocast and tracing are all off."""
        if self.straight is None or torch.is_grad_enabled() or self.training or torch.compiler.is_compiling():
            return None
        if torch.is_autocast_enabled(x.device.type):
            return None
        if not self.straight.watch.unchanged():
            self.straight = None  # it would keep the old weights alive
        return self.straight

    def _apply(self, fn, recurse: bool = True):
        # A cast or a move gives every parameter a storage of its own: let go of the joined ones.
        self.straight = None
        return super()._apply(fn, recurse)

    def embed(self, ids: Tensor, positions: Tensor, segments: Tensor | None) -> Tensor:
        """Map ids (b, n) -> (b, n, width): tokens, segments, absolute positions; normed, projected if configured."""
        x = self.embed_tokens(ids)
        if self.scale != 1.0:
            x = x * self.scale
        if self.embed_segments is not None:
            x = x + (self.embed_segments.weight[0] if segments is None else self.embed_segments(segments))
        x = self.position.embed(x, positions, ids)
        return self.embed_proj(drop(self.embed_norm(x), self.dropout, self.training))


class Decoder(nn.Module):
    """A language model: `hidden` runs the blocks, `logits` the vocabulary head, `forward` both.

    `config` is the LanguageConfig, `tokenizer` the TextTokenizer or None. Set `gradient_checkpointing` to recompute
    each block in the backward pass instead of keeping its activations. Fresh weights are drawn from N(0, init_std);
    in pre-norm blocks the projections back into the residual stream are scaled by 1/sqrt(2 depth) (Radford et al.
    2019, section 2.3). Build under `torch.device("meta")` to allocate nothing.

    >>> from volvelle.systems.language.config import GatedMLP, LanguageConfig, RMSNorm, Rope
    >>> config = LanguageConfig(
    ...     "llama", vocabulary=100, width=48, depth=2, heads=4, context=64,
    ...     norm=RMSNorm(), mlp=GatedMLP(96), position=Rope(), kv_heads=2)
    >>> model = Decoder(config)
    >>> model(torch.zeros(1, 5, dtype=torch.long)).logits.shape
    torch.Size([1, 5, 100])
    """

    def __init__(self, config: LanguageConfig):
        super().__init__()
        self.config = config
        self.tokenizer: TextTokenizer | None = None
        self.gradient_checkpointing = False
        self.model = Trunk(config)
        head = config.head
        self.head_transform = nn.Identity() if head.transform is None else HeadTransform(config, head.transform)
        width = config.width if head.transform is None else config.embedding_width
        self.lm_head = nn.Linear(width, config.vocabulary, bias=head.bias)
        self.tie()
        self.reset_parameters()

    def tie(self) -> None:
        """Make the output weights those of the token embeddings, where the configuration says so."""
        if self.config.head.tied:
            self.lm_head.weight = self.model.embed_tokens.weight

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw fresh weights, as the class says."""
        std = self.config.init_std
        for name, parameter in self.named_parameters():
            if parameter.ndim > 1:
                back = self.config.order == "pre" and name.endswith(("o_proj.weight", "down_proj.weight"))
                nn.init.normal_(parameter, std=std / (2 * self.config.depth) ** 0.5 if back else std)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)
        for module in self.modules():
            # Vectors that are added are drawn as all weights are; other encodings begin where their papers say.
            if isinstance(module, PositionEncoding) and type(module) not in {LearnedPositions, HierarchicalPositions}:
                getattr(module, "reset_parameters", lambda: None)()

    @property
    def device(self) -> torch.device:
        """Where the embeddings lie."""
        return self.model.embed_tokens.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """The embeddings' dtype."""
        return self.model.embed_tokens.weight.dtype

    @property
    def output_weight(self) -> Tensor:
        """The (vocabulary, width) matrix of the head, for losses over chunks of the vocabulary.

        Logits are hidden @ output_weight.T only where the head has neither transform nor bias (`plain_head`).
        """
        return self.lm_head.weight

    @property
    def plain_head(self) -> bool:
        """Whether logits are exactly hidden @ output_weight.T."""
        return self.config.head.transform is None and not self.config.head.bias

    def new_cache(self, batch: int, context: int, dtype: torch.dtype | None = None) -> KVCache:
        """Allocate a cache for `batch` rows of up to `context` tokens, in the model's dtype unless another is given."""
        config = self.config
        if not config.causal:
            raise VolvelleError("a masked language model attends in both directions: it has no cache")
        return KVCache.allocate(
            config.depth, batch, config.kv_heads, context, config.head_width, dtype or self.dtype, self.device
        )

    def forward(
        self,
        ids: Tensor,
        *,
        positions: Tensor | None = None,
        mask: Tensor | None = None,
        segments: Tensor | None = None,
        cache: KVCache | None = None,
    ) -> Output:
        """Return logits (b, n, v) and hidden states (b, n, width); the arguments are those of `hidden`."""
        hidden = self.hidden(ids, positions=positions, mask=mask, segments=segments, cache=cache)
        return Output(self.logits(hidden), hidden)

    def logits(self, hidden: Tensor) -> Tensor:
        """Final hidden states (..., width) -> logits (..., v)."""
        return apply_linear(self.lm_head, self.head_transform(hidden))

    def hidden(
        self,
        ids: Tensor,
        *,
        positions: Tensor | None = None,
        mask: Tensor | None = None,
        segments: Tensor | None = None,
        cache: KVCache | None = None,
    ) -> Tensor:
        """Return the final normed states (b, n, width) of the tokens `ids`, (b, n) int64.

        `mask` is bool: (b, n), True = a real token (padding may be left or right), or (b, n, n), True = may attend,
        which replaces the causal order among the new tokens (token trees, packed documents). `positions` are int64 (n,)
        or (b, n), by default the number of real tokens before each. `segments` (b, n) are token types (RoFormer;
        default 0). With a `cache` the tokens follow those in it and are written to it; the caller commits the step.
        Raises VolvelleError on shapes that do not fit and on a cache for a model without causal order.
        """
        self._check(ids, mask, segments, cache)
        if cache is not None:
            kind = {} if mask is None else {"padding": mask} if mask.ndim == 2 else {"tree": mask}
            opened = cache.begin(ids.shape[1], **kind)
            where, allowed, causal = opened.positions, opened.mask, opened.causal
        else:
            where, allowed, causal = self._whole(ids, mask)
        positions = where if positions is None else positions
        x = self.model.embed(ids, positions, segments)
        rotation = self.model.position.rotation(positions, x.dtype)
        step = Step(rotation, allowed, causal, cache, *self._relative(positions, cache))
        straight = self.model.prepared(x)
        if straight is not None:
            return self.model.norm(straight(x, step))
        recompute = self.gradient_checkpointing and torch.is_grad_enabled() and cache is None
        for layer in self.model.layers:
            x = checkpoint(layer, x, step, use_reentrant=False) if recompute else layer(x, step)
        return self.model.norm(x)

    def _relative(self, positions: Tensor, cache: KVCache | None) -> tuple[Bias | None, tuple[Tensor, Tensor] | None]:
        """The score bias that all layers share, and the positions of queries and keys where any bias needs them."""
        bias = self.model.position.bias()
        if bias is None and not isinstance(self.config.position, Shaw | TransformerXL):
            return None, None
        positions = positions[0] if positions.dim() == 2 and len(positions) == 1 else positions
        return bias, (positions, positions if cache is None else cache.key_positions(positions))

    def _whole(self, ids: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor | None, bool]:
        """Positions, attention mask and causality of a text that stands alone, without a cache."""
        n, causal = ids.shape[1], self.config.causal
        if mask is None:
            return torch.arange(n, device=ids.device), None, causal
        if mask.ndim == 3:
            return (mask.sum(-1) - 1).clamp(min=0), mask[:, None], False
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        allowed = mask[:, None, None]
        if causal:
            allowed = allowed & torch.ones(n, n, dtype=torch.bool, device=ids.device).tril()
        return positions, allowed, False

    def _check(self, ids: Tensor, mask: Tensor | None, segments: Tensor | None, cache: KVCache | None) -> None:
        if ids.ndim != 2 or ids.shape[1] == 0 or ids.is_floating_point():
            raise VolvelleError(f"token ids must be integers of shape (b, n), got {ids.dtype} {tuple(ids.shape)}")
        b, n = ids.shape
        if mask is not None and (mask.dtype != torch.bool or tuple(mask.shape) not in {(b, n), (b, n, n)}):
            raise VolvelleError(
                f"mask must be bool of shape {(b, n)} or {(b, n, n)}, got {mask.dtype} {tuple(mask.shape)}"
            )
        if segments is not None and not self.config.segments:
            raise VolvelleError("this model has no segment embeddings, but segments were given")
        if cache is not None and not self.config.causal:
            raise VolvelleError("a masked language model attends in both directions: it has no cache")
