"""BART folders: read from transformers, written for it, and wrong ones refused by the name of what is wrong."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.systems.language.bart_peers import as_ours, make_bart, some_ids

from volvelle.errors import VolvelleError
from volvelle.systems.language import EncoderDecoder, read_folder, write_folder
from volvelle.systems.language.encoder_decoder_config import Writing
from volvelle.systems.language.huggingface_config import config_from_dict, config_to_dict
from volvelle.systems.language.load import load_language_model

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.peer


def logits(model, kind):
    source, ids = some_ids(2, 8), some_ids(2, 5, seed=1)
    with torch.no_grad():
        if kind == "theirs":
            return model(source, decoder_input_ids=ids).logits
        return model(ids, source=source).logits


@pytest.mark.parametrize("changes", [{}, {"tie_word_embeddings": False}, {"forced_bos_token_id": 0}])
@pytest.mark.parametrize("shards", [1, 4])
def test_transformers_opens_what_we_write(tmp_path, changes, shards):
    peer = make_bart("lopsided") if "tie_word_embeddings" not in changes else make_untied()
    peer.generation_config.forced_bos_token_id = changes.get("forced_bos_token_id")
    peer.save_pretrained(tmp_path / "theirs")
    ours, tmp_path = read_folder(tmp_path / "theirs"), tmp_path / "ours"
    size = sum(p.nbytes for p in ours.parameters())
    write_folder(ours, tmp_path, shard_size=2 * size // shards)
    assert len(list(tmp_path.glob("model*.safetensors"))) >= shards - 1
    again = transformers.BartForConditionalGeneration.from_pretrained(tmp_path).eval()
    torch.testing.assert_close(logits(again, "theirs"), logits(peer, "theirs"), rtol=0, atol=0)
    for name in ("decoder_start_token_id", "forced_eos_token_id", "pad_token_id", "eos_token_id", "bos_token_id"):
        assert getattr(again.generation_config, name) == 2 or name in {"pad_token_id", "bos_token_id"}
    assert again.generation_config.forced_bos_token_id == changes.get("forced_bos_token_id")
    read = read_folder(tmp_path)
    assert isinstance(read, EncoderDecoder)
    assert read.config == ours.config
    assert torch.equal(logits(read, "ours"), logits(ours, "ours"))


def make_untied():
    peer = make_bart()
    peer.config.tie_word_embeddings = False
    peer.lm_head.weight = torch.nn.Parameter(torch.randn_like(peer.lm_head.weight) * 0.2)
    return peer


def test_we_open_what_transformers_writes(tmp_path):
    peer = make_bart("scaled")
    peer.save_pretrained(tmp_path)
    ours = load_language_model(tmp_path)
    torch.testing.assert_close(logits(ours, "ours"), logits(peer, "theirs"), rtol=0, atol=1e-4)
    assert ours.dtype == torch.float32
    assert read_folder(tmp_path, dtype=torch.bfloat16).final_logits_bias.dtype == torch.bfloat16


def test_a_round_trip_keeps_every_bit(tmp_path):
    peer = make_bart()
    peer.save_pretrained(tmp_path / "theirs")
    write_folder(read_folder(tmp_path / "theirs"), tmp_path / "ours")
    theirs, ours = (load_file(tmp_path / name / "model.safetensors") for name in ("theirs", "ours"))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.fixture
def folder(tmp_path):
    make_bart().save_pretrained(tmp_path)
    return tmp_path


def change(folder, edit):
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def test_a_checkpoint_of_the_bare_model_without_a_bias(folder):
    expected = logits(read_folder(folder), "ours")

    def edit(tensors):
        expected.sub_(tensors.pop("final_logits_bias")[0])
        for name in list(tensors):
            tensors[name.removeprefix("model.")] = tensors.pop(name)

    change(folder, edit)
    model = read_folder(folder)
    assert model.plain_head
    torch.testing.assert_close(logits(model, "ours"), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (
            lambda t: t.pop("model.decoder.layers.1.encoder_attn.k_proj.bias"),
            "missing model.decoder.layers.1.encoder_at",
        ),
        (lambda t: t.update({"model.decoder.layers.7.fc1.bias": torch.ones(3)}), "unknown model.decoder.layers.7.fc1"),
        (lambda t: t.update({"model.shared.weight": torch.ones(97, 47)}), r"model.shared.weight: shape \(97, 47\)"),
        (
            lambda t: t.update({"model.encoder.embed_tokens.weight": torch.ones(97, 48)}),
            "ties model.encoder.embed_tokens.weight to model.shared.weight",
        ),
    ],
    ids=["missing", "unknown", "shape", "untied"],
)
def test_wrong_tensors_are_refused_by_name(folder, edit, message):
    change(folder, edit)
    with pytest.raises(VolvelleError, match=message):
        read_folder(folder)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("normalize_before", True, "normalize_before = True is not supported"),
        ("static_position_embeddings", True, "static_position_embeddings = True"),
        ("encoder_layerdrop", 0.1, "encoder_layerdrop = 0.1"),
        ("activation_function", "mish", "activation_function = 'mish'"),
        ("d_model", None, "d_model is missing"),
        ("decoder_attention_heads", 5, "must be a multiple of decoder.heads"),
        ("forced_eos_token_id", [2, 3], "forced_eos_token_id must be one token id"),
    ],
)
def test_wrong_configurations_are_refused_by_name(folder, field, value, message):
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(values | {field: value}))
    (folder / "generation_config.json").unlink()
    with pytest.raises(VolvelleError, match=message):
        read_folder(folder)


ASKED = {"num_beams": 4, "length_penalty": 2.0, "early_stopping": True, "no_repeat_ngram_size": 3}
WRITING = Writing(width=4, length_penalty=2.0, early_stopping=True, no_repeat_ngram_size=3)


@pytest.mark.parametrize("file", ["generation_config.json", "config.json"])
def test_how_answers_are_written_is_read_and_kept(folder, tmp_path, file):
    """Older folders have it in config.json; transformers writes it into generation_config.json only, and so do we."""
    assert read_folder(folder).config.writing == Writing()
    path = folder / file
    path.write_text(json.dumps(json.loads(path.read_text()) | ASKED))
    ours = read_folder(folder)
    assert ours.config.writing == WRITING
    write_folder(ours, tmp_path / "ours")
    assert not ASKED.keys() & json.loads((tmp_path / "ours/config.json").read_text()).keys()
    assert ASKED.items() <= json.loads((tmp_path / "ours/generation_config.json").read_text()).items()
    again = transformers.BartForConditionalGeneration.from_pretrained(tmp_path / "ours")
    assert {name: getattr(again.generation_config, name) for name in ASKED} == ASKED
    assert read_folder(tmp_path / "ours").config == ours.config


def test_generation_config_has_the_last_word(folder):
    for file, changes in (("config.json", ASKED), ("generation_config.json", {"num_beams": 2, "length_penalty": None})):
        path = folder / file
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    assert read_folder(folder).config.writing == dataclasses.replace(WRITING, width=2, length_penalty=1.0)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("num_beams", 0, "num_beams must be at least 1, got 0"),
        ("num_beams", 2.5, "num_beams must be int"),
        ("early_stopping", "soon", 'early_stopping must be true, false or "never"'),
        ("length_penalty", "long", "length_penalty must be float"),
        ("no_repeat_ngram_size", -1, "no_repeat_ngram_size must be at least 0"),
    ],
)
def test_wrong_wishes_are_refused_by_name(folder, field, value, message):
    path = folder / "generation_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {field: value}))
    with pytest.raises(VolvelleError, match=message):
        read_folder(folder)


def test_what_a_config_cannot_hold_is_not_written():
    from tests.systems.language.test_encoder_decoder import make_config

    from volvelle.systems.language.config import LayerNorm

    config = make_config(decoder=make_config().encoder)
    assert config_from_dict(config_to_dict(config)) == config
    for changes in ({"embedding_scale": 3.0}, {"norm": LayerNorm(1e-3)}):
        with pytest.raises(VolvelleError, match=f"cannot hold this model: {next(iter(changes))}"):
            config_to_dict(make_config(decoder=config.encoder, **changes))


def test_an_adapter_has_no_place_in_the_file(tmp_path):
    from volvelle.adapt import LoRA, apply

    model = as_ours(make_bart())
    apply(model, LoRA(rank=2, targets=("fc1", "out_proj")))
    with pytest.raises(VolvelleError, match="no place for this"):
        write_folder(model, tmp_path)


def test_published_configurations_are_read():
    """The fields of facebook/bart-large-cnn's config.json that concern the model."""
    config = config_from_dict({
        "architectures": ["BartForConditionalGeneration"], "d_model": 1024, "vocab_size": 50264, "encoder_layers": 12,
        "decoder_layers": 12, "encoder_ffn_dim": 4096, "decoder_ffn_dim": 4096, "encoder_attention_heads": 16,
        "decoder_attention_heads": 16, "max_position_embeddings": 1024, "normalize_before": False,
        "normalize_embedding": True, "add_final_layer_norm": False, "add_bias_logits": False, "encoder_layerdrop": 0.0,
        "decoder_layerdrop": 0.0, "force_bos_token_to_be_generated": True, "decoder_start_token_id": 2,
        "static_position_embeddings": False, "bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 1, "dropout": 0.1,
    })  # fmt: skip
    assert (config.forced_first, config.forced_last, config.start) == (0, 2, 2)
    assert config.depth == 24
