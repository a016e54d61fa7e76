"""Score biases against transformers' own attention modules with copied weights: 1e-5 in fp32, 1e-10 in fp64."""

import pytest
import torch
from torch import Tensor

from volvelle.parts.attention.attention import attention
from volvelle.parts.position.alibi import ALiBi, alibi_slopes
from volvelle.parts.position.deberta import DisentangledBias, deberta_log_buckets
from volvelle.parts.position.dynamic import DynamicBias
from volvelle.parts.position.shaw import ShawBias
from volvelle.parts.position.sinusoidal import sinusoidal_positions
from volvelle.parts.position.t5 import T5Bias, t5_relative_buckets
from volvelle.parts.position.transformer_xl import TransformerXLBias

pytest.importorskip("transformers")
pytestmark = [pytest.mark.peer, pytest.mark.usefixtures("seeded")]

DTYPES = [torch.float32, torch.float64]
ATOL = {torch.float32: 1e-5, torch.float64: 1e-10}


@pytest.fixture
def seeded():
    torch.manual_seed(0)


def drawn(module, dtype):
    """The module with weights large enough to matter, in evaluation mode."""
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return module.eval().to(dtype)


def heads(x: Tensor, h: int) -> Tensor:
    return x.unflatten(-1, (h, -1)).transpose(1, 2)


def joined(x: Tensor) -> Tensor:
    return x.transpose(1, 2).flatten(2)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("decoder", [False, True])
def test_t5_attention(decoder, dtype):
    from transformers import T5Config
    from transformers.models.t5.modeling_t5 import T5Attention

    n, h = 40, 4
    config = T5Config(
        d_model=24,
        d_kv=6,
        num_heads=h,
        relative_attention_num_buckets=8,
        relative_attention_max_distance=20,
        dropout_rate=0.0,
        is_decoder=decoder,
    )
    config._attn_implementation = "eager"
    theirs = drawn(T5Attention(config, has_relative_attention_bias=True, layer_idx=0), dtype)
    x = torch.randn(2, n, 24, dtype=dtype)
    hidden = torch.full((n, n), torch.finfo(dtype).min, dtype=dtype).triu(1)[None, None] if decoder else None
    expected = theirs(x, mask=hidden)[0]

    ours = T5Bias(h, buckets=8, max_distance=20, bidirectional=not decoder).to(dtype)
    ours.weight.data.copy_(theirs.relative_attention_bias.weight)
    q, k, v = (heads(layer(x), h) for layer in (theirs.q, theirs.k, theirs.v))
    out = attention(q, k, v, bias=ours.bias(), scale=1.0, causal=decoder)
    torch.testing.assert_close(theirs.o(joined(out)), expected, rtol=0, atol=ATOL[dtype])


@pytest.mark.parametrize(("buckets", "far"), [(32, 128), (8, 20), (64, 256), (320, 800), (12, 50), (48, 512)])
@pytest.mark.parametrize("bidirectional", [False, True])
def test_t5_buckets(buckets, far, bidirectional):
    """Theirs takes a logarithm in fp32; with these settings no distance is rounded across an edge."""
    from transformers.models.t5.modeling_t5 import T5Attention

    places = torch.arange(-2000, 2001)
    expected = T5Attention._relative_position_bucket(places, bidirectional, buckets, far)
    assert torch.equal(t5_relative_buckets(places, bidirectional, buckets, far), expected)


@pytest.mark.parametrize(("size", "far"), [(256, 512), (32, 128), (8, 32), (16, 64), (128, 1024), (48, 300)])
def test_deberta_log_buckets(size, far):
    """Equal once clipped, as both attentions clip them: ours stops at the last bucket, theirs counts on."""
    from transformers.models.deberta_v2.modeling_deberta_v2 import make_log_bucket_position

    places = torch.arange(-2000, 2001)
    expected = make_log_bucket_position(places, size, far).long().clamp(-size, size)
    assert torch.equal(deberta_log_buckets(places, size, far), expected)


# Their divisor sqrt(terms * d) is taken in fp32, so only widths with an exact root compare to 1e-10: a peer's rounding.
DEBERTA_TERMS = [(("c2p", "p2c"), 12), (("c2p",), 8), (("p2c",), 8)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("terms", "d"), DEBERTA_TERMS)
@pytest.mark.parametrize(("buckets", "far", "shared"), [(8, 20, False), (8, 20, True), (-1, 7, False)])
def test_deberta_v2_attention(terms, d, buckets, far, shared, dtype):
    from transformers import DebertaV2Config
    from transformers.models.deberta_v2.modeling_deberta_v2 import DisentangledSelfAttention

    n, h, width = 30, 2, 2 * d
    config = DebertaV2Config(
        hidden_size=width,
        num_attention_heads=h,
        relative_attention=True,
        pos_att_type=list(terms),
        position_buckets=buckets,
        max_relative_positions=far,
        share_att_key=shared,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    theirs = drawn(DisentangledSelfAttention(config), dtype)
    span = far if buckets < 0 else buckets
    x, table = torch.randn(2, n, width, dtype=dtype), torch.randn(2 * span, width, dtype=dtype)
    seen = torch.ones(2, 1, n, n, dtype=torch.bool)
    seen[1, :, :, 20:] = False
    expected = theirs(x, seen, rel_embeddings=table)[0]

    key = (theirs.key_proj if shared else theirs.pos_key_proj) if "c2p" in terms else None
    query = (theirs.query_proj if shared else theirs.pos_query_proj) if "p2c" in terms else None
    position = DisentangledBias(
        h, key, query, k=span, max_position=None if buckets < 0 else far, table=torch.nn.Parameter(table)
    )
    q, k, v = (heads(layer(x), h) for layer in (theirs.query_proj, theirs.key_proj, theirs.value_proj))
    out = attention(q, k, v, mask=seen, bias=position.bias())
    torch.testing.assert_close(joined(out), expected, rtol=0, atol=ATOL[dtype])
    # the paper's printed p2c, δ(j, i), is not what the checkpoints were trained with
    if query is not None:
        position.p2c = "paper"
        printed = joined(attention(q, k, v, mask=seen, bias=position.bias()))
        assert (printed - expected).abs().max() > 1e-2


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("terms", "d"), DEBERTA_TERMS)
@pytest.mark.parametrize("far", [4, 16])
def test_deberta_v1_attention(terms, d, far, dtype):
    """Shorter and longer than the largest distance; v1 packs q, k and v head by head and projects P by its own maps."""
    from transformers import DebertaConfig
    from transformers.models.deberta.modeling_deberta import DisentangledSelfAttention, build_relative_position

    n, h, width = 9, 2, 2 * d
    config = DebertaConfig(
        hidden_size=width,
        num_attention_heads=h,
        relative_attention=True,
        pos_att_type=list(terms),
        max_relative_positions=far,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    theirs = drawn(DisentangledSelfAttention(config), dtype)
    x, table = torch.randn(2, n, width, dtype=dtype), torch.randn(2 * far, width, dtype=dtype)
    seen = torch.ones(2, 1, n, n, dtype=torch.bool)
    with torch.no_grad():
        expected = theirs(x, seen, relative_pos=build_relative_position(x, x), rel_embeddings=table)[0]

    q, k, v = theirs.in_proj(x).unflatten(-1, (h, 3, d)).permute(3, 0, 2, 1, 4)
    q = q + theirs.q_bias.view(h, 1, d)
    v = v + theirs.v_bias.view(h, 1, d)
    position = DisentangledBias(
        h,
        theirs.pos_proj if "c2p" in terms else None,
        theirs.pos_q_proj if "p2c" in terms else None,
        k=far,
        table=torch.nn.Parameter(table),
    )
    out = attention(q, k, v, bias=position.bias())
    torch.testing.assert_close(joined(out), expected, rtol=0, atol=ATOL[dtype])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("memory", [0, 6])
def test_xlnet_relative_attention(memory, dtype):
    """Both directions, with and without a memory of earlier keys; r_w_bias is u, r_r_bias is v."""
    from transformers import XLNetConfig
    from transformers.models.xlnet.modeling_xlnet import XLNetModel, XLNetRelativeAttention

    n, h, d, width = 7, 4, 6, 24
    config = XLNetConfig(d_model=width, n_head=h, n_layer=1, d_inner=8, vocab_size=5, dropout=0.0)
    theirs = drawn(XLNetRelativeAttention(config), dtype)
    x, past = torch.randn(n, 2, width, dtype=dtype), torch.randn(memory, 2, width, dtype=dtype)
    every = torch.cat((past, x))
    r = XLNetModel(config).relative_positional_encoding(n, n + memory, bsz=2)
    if dtype == torch.float64:  # their table has fp32 angles: the same distances in fp64
        far = torch.arange(n + memory, -n, -1)
        exact = sinusoidal_positions(far, width, layout="half", dtype=dtype)[:, None].expand(-1, 2, -1)
        torch.testing.assert_close(r.double(), exact, rtol=0, atol=1e-5)
        r = exact
    project = "ibh,hnd->ibnd"
    q, k, v, k_r = (
        torch.einsum(project, y, w)
        for y, w in ((x, theirs.q), (every, theirs.k), (every, theirs.v), (r.to(dtype), theirs.r))
    )
    expected = theirs.rel_attn_core(q, k, v, k_r)

    ours = TransformerXLBias(h, d, width=width).to(dtype)
    ours.u.data.copy_(theirs.r_w_bias)
    ours.v.data.copy_(theirs.r_r_bias)
    ours.weight.data.copy_(theirs.r.permute(1, 2, 0))
    out = attention(*(y.permute(1, 2, 0, 3) for y in (q, k, v)), bias=ours.bias())
    torch.testing.assert_close(out.permute(2, 0, 1, 3), expected, rtol=0, atol=ATOL[dtype])


@pytest.mark.parametrize("heads_", [1, 4, 6, 8, 12, 20])
def test_alibi_slopes_of_bloom_and_mpt(heads_):
    from transformers.models.bloom.modeling_bloom import _get_alibi_slopes
    from transformers.models.mpt.modeling_mpt import build_mpt_alibi_tensor

    ours = alibi_slopes(heads_)
    torch.testing.assert_close(_get_alibi_slopes(heads_, torch.device("cpu")), ours, rtol=1e-6, atol=0)
    for bias_max in (8, 4):  # theirs counts from the last key: -m (n - 1 - j)
        theirs = build_mpt_alibi_tensor(heads_, 3, bias_max)[:, 0, 1]
        torch.testing.assert_close(-theirs, alibi_slopes(heads_, bias_max=float(bias_max)), rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", DTYPES)
def test_alibi_attention_of_bloom_with_left_padding(dtype):
    """Theirs adds m_h j, without -m_h i: the same after a causal softmax, and not the same without causality."""
    from transformers.models.bloom.modeling_bloom import build_alibi_tensor

    h, n = 8, 11  # a power of two: slopes that fp32 holds exactly
    real = torch.ones(2, n, dtype=torch.int64)
    real[1, :4] = 0
    theirs = build_alibi_tensor(real, h, dtype).view(2, h, 1, n)
    positions = (real.cumsum(-1) - 1).clamp(min=0)
    seen = real.bool()[:, None, None] & torch.ones(n, n, dtype=torch.bool).tril()
    q, k, v = torch.randn(3, 2, h, n, 6, dtype=dtype)
    ours = attention(q, k, v, mask=seen, bias=ALiBi(h).bias(), q_positions=positions, k_positions=positions)
    torch.testing.assert_close(ours, attention(q, k, v, mask=seen, bias=theirs), rtol=0, atol=ATOL[dtype])
    both_ways = attention(q, k, v, bias=ALiBi(h).bias(), q_positions=positions, k_positions=positions)
    assert (both_ways - attention(q, k, v, bias=theirs)).abs().max() > 0.1


@pytest.mark.parametrize("dtype", DTYPES)
def test_shaw_keys_of_seamless_m4t(dtype):
    """Their relative_key: Shaw's key term with a longer reach to the left, no value term."""
    from transformers import SeamlessM4Tv2Config
    from transformers.models.seamless_m4t_v2.modeling_seamless_m4t_v2 import SeamlessM4Tv2ConformerSelfAttention

    h, d, n = 4, 6, 13
    config = SeamlessM4Tv2Config(
        hidden_size=h * d,
        speech_encoder_attention_heads=h,
        position_embeddings_type="relative_key",
        left_max_position_embeddings=5,
        right_max_position_embeddings=2,
        speech_encoder_dropout=0.0,
    )
    config._attn_implementation = "eager"
    theirs = drawn(SeamlessM4Tv2ConformerSelfAttention(config), dtype)
    x = torch.randn(2, n, h * d, dtype=dtype)
    expected = theirs(x)[0]
    ours = ShawBias(d, k=5, right=2).to(dtype)
    ours.key.data.copy_(theirs.distance_embedding.weight)
    q, k, v = (heads(layer(x), h) for layer in (theirs.linear_q, theirs.linear_k, theirs.linear_v))
    out = attention(q, k, v, bias=ours.bias())
    torch.testing.assert_close(theirs.linear_out(joined(out)), expected, rtol=0, atol=ATOL[dtype])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("causal", [False, True])
def test_relative_position_bias_of_x_transformers(causal, dtype):
    """T5's bias times a scale; their queries are the last of the keys."""
    theirs = pytest.importorskip("x_transformers.x_transformers").RelativePositionBias(
        0.5, causal=causal, num_buckets=8, max_distance=20, heads=4
    )
    theirs = drawn(theirs, dtype)
    ours = T5Bias(4, buckets=8, max_distance=20, bidirectional=not causal).to(dtype)
    ours.weight.data.copy_(theirs.relative_attention_bias.weight * 0.5)
    found = ours(torch.arange(20, 50), torch.arange(50))
    torch.testing.assert_close(found[0], theirs(30, 50), rtol=0, atol=ATOL[dtype])


@pytest.mark.parametrize("log", [False, True])
@pytest.mark.parametrize("depth", [1, 3])
def test_dynamic_position_bias_of_x_transformers(log, depth):
    """fp32 only: their distances are cast to it. The log of fp32 distances differs by a rounding."""
    peer = pytest.importorskip("x_transformers.x_transformers")
    theirs = drawn(peer.DynamicPositionBias(6, heads=4, depth=depth, log_distance=log), torch.float32)
    ours = DynamicBias(4, width=6, depth=depth, log_distance=log)
    linear = [module for module in theirs.modules() if isinstance(module, torch.nn.Linear)]
    for mine, layer in zip(ours.network, linear, strict=True):
        mine.load_state_dict(layer.state_dict())
    found = ours(torch.arange(5, 12), torch.arange(12))
    torch.testing.assert_close(found[0], theirs(7, 12), rtol=0, atol=1e-5)


@pytest.mark.parametrize("heads_", [4, 6])
def test_alibi_of_x_transformers(heads_):
    """Symmetric, as ours in both directions."""
    theirs = pytest.importorskip("x_transformers.x_transformers").AlibiPositionalBias(heads_)
    found = ALiBi(heads_)(torch.arange(5, 12), torch.arange(12))
    torch.testing.assert_close(found[0].float(), theirs(7, 12), rtol=1e-6, atol=0)
