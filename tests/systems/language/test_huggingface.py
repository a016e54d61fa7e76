"""Model folders: what we write transformers loads, what it writes we load, and a damaged folder is named."""

from __future__ import annotations

import json
import os

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.systems.language.peer_models import PEERS, as_ours, make_peer, peer_logits
from tests.systems.language.test_decoder import GPT2, LLAMA, ROFORMER, build, some_ids

from volvelle.errors import VolvelleError
from volvelle.parts.lowrank.lora import LoRALinear
from volvelle.systems.language.huggingface import from_tensors, read_folder, write_folder
from volvelle.systems.language.projections import fuse_projections


@pytest.fixture
def folder(tmp_path):
    """A small Llama, written."""
    write_folder(build(), tmp_path / "model")
    return tmp_path / "model"


def edit(path, **changes):
    values = json.loads(path.read_text())
    path.write_text(json.dumps(values | changes))


def edit_tensors(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.peer
@pytest.mark.parametrize("name", PEERS)
@torch.no_grad()
def test_we_load_what_transformers_saves(name, tmp_path):
    pytest.importorskip("transformers")
    peer = make_peer(name)
    peer.save_pretrained(tmp_path, max_shard_size="50KB" if name in {"llama", "roformer-causal"} else "5GB")
    ids = some_ids(2, 9)
    ours = read_folder(tmp_path)
    assert not ours.training
    torch.testing.assert_close(ours(ids).logits, peer_logits(peer, ids, torch.ones_like(ids)), rtol=0, atol=1e-5)


@pytest.mark.peer
@pytest.mark.parametrize("name", PEERS)
@pytest.mark.parametrize("shard_size", [10**9, 30_000])
@torch.no_grad()
def test_transformers_loads_what_we_save(name, shard_size, tmp_path):
    import transformers

    peer, ids = make_peer(name), some_ids(2, 9)
    ours = as_ours(peer)
    fuse_projections(ours)
    write_folder(ours, tmp_path, shard_size=shard_size)
    assert (tmp_path / "model.safetensors").exists() == (shard_size == 10**9)
    again, report = type(peer).from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values()), report
    mask = torch.ones_like(ids)
    assert torch.equal(peer_logits(again.eval(), ids, mask), peer_logits(peer, ids, mask))
    for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
        assert getattr(again.config, key) == getattr(peer.config, key), key
    loaded = transformers.AutoConfig.from_pretrained(tmp_path)
    assert loaded.architectures == [type(peer).__name__]


@pytest.mark.parametrize("config", [LLAMA, GPT2, ROFORMER], ids=lambda config: config.family)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shard_size", [10**9, 3000])
def test_a_round_trip_is_exact(config, dtype, shard_size, tmp_path):
    model = build(config).to(dtype)
    write_folder(model, tmp_path, shard_size=shard_size)
    again = read_folder(tmp_path)
    assert again.config == model.config
    assert list(again.state_dict()) == list(model.state_dict())
    for name, tensor in again.state_dict().items():
        assert tensor.dtype == dtype
        assert torch.equal(tensor, model.state_dict()[name]), name
    assert (again.output_weight is again.model.embed_tokens.weight) == model.config.head.tied


def test_shards_keep_to_their_size_and_the_index_lists_all(tmp_path):
    write_folder(build(), tmp_path, shard_size=8000)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    files = sorted(tmp_path.glob("model-*.safetensors"))
    assert len(files) > 2
    assert {file.name for file in files} == set(index["weight_map"].values())
    held = {name: file.name for file in files for name in load_file(file)}
    assert held == index["weight_map"]
    for file in files:
        tensors = load_file(file)
        assert sum(tensor.nbytes for tensor in tensors.values()) <= 8000 or len(tensors) == 1
    assert index["metadata"]["total_size"] == sum(t.nbytes for f in files for t in load_file(f).values())


def test_the_dtype_asked_for_is_what_comes(folder):
    model = read_folder(folder, dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert model.model.position.frequencies.dtype is torch.float64
    assert json.loads((folder / "config.json").read_text())["dtype"] == "float32"


def test_loaded_weights_do_not_hang_on_the_file(folder):
    model = read_folder(folder)
    before = model(some_ids()).logits
    (folder / "model.safetensors").write_bytes(b"")
    assert torch.equal(model(some_ids()).logits, before)


def test_saving_over_an_older_model_leaves_no_mixture(tmp_path):
    write_folder(build(seed=1), tmp_path, shard_size=5000)
    write_folder(build(seed=2), tmp_path)
    assert sorted(file.name for file in tmp_path.glob("model*")) == ["model.safetensors"]
    write_folder(build(seed=3), tmp_path, shard_size=5000)
    assert not (tmp_path / "model.safetensors").exists()
    assert torch.equal(read_folder(tmp_path)(some_ids()).logits, build(seed=3)(some_ids()).logits)


def test_a_failure_while_saving_keeps_the_old_model(folder, monkeypatch):
    before = read_folder(folder)(some_ids()).logits

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("volvelle.systems.language.huggingface.save_file", full)
    with pytest.raises(OSError, match="No space left"):
        write_folder(build(seed=9), folder)
    assert torch.equal(read_folder(folder)(some_ids()).logits, before)
    assert not [name for name in os.listdir(folder) if name.endswith(".part")]


def test_an_unmerged_adapter_is_not_dropped_silently(tmp_path):
    model = build()
    layer = model.model.layers[0].self_attn
    layer.q_proj = LoRALinear(layer.q_proj, rank=2)
    with pytest.raises(VolvelleError, match=r"q_proj\.a, model.*no place") as caught:
        write_folder(model, tmp_path)
    assert "merge" in str(caught.value.tip)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("keep", [0, 5, 100, -1])
def test_a_truncated_file_is_named(folder, keep):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(VolvelleError, match=r"model\.safetensors: truncated or not a safetensors file"):
        read_folder(folder)


def test_a_missing_shard_is_named(tmp_path):
    write_folder(build(), tmp_path, shard_size=8000)
    shard = sorted(tmp_path.glob("model-*.safetensors"))[1]
    shard.rename(tmp_path / "elsewhere")
    with pytest.raises(VolvelleError, match=f"{shard.name}: no such file"):
        read_folder(tmp_path)


def test_an_index_that_points_outside_is_refused(tmp_path):
    write_folder(build(), tmp_path, shard_size=8000)
    path = tmp_path / "model.safetensors.index.json"
    index = json.loads(path.read_text())["weight_map"]
    edit(path, weight_map=index | {"model.norm.weight": "../outside.safetensors"})
    with pytest.raises(VolvelleError, match="lies outside the folder"):
        read_folder(tmp_path)
    edit(path, weight_map=index | {"model.norm.weight": next(iter(index.values()))})
    with pytest.raises(VolvelleError, match=r"model\.norm\.weight is named in the index but not in the file"):
        read_folder(tmp_path)


def test_pickled_weights_are_refused_with_a_way_out(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(VolvelleError, match=r"neither model\.safetensors nor") as caught:
        read_folder(folder)
    assert "save_pretrained" in str(caught.value.tip)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("model.norm.weight"), r"missing model\.norm\.weight$"),
        (lambda t: t.update({"model.extra": torch.zeros(1)}), r"unknown model\.extra$"),
        (
            lambda t: t.update({"model.norm.weight": torch.zeros(25)}),
            r"model\.norm\.weight: shape \(25,\) in the file, \(24,\) by the configuration",
        ),
        (lambda t: t.update({"lm_head.weight": torch.zeros(61, 24)}), "ties lm_head.weight to model.embed_tokens"),
    ],
)
def test_tensors_that_do_not_fit_are_named(folder, change, message):
    edit_tensors(folder, change)
    with pytest.raises(VolvelleError, match=message):
        read_folder(folder)


def test_names_that_carry_nothing_are_ignored(folder):
    def add(tensors):
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.zeros(3)
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()

    edit_tensors(folder, add)
    assert torch.equal(read_folder(folder)(some_ids()).logits, build()(some_ids()).logits)


def test_an_untied_head_that_is_missing_gives_a_tip(folder):
    edit(folder / "config.json", tie_word_embeddings=False)
    with pytest.raises(VolvelleError, match=r"missing lm_head\.weight") as caught:
        read_folder(folder)
    assert "tie_word_embeddings" in str(caught.value.tip)


def test_gpt2_without_its_prefix_and_with_its_buffers_is_read(tmp_path):
    """The layout of the original gpt2 checkpoint on the Hub."""
    model = build(GPT2)
    write_folder(model, tmp_path)

    def change(tensors):
        for name in list(tensors):
            tensors[name.removeprefix("transformer.")] = tensors.pop(name)
        tensors["h.0.attn.bias"] = torch.ones(1, 1, 4, 4)

    edit_tensors(tmp_path, change)
    assert torch.equal(read_folder(tmp_path)(some_ids()).logits, model(some_ids()).logits)


def test_the_folder_and_its_configuration_are_named_when_missing(tmp_path):
    with pytest.raises(VolvelleError, match=r"nothing: no such folder"):
        read_folder(tmp_path / "nothing")
    with pytest.raises(VolvelleError, match=r"config\.json: no such file"):
        read_folder(tmp_path)
    (tmp_path / "config.json").write_text("{broken")
    with pytest.raises(VolvelleError, match=r"config\.json: not valid JSON"):
        read_folder(tmp_path)


def test_tensors_may_come_lazily_one_at_a_time(folder):
    tensors = load_file(folder / "model.safetensors")
    fetched = []

    class Lazy(dict):
        def __getitem__(self, name):
            fetched.append(name)
            return super().__getitem__(name)

    values = json.loads((folder / "config.json").read_text())
    model = from_tensors(values, Lazy(tensors), source="test", dtype=torch.float64)
    assert sorted(fetched) == sorted(tensors)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float64}
