"""The confusion matrix of label maps, counted exactly: what every segmentation metric here is a formula of.

n[i, j] is the number of pixels of class i that were predicted as class j, the n_ij of Long et al. 2015, "Fully
Convolutional Networks for Semantic Segmentation", section 5.

Shapes: preds and target are label maps of one shape, (…, y, x); matrices are (k, k), or (n, k, k) with one a map.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor, nn

from volvelle.export import export

BLOCK = 1 << 18
"""Pixels counted at once on a CPU: their temporary tensors stay in the cache."""
BYTE_CLASSES, SHORT_CLASSES = 15, 180
"""The most classes for which a pair of labels fits into 8 bits, and into 15."""


@export("functional.confusion_matrix", stable=True)
def confusion_matrix(
    preds: Tensor, target: Tensor, num_classes: int, *, ignore_index: int | None = 255, validate_args: bool = True
) -> Tensor:
    """Return n (num_classes, num_classes) int64: n[i, j] pixels of class i were predicted as class j.

    preds and target hold class numbers, in any integer dtype and the same shape (which may hold no pixel at all).
    Pixels whose target is `ignore_index` are not counted, whatever is predicted there; 255 is the void label of VOC and
    Cityscapes, None counts every pixel. A class of the model may be ignored too: its row stays 0.

    uint8 maps of at most 15 classes are the fastest: a pair of labels is one byte then, and counting is one pass.
    Counts are sums of integers, so they do not depend on the order or on how the maps are cut into batches.

    Raises TypeError for maps that hold no integers, and ValueError for unequal shapes and for labels that are neither a
    class nor ignored, which it lists. `validate_args=False` leaves this last check out: such labels then give a wrong
    matrix or an error of torch's.

    Long et al. 2015, section 5.

    >>> truth = torch.tensor([[0, 0, 1], [1, 255, 1]], dtype=torch.uint8)
    >>> seen = torch.tensor([[0, 1, 1], [1, 0, 1]], dtype=torch.uint8)
    >>> confusion_matrix(seen, truth, 2)
    tensor([[1, 1],
            [0, 3]])
    """
    _check_maps(preds, target, num_classes)
    k = num_classes
    total = torch.zeros(k * k, dtype=torch.int64, device=target.device)
    for p, t in _blocks(preds, target):
        if validate_args:
            p = _checked(p, t, k, ignore_index)
        total += _pairs(p, t, k, ignore_index)
    matrix = total.view(k, k)
    if ignore_index is not None and 0 <= ignore_index < k:
        matrix[ignore_index] = 0
    return matrix


@export("nn.ConfusionMatrix")
class ConfusionMatrix(nn.Module):
    """A confusion matrix that grows batch by batch, on one process or on many.

    The counts are int64 in the buffer `matrix`: after any number of batches they equal those of one call over
    everything. With `per_image=True` the first axis of what is given counts images, and `images` (n, k, k) holds the
    matrix of each, for averages over images. Each rank of a distributed run counts its own share; `over_ranks()` gives
    the whole and changes nothing, so it may be asked for at any time and any number of times.

    >>> seen = ConfusionMatrix(2)
    >>> for labels in ([0, 1, 1], [1, 255, 0]):
    ...     seen.update(torch.tensor(labels).clamp(max=1), torch.tensor(labels))
    >>> seen.matrix
    tensor([[2, 0],
            [0, 3]])
    """

    matrix: Tensor

    def __init__(
        self,
        num_classes: int,
        *,
        ignore_index: int | None = 255,
        validate_args: bool = True,
        per_image: bool = False,
    ):
        super().__init__()
        if num_classes < 1:
            raise ValueError(f"ConfusionMatrix: num_classes must be at least 1, got {num_classes}")
        self.num_classes, self.ignore_index, self.validate_args = num_classes, ignore_index, validate_args
        self.per_image = per_image
        self._images: list[Tensor] = []
        zeros = torch.zeros(num_classes, num_classes, dtype=torch.int64)
        self.register_buffer("matrix", zeros, persistent=False)

    @torch.no_grad()
    def update(self, preds: Tensor, target: Tensor) -> None:
        """Count a batch; see `confusion_matrix` for what it may hold and what is an error."""
        options = {"ignore_index": self.ignore_index, "validate_args": self.validate_args}
        if not self.per_image:
            self.matrix += confusion_matrix(preds, target, self.num_classes, **options).to(self.matrix.device)
            return
        _check_maps(preds, target, self.num_classes)
        # All of them before any is kept: a batch with a bad label leaves nothing behind.
        pairs = zip(preds, target, strict=True)
        found = [confusion_matrix(p, t, self.num_classes, **options).to(self.matrix.device) for p, t in pairs]
        for matrix in found:
            self.matrix += matrix
        self._images += found

    def forward(self, preds: Tensor, target: Tensor) -> Tensor:
        """Count a batch and return the matrix so far."""
        self.update(preds, target)
        return self.matrix

    @property
    def images(self) -> Tensor:
        """(n, k, k): the matrix of each image so far. Raises ValueError without `per_image`."""
        if not self.per_image:
            raise ValueError("ConfusionMatrix.images: the matrices of single images are kept with per_image=True only")
        return torch.stack(self._images) if self._images else self.matrix.new_zeros(0, *self.matrix.shape)

    def reset(self) -> None:
        """Forget everything."""
        self.matrix.zero_()
        self._images = []

    def over_ranks(self, group: dist.ProcessGroup | None = None) -> Tensor:
        """The sum (k, k) of every rank's matrix, the same on all of them; without torch.distributed, our own.

        All ranks of the group must call it. Matrices of single images are not gathered.
        """
        total = self.matrix.clone()
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(total, op=dist.ReduceOp.SUM, group=group)
        return total


def _check_maps(preds: Tensor, target: Tensor, num_classes: int) -> None:
    if num_classes < 1:
        raise ValueError(f"confusion_matrix: num_classes must be at least 1, got {num_classes}")
    for name, labels in (("preds", preds), ("target", target)):
        if labels.is_floating_point() or labels.is_complex():
            raise TypeError(f"confusion_matrix: {name} must hold class numbers (integers), got {labels.dtype}")
    if preds.shape != target.shape:
        raise ValueError(
            "confusion_matrix: preds and target must have one shape, got "
            f"{tuple(preds.shape)} and {tuple(target.shape)}"
        )


def _blocks(preds: Tensor, target: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Both maps, flat, in pieces that fit a CPU's cache; on a device in one piece."""
    size = BLOCK if target.device.type == "cpu" else max(1, target.numel())
    yield from zip(preds.reshape(-1).split(size), target.reshape(-1).split(size), strict=True)


def _checked(p: Tensor, t: Tensor, k: int, ignored: int | None) -> Tensor:
    """The predictions, with 0 where the pixel is ignored if they hold anything strange there."""
    if not t.numel():
        return p
    strange = _strange(t if ignored is None else _fill(t, ignored, 0), k)
    if strange:
        void = f" (nor {ignored}, which is ignored)" if ignored is not None else ""
        raise ValueError(f"confusion_matrix: target holds labels outside 0 … {k - 1}{void}: {strange}")
    if not _outside(p, k):
        return p
    if ignored is not None:
        p = torch.where(t == ignored, torch.zeros_like(p), p)
    strange = _strange(p, k)
    if strange:
        raise ValueError(f"confusion_matrix: preds holds labels outside 0 … {k - 1}: {strange}")
    return p


def _outside(labels: Tensor, k: int) -> bool:
    if labels.dtype in (torch.uint8, torch.bool):
        return int(labels.max()) >= k
    low, high = labels.aminmax()
    return int(low) < 0 or int(high) >= k


def _strange(labels: Tensor, k: int) -> str:
    """The labels that are no class, for a message; empty when there are none."""
    if not _outside(labels, k):
        return ""
    found = labels.unique().tolist()
    bad = [value for value in found if not 0 <= value < k]
    return ", ".join(map(str, bad[:10])) + (f" and {len(bad) - 10} more" if len(bad) > 10 else "")


def _fill(t: Tensor, ignored: int, value: int) -> Tensor:
    """The map with `value` where it was `ignored`."""
    if t.dtype == torch.bool:
        t = t.to(torch.uint8)
    # torch compares with a number that the dtype cannot hold by wrapping it: uint8 255 would be "equal" to -1.
    limits = torch.iinfo(t.dtype)
    if not limits.min <= ignored <= limits.max:
        return t
    where = t == ignored
    if value > limits.max:  # int8 holds the classes of k = 128, not k
        t = t.to(torch.int16)
    return t.masked_fill(where, value)


def _pairs(p: Tensor, t: Tensor, k: int, ignored: int | None) -> Tensor:
    """Counts (k·k,) of the pairs t·k + p. Ignored pixels are counted at or beyond k·k, which is cut off."""
    narrow = t.device.type == "cpu"
    if narrow and k <= BYTE_CLASSES:
        dtype, size = torch.uint8, 256
        # In bytes the arithmetic is modulo 256; 255 lands at 256 - k, beyond k·k by itself.
        beyond = ignored is None or k * k <= ignored * k % 256 <= 256 - k
    elif narrow and k <= SHORT_CLASSES:
        dtype, size = torch.int16, 2**15
        beyond = ignored is None or k * k <= ignored * k <= size - k
    else:
        dtype, size = torch.int64, k * (k + 1)
        beyond = ignored is None or ignored == k
    inside = ignored is not None and 0 <= ignored < k  # its row is cleared in the end
    if not beyond and not inside and ignored is not None:
        t = _fill(t, ignored, k)
    pairs = t.to(dtype, copy=True).mul_(k).add_(p.to(dtype))
    return torch.bincount(pairs, minlength=size)[: k * k]
