"""The adaptation methods whose memory can be planned.

LoRA and bottleneck adapters are the library's own. Prefix tuning is written here in the shape of PEFT's: the same
trained tensors in the same places, so that its memory is right.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from volvelle.adapt.bottleneck import family_of
from volvelle.adapt.methods import Bottleneck, LoRA
from volvelle.adapt.model import apply
from volvelle.errors import VolvelleError
from volvelle.parts.lowrank.kinds import is_linear
from volvelle.systems.language.components import SelfAttention, Step, written_out
from volvelle.systems.language.decoder import Decoder

PREFIX_LENGTH = 20


def adapt(model: nn.Module, method: Any) -> nn.Module:
    """Rewrite `model` for `method` (a name, a method of volvelle.adapt, or a function) and freeze what it freezes."""
    if method == "full":
        return model
    if method == "lora":
        return apply(model, LoRA(targets="all-linear")).model
    if method == "adapter":
        return apply(model, _bottlenecks(model)).model
    if method == "prefix":
        return add_prefixes(model) if isinstance(model, Decoder) else PrefixModel(model)
    if hasattr(method, "install"):
        return apply(model, method).model
    rewritten = method(model)
    return model if rewritten is None else rewritten


def _bottlenecks(model: nn.Module) -> Bottleneck:
    """Adapters behind every attention and feed-forward network, in families that are not known behind the last linear
    layer of whatever is called so: good enough for a plan.

    Raises VolvelleError when the model has no submodule that is called so.
    """
    try:
        family_of(model)
    except VolvelleError:
        names = ("mlp", "self_attn", "attn", "attention", "output", "ffn", "feed_forward")
        found = [(path, m) for path, m in model.named_modules() if path.rpartition(".")[2] in names]
        # Of nested matches only the outermost counts.
        outer = [(path, m) for path, m in found if not any(path.startswith(f"{other}.") for other, _ in found)]
        last = [
            [f"{path}.{name}".rstrip(".") for name, m in top.named_modules() if is_linear(m)] for path, top in outer
        ]
        if not any(last):
            raise VolvelleError(
                f"adapter: {type(model).__name__} has no attention or MLP submodule",
                tip="plan a method=Bottleneck(targets=…), or a function that inserts the adapters",
            ) from None
        return Bottleneck(targets=tuple(paths[-1] for paths in last if paths))
    return Bottleneck()


class PrefixAttention(nn.Module):
    """One layer of prefix tuning around our decoder's attention. `prefix` has shape (2, kv_heads, m, head_width)."""

    def __init__(self, attention: SelfAttention, length: int = PREFIX_LENGTH):
        super().__init__()
        self.attention = attention
        dtype = next(attention.parameters()).dtype
        self.prefix = nn.Parameter(torch.zeros(2, attention.kv_heads, length, attention.head_width, dtype=dtype))

    def forward(self, x: Tensor, step: Step) -> Tensor:
        """Map x (b, n, width) -> (b, n, width), every position also attending to the prefix."""
        mask, causal = step.mask, step.causal
        if step.documents is not None:
            mask, causal = written_out(step.documents, causal)[:, None], False
        if mask is not None:
            mask = torch.nn.functional.pad(mask, (self.prefix.shape[2], 0), value=True)
        # Causal attention is aligned to the end, so whatever comes first is seen by all.
        return self.attention(x, step._replace(mask=mask, causal=causal, documents=None, cache=self))  # type: ignore[arg-type]

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Stand in the place of a cache: the prefix, then the new keys and values."""
        keys, values = (part.to(k.dtype).expand(k.shape[0], -1, -1, -1) for part in self.prefix)
        return torch.cat([keys, k], dim=2), torch.cat([values, v], dim=2)


def add_prefixes(model: nn.Module) -> nn.Module:
    """Give every attention of our decoder a trained prefix, and freeze the rest."""
    model.requires_grad_(False)
    for path, module in list(model.named_modules()):
        if isinstance(module, SelfAttention):
            model.set_submodule(path, PrefixAttention(module))
    return model


class PrefixModel(nn.Module):
    """Prefix tuning (Li & Liang 2021) around a transformers causal language model: trained keys and values that every
    layer sees before the text. `prefix` has shape (layers, 2, 1, kv_heads, m, head_width).

    Raises VolvelleError for a model that takes no past_key_values.
    """

    def __init__(self, model: nn.Module, length: int = PREFIX_LENGTH):
        super().__init__()
        config: Any = getattr(model, "config", None)
        if not hasattr(config, "num_hidden_layers") or not hasattr(model, "prepare_inputs_for_generation"):
            raise VolvelleError(
                f"prefix: {type(model).__name__} does not take past keys and values as transformers models do",
                tip="plan method=lora or method=adapter, or pass a function as method=",
            )
        self.model = model.requires_grad_(False)
        heads = config.num_attention_heads
        width = getattr(config, "head_dim", None) or config.hidden_size // heads
        shape = (config.num_hidden_layers, 2, 1, getattr(config, "num_key_value_heads", None) or heads, length, width)
        self.prefix = nn.Parameter(torch.zeros(shape, dtype=next(model.parameters()).dtype))
        self.config = config

    def forward(self, **inputs: Any) -> Any:
        """Run the model with the prefix as its past."""
        from transformers import DynamicCache

        rows = next(value for value in inputs.values() if isinstance(value, Tensor)).shape[0]
        cache = DynamicCache()
        for index, (keys, values) in enumerate(self.prefix.expand(-1, -1, rows, -1, -1, -1)):
            cache.update(keys, values, index)
        return self.model(**inputs, past_key_values=cache)
