"""`export to=hf`: one folder that transformers and vLLM load, with our logits, tokens and conversations."""

from __future__ import annotations

import json

import pytest
import torch
from tests.systems.language.tokenizers_made import byte_level

import volvelle.adapt as adapt
from volvelle.adapt.methods import Bottleneck, DoRA, LoRA
from volvelle.adapt.prefix_methods import PrefixTuning
from volvelle.cli.main import main
from volvelle.systems.language import config as c
from volvelle.systems.language.decoder import Decoder
from volvelle.systems.language.huggingface import write_folder

transformers = pytest.importorskip("transformers", reason="reads what is written")
pytestmark = pytest.mark.peer

CHAT = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "what is the capital?"}]
EVERYWHERE = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """The folder of a small random Llama with a tokenizer and a chat template."""
    tokenizer = byte_level()
    special = c.SpecialTokens(bos=tokenizer.bos_id, eos=tuple(tokenizer.eos_ids), pad=tokenizer.pad_id)
    config = c.LanguageConfig(
        "llama", vocabulary=tokenizer.vocabulary, width=32, depth=2, heads=4, context=64, norm=c.RMSNorm(),
        mlp=c.GatedMLP(48), position=c.Rope(), kv_heads=2, head=c.Head(tied=True), special=special,
    )  # fmt: skip
    torch.manual_seed(0)
    model = Decoder(config)
    scrambled(model)
    model.tokenizer = tokenizer
    folder = tmp_path_factory.mktemp("base")
    write_folder(model, folder)
    return folder


def scrambled(model):
    """Other numbers in every matrix, so that no two of them may be exchanged and no adapter is without effect."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.2)


def adapted(base, method, folder):
    """The base with this adapter, which is saved in the folder."""
    model = adapt.load_run(base)
    trained = adapt.apply(model, method).trainable
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in trained.values():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    adapt.save(model, folder, base=str(base))
    return model.eval()


def read_back(folder, **options):
    """What transformers makes of the folder: the model, and its tokenizer."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, **options)
    return model.eval(), transformers.AutoTokenizer.from_pretrained(folder)


@pytest.mark.parametrize(
    "method",
    [
        LoRA(rank=2, targets=EVERYWHERE),
        LoRA(rank=3, rslora=True, targets="all-linear", rank_pattern={"q_proj": 1}),
        DoRA(rank=2, targets=("q_proj", "down_proj")),
    ],
    ids=["lora", "rslora", "dora"],
)
def test_a_merged_folder_gives_the_logits_of_the_adapter(base, tmp_path, method):
    model = adapted(base, method, tmp_path / "mine")
    assert main(["export", str(tmp_path / "mine"), "to=hf", f"out={tmp_path / 'hf'}"]) == 0
    theirs, tokenizer = read_back(tmp_path / "hf")
    ids = torch.randint(0, model.config.vocabulary, (2, 9), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        ours = model(ids).logits
        plain = adapt.load_run(base)(ids).logits
        found = theirs(ids).logits
    torch.testing.assert_close(found, ours, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(found, plain, rtol=1e-2, atol=1e-2), "the adapter would not have been missed"
    text = "the quick 北京 😀 <think>"
    assert tokenizer(text, add_special_tokens=False).input_ids == model.tokenizer.encode(text)
    asked = tokenizer.apply_chat_template(CHAT, add_generation_prompt=True, tokenize=False)
    assert tokenizer(asked, add_special_tokens=False).input_ids == model.tokenizer.chat_ids(CHAT)


def test_what_vllm_asks_of_a_folder(base, tmp_path):
    adapted(base, LoRA(rank=2), tmp_path / "mine")
    assert main(["export", str(tmp_path / "mine"), "to=hf", f"out={tmp_path / 'hf'}", "precision=bf16"]) == 0
    config = json.loads((tmp_path / "hf/config.json").read_text())
    tokenizer = byte_level()
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert config["torch_dtype"] == "bfloat16"
    assert config["bos_token_id"] == tokenizer.bos_id
    assert set(config["eos_token_id"]) == set(tokenizer.eos_ids)
    generation = transformers.GenerationConfig.from_pretrained(tmp_path / "hf")
    assert set(generation.eos_token_id) == set(tokenizer.eos_ids)
    settings = json.loads((tmp_path / "hf/tokenizer_config.json").read_text())
    assert settings["chat_template"] == tokenizer.chat_template
    model, _ = read_back(tmp_path / "hf")
    assert model.dtype == torch.bfloat16


def test_large_models_become_shards_with_an_index(base, tmp_path):
    most = 20_000
    assert main(["export", str(base), "to=hf", f"out={tmp_path / 'hf'}", f"shard={most / 1e9}"]) == 0
    index = json.loads((tmp_path / "hf/model.safetensors.index.json").read_text())
    files = sorted(path.name for path in (tmp_path / "hf").glob("*.safetensors"))
    assert len(files) > 2
    assert files == sorted(set(index["weight_map"].values()))
    sizes = [(tmp_path / "hf" / name).stat().st_size for name in files]
    assert sum(size < most + 2000 for size in sizes) >= len(files) - 1  # the embedding alone is larger
    ids = torch.arange(10)[None]
    with torch.no_grad():
        torch.testing.assert_close(read_back(tmp_path / "hf")[0](ids).logits, adapt.load_run(base)(ids).logits)


@pytest.mark.parametrize(
    ("method", "name", "other"),
    [(Bottleneck(width=4), "adapters", "to=adapter"), (PrefixTuning(length=3), "refix", "to=peft")],
)
def test_what_cannot_be_merged_is_refused_with_what_can_be_done(base, tmp_path, capsys, method, name, other):
    adapted(base, method, tmp_path / "mine")
    assert main(["export", str(tmp_path / "mine"), "to=hf", f"out={tmp_path / 'hf'}"]) == 1
    said = capsys.readouterr().err
    assert name in said
    assert "cannot be folded into the weights" in said
    assert other in said
    assert "volvelle serve MODEL adapters=" in said
    assert not (tmp_path / "hf").exists()


@pytest.mark.parametrize("shard", ["0", "-1"])
def test_a_shard_of_nothing_is_refused(base, tmp_path, capsys, shard):
    assert main(["export", str(base), "to=hf", f"out={tmp_path / 'hf'}", f"shard={shard}"]) == 2
    assert "shard: a size above 0 GB is wanted" in capsys.readouterr().err


@pytest.mark.slow
def test_smollm2_with_an_adapter_says_the_same_in_transformers(tmp_path):
    from volvelle import hub
    from volvelle.decode import generate
    from volvelle.errors import VolvelleError

    try:
        hub.fetch("smollm2")
    except VolvelleError as error:
        pytest.skip(f"smollm2 cannot be fetched: {error}")
    model = adapt.load_run("smollm2", dtype=torch.float32)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in adapt.apply(model, LoRA(rank=4, targets=EVERYWHERE)).trainable.values():
            parameter.add_(torch.randn_like(parameter) * 0.01)
    adapt.save(model, tmp_path / "mine", base="smollm2")
    assert main(["export", str(tmp_path / "mine"), "to=hf", f"out={tmp_path / 'hf'}", "shard=0.2"]) == 0
    assert len(list((tmp_path / "hf").glob("*.safetensors"))) > 2
    theirs, tokenizer = read_back(tmp_path / "hf")
    asked = tokenizer.apply_chat_template(CHAT, add_generation_prompt=True, tokenize=False)
    ids = model.eval().tokenizer.chat_ids(CHAT)
    assert tokenizer(asked, add_special_tokens=False).input_ids == ids
    with torch.no_grad():
        torch.testing.assert_close(
            theirs(torch.tensor([ids])).logits, model(torch.tensor([ids])).logits, rtol=1e-3, atol=1e-3
        )
        written = theirs.generate(torch.tensor([ids]), max_new_tokens=24, do_sample=False)[0, len(ids) :].tolist()
    assert written == generate(model, ids, max_tokens=24).tokens
