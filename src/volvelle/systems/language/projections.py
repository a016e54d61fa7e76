"""Decoding speed: the blocks as straight-line tensor code, with q, k, v and gate, up computed in one product each.

At batch 1 a decoding step reads every weight once and computes almost nothing. What is left besides memory traffic is
the work between the products: module calls, attribute look-ups, views, checks. `fuse_projections` prepares a path that
does without them.

Weights of layers that read the same input are laid one below the other in one storage, and each layer's own parameter
becomes a view of its rows: no name changes, no memory is doubled. The path is taken only without gradients, and only
while the model is what it was prepared from; a cast, a replaced layer, a new weight or a hook is noticed, and the
modules are called as usual. Weights changed in place (an optimiser, load_state_dict) are the same memory, or are
copied anew (native/step.py).

Shapes: b batch, n tokens, r = b n rows, h heads, g key/value heads, d features a head.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from volvelle.parts.attention.sdpa import SDPA
from volvelle.parts.attention.spec import Shape, Terms
from volvelle.parts.quantization.int4 import Int4Linear
from volvelle.parts.quantization.int4_packed import PackedInt4
from volvelle.parts.quantization.int8 import Int8Linear
from volvelle.parts.quantization.weight_only import WeightOnlyLinear
from volvelle.systems.language.components import (
    MLP,
    GatedMLP,
    LinearSelfAttention,
    PostNormBlock,
    PreNormBlock,
    SelfAttention,
    Step,
)
from volvelle.systems.language.native import step as native
from volvelle.systems.language.norms import RMSNorm

if TYPE_CHECKING:
    from volvelle.parts.attention.before import Past
    from volvelle.systems.language.decoder import Decoder

Norm = Callable[[Tensor], Tensor]
Linear = Callable[[Tensor, bool], Tensor]  # (x, one row?) -> x Wᵀ + bias


class Now(NamedTuple):
    """One step's facts for all blocks. `row`: x is a vector (width,), else (r, width)."""

    step: Step
    b: int
    n: int
    row: bool
    terms: Terms
    shape: Shape


Run = Callable[[Tensor, Now], Tensor]
Branch = Callable[
    [Tensor, Tensor, Now], Tensor
]  # (normed input, residual stream, now) -> the stream, added to in place


def one_row(rows: int, x: Tensor) -> bool:
    """Whether linear layers on x are better computed as matrix-vector products.

    True for one row of fp32 or bf16 on the CPU: torch's matrix-vector kernel returns the same bits, and reads bf16
    weights at the full memory rate (1.6x F.linear on an AVX-512 machine).
    """
    return rows == 1 and x.device.type == "cpu" and x.dtype in {torch.float32, torch.bfloat16}


def apply_linear(layer: nn.Module, x: Tensor) -> Tensor:
    """Return layer(x); for one row of bf16 without gradients and a plain layer, as a matrix-vector product."""
    if not isinstance(layer, nn.Linear) or type(layer) is not nn.Linear or not _unhooked(layer):
        return layer(x)
    if x.dtype is not torch.bfloat16 or not one_row(x.numel() // x.shape[-1], x):
        return layer(x)
    if torch.is_grad_enabled() or torch.compiler.is_compiling() or torch.is_autocast_enabled("cpu"):
        return layer(x)
    return _product(layer.weight, layer.bias)(x.reshape(-1), True).view(*x.shape[:-1], -1)


def few_rows(layer: nn.Module) -> Callable[[Tensor], Tensor]:
    """layer(x) for a few rows at a time, without gradients, as fast as the matrix can be read where it now is."""
    if isinstance(layer, WeightOnlyLinear):
        return _few_bits(layer)
    if isinstance(layer, nn.Linear) and native.fits(layer) and native.library() is not None:
        return native.NativeLinear(layer)
    return lambda x: apply_linear(layer, x)


def _unhooked(module: nn.Module) -> bool:
    return not module._forward_hooks and not module._forward_pre_hooks


class Straight:
    """The prepared path through all blocks of a decoder; `whole` does short steps in one call, where it can."""

    def __init__(self, runs: list[Run], watch: Watch, sizes: tuple[int, int, int], groups: int):
        self.runs = runs
        self.watch = watch
        self.sizes = sizes
        self.groups = groups
        self.whole: native.NativeStep | None = None
        self.head: native.NativeLinear | None = None

    def logits(self, head: nn.Module, x: Tensor) -> Tensor:
        """Map x (..., width) to (..., vocabulary) by the head, as fast as its weights can be read."""
        few = x.numel() // x.shape[-1] <= native.MOST
        if self.head is not None and self.head.layer is head and (few or isinstance(head, WeightOnlyLinear)):
            return self.head(x)
        return apply_linear(head, x)

    def renew(self) -> None:
        """Copy anew what compiled code reads from copies: writing through `.data` leaves no version to tell of it."""
        for compiled in (self.whole, self.head):
            if compiled is not None:
                compiled.copies.renew(always=True)

    def __call__(self, x: Tensor, step: Step) -> Tensor:
        """Map x (b, n, width) -> (b, n, width): all blocks, without the last norm."""
        if self.whole is not None and self.whole.takes(x, step):
            return self.whole(x, step)
        b, n, width = x.shape
        h, g, d = self.sizes
        past = 0 if step.cache is None else step.cache.length
        row = one_row(b * n, x)
        terms = Terms(step.mask, None, step.causal, d**-0.5, None, None)
        now = Now(step, b, n, row, terms, Shape(b, h, g, n, past + n, d, d))
        rows = x.reshape(width).clone() if row else x.reshape(b * n, width)
        for run in self.runs:
            rows = run(rows, now)
        return rows.view(b, n, width)

    def __reduce__(self):
        # A copied or pickled model has parameters of its own: it starts without a prepared path.
        return type(None), ()


class Watch:
    """Remembers a module tree: which child, parameter and buffer sits under which name, and that nothing hooks in."""

    def __init__(self, modules: Sequence[nn.Module], joined: Sequence[nn.Parameter]):
        tables = [table for module in modules for table in (module._modules, module._parameters, module._buffers)]
        self.tables = [table for table in tables for _ in table]
        self.names = [name for table in tables for name in table]
        self.held = [held for table in tables for held in table.values()]
        self.hooks = [hook for module in modules for hook in (module._forward_hooks, module._forward_pre_hooks)]
        self.modules = list(modules)
        self.kinds = [type(module) for module in modules]  # an adapter exchanges the class of the module it sits on
        self.joined = list(joined)
        self.places = [parameter.data_ptr() for parameter in joined]

    def unchanged(self) -> bool:
        """Whether all of it is as it was; some 0.1 ms for 30 blocks."""
        return (
            not any(self.hooks)
            and list(map(type, self.modules)) == self.kinds
            and all(map(operator.is_, map(dict.get, self.tables, self.names), self.held))
            and list(map(Tensor.data_ptr, self.joined)) == self.places
        )


def fuse_projections(model: Decoder) -> int:
    """Prepare the straight path for decoding; returns how many groups of layers share a storage (0: not possible).

    Parameters, state dict and results stay as they are; training is unaffected. Calling it again is cheap while nothing
    has changed. Not possible where a block holds anything but plain layers (adapters: merge them first), and on the
    meta device. Undone by `unfuse_projections`.
    """
    trunk = model.model
    if trunk.straight is None or not trunk.straight.watch.unchanged():
        trunk.straight = prepare(model, list(trunk.layers), model.lm_head)
    else:
        trunk.straight.renew()
    return 0 if trunk.straight is None else trunk.straight.groups


def unfuse_projections(model: Decoder) -> None:
    """Undo `fuse_projections`: every layer's parameters get a storage of their own."""
    model.model.straight = None
    for parameter in model.model.layers.parameters():
        if parameter.untyped_storage().nbytes() != parameter.nbytes:
            parameter.data = parameter.data.clone()


def prepare(model: Decoder, blocks: Sequence[nn.Module], head: nn.Module | None = None) -> Straight | None:
    """The path through these blocks, the decoder's own or others like them; None: there is no faster one."""
    if model.device.type == "meta" or model.model.position.bias() is not None:
        return None
    if not all(_is_plain(block) for block in blocks):
        return None
    if any(parameter.dtype is not model.dtype for block in blocks for parameter in block.parameters()):
        return None
    groups: list[list[nn.Linear]] = []
    runs = [_block(block, groups) for block in blocks]
    joined = [parameter for layers in groups for layer in layers for parameter in layer.parameters()]
    watched = [module for block in blocks for module in block.modules()]
    config, whole, last = model.config, None, None
    if native.why_not(model, blocks) is None:
        # pointers to every weight: all of them are watched
        whole, joined = (
            native.NativeStep(model, blocks),
            [*joined, *(p for block in blocks for p in block.parameters())],
        )
        if head is not None and native.fits(head):
            last, watched = native.NativeLinear(head), [*watched, head]  # type: ignore[arg-type]
            joined += head.parameters()
    straight = Straight(runs, Watch(watched, joined), (config.heads, config.kv_heads, config.head_width), len(groups))
    straight.whole, straight.head = whole, last
    return straight


def _is_plain(block: nn.Module) -> bool:
    attentions = (SelfAttention, LinearSelfAttention)
    linears = (nn.Linear, Int4Linear, Int8Linear)
    known = (PreNormBlock, PostNormBlock, *attentions, GatedMLP, MLP, *linears, RMSNorm, nn.LayerNorm)
    return (
        all(
            type(module) in known and not module._forward_hooks and not module._forward_pre_hooks
            for module in block.modules()
        )
        and len({(parameter.dtype, parameter.device) for parameter in block.parameters()}) == 1
    )


def _block(block: nn.Module, groups: list[list[nn.Linear]]) -> Run:
    assert isinstance(block, PreNormBlock | PostNormBlock)
    attend, feed = _attention(block.self_attn, groups), _mlp(block.mlp, groups)
    if isinstance(block, PreNormBlock):
        before, between = _norm(block.input_layernorm), _norm(block.post_attention_layernorm)

        def pre(x: Tensor, now: Now) -> Tensor:
            x = attend(before(x), x, now)
            return feed(between(x), x, now)

        return pre
    between, after = _norm(block.post_attention_layernorm), _norm(block.post_feedforward_layernorm)

    def post(x: Tensor, now: Now) -> Tensor:
        x = between(attend(x, x, now))
        return after(feed(x, x, now))

    return post


def _attention(module: SelfAttention, groups: list[list[nn.Linear]]) -> Branch:
    h, g, d, index = module.heads, module.kv_heads, module.head_width, module.index
    project, out = _joined([module.q_proj, module.k_proj, module.v_proj], groups), _back(module.o_proj)
    rotate_value, sdpa = module.rotate_value, SDPA()
    if isinstance(module, LinearSelfAttention):

        def linear(x: Tensor, stream: Tensor, now: Now) -> Tensor:
            heads = project(x, now.row).view(now.b, now.n, h + 2 * g, d).transpose(1, 2)
            q, k, v = heads.split_with_sizes((h, g, g), 1)
            seen = module.attend(q, k, v, now.step)
            return out(seen.reshape(h * d) if now.row else seen.transpose(1, 2).reshape(-1, h * d), stream, now)

        return linear

    def run(x: Tensor, stream: Tensor, now: Now) -> Tensor:
        step, b, n = now.step, now.b, now.n
        heads = project(x, now.row).view(b, n, h + 2 * g, d).transpose(1, 2)
        if step.rotation is None:
            q, k, v = heads.split_with_sizes((h, g, g), 1)
        elif rotate_value:
            q, k, v = step.rotation.turn(heads).split_with_sizes((h, g, g), 1)
        else:
            both, v = heads.split_with_sizes((h + g, g), 1)
            q, k = step.rotation.turn(both).split_with_sizes((h, g), 1)
        if step.cache is not None:
            k, v = cast("Past", step.cache).append(index, k, v)
        seen = sdpa(q, k, v, now.terms, now.shape)
        return out(seen.view(h * d) if now.row else seen.transpose(1, 2).reshape(b * n, h * d), stream, now)

    return run


def _mlp(module: nn.Module, groups: list[list[nn.Linear]]) -> Branch:
    if isinstance(module, GatedMLP):
        project, down = _joined([module.gate_proj, module.up_proj], groups), _back(module.down_proj)
        activation, width = module.activation, module.gate_proj.out_features

        def gated(x: Tensor, stream: Tensor, now: Now) -> Tensor:
            gate, up = project(x, now.row).split(width, -1)
            return down(activation(gate).mul_(up), stream, now)

        return gated
    assert isinstance(module, MLP)
    up, down, activation = _linear(module.up_proj), _back(module.down_proj), module.activation
    return lambda x, stream, now: down(activation(up(x, now.row)), stream, now)


def _norm(module: nn.Module) -> Norm:
    if isinstance(module, nn.RMSNorm):
        return _rms_norm(module)
    assert isinstance(module, nn.LayerNorm)
    shape, weight, bias, eps = list(module.normalized_shape), module.weight, module.bias, module.eps
    return lambda x: torch.layer_norm(x, shape, weight, bias, eps)


def _rms_norm(module: nn.RMSNorm) -> Norm:
    """torch.rms_norm; for one row on the CPU in three operations, where torch takes seven.

    After a product has streamed its weights through the caches an operation on one row costs its code, not its numbers:
    torch's takes 40 µs there, this one 10.
    """
    shape, weight, eps = list(module.normalized_shape), module.weight, module.eps
    if weight is None or not eps or not one_row(1, weight):
        return lambda x: torch.rms_norm(x, shape, weight, eps)
    width, zeros = len(weight), torch.zeros_like(weight)

    def norm(x: Tensor) -> Tensor:
        if x.dim() > 1:
            return torch.rms_norm(x, shape, weight, eps)
        wide = x.float()
        return torch.addcmul(zeros, x, weight, value=(wide.dot(wide).item() / width + eps) ** -0.5)

    return norm


def _linear(layer: nn.Module) -> Linear:
    if isinstance(layer, WeightOnlyLinear):
        product = _few_bits(layer)
        return lambda x, row: product(x)
    assert isinstance(layer, nn.Linear)
    return _product(layer.weight, layer.bias)


def _few_bits(layer: WeightOnlyLinear) -> Callable[[Tensor], Tensor]:
    """The fastest product with this layer's matrix here: compiled, torch's own kernel, or dequantised for each call."""
    if native.fits(layer) and native.library() is not None:
        return native.NativeLinear(layer)
    on_cpu = layer.tiles.device.type == "cpu"
    return PackedInt4(layer) if isinstance(layer, Int4Linear) and on_cpu and layer.group in {32, 64, 128} else layer


def _back(layer: nn.Module) -> Branch:
    """The projection back into the residual stream, which for one row the product itself adds to."""
    weight, product = getattr(layer, "weight", None), _linear(layer)
    if weight is None or layer.bias is not None:
        return lambda x, stream, now: product(x, now.row).add_(stream)
    return lambda x, stream, now: stream.addmv_(weight, x) if now.row else product(x, False).add_(stream)


def _product(weight: Tensor, bias: Tensor | None) -> Linear:
    mv, addmv, linear = torch.mv, torch.addmv, F.linear
    if bias is None:
        return lambda x, row: mv(weight, x) if row else linear(x, weight)
    return lambda x, row: addmv(bias, weight, x) if row else linear(x, weight, bias)


def _joined(layers: Sequence[nn.Module], groups: list[list[nn.Linear]]) -> Linear:
    """One product for all `layers`; their outputs lie side by side."""
    if not all(isinstance(layer, nn.Linear) for layer in layers):
        each = [_linear(layer) for layer in layers]
        return lambda x, row: torch.cat([one(x, row) for one in each], -1)
    linear = [layer for layer in layers if isinstance(layer, nn.Linear)]
    weight = _lay([layer.weight for layer in linear])
    biases = [layer.bias for layer in linear if layer.bias is not None]
    groups.append(linear)
    return _product(weight, _lay(biases) if biases else None)


def _lay(parameters: Sequence[Tensor]) -> Tensor:
    """Move the parameters' data, one below the other, into one storage, and return all of it."""
    whole = torch.cat([parameter.data for parameter in parameters])
    for parameter, rows in zip(parameters, whole.split([len(parameter) for parameter in parameters]), strict=True):
        parameter.data = rows
    return whole
