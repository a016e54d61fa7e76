"""Receptive fields through operations that slide along space: convolution, pooling, padding, resampling.

Each is a table of taps: which elements of its input an output element reads along one dimension, and the regularity
of that table (p, q): moving the output by p moves what it reads by q.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction
from typing import Any

import numpy as np

from volvelle.inspect.exported import Node, bound, operation
from volvelle.inspect.receptive_field_call import Call, Field, Result, each, rule
from volvelle.inspect.receptive_field_reach import NOWHERE, Ints, Turn

Taps = tuple[Ints, Turn]


def sliding(count: int, kernel: int, stride: int = 1, padding: int = 0, dilation: int = 1) -> Taps:
    """Output j reads j * stride - padding + dilation * k for k below `kernel`."""
    return np.arange(count)[:, None] * stride - padding + dilation * np.arange(kernel), (1, stride)


def spreading(count: int, kernel: int, stride: int = 1, padding: int = 0, dilation: int = 1) -> Taps:
    """The transpose: output j reads every i with j = i * stride - padding + dilation * k."""
    reach = np.arange(count)[:, None] + padding - dilation * np.arange(kernel)
    taps = np.where(reach % stride == 0, reach // stride, NOWHERE)
    return np.sort(taps, 1)[:, ::-1], (stride, 1)


def adaptive(n: int, count: int) -> Taps:
    """Output j reads from floor(j * n / count) up to ceil((j + 1) * n / count), that excluded."""
    j, g = np.arange(count), math.gcd(n, count)
    first, last = j * n // count, -((j + 1) * n // -count) - 1
    width = int((last - first).max()) + 1
    return np.minimum(first[:, None] + np.arange(width), last[:, None]), (count // g, n // g)


def nearest(n: int, count: int, scale: float | None, *, exact: bool = False) -> Taps:
    """Output j reads floor(j * ratio); with `exact`, floor((j + 1/2) * ratio)."""
    ratio = _ratio(n, count, scale)
    half = Fraction(1, 2) if exact else Fraction(0)
    taps = np.array([[math.floor((j + half) * ratio)] for j in range(count)])
    return taps, (ratio.denominator, ratio.numerator)


def interpolating(n: int, count: int, scale: float | None, *, corners: bool, cubic: bool) -> Taps:
    """Output j reads the 2 (cubic: 4) inputs around its place, only one where it lies exactly on an input."""
    if corners:
        ratio = Fraction(n - 1, count - 1) if count > 1 else Fraction(0)
        places = [j * ratio for j in range(count)]
    else:
        ratio = _ratio(n, count, scale)
        places = [(j + Fraction(1, 2)) * ratio - Fraction(1, 2) for j in range(count)]
    around = (-1, 0, 1, 2) if cubic else (0, 1)
    taps = [[math.floor(x) + (k if x.denominator > 1 else 0) for k in around] for x in places]
    return np.array(taps), (ratio.denominator, ratio.numerator)


def smoothing(n: int, count: int, scale: float | None, *, cubic: bool) -> Taps:
    """Interpolation with antialiasing: the inputs under a kernel that is stretched by the ratio."""
    ratio = _ratio(n, count, scale)
    stretch, radius = max(ratio, Fraction(1)), 2 if cubic else 1
    rows = []
    for j in range(count):
        centre = (j + Fraction(1, 2)) * ratio - Fraction(1, 2)
        near = range(math.ceil(centre - radius * stretch), math.floor(centre + radius * stretch) + 1)
        # Both kernels are 0 at their ends, and the cubic one at distance 1 as well.
        rows.append([k for k in near if abs(k - centre) / stretch not in (1, radius)])
    width = max(map(len, rows))
    taps = np.array([row + row[-1:] * (width - len(row)) for row in rows])
    return taps, (ratio.denominator, ratio.numerator)


def _ratio(n: int, count: int, scale: float | None) -> Fraction:
    if scale is None or scale <= 0:
        return Fraction(n, count)
    return 1 / Fraction(scale).limit_denominator(1 << 12)


def slid(field: Field, dim: int, taps: Ints, turn: Turn | None) -> Field:
    """The field after reading `taps` along one dimension."""
    return each(field, lambda reach: reach.window(dim, taps, turn).compact())


def _many(value: Any, count: int, default: int = 1) -> list[int]:
    """An int or a list, for every spatial dimension."""
    if value is None or (isinstance(value, list | tuple) and not value):
        return [default] * count
    value = [value] if isinstance(value, int) else list(value)
    return [int(v) for v in (value * count if len(value) == 1 else value)]


def _mixed(call: Call, field: Field, groups: int, made: int) -> Field:
    """The field after a convolution's sum over the channels (dimension 1) of each group."""
    shape = field[0].shape
    if all(reach.low.shape[1] == 1 and not reach.carries(1) for reach in field):
        return each(field, lambda r: r.reduce([1]).broadcast((shape[0], made, *shape[2:])))
    split = each(field, lambda r: r.reshape((shape[0], groups, shape[1] // groups, *shape[2:])).reduce([2]))
    wide = (shape[0], groups, made // groups, *shape[2:])
    return each(split, lambda r: r.broadcast(wide).reshape((shape[0], made, *shape[2:])).compact())


def _batched(call: Call, field: Field, rank: int) -> Field:
    """With a leading dimension where the operation was given an input without batch."""
    if len(field[0].shape) == rank + 1:
        return each(field, lambda r: r.reshape((1, *r.shape)))
    return field


@rule("conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d", "convolution")
def _convolution(call: Call) -> Result:
    field = call.field("input")
    if field is None:
        return None if call.field("weight") is None else call.everything(call.out)
    if call.field("weight") is not None:
        call.note("a convolution whose weights are computed from the input: their field is joined as the whole input")
        return call.everything(call.out)
    weight = call.shape("weight")
    rank = len(weight) - 2
    transposed = "transpose" in call.op or bool(call.args.get("transposed"))
    groups = call.number("groups", 1)
    made = weight[1] * groups if transposed else weight[0]
    strides, dilations = (_many(call.args.get(name), rank) for name in ("stride", "dilation"))
    padding = call.args.get("padding")
    sizes = call.out[-rank:]
    found = _mixed(call, _batched(call, field, rank), groups, made)
    for i in range(rank):
        kernel, stride, dilation = weight[2 + i], strides[i], dilations[i]
        if padding == "same":
            before = dilation * (kernel - 1) // 2
        else:
            before = 0 if padding == "valid" else _many(padding, rank, 0)[i]
        taps, turn = (spreading if transposed else sliding)(sizes[i], kernel, stride, before, dilation)
        found = slid(found, 2 + i, taps, turn)
    return each(found, lambda r: r.reshape(call.out))


_POOLS = ("max_pool1d", "max_pool2d", "max_pool3d", "avg_pool1d", "avg_pool2d", "avg_pool3d")
_INDEXED = ("max_pool1d_with_indices", "max_pool2d_with_indices", "max_pool3d_with_indices")


@rule(*_POOLS, *_INDEXED, "quantized_max_pool2d", "mkldnn_max_pool2d")
def _pool(call: Call) -> Result:
    field = call.field("self") or call.field("input")
    if field is None:
        return None
    rank = int(call.op[call.op.index("pool") + 4])
    kernels = _many(call.args["kernel_size"], rank)
    strides = _many(call.args.get("stride") or kernels, rank)
    paddings, dilations = _many(call.args.get("padding"), rank, 0), _many(call.args.get("dilation"), rank)
    for i in range(rank):
        dim = len(call.out) - rank + i
        field = slid(field, dim, *sliding(call.out[dim], kernels[i], strides[i], paddings[i], dilations[i]))
    return [field, field] if call.op in _INDEXED else field


@rule(*(f"adaptive_{kind}_pool{rank}d" for kind in ("avg", "max") for rank in (1, 2, 3)), "_adaptive_avg_pool2d")
def _adaptive(call: Call) -> Result:
    field = call.field("self")
    if field is None:
        return None
    source = field[0].shape
    rank = len(_many(call.args["output_size"], 1))
    dims = range(len(source) - rank, len(source))
    # One output reads everything: a global pooling, whose field is the input whatever its size.
    field = each(field, lambda r: r.reduce([d for d in dims if call.out[d] == 1 and source[d] > 1]))
    for dim in dims:
        if call.out[dim] not in (1, source[dim]):
            field = slid(field, dim, *adaptive(source[dim], call.out[dim]))
    return [field, field] if isinstance(call.node.meta.get("val"), list | tuple) else field


@rule("fractional_max_pool2d", "fractional_max_pool3d")
def _fractional(call: Call) -> Result:
    field = call.field("self")
    if field is None:
        return None
    call.note("fractional pooling places its windows at random: bounded by all places that a window can take")
    kernels = _many(call.args["kernel_size"], len(_many(call.args["output_size"], 1)))
    for i, kernel in enumerate(kernels):
        dim = len(call.out) - len(kernels) + i
        n, count = field[0].shape[dim], call.out[dim]
        ratio = Fraction(n - kernel, count - 1) if count > 1 else Fraction(0)
        first = [max(0, math.floor(j * ratio)) for j in range(count)]
        last = [min(n, math.ceil((j + 1) * ratio) + kernel) - 1 for j in range(count)]
        width = max(b - a for a, b in zip(first, last, strict=True)) + 1
        taps = np.array([[min(a + k, b) for k in range(width)] for a, b in zip(first, last, strict=True)])
        field = slid(field, dim, taps, (ratio.denominator, ratio.numerator))
    return [field, field]


@rule("max_unpool2d", "max_unpool3d")
def _unpool(call: Call) -> Result:
    """A place is filled by a pooled value whose window held it: the transpose of the pooling that made the indices."""
    field = call.join([call.field("self"), call.field("indices")], call.shape("self"))
    if field is None:
        return None
    pool = call.args["indices"]
    while isinstance(pool, Node) and operation(pool) not in _INDEXED and pool.all_input_nodes:
        pool = pool.all_input_nodes[0]
    if not isinstance(pool, Node) or pool.op != "call_function" or operation(pool) not in _INDEXED:
        call.note("unpooling by indices that no pooling made: they may point anywhere")
        return each(field, lambda r: r.everything().expand(call.out))
    given = bound(pool)
    kernels = _many(given["kernel_size"], 1)
    strides, paddings = given.get("stride") or kernels, given.get("padding") or [0]
    for i, kernel in enumerate(kernels):
        dim = len(call.out) - len(kernels) + i
        stride, before = _many(strides, len(kernels))[i], _many(paddings, len(kernels), 0)[i]
        field = slid(field, dim, *spreading(call.out[dim], kernel, stride, before))
    return field


@rule("pad", "constant_pad_nd", "reflection_pad1d", "reflection_pad2d", "replication_pad1d", "replication_pad2d",
      "reflection_pad3d", "replication_pad3d")  # fmt: skip
def _pad(call: Call) -> Result:
    field = call.field("self")
    if field is None:
        return None
    amounts = call.args["pad" if "pad" in call.args else "padding"]
    mode = call.args.get("mode", "constant") if call.op == "pad" else call.op.split("_")[0]
    for i in range(len(amounts) // 2):
        before, after, dim = int(amounts[2 * i]), int(amounts[2 * i + 1]), len(call.out) - 1 - i
        n = field[0].shape[dim]
        index = np.arange(-before, n + after)
        # Without bounds a border goes on as the interior does; the copies that it holds matter only near it.
        if call.bounded and mode != "constant":
            index = _folded(index, n, mode)
        if before or after:
            field = slid(field, dim, index[:, None], (1, 1))
    return field


def _folded(index: Ints, n: int, mode: str) -> Ints:
    if mode == "circular":
        return index % n
    if mode in {"replicate", "replication"}:
        return np.clip(index, 0, n - 1)
    period = max(2 * (n - 1), 1)
    return np.minimum(index % period, period - index % period) % max(n, 1)


@rule(*(f"{a}upsample_{kind}{rank}d{b}" for rank in (1, 2, 3) for a in ("", "_") for b in ("", "_aa")
        for kind in ("nearest", "nearest_exact", "linear", "bilinear", "trilinear", "bicubic")),
      *(f"_upsample_nearest_exact{rank}d" for rank in (1, 2, 3)))  # fmt: skip
def _upsample(call: Call) -> Result:
    field = call.field("input") or call.field("self")
    if field is None:
        return None
    rank = len(call.out) - 2
    source = field[0].shape
    scales: Sequence[Any] = call.args.get("scale_factors") or []
    single = [call.args.get(f"scales{end}") for end in ("_d", "_h", "_w")[3 - rank :]]
    for i in range(rank):
        n, count = source[2 + i], call.out[2 + i]
        scale = scales[i] if scales else single[i] if rank > 1 else call.args.get("scales")
        taps, turn = _resampled(call, n, count, scale)
        field = slid(field, 2 + i, np.clip(taps, 0, n - 1) if call.bounded else taps, turn)
    return field


def _resampled(call: Call, n: int, count: int, scale: float | None) -> Taps:
    cubic = "cubic" in call.op
    if "nearest" in call.op:
        return nearest(n, count, scale, exact="exact" in call.op)
    if call.op.endswith("_aa"):
        return smoothing(n, count, scale, cubic=cubic)
    corners = bool(call.args.get("align_corners"))
    return interpolating(n, count, scale, corners=corners, cubic=cubic)


@rule("pixel_shuffle")
def _pixel_shuffle(call: Call) -> Result:
    field, r = call.field("self"), call.number("upscale_factor")
    if field is None:
        return None
    *lead, c, h, w = field[0].shape
    k = len(lead)
    order = [*range(k), k, k + 3, k + 1, k + 4, k + 2]
    return each(field, lambda x: x.reshape((*lead, c // r**2, r, r, h, w)).permute(order).reshape(call.out).compact())


@rule("pixel_unshuffle")
def _pixel_unshuffle(call: Call) -> Result:
    field, r = call.field("self"), call.number("downscale_factor")
    if field is None:
        return None
    *lead, c, h, w = field[0].shape
    k = len(lead)
    order = [*range(k), k, k + 2, k + 4, k + 1, k + 3]
    return each(field, lambda x: x.reshape((*lead, c, h // r, r, w // r, r)).permute(order).reshape(call.out).compact())


@rule("channel_shuffle", "native_channel_shuffle")
def _channel_shuffle(call: Call) -> Result:
    field, groups = call.field("self"), call.number("groups")
    if field is None:
        return None
    b, c, *space = field[0].shape
    order = [0, 2, 1, *range(3, 3 + len(space))]
    wide = (b, groups, c // groups, *space)
    return each(field, lambda x: x.reshape(wide).permute(order).reshape(call.out).compact())


@rule("im2col")
def _im2col(call: Call) -> Result:
    """Patches as columns: (b, c, y, x) to (b, c * k_y * k_x, places)."""
    field = call.field("self")
    if field is None:
        return None
    field = _batched(call, field, 2)
    sizes = field[0].shape[2:]
    kernels, strides, dilations = (_many(call.args[name], 2) for name in ("kernel_size", "stride", "dilation"))
    paddings = _many(call.args["padding"], 2, 0)
    counts = []
    for i in range(2):
        dim = 2 + 2 * i
        count = (sizes[i] + 2 * paddings[i] - dilations[i] * (kernels[i] - 1) - 1) // strides[i] + 1
        taps, _ = sliding(count, kernels[i], strides[i], paddings[i], dilations[i])
        rest = field[0].shape[dim + 1 :]
        field = slid(field, dim, taps.T.reshape(-1, 1), None)
        wide = (*field[0].shape[:dim], kernels[i], count, *rest)
        field = each(field, lambda r, s=wide: r.reshape(s))
        counts.append(count)
    found = each(field, lambda r: r.permute([0, 1, 2, 4, 3, 5]))
    return each(found, lambda r: r.reshape(call.out).compact())


@rule("torchvision.deform_conv2d", "volvelle.deform_conv2d")
def _deformable(call: Call) -> Result:
    call.note("deformable convolution: its offsets are not bounded, so neither is what it reads")
    return call.everything(call.out)


@rule("grid_sampler", "grid_sampler_2d", "grid_sampler_3d")
def _grid(call: Call) -> Result:
    if call.field("input") is None and call.field("grid") is None:
        return None
    call.note("grid sampling reads wherever the grid says")
    return call.everything(call.out)
