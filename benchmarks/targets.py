"""What every benchmark is held against: one line a figure, with the place of the figure in the benchmark's JSON.

`python -m benchmarks.page`, which `volvelle bench all` calls, reads the JSON and gives the verdicts. A target is a
ratio of speeds (ours over the peer's, at least) unless `most` says that the figure may be at most the bound. Figures
without a bound are listed without a verdict.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

Step = str | Mapping[str, Any]
"""A key, or the values by which a row of a list is found."""


@dataclass(frozen=True)
class Target:
    """One figure of a benchmark and the bound it is held against."""

    bench: str
    what: str
    at: tuple[Step, ...]
    """The figure: a comparison of `protocol.compare`, or a number."""
    bound: float | None = None
    peer: str = ""
    """The package that it is held against; its version is in the JSON."""
    most: bool = False
    over: tuple[Step, ...] = ()
    """The figure is divided by this one, where a share is what counts."""
    unit: str = "x"


def _row(*, then: tuple[Step, ...] = ("speed",), **keys: Any) -> tuple[Step, ...]:
    return ("rows", keys, *then)


def _attention(what: str, tokens: int, kind: str = "forward and backward") -> tuple[Step, ...]:
    return _row(what=what, tokens=tokens, threads=1, then=(kind, "speed"))


def _memory(what: str, tokens: int, who: str) -> tuple[Step, ...]:
    return _row(what=what, tokens=tokens, threads=1, then=("memory", who))


AMP = 1.5
"""Speed of training in bf16 over fp32, on processors with AMX."""
ALL_REDUCE = {("ring", 4, 64 << 20): 1.3, ("recursive-doubling", 4, 1 << 10): 0.85}
"""Time over gloo's, at most: by algorithm, ranks and bytes."""
PLANNER = {"worst": 0.05, "median": 0.01}
"""Error of planned memory, at most."""

_FOLDED = "folded, channels last"
_BEST = "folded, channels last, bf16, compiled"
_AUTHORS = "segment_anything, fp32"

TARGETS: tuple[Target, ...] = (
    *(
        Target("language", f"decode {dtype}, batch {batch}", _row(what="decode", dtype=dtype, batch=batch),
               1.3 if batch == 1 else None, "transformers")
        for dtype in ("fp32", "bf16") for batch in (1, 8)
    ),
    *(
        Target("language", f"LoRA step, {dtype}", _row(what="lora step", dtype=dtype), 1.0, "peft")
        for dtype in ("fp32", "bf16")
    ),
    *(
        Target("decode", f"plain {who}", _row(what="plain", who=who, then=(f"over {peer}",)), bound, peer)
        for who, peer, bound in (
            ("fp32", "transformers fp32", 1.4), ("bf16", "transformers fp32", 1.9), ("int8", "llama.cpp", None),
            ("int4", "llama.cpp", 1.2),
        )
    ),
    *(
        Target("decode", f"{precision}, drafts by {drafter}",
               _row(what="drafts", precision=precision, drafter=drafter, then=(f"over {peer}",)), bound, peer)
        for precision, drafter, peer, bound in (
            ("bf16", "lookup", "transformers fp32", None), ("bf16", "ngram", "transformers fp32", 3.0),
            ("bf16", "ngram", "llama.cpp", 1.0), ("int4", "lookup", "llama.cpp", 1.4),
        )
    ),
    *(
        Target("decode", f"{precision}, drafts by lookup, rewriting",
               _row(what="drafts", precision=precision, drafter="lookup", then=("kinds", "rewriting", "over plain")),
               2.5, "ours without drafts")
        for precision in ("bf16", "int4")
    ),
    Target("adapt", "LoRA, a training step", _row(what="step"), 1.3, "peft"),
    Target("adapt", "LoRA, a training step: peak of the process",
           _row(what="step", then=("memory", "ours", "rss_peak")), 0.6, "peft", most=True,
           over=_row(what="step", then=("memory", "peft", "rss_peak"))),
    Target("adapt", "LoRA, completions only", _row(what="completions"), 1.3, "peft"),
    Target("adapt", "8 LoRAs in one batch", _row(what="mixed"), 1 / 1.25, "one LoRA for all"),
    Target("adapt", "prefix, a training step", _row(what="prefix"), None, "peft"),
    Target("comparison", "fall of the loss, LoRA over full", _row(method="lora", then=("gain",)), 0.95, "full"),
    Target("comparison", "share that LoRA trains", _row(method="lora", then=("trained",)), 0.01, "full", most=True),
    Target("comparison", "share that a prefix stores", _row(method="prefix", then=("stored",)), 0.005, "full",
           most=True),
    Target("comparison", "all methods on WebNLG, seconds", ("seconds",), 2400, "", most=True, unit="s"),
    *(
        Target("summarization", f"{what} {dtype}", _row(what=what, dtype=dtype), None, "transformers")
        for what in ("greedy", "4 beams") for dtype in ("fp32", "bf16")
    ),
    *(
        Target("loader", f"{what}, {kind}", _row(what=what, then=("speed_against_torch", f"ours, {kind}")), None,
               "torch DataLoader")
        for what, kind in (("jpeg", "threads"), ("camvid", "threads"), ("python", "processes"))
    ),
    *(
        Target("planner", f"{which} error of planned memory", ("summary", which), PLANNER[which], "torch.profiler",
               most=True, unit="")
        for which in PLANNER
    ),
    *(
        Target("amp", f"bf16, {title}", _row(case=case, then=("speed", "bf16")), AMP, "fp32")
        for case, title in (("efficientnet-b0", "EfficientNet-B0"), ("resnet50", "ResNet-50"), ("smollm2", "SmolLM2"))
    ),
    *(
        Target("collectives", f"{algorithm}, {ranks} ranks, {size:,} bytes: time",
               _row(algorithm=algorithm, ranks=ranks, bytes=size, then=("time_ratio",)), bound, "gloo", most=True)
        for (algorithm, ranks, size), bound in ALL_REDUCE.items()
    ),
    *(Target("attention", f"tiles, {n} tokens", _attention("plain", n), 1 / 1.4, "SDPA") for n in (2048, 4096)),
    *(Target("attention", f"learnable bias, {n} tokens", _attention("learnable bias", n), 2.0, "SDPA")
      for n in (2048, 4096)),
    *(Target("attention", f"learnable bias, {n} tokens: memory", _memory("learnable bias", n, "ours"), 0.1, "SDPA",
             most=True, over=_memory("learnable bias", n, "sdpa")) for n in (2048, 4096)),
    Target("attention", "dropout, 2048 tokens", _attention("dropout", 2048), 2.0, "SDPA"),
    Target("attention", "window of 256, 4096 tokens", _attention("window 256", 4096), 1 / 0.45, "SDPA"),
    Target("attention", "what auto adds to a call", ("auto", "added_us"), 20.0, "SDPA", most=True, unit="µs"),
    Target("attention_cuda", "causal, 4096 tokens", _row(what="causal", tokens=4096, then=("forward", "speed")), 0.8,
           "SDPA"),
    Target("attention_cuda", "causal, 4096 tokens: of the dense rate",
           _row(what="causal", tokens=4096, then=("forward", "flops", "ours")), 0.5, "torch", over=("dense_flops",)),
    Target("attention_cuda", "learnable bias, 4096 tokens",
           _row(what="learnable bias", tokens=4096, then=("forward and backward", "speed")), 3.0, "SDPA"),
    Target("metrics", "uint8 masks, both without checks",
           _row(what="uint8", then=("speed", "ours, no checks : JaccardIndex, no checks")), 8.0, "torchmetrics"),
    Target("metrics", "int64 masks, both without checks",
           _row(what="int64", then=("speed", "ours, no checks : JaccardIndex, no checks")), 2.5, "torchmetrics"),
    *(
        Target("backbone", f"{name}, batch {batch}, {how}", _row(what=name, batch=batch, then=("speed", how)),
               bound, "timm")
        for name in ("b0", "lite0") for batch in (1, 8) for how, bound in ((_FOLDED, None), (_BEST, 1.8))
    ),
    *(
        Target("segmentation", f"bf16, folded, batch {batch}",
               _row(batch=batch, then=("speed", "folded, channels last, bf16")), 2.0, "timm")
        for batch in (1, 8)
    ),
    Target("regions", "geometric mean of the region parts", ("geometric_mean",), 2.0, "torchvision"),
    Target("regions", "nms, 2000 boxes", _row(what="nms, 2000 boxes up to 101 pixels long within 1000"), 1.0,
           "torchvision"),
    Target("detection", "R-FCN's head, 2000 regions over 100: time", ("heads", "slopes", "R-FCN"), 1.3,
           "itself at 100 regions", most=True),
    Target("detection", "Faster R-CNN's head, 2000 regions over 100: time", ("heads", "slopes", "Faster R-CNN"), None,
           "itself at 100 regions"),
    Target("detection", "ThunderNet-SNet49, pictures a second", ("latency", "images_per_second"), 15.0, "", unit="/s"),
    Target("detection", "its share of post-processing", ("latency", "shares", "post-processing"), 0.15, "", most=True,
           unit=""),
    Target("sam", "encoder, bf16", ("encoder", "speed", "ours, bf16 by autocast"), 3.5, "transformers"),
    Target("sam", "encoder, bf16: relative error", ("encoder", "far", "ours, bf16 by autocast"), 0.01, "transformers",
           most=True, unit=""),
    Target("sam", "a click, fp32", ("decoder", "clicks", "1", "speed", "ours, fp32"), None, _AUTHORS),
    Target("sam", "a click: seconds", ("decoder", "clicks", "1", "seconds", "ours, fp32", "wall_median"), 0.05, "",
           most=True, unit="s"),
    *(
        Target("sam", f"everything, {who}", ("everything", "speed", f"ours, {who}"), 3.0, _AUTHORS)
        for who in ("fp32", "at most 256 MB")
    ),
    *(
        Target("serving", f"32 clients, beside {who}",
               _row(what="speed", draft=None, then=("speed", f"transformers, {who}")), 3.0, "transformers")
        for who in ("one by one", "one batch")
    ),
    Target("serving", "answers under load that differ", _row(what="minute", draft=None, then=("different",)), 0,
           "itself alone", most=True, unit=""),
    Target("generation", "pictures, batch 1", ("sampling", {"batch": 1}, "speed", "transformers"), 1.6, "transformers"),
    Target("generation", "pictures, batch 1, beside no cache", ("sampling", {"batch": 1}, "speed", "no cache"), 7.0,
           "a loop without a cache"),
    Target("generation", "codes that are transformers'", ("sampling", {"batch": 1}, "same", "ours"), 1.0,
           "transformers", unit=""),
    *(
        Target("generation", f"drafts of image tokens, {how}", ("drafts", {"temperature": at}, "speed"), None,
               "ours without drafts")
        for at, how in ((1.0, "drawn"), (0.0, "greedy"))
    ),
)  # fmt: skip
"""In the order of the page."""
