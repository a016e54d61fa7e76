"""Models in 4 and 8 bits: a file's own grid number for number, anything else rounded and counted, the rest refused."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from gguf import GGMLQuantizationType as Q
from gguf.quants import dequantize, quantize
from tests.systems.language.test_decoder import LLAMA, build
from torch import nn

from volvelle import adapt
from volvelle.errors import VolvelleError
from volvelle.parts.quantization.int4 import Int4Linear
from volvelle.parts.quantization.int8 import Int8Linear
from volvelle.systems.language import config as c
from volvelle.systems.language.encoder_decoder import EncoderDecoder
from volvelle.systems.language.gguf import read_gguf
from volvelle.systems.language.gguf_grids import KINDS, grid_of
from volvelle.systems.language.huggingface import write_folder
from volvelle.systems.language.load import load_language_model
from volvelle.systems.language.quantized import Quantized, quantize_model


def gguf_file(tmp_path, kind, head=Q.Q8_0):
    """A tiny Llama whose matrices are of `kind`, and its embedding of `head`."""
    from tests.systems.language.test_gguf import llama_file

    def change(metadata, tensors):
        for name, values in tensors.items():
            wanted = head if name == "token_embd.weight" else kind
            if values.ndim == 2 and wanted is not Q.F32:
                tensors[name] = (quantize(values, wanted), wanted)

    return llama_file(tmp_path, change=change)


@pytest.mark.parametrize("kind", [Q.Q4_0, Q.Q4_1, Q.Q8_0], ids=lambda k: k.name)
def test_a_files_grid_is_taken_over_number_for_number(tmp_path, kind):
    path, stored = gguf_file(tmp_path, kind)
    file = read_gguf(path)
    for name in file.tensors:
        grid = grid_of(file, name)
        if file.tensors[name].dim() == 1:
            assert grid is None
            continue
        assert grid is not None
        # gguf's own dequantiser computes in fp32, in another order for Q4_0: exact in fp64
        scale, offset = (None if x is None else x.t().double().repeat_interleave(32, 1) for x in grid[1:])
        exact = scale * grid.codes + (0 if offset is None else offset)
        assert torch.equal(exact.float(), file.tensors[name])
    raw, _ = stored["blk.0.attn_v.weight"]
    assert torch.equal(torch.from_numpy(dequantize(raw, kind)), file.tensors["model.layers.0.self_attn.v_proj.weight"])
    assert kind.name in KINDS


@pytest.mark.parametrize(
    ("kind", "precision", "layers", "exact"),
    [
        (Q.Q4_1, "int4", Int4Linear, True),
        (Q.Q4_0, "int4", Int4Linear, True),
        (Q.Q4_1, "int8", Int4Linear, True),  # its own 4 bits: nothing to gain by more
        (Q.Q8_0, "int8", Int8Linear, True),
        (Q.Q8_0, "int4", Int4Linear, False),
        (Q.F16, "int4", Int4Linear, False),
        (Q.Q5_0, "int8", Int8Linear, False),
    ],
    ids=str,
)
@torch.no_grad()
def test_loading_keeps_what_fits_and_counts_the_rest(tmp_path, caplog, kind, precision, layers, exact):
    path, _ = gguf_file(tmp_path, kind)
    model = load_language_model(path, precision=precision, dtype=torch.float32)
    plain = load_language_model(path)
    assert type(model.model.layers[1].mlp.down_proj) is layers
    assert type(model.lm_head) is nn.Linear  # this vocabulary does not divide by 16
    ids = torch.arange(20)[None]
    if exact:
        assert not caplog.text
        torch.testing.assert_close(model(ids).logits, plain(ids).logits, rtol=1e-4, atol=1e-3)
    else:
        assert "were rounded (lossy)" in caplog.text
        assert "14 were rounded" in caplog.text
    assert load_language_model(path, precision=precision).dtype is torch.bfloat16


@torch.no_grad()
def test_any_model_can_be_rounded(caplog):
    config = dataclasses.replace(LLAMA, width=64, mlp=c.GatedMLP(96), head_width=16, vocabulary=64, embedding_width=64)
    model, plain = build(config), build(config)
    ids = torch.arange(12)[None]
    assert quantize_model(model, "int8") == Quantized(exact=0, rounded=15, kept=0)
    expected = plain(ids).logits
    assert (model(ids).logits - expected).abs().max() < 0.05 * expected.abs().max()
    odd = build()  # a width of 24 does not divide into groups
    before = odd(ids).logits
    assert quantize_model(odd, "int4") == Quantized(exact=0, rounded=0, kept=15)
    assert torch.equal(odd(ids).logits, before)


def test_what_cannot_be_is_refused(tmp_path):
    from tests.systems.language.test_encoder_decoder import make_config

    with pytest.raises(VolvelleError, match="an encoder-decoder has no layers in 4 bits"):
        quantize_model(EncoderDecoder(make_config()), "int4")
    adapted = build(dataclasses.replace(LLAMA, width=64, embedding_width=64, head_width=16, mlp=c.GatedMLP(96)))
    adapt.apply(adapted, adapt.LoRA(rank=2, alpha=4, targets=("q_proj",)))
    with pytest.raises(VolvelleError, match=r"self_attn.q_proj holds an adapter"):
        quantize_model(adapted, "int4")
    model = build(
        dataclasses.replace(LLAMA, width=64, embedding_width=64, head_width=16, mlp=c.GatedMLP(96), vocabulary=64)
    )
    quantize_model(model, "int4")
    with pytest.raises(VolvelleError):
        adapt.apply(model, adapt.LoRA(rank=2, alpha=4, targets=("q_proj",)))
    with pytest.raises(VolvelleError):
        write_folder(model, tmp_path / "out")
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert not any(type(layer) is nn.Linear for layer in model.model.modules())


@torch.no_grad()
def test_smollm2_keeps_every_matrix_of_its_file(smollm2_path, caplog):
    model, plain = load_language_model(smollm2_path, precision="int4"), load_language_model(smollm2_path)
    assert not caplog.text
    assert isinstance(model.lm_head, Int8Linear)
    layers = [name for name, layer in model.named_modules() if isinstance(layer, Int4Linear)]
    assert len(layers) == 210
    for name in (*layers[:7], layers[-1]):
        assert torch.equal(model.get_submodule(name).dequantized(torch.float32), plain.get_submodule(name).weight)
    assert torch.equal(model.lm_head.dequantized(torch.float32), plain.lm_head.weight)
