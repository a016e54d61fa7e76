"""The authors' segment_anything, which wants torchvision: its compiled nms, and Pillow where it wants a resize.

torchvision's Python package does not import beside every build of torch. Five of its functions are used by
segment_anything; here they are, the one that computes being torchvision's own operator.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from volvelle.claims.peer_ops import torchvision_ops
from volvelle.systems.segmentation.sam import Promptable, Sam, SamConfig
from volvelle.systems.segmentation.sam.config import Decoder, ViT


def load_segment_anything() -> Any:
    """The module segment_anything. Raises ImportError where it, or torchvision's operators, are not installed."""
    if "segment_anything" in sys.modules:
        return sys.modules["segment_anything"]
    ops = torchvision_ops()

    def batched_nms(boxes: Tensor, scores: Tensor, idxs: Tensor, iou_threshold: float) -> Tensor:
        assert not idxs.any(), "only ever called with one category"
        return ops.nms(boxes, scores, iou_threshold)

    def box_area(boxes: Tensor) -> Tensor:
        return (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])

    def resize(image: Image.Image, size: tuple[int, int]) -> Image.Image:
        return image.resize(size[::-1], Image.Resampling.BILINEAR)

    names: dict[str, dict[str, Any]] = {
        "torchvision": {},
        "torchvision.ops": {},
        "torchvision.ops.boxes": {"batched_nms": batched_nms, "box_area": box_area},
        "torchvision.transforms": {},
        "torchvision.transforms.functional": {"resize": resize, "to_pil_image": Image.fromarray},
    }
    for name, functions in names.items():
        module = ModuleType(name)
        vars(module).update(functions, __path__=[])
        sys.modules[name] = module
    try:
        return importlib.import_module("segment_anything")
    finally:
        for name in names:
            del sys.modules[name]


class _Encoder(torch.nn.Module):
    """One of our image encoders where theirs stands, for models of which they have none."""

    def __init__(self, model: Sam):
        super().__init__()
        self.encoder, self.img_size = model.image_encoder, model.config.size

    def forward(self, pixels: Tensor) -> Tensor:
        """The embedding."""
        return self.encoder(pixels)


def their_sam(model: Sam) -> Any:
    """Their model with our weights; around our own image encoder where it is no vision transformer."""
    load_segment_anything()
    theirs = importlib.import_module("segment_anything.modeling")
    config = model.config
    decoder, grid, side = config.decoder, (config.grid,) * 2, (config.size,) * 2
    transformer = theirs.TwoWayTransformer(decoder.depth, config.width, decoder.heads, decoder.mlp)
    built = theirs.Sam(
        _their_encoder(theirs, model),
        theirs.PromptEncoder(config.width, grid, side, config.mask_channels),
        theirs.MaskDecoder(
            transformer_dim=config.width,
            transformer=transformer,
            num_multimask_outputs=decoder.masks,
            iou_head_depth=decoder.iou_depth,
            iou_head_hidden_dim=decoder.iou_width,
        ),
        pixel_mean=[255 * value for value in config.mean],
        pixel_std=[255 * value for value in config.std],
    )
    built.prompt_encoder.load_state_dict(model.prompt_encoder.state_dict())
    built.mask_decoder.load_state_dict(model.mask_decoder.state_dict())
    return built.eval()


def _their_encoder(theirs: Any, model: Sam) -> torch.nn.Module:
    config, spec = model.config, model.config.encoder
    if not isinstance(spec, ViT):
        return _Encoder(model)
    encoder = theirs.ImageEncoderViT(
        img_size=config.size,
        embed_dim=spec.width,
        depth=spec.depth,
        num_heads=spec.heads,
        mlp_ratio=spec.mlp / spec.width,
        out_chans=config.width,
        norm_layer=lambda width: torch.nn.LayerNorm(width, eps=spec.eps),
        use_rel_pos=True,
        window_size=spec.window,
        global_attn_indexes=spec.everywhere,
    )
    encoder.load_state_dict(model.image_encoder.state_dict())
    return encoder


def their_generator(model: Sam, **settings: Any) -> Any:
    """Their automatic mask generator over their model with our weights."""
    return load_segment_anything().SamAutomaticMaskGenerator(their_sam(model), **settings)


def small_config(size: int = 128) -> SamConfig:
    """A vision transformer of few channels that both implementations can build."""
    return SamConfig("small", ViT(32, 2, 2, (1,), window=3, mlp=64), size, width=32, decoder=Decoder(heads=2, mlp=64))


@torch.no_grad()
def enliven(model: Sam, seed: int = 0, *, logits: float = 4.0) -> Sam:
    """Draw all weights anew, so large that masks and estimates differ from prompt to prompt.

    Logits get a standard deviation of about `logits`, and estimates of the IoU lie around a half.
    """
    draw = torch.Generator().manual_seed(seed)
    for name, weight in model.named_parameters():
        if weight.dim() > 1:
            fan = weight[0].numel() if "embed" not in name and "token" not in name else 1
            weight.copy_(torch.randn(weight.shape, generator=draw) * (1.4 / fan**0.5))
        elif "norm" not in name:
            weight.copy_(torch.randn(weight.shape, generator=draw) * 0.2)
    size = model.config.size
    x = torch.randn(1, 3, size, size, generator=draw)
    points = torch.rand(1, 32, 1, 2, generator=draw) * size
    found, iou = model(x, points=points, labels=torch.ones(1, 32, 1, dtype=torch.int64))
    for network in model.mask_decoder.output_hypernetworks_mlps:
        for part in (network.layers[-1].weight, network.layers[-1].bias):
            part.mul_(logits / float(found.std()))
    last = model.mask_decoder.iou_prediction_head.layers[-1]
    last.weight.mul_(0.2 / float(iou.std()))
    last.bias.mul_(0.2 / float(iou.std())).add_(0.5 - float(iou.mean()) * 0.2 / float(iou.std()))
    return model


@torch.no_grad()
def centre(model: Sam, picture: Image.Image, *, logits: float = 4.0, prompts: int = 32) -> Sam:
    """Shift and scale each mask's logits so that on this picture they have mean 0 and a standard deviation of `logits`.

    The logits of a mask are (W h + b) · u at each place, u being the embedding grown: their mean moves with b along the
    mean of u, which is its gradient.
    """
    decoder, draw = model.mask_decoder, torch.Generator().manual_seed(0)
    seen = Promptable(model).embed(picture)
    points = torch.rand(1, prompts, 1, 2, generator=draw) * torch.tensor([picture.width, picture.height])
    points = points * (model.config.size / max(picture.size))
    sparse, dense = model.prompt_encoder(points, torch.ones(points.shape[:-1], dtype=torch.int64), None)
    last = [network.layers[-1] for network in decoder.output_hypernetworks_mlps]

    def asked() -> Tensor:
        return decoder(seen.features, model.prompt_encoder.position(), sparse, dense, None)[0]

    for part, spread in zip(last, asked().std((-1, -2)).mean((0, 1)).tolist(), strict=True):
        part.weight.mul_(logits / spread)
        part.bias.mul_(logits / spread)
    with torch.enable_grad():
        biases = [part.bias.requires_grad_() for part in last]
        means = asked().mean((0, 1, 3, 4))
        for number, (bias, mean) in enumerate(zip(biases, means, strict=True)):
            slope = torch.autograd.grad(mean, bias, retain_graph=number < len(biases) - 1)[0]
            bias.data -= slope * (float(mean.detach()) / float(slope.square().sum()))
    return model


def as_array(image: Image.Image) -> np.ndarray:
    """What their functions take."""
    return np.asarray(image.convert("RGB"))
