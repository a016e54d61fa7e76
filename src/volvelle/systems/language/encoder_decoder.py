"""The encoder-decoder: an encoder reads a source in both directions, a decoder writes an answer while looking at it.

BART (Lewis et al. 2019, "BART: Denoising Sequence-to-Sequence Pre-training"), with transformers' parameter names: the
parameters of `BartForConditionalGeneration` are these, one for one.

Shapes: s sources of m tokens, b answers of n new tokens (b a multiple of s: b / s answers to each source, side by
side), v vocabulary.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from volvelle.errors import VolvelleError
from volvelle.parts.attention.before import Recorder
from volvelle.parts.attention.cache import Cache, KVCache
from volvelle.parts.position.learned import LearnedPositions
from volvelle.systems.language.components import Step, build_norm, check_ids, drop, standing_alone
from volvelle.systems.language.decoder import Output
from volvelle.systems.language.encoder_decoder_blocks import DecoderBlock, EncoderBlock, Source
from volvelle.systems.language.encoder_decoder_config import EncoderDecoderConfig
from volvelle.systems.language.preface import Prefaced, Site
from volvelle.systems.language.projections import apply_linear

if TYPE_CHECKING:
    from volvelle.systems.language.tokenizer import TextTokenizer

OFFSET = 2
"""BART's table of positions begins with two rows that no position uses."""


class Side(nn.Module):
    """Embeddings of positions, their norm, and the blocks: one half of the model."""

    def __init__(self, config: EncoderDecoderConfig, blocks: list[EncoderBlock] | list[DecoderBlock]):
        super().__init__()
        self.embed_positions = LearnedPositions(config.context + OFFSET, config.width)
        self.layers = nn.ModuleList(blocks)
        self.layernorm_embedding = build_norm(config.norm, config.width)
        self.dropout = config.dropout.embedding

    def embed(self, x: Tensor, positions: Tensor) -> Tensor:
        """Token embeddings (b, n, width) at their positions, normed."""
        x = self.layernorm_embedding(self.embed_positions.embed(x, positions + OFFSET))
        return drop(x, self.dropout, self.training)


class Sides(nn.Module):
    """The token embeddings, which both halves share, and the halves."""

    def __init__(self, config: EncoderDecoderConfig):
        super().__init__()
        self.shared = nn.Embedding(config.vocabulary, config.width, padding_idx=config.special.pad)
        self.encoder = Side(config, [EncoderBlock(config, index) for index in range(config.encoder.depth)])
        self.decoder = Side(config, [DecoderBlock(config, index) for index in range(config.decoder.depth)])
        self.scale = config.embedding_scale

    def words(self, ids: Tensor) -> Tensor:
        """Embeddings (b, n, width) of tokens."""
        x = self.shared(ids)
        return x if self.scale == 1.0 else x * self.scale


class EncoderDecoder(Prefaced):
    """A model of answers to sources: `read` runs the encoder, `hidden` the decoder, `logits` the vocabulary head.

    `config` is the EncoderDecoderConfig, `tokenizer` the TextTokenizer or None. Answers begin with `config.start`. Set
    `gradient_checkpointing` to recompute each block in the backward pass. Fresh weights are drawn from N(0, init_std).
    Lewis et al. 2019, section 2.1.

    >>> from volvelle.systems.language.config import MLP
    >>> from volvelle.systems.language.encoder_decoder_config import EncoderDecoderConfig, Stack
    >>> side = Stack(depth=2, heads=4, mlp=MLP(96, "gelu"))
    >>> model = EncoderDecoder(
    ...     EncoderDecoderConfig("bart", vocabulary=100, width=48, encoder=side, decoder=side, context=64, start=2))
    >>> ids, source = torch.full((2, 5), 2), torch.ones(2, 9, dtype=torch.long)
    >>> model(ids, source=source).logits.shape
    torch.Size([2, 5, 100])
    """

    config: EncoderDecoderConfig
    final_logits_bias: Tensor

    def __init__(self, config: EncoderDecoderConfig):
        super().__init__()
        self.config = config
        self.tokenizer: TextTokenizer | None = None
        self.model = Sides(config)
        self.lm_head = nn.Linear(config.width, config.vocabulary, bias=False)
        # Not trained, and zero in almost every checkpoint; transformers keeps it as a buffer.
        self.register_buffer("final_logits_bias", torch.zeros(1, config.vocabulary))
        self.tie()
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw fresh weights, as the class says."""
        for name, parameter in self.named_parameters():
            if parameter.ndim > 1:
                nn.init.normal_(parameter, std=self.config.init_std)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)
        if self.model.shared.padding_idx is not None:
            nn.init.zeros_(self.model.shared.weight[self.model.shared.padding_idx])

    @property
    def embeddings(self) -> nn.Embedding:
        """The vectors of the words, of sources and of answers."""
        return self.model.shared

    @property
    def plain_head(self) -> bool:
        """Whether logits are exactly hidden @ output_weight.T: nothing is added to them."""
        bias = self.final_logits_bias
        # A fake tensor has no values; the planner asks about fresh models, whose bias is zero.
        return bias.is_meta or isinstance(bias, FakeTensor) or not bool(bias.any())

    def new_cache(
        self, batch: int, context: int, dtype: torch.dtype | None = None, *, blocks: int | None = None
    ) -> KVCache:
        """Allocate a cache for `batch` answers of up to `context` tokens, in the model's dtype unless it is given.

        With `blocks` it is for as many blocks of the decoder, and nothing comes before their texts.
        """
        config = self.config
        layers, ahead = (config.decoder.depth, self.ahead) if blocks is None else (blocks, 0)
        return KVCache.allocate(
            layers,
            batch,
            config.decoder.heads,
            ahead + context,
            config.head_width,
            dtype or self.dtype,
            self.device,
        )

    def forward(
        self,
        ids: Tensor,
        *,
        source: Tensor | Source,
        source_mask: Tensor | None = None,
        positions: Tensor | None = None,
        mask: Tensor | None = None,
        cache: Cache | None = None,
    ) -> Output:
        """Return logits (b, n, v) and hidden states (b, n, width); the arguments are those of `hidden`."""
        hidden = self.hidden(ids, source=source, source_mask=source_mask, positions=positions, mask=mask, cache=cache)
        return Output(self.logits(hidden), hidden)

    def logits(self, hidden: Tensor) -> Tensor:
        """Final hidden states (..., width) -> logits (..., v)."""
        return apply_linear(self.lm_head, hidden) + self.final_logits_bias[0].to(hidden.dtype)

    def read(
        self, source: Tensor, *, mask: Tensor | None = None, positions: Tensor | None = None, keep: bool = False
    ) -> Source:
        """Run the encoder over sources (s, m) int64, for `hidden` to look at as often as it is wanted.

        `mask` is bool (s, m), True = a real token; padding may be left or right. `positions` (m,) or (s, m) are by
        default the number of real tokens before each. `keep` makes the decoder's keys and values of it only once, for
        decoding without gradients. Raises VolvelleError on shapes that do not fit.
        """
        check_ids("source", source, mask)
        if mask is not None and mask.ndim != 2:
            raise VolvelleError(f"the mask of sources must be (s, m), got {tuple(mask.shape)}")
        self._fits("source", source)
        where, allowed, _ = standing_alone(source, mask, causal=False)
        x = self.model.encoder.embed(self.model.words(source), where if positions is None else positions)
        before = self._before(len(source), "encoder")
        reach = allowed if before is None else before.widened(allowed, source.shape[1])
        step = Step(None, reach, False, before)
        for layer in self.model.encoder.layers:
            x = self.run(layer, x, step)
        return Source(x, allowed, keep=keep, before=self._before(len(source), "cross"))

    def hidden(
        self,
        ids: Tensor,
        *,
        source: Tensor | Source,
        source_mask: Tensor | None = None,
        positions: Tensor | None = None,
        mask: Tensor | None = None,
        cache: Cache | None = None,
    ) -> Tensor:
        """Return the final states (b, n, width) of the tokens `ids` of answers, (b, n) int64.

        `source` is what `read` gave, or the sources' tokens (s, m) with their `source_mask`, which are then read.
        `mask` is bool: (b, n), True = a real token (padding may be left or right), or (b, n, n), True = may attend.
        `positions` are int64 (n,) or (b, n), by default the number of real tokens before each. With a `cache` the
        tokens follow those in it and are written to it; the caller commits the step.
        Raises VolvelleError on shapes that do not fit.
        """
        if isinstance(source, Tensor):
            source = self.read(source, mask=source_mask)
        elif source_mask is not None:
            raise VolvelleError("a source that was read has its mask already: give source_mask to `read`")
        x, step = self.begin(ids, source, positions=positions, mask=mask, cache=cache)
        for layer in self.model.decoder.layers:
            x = layer(x, step, source) if cache is not None else self.run(layer, x, step, source)
        return x

    def begin(
        self,
        ids: Tensor,
        source: Source,
        *,
        positions: Tensor | None = None,
        mask: Tensor | None = None,
        cache: Cache | None = None,
    ) -> tuple[Tensor, Step]:
        """Return what the first block of the decoder reads (b, n, width), and what all blocks share; see `hidden`."""
        check_ids("token ids", ids, mask)
        if len(ids) % len(source.states):
            raise VolvelleError(f"{len(ids)} answers cannot be shared out to {len(source.states)} sources")
        past = self._past(cache, len(ids))
        if cache is None:
            self._fits("answer", ids)
        if past is not None:
            kind = {} if mask is None else {"padding": mask} if mask.ndim == 2 else {"tree": mask}
            where, allowed, causal = past.begin(ids.shape[1], **kind)
        else:
            where, allowed, causal = standing_alone(ids, mask, causal=True)
        x = self.model.decoder.embed(self.model.words(ids), where if positions is None else self._moved(positions))
        return x, Step(None, allowed, causal, past)

    def states_of(self, ids: Tensor) -> dict[Site, Tensor]:
        """The keys and values (layers, 2, b, h, n, d) that words (b, n) give each kind of attention.

        They are read as the source, looked at, and written as the answer to it.
        """
        encoder, decoder, positions = Recorder(), Recorder(), torch.arange(ids.shape[1], device=ids.device)
        x = self.model.encoder.embed(self.model.words(ids), positions)
        for layer in self.model.encoder.layers:
            x = layer(x, Step(None, None, False, encoder))
        source = Source(x)
        looks: list[Any] = [layer.encoder_attn for layer in self.model.decoder.layers]
        cross = [torch.stack(look.keys_values(x)) for look in looks]
        x = self.model.decoder.embed(self.model.words(ids), positions)
        for layer in self.model.decoder.layers:
            x = layer(x, Step(None, None, True, decoder), source)
        return {"decoder": decoder.states, "cross": torch.stack(cross), "encoder": encoder.states}

    def _fits(self, what: str, ids: Tensor) -> None:
        room = self.room if what == "answer" else self.config.context
        if ids.shape[1] > room:
            raise VolvelleError(f"{what} of {ids.shape[1]} tokens: the model's context is {room}")


class Answering:
    """An encoder-decoder that has read its sources: it goes on with answers as a `Decoder` goes on with texts.

    Decoding loops take it for the model; rows are answers, in the order of their sources.
    """

    def __init__(self, model: EncoderDecoder, source: Source):
        self.model, self.source = model, source

    @property
    def device(self) -> torch.device:
        """Where the model lies."""
        return self.model.device

    def new_cache(self, batch: int, context: int, dtype: torch.dtype | None = None) -> KVCache:
        """Allocate a cache for `batch` answers of up to `context` tokens."""
        return self.model.new_cache(batch, context, dtype)

    def hidden(
        self,
        ids: Tensor,
        *,
        positions: Tensor | None = None,
        mask: Tensor | None = None,
        cache: Cache | None = None,
    ) -> Tensor:
        """`EncoderDecoder.hidden` with these sources."""
        return self.model.hidden(ids, source=self.source, positions=positions, mask=mask, cache=cache)

    def logits(self, hidden: Tensor) -> Tensor:
        """Final hidden states (..., width) -> logits (..., v)."""
        return self.model.logits(hidden)
