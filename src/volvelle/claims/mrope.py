"""M-RoPE: rotary positions with three coordinates are plain RoPE on text, and relative in each coordinate."""

from __future__ import annotations

from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from volvelle.claims.claim import Budget, Claim, Finding, Measurement, Paper, at_least, at_most

if TYPE_CHECKING:
    from torch import Tensor

CLAIM = Claim(
    title="M-RoPE: rotary positions in time, height and width",
    family="position",
    paper=Paper(
        "Wang et al.",
        2024,
        "Qwen2-VL: Enhancing Vision-Language Model's Perception of the World at Any Resolution",
        "section 2.1",
        "https://arxiv.org/abs/2409.12191",
    ),
    sentence="for textual inputs the components use identical position ids, making M-RoPE functionally equivalent to "
    "1D-RoPE; it also reduces the value of position ids for images and videos",
    measured_by="queries and keys in fp64, both orders of the sections and both layouts: bits of text against RoPE, "
    "scores of pictures when all coordinates move, the features that each coordinate turns, and transformers' module "
    "on the same numbers; ids of a picture against those of its tokens in a row",
    summary="One rotary embedding for text, pictures and video: time, height and width each turn their share of the "
    "pairs of features.",
    summary_zh="一套旋转位置嵌入同时用于文本、图片与视频：特征对分给时间、高度与宽度三个坐标。",
    seconds={"quick": 20, "full": 60},
    parts=("functional.apply_mrope", "nn.MultimodalRotaryEmbedding"),
)

SECTIONS = {False: (16, 24, 24), True: (24, 20, 20)}
"""Pairs of time, height and width in a head of 128: in sections (Qwen2-VL), and in turns (Qwen3-VL)."""
WIDTH = 128
GRID = (2, 12, 16)
"""Frames, rows and columns of the video."""


def measure(budget: Budget) -> Measurement:
    """4 heads (full: 16, and a larger video)."""
    import torch

    heads, grid = (4, GRID) if budget == "quick" else (16, (4, 16, 24))
    findings: list[Finding] = []
    draw = torch.Generator().manual_seed(0)
    positions = coordinates(grid)
    q, k = (torch.randn(1, heads, len(positions), WIDTH, generator=draw, dtype=torch.float64) for _ in "qk")
    for interleaved in (False, True):
        order = "in turns" if interleaved else "in sections"
        findings += [
            at_most(f"{order}: text, largest difference from RoPE", _text(q, k, interleaved), 0),
            *_pictures(q, k, positions, order, interleaved),
        ]
    peer = _peer(q, k, positions)
    findings += peer
    tokens = len(positions)
    findings += [
        Finding("largest id of the video's tokens in a row", tokens - 1),
        Finding("its largest coordinate over that", int(positions.max()) / (tokens - 1), "x"),
    ]
    setting = {
        "heads": heads,
        "width of a head": WIDTH,
        "sections": list(SECTIONS.values()),
        "video": grid,
        "dtype": "fp64",
    }
    versions = _versions() if peer else {}
    notes = [] if peer else ["transformers is not installed here: not compared"]
    return Measurement(findings, peers=versions, setting=setting, notes=notes)


def coordinates(grid: tuple[int, int, int]) -> Tensor:
    """Time, row and column of every token, (n, 3)."""
    import torch

    return torch.cartesian_prod(*map(torch.arange, grid))


def _text(q: Tensor, k: Tensor, interleaved: bool) -> float:
    """All coordinates equal, in both layouts of the pairs."""
    import torch

    from volvelle.parts.position import multimodal_rope, rope

    at, worst = torch.arange(q.shape[2]) + 7, 0.0
    for layout in ("half", "interleaved"):
        ours = multimodal_rope.apply_mrope(
            q, k, at[:, None].expand(-1, 3), sections=SECTIONS[interleaved], interleaved=interleaved, layout=layout
        )
        plain = rope.apply_rope(q, k, at, layout=layout)
        worst = max(worst, *(float((a - b).abs().max()) for a, b in zip(ours, plain, strict=True)))
    return worst


def _pictures(q: Tensor, k: Tensor, positions: Tensor, order: str, interleaved: bool) -> list[Finding]:
    """Scores under a shift of all tokens, and which features a coordinate turns."""
    import torch

    from volvelle.parts.position import multimodal_rope

    def turned(at: Tensor) -> tuple[Tensor, Tensor]:
        return multimodal_rope.apply_mrope(q, k, at, sections=SECTIONS[interleaved], interleaved=interleaved)

    def scores(at: Tensor) -> Tensor:
        a, b = turned(at)
        return a @ b.transpose(-1, -2)

    here = scores(positions)
    shifted = float((scores(positions + torch.tensor([31, 5, 2])) - here).abs().max() / here.abs().max())
    moved = float((scores(positions * torch.tensor([1, 2, 1])) - here).abs().max() / here.abs().max())
    findings = [
        at_most(f"{order}: all tokens moved by one step, largest change of a score", shifted, 1e-12),
        at_least(f"{order}: rows drawn apart, largest change (must not be nothing)", moved, 1e-2),
    ]
    wrong = 0
    for axis, pairs in enumerate(SECTIONS[interleaved]):
        step = torch.zeros(3, dtype=torch.long)
        step[axis] = 1
        change = (turned(positions + step)[0] - turned(positions)[0]).abs().amax((0, 1, 2))
        wrong += abs(int((change > 1e-9).sum()) - 2 * pairs)
    return [*findings, at_most(f"{order}: features that a coordinate turns beside its own", wrong, 0)]


def _peer(q: Tensor, k: Tensor, positions: Tensor) -> list[Finding]:
    """The module of transformers' Qwen2-VL, where it is installed."""
    if find_spec("transformers") is None:
        return []
    from transformers.models.qwen2_vl import configuration_qwen2_vl, modeling_qwen2_vl

    from volvelle.parts.position import multimodal_rope

    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": list(SECTIONS[False])}
    config: Any = configuration_qwen2_vl.Qwen2VLTextConfig(
        hidden_size=WIDTH, num_attention_heads=1, num_key_value_heads=1, rope_parameters=rope
    )
    cos, sin = modeling_qwen2_vl.Qwen2VLRotaryEmbedding(config)(q, positions.T[:, None])
    theirs = modeling_qwen2_vl.apply_rotary_pos_emb(q, k, cos, sin)
    ours = multimodal_rope.apply_mrope(q, k, positions, sections=SECTIONS[False])
    apart = max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(ours, theirs, strict=True))
    # Their angles are fp32: at position m off by m 2^-24 and more.
    return [at_most("in sections: relative difference from transformers, whose angles are fp32", apart, 1e-5)]


def _versions() -> dict[str, str]:
    from importlib import metadata

    return {"transformers": metadata.version("transformers")}
