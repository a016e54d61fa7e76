"""What every encoding must do in one attention layer: explicit positions make caches, packing, padding and trees exact.

All in fp64 through `attention`, with grouped keys, more than one row and ragged lengths.
"""

import pytest
import torch
from tests.parts.position.zoo import VOCABULARY, ZOO, Layer, causal

from volvelle.parts.attention.attention import BACKENDS

TOLERANCE = {"rtol": 0, "atol": 1e-12}
NAMES = list(ZOO)
BIASES = [name for name in NAMES if ZOO[name].build().bias() is not None]


def ids(b: int, n: int, seed: int = 1) -> torch.Tensor:
    return torch.randint(VOCABULARY, (b, n), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("name", NAMES)
def test_a_cached_step_equals_the_full_pass(name):
    """The last queries, against the keys of all tokens at the positions they had."""
    layer, tokens, positions = Layer(name), ids(2, 13), torch.arange(13)
    full = layer(tokens, positions, causal(13))
    for last in (1, 4):
        torch.testing.assert_close(layer(tokens, positions, causal(13), last=last), full[:, :, -last:], **TOLERANCE)


@pytest.mark.parametrize("name", NAMES)
def test_packed_texts_equal_separate_ones(name):
    layer, tokens = Layer(name), ids(2, 12)
    lengths = (5, 7)
    positions = torch.cat([torch.arange(n) for n in lengths])
    packed = layer(tokens, positions, torch.block_diag(*(causal(n) for n in lengths)).bool())
    parts = [layer(part, torch.arange(part.shape[1]), causal(part.shape[1])) for part in tokens.split(lengths, 1)]
    torch.testing.assert_close(packed, torch.cat(parts, dim=2), **TOLERANCE)


@pytest.mark.parametrize("name", NAMES)
def test_left_padding_changes_nothing(name):
    """Rows of 9 and 6 tokens, padded on the left; every row has positions of its own."""
    layer, tokens, lengths = Layer(name), ids(2, 9), (9, 6)
    real = torch.arange(9) >= 9 - torch.tensor(lengths)[:, None]
    positions = (real.cumsum(-1) - 1).clamp(min=0)
    out = layer(tokens, positions, causal(9) & real[:, None, None])
    for row, n in enumerate(lengths):
        alone = layer(tokens[row : row + 1, -n:], torch.arange(n), causal(n))
        torch.testing.assert_close(out[row, :, -n:], alone[0], **TOLERANCE)


@pytest.mark.parametrize("name", NAMES)
def test_a_token_tree_equals_its_paths(name):
    """Three tokens of context, then a tree; a node's position is its depth, not its place in the row."""
    layer, tokens = Layer(name), ids(2, 9)
    parent = {3: 2, 4: 2, 5: 3, 6: 4, 7: 6, 8: 3}
    paths = {node: [node] for node in range(9)}
    for node in range(1, 9):
        paths[node] = [*paths[parent.get(node, node - 1)], node]
    mask = torch.zeros(9, 9, dtype=torch.bool)
    for node, path in paths.items():
        mask[node, path] = True
    out = layer(tokens, mask.sum(-1) - 1, mask)
    for node, path in paths.items():
        alone = layer(tokens[:, path], torch.arange(len(path)), causal(len(path)))
        torch.testing.assert_close(out[:, :, node], alone[:, :, -1], **TOLERANCE)


@pytest.mark.parametrize("name", NAMES)
def test_relative_encodings_and_only_they_ignore_a_shift(name):
    layer, tokens, positions = Layer(name), ids(2, 7), torch.tensor([0, 1, 2, 5, 6, 7, 11])
    here, there = layer(tokens, positions), layer(tokens, positions + 13)
    if ZOO[name].relative:
        torch.testing.assert_close(there, here, rtol=0, atol=1e-10)
    else:
        assert (there - here).abs().max() > 1e-3


@pytest.mark.parametrize("name", NAMES)
def test_order_matters_with_every_encoding_and_with_none_it_does_not(name):
    """Without a mask, attention sees a set: swapping two other tokens leaves a query's output alone, unless encoded."""
    layer, tokens, positions = Layer(name), ids(1, 6), torch.arange(6)
    tokens[0, :3] = torch.tensor([1, 2, 3])
    swapped = tokens.clone()
    swapped[0, :2] = tokens[0, [1, 0]]
    change = (layer(tokens, positions, last=4) - layer(swapped, positions, last=4)).abs().max()
    assert change < 1e-12 if name == "none" else change > 1e-4


@pytest.mark.parametrize("name", NAMES)
def test_beyond_the_trained_length(name):
    """Positions far out are served, or refused with a message, never answered with garbage."""
    layer, tokens, reach = Layer(name), ids(1, 5), ZOO[name].reach
    far = torch.arange(5) + (150 if reach is None else reach - 5)
    assert layer(tokens, far, causal(5)).isfinite().all()
    if reach is not None:
        with pytest.raises(ValueError, match=f"got position {reach}"):
            layer(tokens, far + 1)


@pytest.mark.parametrize("name", BIASES)
def test_any_block_is_a_part_of_the_whole(name):
    layer, positions = Layer(name), torch.tensor([[4, 0, 9, 2, 30], [1, 1, 7, 8, 3]])
    bias = layer.position.bias()
    assert bias is not None
    q, k, _ = layer.heads(ids(2, 5), positions)
    whole = bias.tile(q, k, positions, positions).expand(2, 4, 5, 5)
    block = bias.tile(q[:, :, 1:3], k[:, :, 2:], positions[:, 1:3], positions[:, 2:])
    torch.testing.assert_close(block.expand(2, 4, 2, 3), whole[:, :, 1:3, 2:], **TOLERANCE)
    shared = bias.tile(q, k, positions[:1], positions[:1])  # positions of one row for all, as a cache gives them
    torch.testing.assert_close(shared, bias.tile(q, k, positions[0], positions[0]), **TOLERANCE)
    row = bias.tile(q[1:], k[1:], positions[1], positions[1])
    torch.testing.assert_close(row.expand(1, 4, 5, 5), whole[1:], **TOLERANCE)


@pytest.mark.parametrize("backend", [name for name in BACKENDS if name != "reference"])
@pytest.mark.parametrize("name", BIASES)
def test_every_back_end_agrees_with_the_reference_values_and_gradients(name, backend):
    """A back end that does not serve a bias says so by name; one that does gives its gradients too."""
    layer, tokens, positions = Layer(name), ids(2, 9), torch.arange(9) * 2
    weights = list(layer.parameters())
    results = []
    for served_by in ("reference", backend):
        try:
            out = layer(tokens, positions, backend=served_by)
        except ValueError as refusal:
            if "cannot serve" not in str(refusal):
                raise
            pytest.skip(str(refusal))
        results.append((out, *torch.autograd.grad(out.square().sum(), weights)))
    torch.testing.assert_close(results[1], results[0], rtol=0, atol=1e-10)
    assert all(gradient.abs().max() > 0 for gradient in results[0][1:])


def test_a_value_term_goes_to_the_reference_and_trains():
    layer, tokens = Layer("shaw"), ids(2, 9)
    out = layer(tokens, torch.arange(9), causal(9), backend="auto")
    torch.testing.assert_close(out, layer(tokens, torch.arange(9), causal(9)), **TOLERANCE)
    value = torch.autograd.grad(out.square().sum(), layer.position.value)[0]
    assert value[:4].abs().min() > 0  # distances -3 .. 0
    assert value[4:].abs().max() == 0  # causal: no key after the query
    with pytest.raises(ValueError, match="value term"):
        layer(tokens, torch.arange(9), backend="sdpa")


@pytest.mark.parametrize("name", BIASES)
def test_the_declared_tensors_are_those_the_block_depends_on(name):
    """Gradients by the declared tensors alone, pushed on, are the gradients of all parameters of the encoding."""
    layer, positions = Layer(name), torch.arange(5)
    bias = layer.position.bias()
    assert bias is not None
    q, k, _ = (x.detach() for x in layer.heads(ids(2, 5), positions))
    out = bias.tile(q, k, positions, positions).sin().sum()
    if bias.has_value_term:
        weights = (q @ k.repeat_interleave(2, 1).mT).softmax(-1)
        out = out + bias.value_term(weights, positions, positions).sin().sum()
    if not bias.learnable:
        assert not out.requires_grad
        return
    declared = bias.tensors()
    inner = torch.autograd.grad(out, declared, retain_graph=True)
    parameters = list(layer.position.parameters())
    expected = torch.autograd.grad(out, parameters, retain_graph=True)
    torch.testing.assert_close(torch.autograd.grad(declared, parameters, inner), expected, **TOLERANCE)


@pytest.mark.parametrize("name", NAMES[1:])
def test_bf16_is_rounded_once(name):
    """With weights and inputs in bf16, blocks come in fp32, and embeddings within one rounding of the exact ones."""
    half = Layer(name).to(torch.bfloat16)
    exact, positions = Layer(name).to(torch.bfloat16).double(), torch.arange(7) + 50
    x = torch.randn(2, 7, 24, generator=torch.Generator().manual_seed(2)).bfloat16()
    out = half.position.embed(x, positions, ids(2, 7))
    wanted = exact.position.embed(x.double(), positions, ids(2, 7))
    assert out.dtype == torch.bfloat16
    assert (out.double() - wanted).abs().max() <= 2**-7 * wanted.abs().max()
    bias, wide = half.position.bias(), exact.position.bias()
    if bias is not None and wide is not None:
        q, k, _ = (y.detach() for y in half.heads(ids(2, 7), positions))
        tile = bias.tile(q, k, positions, positions)
        assert tile.dtype == torch.float32
        wanted = wide.tile(q.double(), k.double(), positions, positions)
        # a projected table of DeBERTa was rounded to bf16 before it came here
        assert (tile - wanted).abs().max() <= (2**-6 if "deberta" in name else 1e-5) * wanted.abs().max()


@pytest.mark.parametrize("name", ["shaw", "transformer-xl", "t5", "alibi", "dynamic"])
def test_autocast_leaves_blocks_in_fp32(name):
    layer, positions = Layer(name).float(), torch.arange(7) + 1_000_000
    q, k, _ = layer.heads(ids(2, 7), positions)
    bias = layer.position.bias()
    assert bias is not None
    exact = Layer(name).position.bias().tile(q.double(), k.double(), positions, positions)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        tile = bias.tile(q, k, positions, positions)
    assert tile.dtype == torch.float32
    torch.testing.assert_close(tile.double(), exact, rtol=0, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("name", NAMES)
def test_a_cuda_device_gives_the_same(name):
    layer, tokens, positions = Layer(name), ids(2, 9), torch.arange(9)
    expected = layer(tokens, positions, causal(9))
    ours = layer.cuda()(tokens.cuda(), positions.cuda(), causal(9).cuda())
    torch.testing.assert_close(ours.cpu(), expected, rtol=0, atol=1e-10)
