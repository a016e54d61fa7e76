"""Every target beside what was measured, for docs/benchmarks.md, and a few of them for the READMEs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from benchmarks.page import Row, rows
from benchmarks.support.claims_table import cell

ORDER = ("held", "NOT held", "no ratio", "no target", "not measured yet")


@dataclass(frozen=True)
class Words:
    """The words of the short table in one language."""

    head: tuple[str, ...]
    what: tuple[str, ...]
    times: str


SHORT = (
    ("decode", "plain bf16"),
    ("decode", "bf16, drafts by ngram"),
    ("adapt", "LoRA, completions only"),
    ("attention", "learnable bias, 4096 tokens"),
    ("regions", "geometric mean of the region parts"),
    ("backbone", "lite0, batch 1, folded, channels last, bf16, compiled"),
    ("sam", "encoder, bf16"),
    ("metrics", "uint8 masks, both without checks"),
    ("serving", "32 clients, beside one by one"),
)
"""What the READMEs show, the first row of each name."""
ENGLISH = Words(
    ("work", "times as fast as the peer (range over the rounds)", "peer"),
    (
        "SmolLM2 answers, bf16, one text",
        "the same with n-gram drafts, equal answers",
        "a LoRA step that learns completions",
        "attention with a learnable bias, forward and backward, 4096 tokens",
        "deformable convolution and RoI operators, geometric mean",
        "EfficientNet-Lite0, one picture, bf16, compiled",
        "Segment Anything's ViT-B encoder, bf16",
        "a confusion matrix of masks",
        "a server with 32 clients, beside one after another",
    ),
    "x",
)
CHINESE = Words(
    ("任务", "相对速度，括号内为各轮范围", "对照"),
    (
        "SmolLM2 生成，bf16，单条文本",
        "同上，加 n-gram 草稿，答案不变",
        "LoRA 训练一步，仅学习补全部分",
        "带可学习偏置的注意力，前向与反向，4096 个词元",
        "可变形卷积与 RoI 算子，几何平均",
        "EfficientNet-Lite0，单张图片，bf16，编译后",
        "Segment Anything 的 ViT-B 编码器，bf16",
        "掩码的混淆矩阵",
        "32 个客户端的服务，对照逐个请求",
    ),
    " 倍",
)


def full(pages: Mapping[str, str]) -> list[str]:
    """All targets: figure, peer, bound, verdict and date; `pages` says where a benchmark's own table stands."""
    every = rows()
    counts = Counter(row.verdict for row in every)
    lines = [
        ", ".join(f"{counts[kind]} {kind}" for kind in ORDER if counts[kind]) + ".",
        "",
        "| benchmark | what | figure | beside | target | verdict | measured |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in every:
        name = f"[{row.bench}]({pages[row.bench].removeprefix('docs/')})" if row.bench in pages else row.bench
        cells = (name, row.what, row.figure, row.peer, row.target, row.verdict, (row.measured or "")[:10])
        lines.append(f"| {' | '.join(map(cell, cells))} |")
    return lines


def short(words: Words) -> list[str]:
    """A few rows, each of another family."""
    first: dict[tuple[str, str], Row] = {}
    for row in rows():
        first.setdefault((row.bench, row.what), row)
    lines = [f"| {' | '.join(words.head)} |", "|---" * len(words.head) + "|"]
    for key, what in zip(SHORT, words.what, strict=True):
        row = first[key]
        figure = row.figure
        if row.value is not None:
            number, _, spread = figure.partition(" ")
            figure = f"{number}{words.times} {spread}".strip()
        lines.append(f"| {what} | {figure} | {row.peer} |")
    return lines
