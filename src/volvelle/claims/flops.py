"""Counting FLOPs: against formulas by hand, against products that really run, and against the tables of papers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from volvelle.claims.claim import Budget, Claim, Finding, Measurement, Paper, at_least, at_most

if TYPE_CHECKING:
    from torch import nn

CLAIM = Claim(
    title="FLOPs, and multiply-adds that are called so",
    family="backbones",
    paper=Paper(
        "He et al.",
        2016,
        "Deep Residual Learning for Image Recognition",
        "section 3.3 and table 1; other tables as named",
        "https://arxiv.org/abs/1512.03385",
    ),
    sentence="Our 34-layer baseline has 3.6 billion FLOPs (multiply-adds), which is only 18% of VGG-19 (19.6 billion "
    "FLOPs)",
    measured_by="the counter of `volvelle inspect` on layers and whole networks: against formulas by hand; against the "
    "same products run on ones, whose sum is their number; against torch's own counter; and against the figures that "
    "papers print as FLOPs, which are multiply-adds (MACs), two FLOPs each. A decoder against 2N + 2 n_layer n_ctx d",
    summary="Counts the multiply-adds of any module, layer by layer, and says FLOPs only for twice their number.",
    summary_zh="逐层统计任意模块的乘加次数（MAC）；一次乘加等于两次浮点运算，论文里的“FLOPs”往往其实是 MAC。",
    seconds={"quick": 60, "full": 300},
    recipe="volvelle inspect efficientnet-b0 flops",
)

HE, TAN = "He et al. 2016", "Tan & Le 2019"
PRINTED = {
    "plain-34": (HE, 3.6), "vgg-19": (HE, 19.6), "resnet-18": (HE, 1.8), "resnet-50, stride as in the paper": (HE, 3.8),
    "resnet-101, stride as in the paper": (HE, 7.6), "resnet-152, stride as in the paper": (HE, 11.3),
    "mobilenet-v2": ("Sandler et al. 2018", 0.300), "shufflenet-v2-x1.0": ("Ma et al. 2018", 0.146),
    "efficientnet-b0": (TAN, 0.39), "efficientnet-b1": (TAN, 0.70), "efficientnet-b2": (TAN, 1.0),
    "efficientnet-b3": (TAN, 1.8), "efficientnet-b4": (TAN, 4.2), "efficientnet-b5": (TAN, 9.9),
    "efficientnet-b6": (TAN, 19.0), "efficientnet-b7": (TAN, 37.0),
}  # fmt: skip
"""Billions that the papers' tables give as FLOPs (Sandler et al.: as multiply-adds)."""
NEAR = 5.0
"""Per cent between a count and a printed figure: two printed digits alone leave up to five."""
RUN = ("resnet-18", "mobilenet-v2", "efficientnet-b0", "inception-v1", "shufflenet-v2-x1.0")
"""Networks whose every product is run (full: also resnet-50 and efficientnet-b3)."""
TEXT = 128
"""Tokens of the decoder's input."""


def measure(budget: Budget) -> Measurement:
    """Layers, networks, tables, a decoder (quick: fewer networks, all at 64 pixels where products run)."""
    import torch

    full = budget == "full"
    names = [*RUN, "resnet-50", "efficientnet-b3"] if full else RUN[:3]
    findings = [*_layers(), *_networks(names, 224 if full else 64), *_tables(quick=not full), *_decoder()]
    notes = [
        "resnet-50 as it is in use has its strides in the 3 x 3 kernels: 4.1 billion MACs, where the paper has 3.8",
        "torch counts every pair of causal attention, this counter those that are seen: the decoder's attention is "
        "compared with the formula, all other products with torch as well",
        "torch's counter names FLOPs what is 2 MACs, and counts nothing beside products; here that is `other`",
    ]
    setting = {"layers": len(LAYERS), "networks run": names, "input": "one picture", "decoder": f"{TEXT} tokens"}
    peers = {"torch.utils.flop_counter": torch.__version__}
    return Measurement(findings, setting=setting, notes=notes, peers=peers)


Layer = tuple[Callable[[], "nn.Module"], tuple[int, ...], int]


def _made(kind: str, *sizes: int, **options: int) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        from torch import nn

        return getattr(nn, kind)(*sizes, **options)

    return make


LAYERS: dict[str, Layer] = {
    "3 x 3": (_made("Conv2d", 6, 8, 3), (2, 6, 11, 13), 2 * 8 * 9 * 11 * 6 * 9),
    "3 x 3, padded, stride 2": (_made("Conv2d", 6, 8, 3, stride=2, padding=1), (1, 6, 11, 13), 8 * 6 * 7 * 6 * 9),
    "grouped": (_made("Conv2d", 6, 9, 3, groups=3), (1, 6, 11, 13), 9 * 9 * 11 * 2 * 9),
    "depthwise, dilated": (_made("Conv2d", 6, 12, 3, groups=6, dilation=2), (1, 6, 11, 13), 12 * 7 * 9 * 9),
    "1 x 1": (_made("Conv2d", 64, 16, 1), (1, 64, 7, 7), 16 * 49 * 64),
    "along a line": (_made("Conv1d", 4, 5, 7, padding=3), (3, 4, 20), 3 * 5 * 20 * 4 * 7),
    "in space": (_made("Conv3d", 2, 3, 3), (1, 2, 5, 6, 7), 3 * 3 * 4 * 5 * 2 * 27),
    "transposed, grouped": (
        _made("ConvTranspose2d", 6, 8, 3, stride=2, padding=1, groups=2),
        (1, 6, 5, 4),
        6 * 20 * 4 * 9,
    ),
    "linear": (_made("Linear", 30, 7), (2, 5, 30), 10 * 30 * 7),
    "bilinear form as products": (_made("Linear", 12, 12, bias=False), (4, 12), 4 * 144),
    "batch norm: no product": (_made("BatchNorm2d", 6), (1, 6, 5, 5), 0),
    "max pooling: no product": (_made("MaxPool2d", 2), (1, 6, 8, 8), 0),
}
"""Layers with the shape of their input and their MACs by hand."""


def by_running(module: nn.Module, shape: Sequence[int]) -> int:
    """How many products a forward pass takes: each of its products once more on ones, whose sum is their number.

    The module itself lies on the meta device and computes nothing. Taps of the padding count, as they do for everyone.
    """
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode

    total = 0

    class Ones(TorchDispatchMode):
        """Sees every operation below autograd."""

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal total
            total += ones(func, args)
            return func(*args, **(kwargs or {}))

    with torch.no_grad(), Ones():
        module.to("meta").eval()(torch.zeros(tuple(shape), device="meta"))
    return total


def ones(func, args) -> int:
    """The products of one operation, counted by a run on ones; 0 for what is no product."""
    import torch
    from torch.nn import functional as F

    aten = torch.ops.aten
    if func is aten.convolution.default:
        x, weight, _, stride, padding, dilation, transposed, _, groups = args
        kernel, data = torch.ones(weight.shape), torch.ones(x.shape)
        if transposed:
            run = {3: F.conv_transpose1d, 4: F.conv_transpose2d, 5: F.conv_transpose3d}[data.ndim]
            # Without cropping: what is cut off was computed.
            out = run(data, kernel, stride=stride, groups=groups, dilation=dilation)
        else:
            data = F.pad(data, [n for p in reversed(padding) for n in (p, p)], value=1.0)
            run = {3: F.conv1d, 4: F.conv2d, 5: F.conv3d}[data.ndim]
            out = run(data, kernel, stride=stride, dilation=dilation, groups=groups)
        return round(out.double().sum().item())
    if func in (aten.mm.default, aten.bmm.default, aten.addmm.default, aten.baddbmm.default):
        a, b = args[-2:] if func in (aten.mm.default, aten.bmm.default) else args[1:3]
        return round((torch.ones(a.shape) @ torch.ones(b.shape)).double().sum().item())
    return 0


def by_torch(module: nn.Module, shape: Sequence[int]) -> int:
    """FLOPs as torch.utils.flop_counter finds them."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        module.to("meta").eval()(torch.zeros(tuple(shape), device="meta"))
    return counter.get_total_flops()


def _layers() -> list[Finding]:
    from volvelle.inspect.flops import count_flops

    apart = {"the formula by hand": 0, "the products that run": 0, "torch's FLOPs": 0}
    twice = 0
    for make, shape, macs in LAYERS.values():
        found = count_flops(make(), shape)
        apart["the formula by hand"] += found.macs != macs
        apart["the products that run"] += found.macs != by_running(make(), shape)
        apart["torch's FLOPs"] += found.flops != by_torch(make(), shape)
        twice += found.flops == 2 * found.macs
    return [
        *(at_most(f"layers of {len(LAYERS)} whose count is not that of {name}", n, 0) for name, n in apart.items()),
        at_least("layers whose FLOPs are two for each MAC", twice, len(LAYERS)),
    ]


def network(name: str) -> tuple[nn.Module, int]:
    """A network by its name on the meta device, and the side of its pictures."""
    import torch

    from volvelle.claims.flops_networks import build, has

    with torch.device("meta"):
        if has(name):
            return build(name), 224
        from volvelle.systems.backbone.load import backbone

        net = backbone(name)
        return net, net.preprocessing.size


def _networks(names: Sequence[str], side: int) -> list[Finding]:
    """Whole networks: every product of them run on ones, and torch's counter."""
    from volvelle.inspect.flops import count_flops

    ran, theirs = [], []
    for name in names:
        shape = (1, 3, side, side)
        found = count_flops(network(name)[0], shape)
        if found.macs != by_running(network(name)[0], shape):
            ran.append(name)
        if found.flops != by_torch(network(name)[0], shape):
            theirs.append(name)
    return [
        at_most(f"networks of {len(names)} whose MACs are not the products that run", len(ran), 0),
        at_most(f"networks of {len(names)} whose FLOPs are not torch's", len(theirs), 0),
    ]


def _tables(*, quick: bool) -> list[Finding]:
    """MACs against what papers print, in per cent."""
    from volvelle.inspect.flops import count_flops

    findings, macs, exact = list[Finding](), {}, 0
    for name, (paper, billions) in PRINTED.items():
        if quick and name in SLOW:
            continue
        net, side = network(name)
        found = macs[name] = count_flops(net, (1, 3, side, side)).macs / 1e9
        exact += abs(found - billions) < 10.0 ** -_digits(billions)
        what = f"{name}: {found:.3f} billion MACs from the {billions:g} billion of {paper}"
        findings.append(at_most(what, 100 * abs(found / billions - 1), NEAR, "%"))
    share = 100 * macs["plain-34"] / macs["vgg-19"]
    return [
        at_most("plain-34 over vgg-19, from the paper's 18 %", abs(share - 18), 1.0, "points"),
        *findings,
        Finding(f"of these {len(macs)}, those that differ by less than one in the last printed digit", exact),
        Finding("the 34-layer baseline in FLOPs, two a MAC", 2 * macs["plain-34"], "billion"),
    ]


SLOW = (*(f"efficientnet-b{n}" for n in range(3, 8)), "resnet-152, stride as in the paper")
"""Left out of the quick budget: tracing takes seconds."""


def _digits(value: float) -> int:
    """Printed digits behind the point: 2 below 1, 1 below 10 (and of 11.3 and 19.6), none of whole tens."""
    text = f"{value:.3f}".rstrip("0")
    return 2 if value < 1 and len(text) <= 4 else len(text.partition(".")[2]) or (1 if value < 10 else 0)


def _decoder() -> list[Finding]:
    """A Llama of four blocks: MACs of a text by hand, and the rule of Kaplan et al. 2020, section 2.1."""
    import torch

    from volvelle.inspect.flops import count_flops
    from volvelle.systems.language.config import GatedMLP, LanguageConfig, RMSNorm, Rope
    from volvelle.systems.language.decoder import Decoder

    width, depth, heads, kv, inner, words, n = 64, 4, 4, 2, 172, 300, TEXT
    config = LanguageConfig(
        family="llama", vocabulary=words, width=width, depth=depth, heads=heads, kv_heads=kv, context=256,
        norm=RMSNorm(), mlp=GatedMLP(inner), position=Rope(),
    )  # fmt: skip
    model = Decoder(config)
    found = count_flops(model, (1, n), dtype=torch.int64)
    matrices = depth * (2 * width * width + 2 * width * width * kv // heads + 3 * width * inner)
    pairs = depth * n * (n + 1) // 2 * 2 * width
    attention = sum(layer.macs for layer in found if layer.op == "scaled_dot_product_attention")
    products = found.macs - attention
    rule = n * (2 * matrices + 2 * depth * n * width)
    counted = 2 * (found.macs - n * words * width)
    return [
        at_most(
            "decoder: MACs of linear layers apart from n (N + d V)", abs(products - n * (matrices + words * width)), 0
        ),
        at_most("decoder: MACs of causal attention apart from n_layer n (n + 1) d", abs(attention - pairs), 0),
        # The rule gives every token n / 2 keys where token i sees i: it is short by 1 / n of the attention.
        at_most(
            "decoder: FLOPs without its head over n (2N + 2 n_layer n_ctx d), less 1", abs(counted / rule - 1), 1 / n
        ),
    ]
