"""One decoder for Llama, SmolLM2, Qwen2, GPT-2 and RoFormer, composed from the components its configuration names.

Parameters carry Hugging Face's Llama names in every family; key_maps.py says where each lies in a foreign file.

Shapes: b batch, n new tokens, m tokens in reach (cache included), v vocabulary.
"""

from __future__ import annotations

from math import inf
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from volvelle.errors import VolvelleError
from volvelle.parts.attention.before import Past, Recorder
from volvelle.parts.attention.cache import Cache, KVCache
from volvelle.parts.attention.seat_cache import SeatCache
from volvelle.parts.attention.state_cache import StateCache
from volvelle.parts.position.encoding import Bias, PositionEncoding
from volvelle.parts.position.hierarchical import HierarchicalPositions
from volvelle.parts.position.learned import LearnedPositions
from volvelle.systems.language.components import (
    HeadTransform,
    PostNormBlock,
    PreNormBlock,
    Step,
    build_norm,
    check_ids,
    drop,
    no_keys,
    places,
    standing_alone,
    written_out,
)
from volvelle.systems.language.config import LanguageConfig, LinearAttention, ScoreBias
from volvelle.systems.language.positions import build_position
from volvelle.systems.language.preface import Prefaced
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
        return self.place(self.embed_tokens(ids), positions, segments, ids)

    def place(self, x: Tensor, positions: Tensor, segments: Tensor | None = None, ids: Tensor | None = None) -> Tensor:
        """The rest of `embed`, for token embeddings x (b, n, embedding_width) of any origin."""
        if self.scale != 1.0:
            x = x * self.scale
        if self.embed_segments is not None:
            x = x + (self.embed_segments.weight[0] if segments is None else self.embed_segments(segments))
        x = self.position.embed(x, positions, ids)
        return self.embed_proj(drop(self.embed_norm(x), self.dropout, self.training))


class Decoder(Prefaced):
    """A language model: `hidden` runs the blocks, `logits` the vocabulary head, `forward` both.

    `config` is the LanguageConfig, `tokenizer` the TextTokenizer or None. With `written` only ids below it have a
    chance (a model of pictures reads captions and writes codes): the logits of all others are -inf. Set
    `gradient_checkpointing` to recompute each block in the backward pass instead of keeping its activations. Fresh
    weights are drawn from N(0, init_std); in pre-norm blocks the projections back into the residual stream are scaled
    by 1/sqrt(2 depth) (Radford et al. 2019, section 2.3). Build under `torch.device("meta")` to allocate nothing.

    >>> from volvelle.systems.language.config import GatedMLP, LanguageConfig, RMSNorm, Rope
    >>> config = LanguageConfig(
    ...     "llama", vocabulary=100, width=48, depth=2, heads=4, context=64,
    ...     norm=RMSNorm(), mlp=GatedMLP(96), position=Rope(), kv_heads=2)
    >>> model = Decoder(config)
    >>> model(torch.zeros(1, 5, dtype=torch.long)).logits.shape
    torch.Size([1, 5, 100])
    """

    config: LanguageConfig

    def __init__(self, config: LanguageConfig):
        super().__init__()
        self.config = config
        self.tokenizer: TextTokenizer | None = None
        self.written: int | None = None
        self.model = Trunk(config)
        head = config.head
        self.head_transform = nn.Identity() if head.transform is None else HeadTransform(config, head.transform)
        width = config.width if head.transform is None else config.embedding_width
        self.lm_head = nn.Linear(width, config.vocabulary, bias=head.bias)
        self.tie()
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw fresh weights, as the class says."""
        draw_weights(self, self.config)

    @property
    def embeddings(self) -> nn.Embedding:
        """The vectors of the words."""
        return self.model.embed_tokens

    @property
    def _linear(self) -> bool:
        return isinstance(self.config.attention, LinearAttention)

    @property
    def plain_head(self) -> bool:
        """Whether logits are exactly hidden @ output_weight.T."""
        return self.config.head.transform is None and not self.config.head.bias

    def new_cache(
        self, batch: int, context: int, dtype: torch.dtype | None = None, *, blocks: int | None = None
    ) -> Cache:
        """Allocate a cache for `batch` rows of up to `context` tokens, in the model's dtype unless another is given.

        Keys that come before every text have room besides; the first step writes them.
        With `blocks` it is for as many blocks that are not the model's own, and nothing comes before their texts.
        """
        config = self.config
        if not config.causal:
            raise VolvelleError("a masked language model attends in both directions: it has no cache")
        layers, ahead = (config.depth, self.ahead) if blocks is None else (blocks, 0)
        if self._linear:
            width = config.head_width
            return StateCache.allocate(layers, batch, config.kv_heads, width, width, dtype or self.dtype, self.device)
        return KVCache.allocate(
            layers,
            batch,
            config.kv_heads,
            ahead + context,
            config.head_width,
            dtype or self.dtype,
            self.device,
        )

    def new_seats(self, batch: int, context: int) -> SeatCache | StateCache:
        """Allocate a cache for texts that come and go: `batch` rows of up to `context` tokens.

        What comes before a text comes with it (`adopt`). Raises VolvelleError for a masked language model.
        """
        config = self.config
        if self._linear or not config.causal:
            cache = self.new_cache(batch, context)
            assert isinstance(cache, StateCache)
            return cache
        sizes = (config.depth, batch, config.kv_heads, context, config.head_width)
        return SeatCache.allocate(*sizes, self.dtype, self.device)

    def forward(
        self,
        ids: Tensor,
        *,
        positions: Tensor | None = None,
        mask: Tensor | None = None,
        segments: Tensor | None = None,
        cache: Cache | None = None,
    ) -> Output:
        """Return logits (b, n, v) and hidden states (b, n, width); the arguments are those of `hidden`."""
        hidden = self.hidden(ids, positions=positions, mask=mask, segments=segments, cache=cache)
        return Output(self.logits(hidden), hidden)

    def logits(self, hidden: Tensor) -> Tensor:
        """Final hidden states (..., width) -> logits (..., v)."""
        x = self.head_transform(hidden)
        straight = self.model.prepared(x)
        logits = apply_linear(self.lm_head, x) if straight is None else straight.logits(self.lm_head, x)
        if self.written is None:
            return logits
        return pad(logits[..., : self.written], (0, logits.shape[-1] - self.written), value=-inf)

    def hidden(
        self,
        ids: Tensor,
        *,
        positions: Tensor | None = None,
        mask: Tensor | None = None,
        segments: Tensor | None = None,
        cache: Cache | None = None,
    ) -> Tensor:
        """Return the final normed states (b, n, width) of the tokens `ids`, (b, n) int64.

        `mask` is bool: (b, n), True = a real token (padding may be left or right), or (b, n, n), True = may attend,
        which replaces the causal order among the new tokens (token trees); or int64 (b, n), the number of the text that
        each token belongs to (packed rows), of which no (n, n) mask is made. `positions` are int64 (n,)
        or (b, n), by default the number of real tokens before each; keys that come before every text (`before`) move
        all of them by their number. `segments` (b, n) are token types (RoFormer; default 0). With a `cache` the tokens
        follow those in it and are written to it; the caller commits the step.
        Raises VolvelleError on shapes that do not fit and on a cache for a model without causal order.
        """
        x, step = self.begin(ids, positions=positions, mask=mask, segments=segments, cache=cache)
        straight = self.model.prepared(x) if step.documents is None else None
        if straight is not None:
            return self.model.norm(straight(x, step))
        for layer in self.model.layers:
            x = self.run(layer, x, step)
        return self.model.norm(x)

    def begin(
        self,
        ids: Tensor,
        *,
        positions: Tensor | None = None,
        mask: Tensor | None = None,
        segments: Tensor | None = None,
        cache: Cache | None = None,
    ) -> tuple[Tensor, Step]:
        """Return what the first block reads (b, n, width), and what all blocks share; the arguments are `hidden`'s."""
        self._check(ids, mask, segments, cache)
        past = self._past(cache, len(ids))
        documents = None if mask is None or mask.dtype == torch.bool else mask
        both_ways = self._linear and not self.config.causal
        if documents is not None and (past is not None or both_ways):  # which know masks only
            documents, mask = None, written_out(documents, self.config.causal)
        if past is not None:
            kind = {} if mask is None else {"padding": mask} if mask.ndim == 2 else {"tree": mask}
            where, allowed, causal = past.begin(ids.shape[1], **kind)
        elif documents is not None:
            where, allowed, causal = places(documents), None, self.config.causal
        else:
            where, allowed, causal = standing_alone(ids, mask, self.config.causal, merged=not self._linear)
        at = where if positions is None else self._moved(positions)
        x = self.model.embed(ids, at, segments)
        return x, self.shared(x, at, allowed, causal, past)._replace(documents=documents)

    def states_of(self, x: Tensor, ids: Tensor | None = None) -> Tensor:
        """The keys and values (layers, 2, b, h_kv, n, d) that token embeddings x (b, n, embedding_width) give.

        They can come before another text, which then is what it would be behind these tokens. `ids` (b, n) are for
        positions that depend on the word.
        """
        past = Recorder(x.device)
        positions, allowed, causal = past.begin(x.shape[1])
        x = self.model.place(x.to(self.dtype), positions, ids=ids)
        step = self.shared(x, positions, allowed, causal, past)
        for layer in self.model.layers:
            x = layer(x, step)
        return past.states

    def shared(self, x: Tensor, positions: Tensor, allowed: Tensor | None, causal: bool, past: Any) -> Step:
        """What all blocks share: the rotation in the dtype in which they apply it, what score biases need, the past.

        The arguments are what the first block reads, and positions, mask and causality as a cache's `begin` gives them.
        """
        # linear attention turns its features in fp32 at least
        dtype = torch.promote_types(x.dtype, torch.float32) if self._linear else x.dtype
        rotation = self.model.position.rotation(positions, dtype)
        bias, where = self._relative(positions, past)
        return Step(rotation, allowed, causal, past, bias, where, self.model.position.vectors())

    def _relative(self, positions: Tensor, past: Past | None) -> tuple[Bias | None, tuple[Tensor, Tensor] | None]:
        """The score bias that all layers share, and the positions of queries and keys where any bias needs them."""
        bias = self.model.position.bias()
        if not isinstance(self.config.position, ScoreBias):
            return None, None
        positions = positions[0] if positions.dim() == 2 and len(positions) == 1 else positions
        return bias, (positions, positions if past is None else past.key_positions(positions))

    def _check(self, ids: Tensor, mask: Tensor | None, segments: Tensor | None, cache: Cache | None) -> None:
        check_ids("token ids", ids, mask)
        if segments is not None and not self.config.segments:
            raise VolvelleError("this model has no segment embeddings, but segments were given")
        if cache is not None and not self.config.causal:
            raise VolvelleError("a masked language model attends in both directions: it has no cache")
        if self._linear and self.before is not None:
            raise no_keys()
        if cache is not None and isinstance(cache, StateCache) != self._linear:
            raise VolvelleError(f"this model does not decode with a {type(cache).__name__}", tip="call model.new_cache")


@torch.no_grad()
def draw_weights(module: nn.Module, config: LanguageConfig) -> None:
    """Draw fresh weights for a decoder, or for blocks beside one, as `Decoder` says."""
    std = config.init_std
    for name, parameter in module.named_parameters():
        if parameter.ndim > 1:
            back = config.order == "pre" and name.endswith(("o_proj.weight", "down_proj.weight"))
            nn.init.normal_(parameter, std=std / (2 * config.depth) ** 0.5 if back else std)
        elif name.endswith("bias"):
            nn.init.zeros_(parameter)
    for part in module.modules():
        # Vectors that are added are drawn as all weights are; other encodings begin where their papers say.
        if isinstance(part, PositionEncoding) and type(part) not in {LearnedPositions, HierarchicalPositions}:
            getattr(part, "reset_parameters", lambda: None)()
