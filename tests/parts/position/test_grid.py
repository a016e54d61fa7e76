"""Several coordinates a token: axial RoPE, M-RoPE and learned axial positions, against loops and transformers."""

import pytest
import torch

from volvelle.parts.position.axial import (
    AxialPositions,
    AxialRotaryEmbedding,
    apply_axial_rope,
    axial_positions,
    grid_positions,
)
from volvelle.parts.position.multimodal_rope import MultimodalRotaryEmbedding, apply_mrope
from volvelle.parts.position.rope import apply_rope, rope_frequencies

LAYOUTS = ("half", "interleaved")


def drawn(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def turned_pairs(x, angle, layout):
    """Complex multiplication of each pair i of x (b, h, n, d) by exp(i angle[n, i])."""
    half = x.shape[-1] // 2
    first, second = (x[..., :half], x[..., half:]) if layout == "half" else (x[..., ::2], x[..., 1::2])
    out = torch.complex(first, second) * torch.polar(torch.ones_like(angle), angle)
    parts = (out.real, out.imag)
    return torch.cat(parts, -1) if layout == "half" else torch.stack(parts, -1).flatten(-2)


def test_grid_positions_are_row_major():
    grid = grid_positions(2, 3)
    assert grid.tolist() == [[y, x] for y in range(2) for x in range(3)]
    assert grid_positions(2, 3, 4)[-1].tolist() == [1, 2, 3]
    assert grid_positions(3).tolist() == [[0], [1], [2]]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("sizes", [(3, 4), (2, 2, 3), (12,)])
def test_axial_rope_turns_each_axis_by_its_coordinate(layout, sizes):
    axes, d = len(sizes), 12
    q, k, grid = drawn(2, 3, 12, d), drawn(2, 1, 12, d, seed=1), grid_positions(*sizes)
    theta = [50.0 ** (-2 * i / (d / axes)) for i in range(d // 2 // axes)]
    angle = torch.stack([grid[:, axis].double() * t for axis in range(axes) for t in theta], dim=-1)
    for ours, x in zip(apply_axial_rope(q, k, grid, layout=layout, base=50.0), (q, k), strict=True):
        torch.testing.assert_close(ours, turned_pairs(x, angle, layout), rtol=0, atol=1e-13)
    if axes == 1:
        torch.testing.assert_close(apply_axial_rope(q, k, grid), apply_rope(q, k, grid[:, 0]), rtol=0, atol=1e-13)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_axial_products_depend_on_the_differences_only(layout):
    q, k, grid = drawn(1, 2, 12, 8), drawn(1, 2, 12, 8, seed=1), grid_positions(3, 4)
    q0, k0 = apply_axial_rope(q, k, grid, layout=layout)
    q1, k1 = apply_axial_rope(q, k, grid + torch.tensor([1000, 7]), layout=layout)
    torch.testing.assert_close(q1 @ k1.mT, q0 @ k0.mT, rtol=0, atol=1e-10)
    q2, _ = apply_axial_rope(q, k, grid + torch.tensor([0, 1]), layout=layout)
    assert (q2 @ k0.mT - q0 @ k0.mT).abs().max() > 0.1


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_mrope_deals_the_pairs_of_plain_rope(interleaved, layout):
    q, positions = drawn(2, 3, 5, 16), torch.randint(40, (2, 5, 3), generator=torch.Generator().manual_seed(2))
    axes = [0, 1, 2, 0, 1, 2, 0, 0] if interleaved else [0, 0, 0, 0, 1, 1, 2, 2]
    angle = torch.stack([positions[..., axis] * t for axis, t in zip(axes, rope_frequencies(16), strict=True)], -1)
    options = {"sections": (4, 2, 2), "interleaved": interleaved, "layout": layout}
    ours, _ = apply_mrope(q, q, positions, **options)
    torch.testing.assert_close(ours, turned_pairs(q, angle[:, None], layout), rtol=0, atol=1e-13)


@pytest.mark.parametrize("interleaved", [False, True])
def test_mrope_of_text_is_plain_rope(interleaved):
    q, text = drawn(2, 3, 5, 16), torch.tensor([[0, 1, 2, 3, 4], [7, 8, 9, 9, 1_000_000]])
    rope = MultimodalRotaryEmbedding((4, 2, 2), interleaved=interleaved)
    ours, _ = rope(q, q, text[..., None].expand(2, 5, 3))
    assert torch.equal(ours, apply_rope(q, q, text)[0])


@pytest.mark.parametrize("module", [AxialRotaryEmbedding(16, axes=2), MultimodalRotaryEmbedding((4, 2, 2))])
def test_frequencies_survive_casting_and_compiling(module):
    before = module.frequencies.clone()
    assert torch.equal(module.to(torch.bfloat16).float().frequencies, before)
    assert module.state_dict() == {}
    with torch.device("meta"):
        fresh = AxialRotaryEmbedding(16) if isinstance(module, AxialRotaryEmbedding) else type(module)(module.sections)
    assert torch.equal(fresh.to_empty(device="cpu").frequencies, before)
    q, positions = drawn(2, 3, 6, 16, dtype=torch.float32), grid_positions(3, 2)
    positions = positions if isinstance(module, AxialRotaryEmbedding) else positions[:, [0, 0, 1]]
    expected = module(q, q, positions)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(q, q, positions), expected)


def test_learned_axial_positions():
    rows, columns = drawn(3, 4), drawn(5, 4, seed=1)
    grid = grid_positions(3, 5)
    added = axial_positions(grid, (rows, columns))
    joined = axial_positions(grid.view(1, 15, 2), (rows, columns), join="concat")
    for n, (y, x) in enumerate(grid.tolist()):
        assert torch.equal(added[n], rows[y] + columns[x])
        assert torch.equal(joined[0, n], torch.cat((rows[y], columns[x])))
    module = AxialPositions((3, 5, 2), 8, join="concat")
    assert [tuple(weight.shape) for weight in module.weights] == [(3, 4), (5, 2), (2, 2)]
    assert torch.autograd.gradcheck(lambda a, b: axial_positions(grid, (a, b)), (rows.requires_grad_(), columns))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: AxialRotaryEmbedding(6), "dim must be a multiple of 4 for 2 axes, got 6"),
        (lambda: apply_axial_rope(torch.ones(1, 1, 4, 6), torch.ones(1, 1, 4, 6), grid_positions(2, 2)), "multiple"),
        (lambda: AxialRotaryEmbedding(8).rotation(torch.arange(4), torch.float32), r"\(n, 2\) or \(b, n, 2\)"),
        (lambda: AxialPositions((2, 2), 4)(torch.tensor([[2, 0]])), "2 positions were trained"),
        (lambda: axial_positions(grid_positions(2, 2), (torch.ones(2, 3),)), r"\(n, 1\)"),
        (lambda: axial_positions(grid_positions(2), (torch.ones(2, 3),), join="max"), "'sum' or 'concat'"),
        (lambda: apply_mrope(*[torch.ones(1, 1, 4, 8)] * 2, torch.ones(4, 3).long(), sections=(2, 1)), "add up"),
        (
            lambda: apply_mrope(*[torch.ones(1, 1, 4, 8)] * 2, torch.ones(4, 2).long(), sections=(2, 1, 1)),
            r"\(n, 3\) or",
        ),
        (lambda: MultimodalRotaryEmbedding((1, 1, 6), interleaved=True), "do not fit when interleaved"),
    ],
)
def test_errors_name_the_rule(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.peer
@pytest.mark.parametrize("kind", ["qwen2_vl", "qwen3_vl"])
def test_mrope_of_qwen(kind):
    pytest.importorskip("transformers")
    if kind == "qwen2_vl":
        from transformers import Qwen2VLTextConfig as Config
        from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VLRotaryEmbedding as Theirs
        from transformers.models.qwen2_vl.modeling_qwen2_vl import apply_rotary_pos_emb
    else:
        from transformers import Qwen3VLTextConfig as Config
        from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLTextRotaryEmbedding as Theirs
        from transformers.models.qwen3_vl.modeling_qwen3_vl import apply_rotary_pos_emb
    parameters = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 2, 2]}
    config = Config(hidden_size=64, num_attention_heads=4, head_dim=16, rope_parameters=parameters)
    q, k = drawn(2, 4, 9, 16, dtype=torch.float32), drawn(2, 2, 9, 16, seed=1, dtype=torch.float32)
    positions = torch.randint(50, (2, 9, 3), generator=torch.Generator().manual_seed(3))
    expected = apply_rotary_pos_emb(q, k, *Theirs(config)(q, positions.permute(2, 0, 1)))
    ours = apply_mrope(q, k, positions, sections=(4, 2, 2), interleaved=kind == "qwen3_vl")
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-5)


@pytest.mark.peer
def test_axial_rope_of_the_qwen_vision_tower():
    pytest.importorskip("transformers")
    from transformers.models.qwen2_vl.configuration_qwen2_vl import Qwen2VLVisionConfig
    from transformers.models.qwen2_vl.modeling_qwen2_vl import (
        Qwen2VLVisionRotaryEmbedding,
        apply_rotary_pos_emb_vision,
    )

    config = Qwen2VLVisionConfig(embed_dim=64, num_heads=4)
    config.num_attention_heads = 4
    grid = grid_positions(3, 5)
    q, k = drawn(15, 4, 16, dtype=torch.float32), drawn(15, 4, 16, seed=1, dtype=torch.float32)
    expected = apply_rotary_pos_emb_vision(q, k, *Qwen2VLVisionRotaryEmbedding(config)(q, grid))
    ours = apply_axial_rope(q.transpose(0, 1)[None], k.transpose(0, 1)[None], grid)
    for mine, theirs in zip(ours, expected, strict=True):
        torch.testing.assert_close(mine[0].transpose(0, 1), theirs, rtol=0, atol=1e-5)


@pytest.mark.peer
def test_learned_axial_positions_of_reformer():
    pytest.importorskip("transformers")
    from transformers import ReformerConfig
    from transformers.models.reformer.modeling_reformer import AxialPositionEmbeddings

    config = ReformerConfig(axial_pos_shape=(3, 4), axial_pos_embds_dim=(2, 6), hidden_size=8, hidden_dropout_prob=0.0)
    theirs = AxialPositionEmbeddings(config)
    for weight in theirs.weights:
        torch.nn.init.normal_(weight)
    rows, columns = (weight.reshape(-1, weight.shape[-1]) for weight in theirs.weights)
    expected = theirs(torch.arange(12)[None])
    ours = axial_positions(grid_positions(3, 4)[None], (rows, columns), join="concat")
    torch.testing.assert_close(ours, expected, rtol=0, atol=0)
