"""A small call of every public function of tensors: `FAMILIES[family][name](f)` gives its arguments.

A name may go on behind a comma, where one function is tried in several ways.

`f(*shape)` is a tensor of normal numbers in the dtype under trial, whose gradient is wanted; `f.share(*shape)` one of
numbers between 0 and 1. Everything else (positions, labels, sizes) is the same for every dtype.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor

from volvelle.parts.position.recurrent import Dynamics


class Make(Protocol):
    """What makes the tensors of an example."""

    def __call__(self, *shape: int) -> Tensor:
        """Normal numbers."""
        ...

    def share(self, *shape: int) -> Tensor:
        """Numbers between 0 and 1."""
        ...


Arguments = tuple[tuple[Any, ...], dict[str, Any]]
Example = Callable[[Make], Arguments]


def call(*args: Any, **kwargs: Any) -> Arguments:
    """The arguments as a pair."""
    return args, kwargs


def positions(n: int) -> Tensor:
    """0 to n - 1."""
    return torch.arange(n)


def labels(*shape: int, classes: int = 3) -> Tensor:
    """Class numbers that repeat."""
    count = torch.Size(shape).numel()
    return (torch.arange(count) * 7 % classes).view(shape)


def boxes(f: Make, n: int = 4) -> Tensor:
    """Boxes (n, 4) of some pixels within 12."""
    low = f.share(n, 2) * 5
    return torch.cat((low, low + 2 + 4 * f.share(n, 2)), 1)


def rois(f: Make, n: int = 4) -> Tensor:
    """Regions (n, 5) of picture 0."""
    found = boxes(f, n)
    return torch.cat((torch.zeros_like(found[:, :1]), found), 1)


def scores(n: int = 4) -> Tensor:
    """Different scores: which box goes first is no matter of rounding."""
    return torch.linspace(0.9, 0.3, n)


def qk(f: Make) -> tuple[Tensor, Tensor]:
    """Queries and keys (1, 2, 5, 8)."""
    return f(1, 2, 5, 8), f(1, 2, 5, 8)


def _critic(x: Tensor) -> Tensor:
    return x.tanh().square().sum(-1)


def _matrix() -> Tensor:
    return torch.tensor([[5, 1, 0], [2, 7, 1], [0, 0, 3]])


HITS = torch.tensor([True, False, True, True])

POSITION: dict[str, Example] = {
    "alibi_bias": lambda f: call(positions(5), positions(5), f.share(2)),
    "apply_axial_rope": lambda f: call(*(f(1, 2, 4, 8), f(1, 2, 4, 8)), torch.tensor([[0, 0], [0, 1], [1, 0], [1, 1]])),
    "apply_mrope": lambda f: call(*qk(f), positions(5)[:, None].expand(5, 3), sections=(2, 1, 1)),
    "apply_rope": lambda f: call(*qk(f), positions(5)),
    "axial_positions": lambda f: call(torch.tensor([[0, 1], [1, 2]]), (f(2, 4), f(3, 4))),
    "complex_positions": lambda f: call(f(1, 5, 8), positions(5), f.share(4)),
    "conv_positions": lambda f: call(positions(9), f(2, 3, 3), f(2, 3)),
    "convert_rope_layout": lambda f: call(f(16, 4), 2, to="half"),
    "deberta_log_buckets": lambda f: call(positions(40) - 20, 8, 32),
    "decomposed_bias": lambda f: call(f(1, 2, 4, 8), positions(4), positions(4), rel_h=f(3, 8), rel_w=f(3, 8)),
    "disentangled_bias": lambda f: call(
        *qk(f), positions(5), positions(5), pos_key=f(2, 8, 8), pos_query=f(2, 8, 8)
    ),
    "dynamic_bias": lambda f: call(positions(5), positions(5), [(f(4, 1), f(4)), (f(2, 4), f(2))]),
    "hierarchical_positions": lambda f: call(positions(9), f(4, 8)),
    "learned_positions": lambda f: call(positions(5), f(9, 8)),
    "multiplicative_positions": lambda f: call(f(1, 5, 8), positions(5), f(9, 8)),
    "recurrent_positions": lambda f: call(positions(5), f(4), Dynamics(f(6, 5), f(6), f(4, 6), f(4))),
    "rope_frequencies": lambda f: call(8, length=torch.tensor(64)),
    "shaw_key_bias": lambda f: call(f(1, 2, 5, 8), positions(5), positions(5), f(7, 8)),
    "shaw_value_term": lambda f: call(f.share(1, 2, 5, 5), positions(5), positions(5), f(7, 8)),
    "sinusoidal_positions": lambda f: call(positions(5), 8),
    "t5_bias": lambda f: call(positions(5), positions(5), f(32, 2)),
    "t5_relative_buckets": lambda f: call(positions(40) - 20),
    "transformer_xl_bias": lambda f: call(
        *qk(f), positions(5), positions(5), u=f(2, 8), v=f(2, 8), weight=f(2, 8, 8)
    ),
}  # fmt: skip

ATTENTION: dict[str, Example] = {
    "attention": lambda f: call(*qk(f), f(1, 2, 5, 8), causal=True),
    "attention, derivatives=2": lambda f: call(*qk(f), f(1, 2, 5, 8), causal=True, derivatives=2),
    "linear_attention": lambda f: call(*qk(f), f(1, 2, 5, 8), causal=True),
}

CONVOLUTION: dict[str, Example] = {
    "atrous_conv1d": lambda f: call(f(1, 4, 12), f(4, 4, 3), f(4), dilation=2),
    "atrous_conv2d": lambda f: call(f(1, 4, 9, 9), f(4, 4, 3, 3), f(4), dilation=2),
    "boundary_refinement": lambda f: call(f(1, 3, 6, 6), torch.tanh, torch.sigmoid),
    "causal_conv1d": lambda f: call(f(1, 4, 12), f(4, 4, 3), f(4), dilation=2),
    "conv2d_same": lambda f: call(f(1, 4, 9, 9), f(4, 4, 3, 3), f(4), stride=2),
    "deform_conv2d": lambda f: call(
        f(1, 4, 7, 7), f(1, 18, 7, 7), f(6, 4, 3, 3), f(6), padding=1, mask=f.share(1, 9, 7, 7)
    ),
    "depthwise_separable_conv2d": lambda f: call(f(1, 4, 9, 9), f(4, 1, 3, 3), f(6, 4, 1, 1), f(6)),
    "drop_path": lambda f: call(f(4, 3, 5, 5), 0.0),
    "global_convolution": lambda f: call(f(1, 3, 6, 6), (torch.tanh, torch.sigmoid), (torch.sigmoid, torch.tanh)),
    "inception_block": lambda f: call(f(1, 3, 6, 6), (torch.tanh, torch.sigmoid)),
    "pointwise_conv2d": lambda f: call(f(1, 4, 9, 9), f(6, 4, 1, 1), f(6)),
    "squeeze_excite": lambda f: call(f(1, 8, 5, 5), f(2, 8, 1, 1), f(2), f(8, 2, 1, 1), f(8)),
}  # fmt: skip

RESAMPLING: dict[str, Example] = {
    "checkerboard": lambda f: call(f(1, 2, 8, 8)),
    "max_unpool2d": lambda f: call(f(1, 1, 2, 2), torch.tensor([[[[0, 3], [8, 11]]]]), 2),
    "pixel_shuffle": lambda f: call(f(1, 8, 4, 4), 2),
    "resize_bilinear": lambda f: call(f(1, 2, 5, 5), (8, 8)),
    "resize_nearest": lambda f: call(f(1, 2, 5, 5), (8, 8)),
    "upsample2d": lambda f: call(f(1, 4, 5, 5), f(6, 4, 3, 3), f(6)),
}

REGIONS: dict[str, Example] = {
    "batched_nms": lambda f: call(boxes(f), scores(), labels(4), 0.5),
    "box_convert": lambda f: call(boxes(f), "xyxy", "cxcywh"),
    "box_iou": lambda f: call(boxes(f), boxes(f)),
    "clip_boxes": lambda f: call(boxes(f), (8, 8)),
    "complete_box_iou": lambda f: call(boxes(f), boxes(f)),
    "decode_boxes": lambda f: call(f(4, 4), boxes(f)),
    "deform_ps_roi_pool": lambda f: call(f(1, 8, 12, 12), rois(f), f(4, 2, 2, 2), 2),
    "deform_roi_pool": lambda f: call(f(1, 3, 12, 12), rois(f), f(4, 2, 2, 2), 2),
    "distance_box_iou": lambda f: call(boxes(f), boxes(f)),
    "encode_boxes": lambda f: call(boxes(f), boxes(f)),
    "generalized_box_iou": lambda f: call(boxes(f), boxes(f)),
    "masks_to_boxes": lambda f: call(f(2, 8, 8) > 0),
    "nms": lambda f: call(boxes(f), scores(), 0.5),
    "ps_roi_align": lambda f: call(f(1, 8, 12, 12), rois(f), 2, 1.0, 2),
    "ps_roi_pool": lambda f: call(f(1, 8, 12, 12), rois(f), 2),
    "roi_align": lambda f: call(f(1, 3, 12, 12), rois(f), 2, 1.0, 2, True),
    "roi_pool": lambda f: call(f(1, 3, 12, 12), rois(f), 2),
    "soft_nms": lambda f: call(boxes(f), scores()),
    "stability_score": lambda f: call(f(2, 8, 8)),
}

LOW_RANK: dict[str, Example] = {
    "bottleneck_adapter": lambda f: call(f(3, 8), f(4, 8), f(4), f(8, 4), f(8)),
    "dora_linear": lambda f: call(f(3, 8), f(6, 8), f(6), f(2, 8), f(6, 2), f.share(6), 2.0),
    "lora_linear": lambda f: call(f(3, 8), f(6, 8), f(6), f(2, 8), f(6, 2), 2.0),
    "prefix_states": lambda f: call(f(3, 32), 2, 1),
}

QUANTIZATION: dict[str, Example] = {
    "dequantize_weight": lambda f: call(labels(4, 32, classes=16), f.share(1, 4), f(1, 4), torch.float32),
    "ema_codebook": lambda f: call(f(4, 8), f.share(4), f(4, 8), f.share(4), f(4, 8)),
    "kmeans": lambda f: call(f(20, 4), 3),
    "nearest_code": lambda f: call(f(9, 8), f(16, 8)),
    "quantize_weight": lambda f: call(f(4, 64), 4),
    "vector_quantize": lambda f: call(f(9, 8), f(16, 8)),
}

GENERATION: dict[str, Example] = {
    "c_transform": lambda f: call(f(4), f.share(4, 5)),
    "dual_bound": lambda f: call(f(4), f.share(4, 5)),
    "gan_loss": lambda f: call(f(9), True, "hinge"),
    "gradient_norms": lambda f: call(_critic, f(5, 3)),
    "gradient_penalty": lambda f: call(_critic, f(5, 3), f(5, 3)),
    "group_sort": lambda f: call(f(5, 6)),
    "optimal_transport": lambda f: call(None, None, f.share(4, 4)),
    "orthogonal_linear": lambda f: call(f(5, 6), f(4, 6), f(4)),
    "orthonormalize": lambda f: call(f(4, 6)),
    "power_iteration": lambda f: call(f(4, 6), f(6)),
    "r1_penalty": lambda f: call(_critic, f(5, 3)),
    "sinkhorn": lambda f: call(None, None, f.share(4, 4), 0.5, rounds=20),
    "sliced_wasserstein": lambda f: call(f(6, 3), f(6, 3), directions=4),
    "spectral_norm": lambda f: call(f(4, 6), f(4), f(6)),
    "transport_cost": lambda f: call(f(5, 3), f(4, 3)),
    "wasserstein_1d": lambda f: call(f(6), f(5)),
    "wasserstein_distance": lambda f: call(f(6, 3), f(6, 3)),
}

METRICS: dict[str, Example] = {
    "average_precision": lambda f: call(scores(), HITS, 4),
    "boundary_counts": lambda f: call(labels(1, 16, 16), labels(1, 16, 16), 3),
    "boundary_iou": lambda f: call(labels(1, 3), labels(1, 3) + 2),
    "class_accuracy": lambda f: call(_matrix()),
    "class_iou": lambda f: call(_matrix()),
    "confusion_matrix": lambda f: call(labels(1, 8, 8), labels(1, 8, 8), 3, validate_args=False),
    "feature_statistics": lambda f: call(f(9, 4)),
    "frechet_distance": lambda f: call(f(4), torch.eye(4, dtype=f(1).dtype), f(4), torch.eye(4, dtype=f(1).dtype)),
    "frequency_weighted_iou": lambda f: call(_matrix()),
    "lovasz_softmax": lambda f: call(f(1, 3, 6, 6).softmax(1), labels(1, 6, 6)),
    "manifold_precision_recall": lambda f: call(f(12, 4), f(12, 4)),
    "mean_iou": lambda f: call(_matrix()),
    "mean_pixel_accuracy": lambda f: call(_matrix()),
    "peak_signal_noise_ratio": lambda f: call(f.share(1, 3, 16, 16), f.share(1, 3, 16, 16), 1.0),
    "pixel_accuracy": lambda f: call(_matrix()),
    "precision_recall": lambda f: call(scores(), HITS, 4),
    "structural_similarity": lambda f: call(f.share(1, 3, 16, 16), f.share(1, 3, 16, 16), 1.0),
}  # fmt: skip

FAMILIES: dict[str, dict[str, Example]] = {
    "position": POSITION, "attention": ATTENTION, "convolution": CONVOLUTION, "resampling": RESAMPLING,
    "regions": REGIONS, "low rank": LOW_RANK, "quantization": QUANTIZATION, "generation": GENERATION,
    "metrics": METRICS,
}  # fmt: skip

OUTSIDE = {
    "alibi_slopes": "of numbers", "certified_w1": "a number, of a Module", "clip_weights": "in place",
    "codebook_usage": "a number", "grid_positions": "of numbers", "gridding": "of numbers",
    "hybrid_dilation_rates": "of numbers", "icnr_init": "in place", "master_weight_update": "in place",
    "number_format": "of a dtype", "position_readout": "a number", "quantized_linear": "of packed bytes",
    "rouge_l": "of texts", "rouge_n": "of texts", "unscale_gradients": "in place", "update_loss_scale": "of a state",
}  # fmt: skip
"""Functions that are not tried, and why."""
