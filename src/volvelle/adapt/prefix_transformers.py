"""Keys and values before the text for transformers' decoder models, through hooks on the modules they have.

transformers would take them as `past_key_values`, but drops those where layers are recomputed (gradient checkpointing),
counts them as text in every later step, and no longer sees where packed rows begin. Here the model keeps its own cache,
or none, and each self-attention gets its past behind ours: a face over the cache puts the given keys first, the mask
gets their columns, and the trunk's positions begin after them. A layer that is recomputed asks again and gets the same.

Shapes: b batch, h_kv key/value heads, l keys that come before, n new tokens, m keys in reach, d features a head.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import itertools
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from volvelle.errors import VolvelleError
from volvelle.parts.attention.before import Before, Recorder

_PAST = ("cache", "past_key_values", "past_key_value", "layer_past")  # `cache` since transformers 5.24
_OTHERS = re.compile(r"encoder|cross|EncDec")  # attention that does not read the text that is written
_MASKED = ("sdpa", "eager")  # implementations whose masks are (b, h, n, m) tensors


class Sizes(NamedTuple):
    """What a prefix must fit: one keys-and-values pair a layer, and the width of a token's embedding."""

    layers: int
    kv_heads: int
    head_width: int
    embedding: int


def sizes(model: nn.Module) -> Sizes:
    """The sizes in a transformers model's configuration."""
    config: Any = getattr(model, "config", None)
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    heads = getattr(config, "num_attention_heads", None)
    width = getattr(config, "hidden_size", None)
    layers = getattr(config, "num_hidden_layers", None)
    if getattr(config, "is_encoder_decoder", False):
        raise VolvelleError(
            f"{type(model).__name__}: prefixes go to transformers' decoder models",
            tip="open an encoder-decoder with volvelle.systems.load_language_model, prefixes go to ours",
        )
    if not (heads and width and layers):
        raise VolvelleError(
            f"prefix tuning: {type(model).__name__} is no decoder whose configuration tells its layers and heads",
            tip="prefixes and prompts go to our decoders and to transformers' decoder models",
        )
    embeddings: Any = model.get_input_embeddings()  # pyright: ignore[reportCallIssue]
    return Sizes(
        layers,
        getattr(config, "num_key_value_heads", None) or heads,
        getattr(config, "head_dim", None) or width // heads,
        embeddings.weight.shape[1],
    )


class Graft:
    """The hooks on one model. `preface(model, b)` gives what comes before the b rows of a text, or None for nothing."""

    def __init__(self, model: nn.Module, preface: Callable[[nn.Module, int], Before | None]):
        trunk, attentions = _find(model)
        self.model, self.trunk, self.preface = model, trunk, preface
        self._source: Before | Recorder | None = None
        modules = [(trunk, self._enter), *((module, self._attend) for module in attentions)]
        self._handles = [module.register_forward_pre_hook(hook, with_kwargs=True) for module, hook in modules]

    def remove(self) -> None:
        """Take the hooks away."""
        for handle in self._handles:
            handle.remove()

    def states_of(self, x: Tensor) -> Tensor:
        """The keys and values (layers, 2, b, h_kv, n, d) that token embeddings x (b, n, embedding) give."""
        recorder, outer = Recorder(x.device), self._source
        self._source = recorder
        try:
            with _without_checkpointing(self.trunk):
                positions = torch.arange(x.shape[1], device=x.device)[None]
                self.trunk(inputs_embeds=x, position_ids=positions, use_cache=False)
        finally:
            self._source = outer
        return recorder.states

    def _enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if isinstance(self._source, Recorder):
            return None
        known = _arguments(module)
        values = known.named(args, kwargs)
        past = values.get(known.past)
        seen = 0 if past is None else int(past.get_seq_length())
        text = values["inputs_embeds"] if values.get("input_ids") is None else values["input_ids"]
        # In later steps of a generation the keys are what they were in the first.
        if seen == 0 or self._source is None or torch.is_grad_enabled():
            self._source = self.preface(self.model, len(text))
        if self._source is None:
            return None
        if torch.is_grad_enabled() and self.trunk.training:
            _refuse_reentrant(self.trunk)
        positions = values.get("position_ids")
        if positions is None:
            positions = torch.arange(seen, seen + text.shape[1], device=text.device)[None]
        return (), values | {"position_ids": positions + self._source.lengths}

    def _attend(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        source, known = self._source, _arguments(module)
        if source is None:
            return None
        values = known.named(args, kwargs)
        past, n = values.get(known.past), values["hidden_states"].shape[1]
        past = getattr(past, "self_attention_cache", past)
        mask, alone = values.get("attention_mask"), False
        if isinstance(source, Before):
            alone = mask is None and n > 1
            reach = n if past is None or n > 1 else n + past.get_seq_length(module.layer_idx)
            mask = _widened(mask, source, n, reach, module)
        return (), values | {"attention_mask": mask, known.past: _Behind(past, source, n if alone else None)}


class _Behind:
    """A past as an attention module of transformers uses one: `update` returns all keys and values."""

    def __init__(self, cache: Any, source: Before | Recorder, alone: int | None):
        self._cache, self._source, self._alone = cache, source, alone

    def update(self, k: Tensor, v: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Write k and v to the model's cache, if it has one, and put the given keys and values first."""
        if self._cache is not None:
            k, v = self._cache.update(k, v, layer_idx, *args, **kwargs)
            if self._alone is not None:  # a static cache returns the slots that are still empty as well
                k, v = k[:, :, : self._alone], v[:, :, : self._alone]
        return self._source.append(layer_idx, k, v)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._cache, name)


class _Arguments(NamedTuple):
    """The names of the arguments of a class's forward, and which of them is the past."""

    names: tuple[str, ...]
    past: str

    def named(self, args: Sequence[Any], kwargs: dict[str, Any]) -> dict[str, Any]:
        """All arguments by name; the past by the name it has here, whichever of its names it was given under."""
        values = dict(zip(self.names, args, strict=False)) | kwargs
        for older in (name for name in _PAST if self.past and name in values and name not in self.names):
            given = values.pop(older)
            values = values if given is None else values | {self.past: given}
        return values


def _arguments(module: nn.Module) -> _Arguments:
    # Another adapter may have put a subclass in the place of the module's class, whose forward takes anything.
    return _signature(getattr(module, "base_class", type(module)))


@functools.cache
def _signature(kind: type[nn.Module]) -> _Arguments:
    names = tuple(inspect.signature(kind.forward).parameters)[1:]
    return _Arguments(names, next((name for name in _PAST if name in names), ""))


def _widened(mask: Any, before: Before, n: int, reach: int, module: nn.Module) -> Tensor | None:
    """The mask of n queries over `reach` keys with the columns of what comes before in front; None: all is visible."""
    implementation = getattr(getattr(module, "config", None), "_attn_implementation", "eager")
    if implementation not in _MASKED or not (mask is None or (isinstance(mask, Tensor) and mask.dim() == 4)):
        raise VolvelleError(
            f"a prefix needs masks that are tensors of (b, h, n, m); attention {implementation!r} has others",
            tip='model.set_attn_implementation("sdpa")',
        )
    if mask is None:
        if before.present is None and (n == 1 or not getattr(module, "is_causal", True)):
            return None
        weight = next(module.parameters())
        mask = torch.ones(1, 1, n, reach, dtype=torch.bool, device=weight.device).tril(reach - n)
        mask = mask if implementation == "sdpa" else _added(mask, weight.dtype)
    if mask.dtype == torch.bool:
        return before.widened(mask, mask.shape[-1])
    if before.present is None:
        return nn.functional.pad(mask, (before.length, 0))
    front = _added(before.present[:, None, None], mask.dtype)
    rows, heads = len(front), mask.shape[1]
    return torch.cat((front.expand(rows, heads, n, -1), mask.expand(rows, heads, n, -1)), -1)


def _added(seen: Tensor, dtype: torch.dtype) -> Tensor:
    """A bool mask as numbers that are added to the scores."""
    return torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill(~seen, torch.finfo(dtype).min)


def _find(model: nn.Module) -> tuple[nn.Module, list[nn.Module]]:
    """The module that gives tokens their positions, and the self-attentions under it, one a layer."""
    found: dict[int, tuple[str, nn.Module]] = {}
    for path, module in model.named_modules():
        index = getattr(module, "layer_idx", None)
        if not isinstance(index, int) or _OTHERS.search(path) or _is_block(module):
            continue
        arguments = _arguments(module)
        if arguments.past and "attention_mask" in arguments.names:
            if index in found:
                raise _unknown(model, f"{found[index][0]} and {path} both attend in layer {index}")
            found[index] = path, module
    layers = sizes(model).layers
    if sorted(found) != list(range(layers)):
        raise _unknown(model, f"{len(found)} of its {layers} layers have a self-attention with a past")
    parts = [path.split(".") for path, _ in found.values()]
    columns = itertools.takewhile(lambda names: len(set(names)) == 1, zip(*parts, strict=False))
    common = [names[0] for names in columns]
    for depth in range(len(common), -1, -1):
        trunk = model.get_submodule(".".join(common[:depth]))
        if {"position_ids", "inputs_embeds"} <= set(_arguments(trunk).names):
            return trunk, [found[index][1] for index in range(layers)]
    raise _unknown(model, "it takes no position_ids")


def _is_block(module: nn.Module) -> bool:
    return any(kind.__name__ == "GradientCheckpointingLayer" for kind in type(module).__mro__)


def _unknown(model: nn.Module, why: str) -> VolvelleError:
    return VolvelleError(
        f"{type(model).__name__}: cannot put keys before its text: {why}",
        tip="this works on our decoders and on transformers' decoder models such as Llama, Qwen, Mistral and GPT-2",
    )


def _refuse_reentrant(trunk: nn.Module) -> None:
    for module in trunk.modules():
        function = getattr(module, "_gradient_checkpointing_func", None)
        if getattr(module, "gradient_checkpointing", False) and getattr(function, "keywords", {}).get("use_reentrant"):
            raise VolvelleError(
                "reentrant checkpointing hides what comes before the text from the gradients",
                tip="model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={'use_reentrant': False})",
            )


@contextlib.contextmanager
def _without_checkpointing(trunk: nn.Module) -> Iterator[None]:
    """No recomputation inside: the few tokens of a prompt are cheap, and a recorder writes once."""
    switched: list[Any] = [module for module in trunk.modules() if getattr(module, "gradient_checkpointing", False)]
    for module in switched:
        module.gradient_checkpointing = False
    try:
        yield
    finally:
        for module in switched:
            module.gradient_checkpointing = True
