"""Every position encoding in a language model: the cache, padding and packing change nothing, and files keep it."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import json
import pkgutil

import pytest
import torch
from tests.systems.language.test_decoder import LLAMA, build, some_ids

from volvelle.decode import generate
from volvelle.errors import UsageError, VolvelleError
from volvelle.parts import position as position_parts
from volvelle.parts.position import rope_scaling
from volvelle.parts.position.axial import AxialPositions, AxialRotaryEmbedding
from volvelle.parts.position.encoding import PositionEncoding
from volvelle.parts.position.multimodal_rope import MultimodalRotaryEmbedding
from volvelle.systems.language import config as c
from volvelle.systems.language.huggingface import read_folder, write_folder
from volvelle.systems.language.projections import fuse_projections
from volvelle.train.recipes.choices import ATTENTIONS, POSITIONS, AttentionName, PositionName
from volvelle.train.recipes.language import TrainLanguage

CASES = [
    f"{name} {kind}"
    for name, position in POSITIONS.items()
    for kind in ATTENTIONS
    if kind == "softmax" or not isinstance(position, c.ScoreBias)
]
"""Every encoding that `volvelle train language` offers, with every attention that it goes with."""
RELATIVE = {name for name, position in POSITIONS.items() if isinstance(position, c.Rope | c.ScoreBias | c.NoPosition)}
EVERY = pytest.mark.parametrize("name", CASES)


def config(name):
    name, kind = name.split()
    held = name == "rope" and kind == "softmax"
    attention = dataclasses.replace(c.LinearAttention(), chunk=4) if kind == "linear" else c.SoftmaxAttention()
    return dataclasses.replace(
        LLAMA, family="llama" if held else "volvelle", position=POSITIONS[name], attention=attention
    )


def model_of(name):
    """Every weight random, so that no encoding starts as nothing."""
    model = build(config(name)).double()
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if "position" in parameter_name:
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return model


def test_no_encoding_and_no_scaling_is_forgotten():
    """What the parts offer, what a configuration can say, and what the command line lists are the same."""
    assert set(POSITIONS) == set(PositionName.__args__)
    assert set(ATTENTIONS) == set(AttentionName.__args__)
    assert {type(position) for position in POSITIONS.values()} == set(c.Position.__args__)
    ropes = [position for position in POSITIONS.values() if isinstance(position, c.Rope)]
    assert {type(rope.scaling) for rope in ropes} == {*c.RopeScaling.__args__, type(None)}
    built = [
        module for name in CASES for module in build(config(name)).modules() if isinstance(module, PositionEncoding)
    ]
    modules = [
        importlib.import_module(f"{position_parts.__name__}.{found.name}")
        for found in pkgutil.iter_modules(position_parts.__path__)
    ]
    kinds = {
        kind
        for module in modules
        for kind in vars(module).values()
        if inspect.isclass(kind) and issubclass(kind, PositionEncoding)
    }
    several_axes = {AxialPositions, AxialRotaryEmbedding, MultimodalRotaryEmbedding}  # a text has one
    assert kinds - several_axes == {type(module) for module in built}
    scalings = {kind for kind in vars(rope_scaling).values() if dataclasses.is_dataclass(kind)}
    assert scalings == {type(module.scaling) for module in built if hasattr(module, "scaling")} - {type(None)}


@pytest.mark.parametrize("name", [name for name, position in POSITIONS.items() if isinstance(position, c.ScoreBias)])
def test_a_bias_on_scores_is_refused_where_there_are_none(name):
    with pytest.raises(UsageError, match=f"position={name} adds to attention scores, and attention=linear has none"):
        TrainLanguage(data="x", position=name, attention="linear")


@EVERY
@torch.no_grad()
def test_steps_over_the_cache_equal_the_whole(name):
    model, ids = model_of(name), some_ids(2, 11)
    whole = model(ids).logits
    cache = model.new_cache(2, 16)
    for part in ids.split([4, 1, 1, 3, 2], 1):
        step = model(part, cache=cache).logits
        cache.commit()
        torch.testing.assert_close(step, whole[:, cache.length - part.shape[1] : cache.length], rtol=0, atol=1e-10)


@EVERY
@torch.no_grad()
def test_left_padding_changes_nothing(name):
    model, ids = model_of(name), some_ids(2, 7)
    mask = torch.ones(2, 7, dtype=torch.bool)
    mask[1, :3] = False
    short = model(ids[1:, 3:]).logits
    torch.testing.assert_close(model(ids, mask=mask).logits[1:, 3:], short, rtol=0, atol=1e-10)
    cache = model.new_cache(2, 16)
    first = model(ids[:, :5], mask=mask[:, :5], cache=cache).logits
    cache.commit()
    torch.testing.assert_close(first[1:, 3:], short[:, :2], rtol=0, atol=1e-10)
    rest = model(ids[:, 5:], cache=cache).logits  # behind holes of one row
    torch.testing.assert_close(rest[1:], short[:, 2:], rtol=0, atol=1e-10)


@EVERY
@torch.no_grad()
def test_an_accepted_path_equals_the_text_it_spells(name):
    model, ids = model_of(name), some_ids(1, 6)
    cache = model.new_cache(1, 16)
    model(ids[:, :3], cache=cache)
    cache.commit()
    # a tree: the root, two children of it, one grandchild under the second
    tree = torch.tensor([[1, 0, 0, 0], [1, 1, 0, 0], [1, 0, 1, 0], [1, 0, 1, 1]], dtype=torch.bool)[None]
    drafted = torch.stack((ids[0, 3], (ids[0, 4] + 1) % 61, ids[0, 4], ids[0, 5]))[None]
    step = model(drafted, mask=tree, cache=cache).logits
    whole = model(ids).logits
    torch.testing.assert_close(step[:, [0, 2, 3]], whole[:, 3:], rtol=0, atol=1e-10)
    cache.commit(torch.tensor([[0, 2]]))
    again = model(ids[:, 5:], cache=cache).logits
    torch.testing.assert_close(again, whole[:, 5:], rtol=0, atol=1e-10)


@EVERY
@torch.no_grad()
def test_packed_equals_separate(name):
    model, ids = model_of(name), some_ids(1, 9)[0]
    parts = (ids[:4], ids[4:])
    positions = torch.cat([torch.arange(len(part)) for part in parts])[None]
    owner = torch.tensor([0] * 4 + [1] * 5)
    mask = ((owner[:, None] == owner) & torch.ones(9, 9, dtype=torch.bool).tril())[None]
    packed = model(ids[None], positions=positions, mask=mask).logits
    separate = torch.cat([model(part[None]).logits for part in parts], 1)
    torch.testing.assert_close(packed, separate, rtol=0, atol=1e-10)
    by_number = model(ids[None], mask=owner[None] + 1).logits  # as the loader packs, without a mask of pairs
    torch.testing.assert_close(by_number, separate, rtol=0, atol=1e-10)


@EVERY
@torch.no_grad()
def test_it_matters_where_a_token_stands(name):
    """Order matters to every encoding but `none` of a model of one layer; where it begins only to the absolute ones."""
    one = dataclasses.replace(config(name), depth=1)
    model = model_of(name)
    ids = some_ids(1, 8)
    shifted = model.hidden(ids, positions=torch.arange(5, 13))
    same = torch.allclose(shifted, model.hidden(ids), atol=1e-9)
    assert same == (name.split()[0] in RELATIVE)
    del model
    shallow = build(one).double()
    for parameter_name, parameter in shallow.named_parameters():
        if "position" in parameter_name:
            parameter.add_(torch.randn(parameter.shape, dtype=torch.float64))
    swapped = ids[:, [1, 0, *range(2, 8)]]
    last = torch.allclose(shallow.hidden(ids)[:, -1], shallow.hidden(swapped)[:, -1], atol=1e-9)
    assert last == name.startswith("none")


@EVERY
def test_all_weights_learn_and_fused_decoding_agrees(name):
    model = model_of(name).float()
    ids = some_ids(2, 9)
    model(ids).logits.logsumexp(-1).sum().backward()
    for parameter_name, parameter in model.named_parameters():
        assert parameter.grad is not None, parameter_name
        assert parameter.grad.isfinite().all()
        # T5 and Shaw keep rows for distances that nine tokens do not have, but some row always moves; a number that is
        # added to all scores of a head changes nothing
        idle = name.startswith("recurrent") or parameter_name.endswith("network.2.bias")
        assert parameter.grad.abs().sum() > 0 or idle, parameter_name
    before = generate(model.eval(), ids[0, :4].tolist(), max_tokens=6, eos_ids=()).tokens
    fuse_projections(model)
    assert generate(model, ids[0, :4].tolist(), max_tokens=6, eos_ids=()).tokens == before


@EVERY
@torch.no_grad()
def test_files_keep_it(name, tmp_path):
    model, ids = model_of(name).float(), some_ids()
    write_folder(model, tmp_path / "model")
    again = read_folder(tmp_path / "model")
    assert again.config == model.config
    assert torch.equal(again(ids).logits, model(ids).logits)


def test_a_native_configuration_names_what_is_wrong(tmp_path):
    write_folder(model_of("shaw softmax").float(), tmp_path)
    path = tmp_path / "config.json"
    good = json.loads(path.read_text())
    for change, said in (
        ({"position": {"kind": "Shawl"}}, r"config.position: kind 'Shawl' is not known"),
        ({"position": {"kind": "Shaw", "reech": 3}}, r"config.position: unknown field 'reech'"),
        ({"widht": 3}, r"unknown field 'widht'"),
        ({"heads": 0}, r"heads must be positive"),
        ({"attention": {"kind": "LinearAtention"}}, r"config.attention: kind 'LinearAtention' is not known"),
        ({"attention": {"kind": "LinearAttention"}}, "Shaw adds to attention scores, and linear attention has none"),
    ):
        path.write_text(json.dumps(good | {"config": good["config"] | change}))
        with pytest.raises(VolvelleError, match=said):
            read_folder(tmp_path)
    del good["config"]["attention"]  # as files were before there was a choice
    path.write_text(json.dumps(good))
    assert read_folder(tmp_path).config.attention == c.SoftmaxAttention()
    del good["config"]["width"]
    path.write_text(json.dumps(good))
    with pytest.raises(VolvelleError, match="config: width is missing"):
        read_folder(tmp_path)


@torch.no_grad()
def test_token_embeddings_are_scaled_and_no_foreign_file_forgets_it(tmp_path):
    model, ids = build(dataclasses.replace(config("none softmax"), embedding_scale=3.0)), some_ids()
    embedded = model.model.embed(ids, torch.arange(ids.shape[1]), None)
    assert torch.equal(embedded, 3 * model.model.embed_tokens.weight[ids])
    write_folder(model, tmp_path)
    assert torch.equal(read_folder(tmp_path)(ids).logits, model(ids).logits)
    with pytest.raises(VolvelleError, match=r"cannot hold this model: embedding_scale = 3\.0"):
        write_folder(build(dataclasses.replace(LLAMA, embedding_scale=3.0)), tmp_path / "llama")


GROWING = {"rope-dynamic", "rope-longrope"}
"""Their frequencies follow from the length of the text, and so differ far out."""


@pytest.mark.parametrize("name", [name for name in CASES if name.split()[0] in RELATIVE - GROWING])
@torch.no_grad()
def test_far_out_a_relative_encoding_is_as_exact_as_near(name):
    """Angles at position 1,000,000 are those of the paper: in fp64 nothing moves by more than its last digits there."""
    model, ids = model_of(name), some_ids(2, 9)
    for start in (1_000, 1_000_000):
        there = model.hidden(ids, positions=torch.arange(start, start + 9))
        torch.testing.assert_close(there, model.hidden(ids), rtol=0, atol=1e-8)
    half, exact = model_of(name).to(torch.bfloat16), model_of(name).to(torch.bfloat16).double()
    errors = [
        float((half.hidden(ids, positions=at).double() - exact.hidden(ids, positions=at)).square().mean().sqrt())
        for at in (torch.arange(9), torch.arange(1_000_000, 1_000_009))
    ]
    assert errors[1] <= 1.5 * errors[0]


@EVERY
@torch.no_grad()
def test_bf16_weights_err_no_more_than_without_an_encoding(name):
    """Against fp64 with the same rounded weights; twice the error of the same model without positions at most."""
    ids, errors = some_ids(4, 24), []
    for case in (f"none {name.split()[1]}", name):
        half, exact = model_of(case).to(torch.bfloat16), model_of(case).to(torch.bfloat16).double()
        wanted = exact(ids).logits
        errors.append(float((half(ids).logits.double() - wanted).square().mean().sqrt() / wanted.std()))
    assert errors[1] <= 2 * errors[0]


@pytest.mark.parametrize("name", sorted(GROWING))
@torch.no_grad()
def test_beyond_the_context_frequencies_that_grow_with_the_text_tell_cached_keys_apart(name):
    """The methods' own error, the same in transformers: keys keep the frequencies of the step that cached them."""
    kind = dataclasses.replace(LLAMA, family="volvelle", position=POSITIONS[name], context=8)
    model, ids = build(kind).double(), some_ids(1, 12)
    whole = model(ids).logits
    at_once, in_parts = model.new_cache(1, 12), model.new_cache(1, 12)
    torch.testing.assert_close(model(ids, cache=at_once).logits, whole, rtol=0, atol=1e-10)
    inside = model(ids[:, :8], cache=in_parts).logits
    in_parts.commit()
    torch.testing.assert_close(inside, model(ids[:, :8]).logits, rtol=0, atol=1e-10)
    beyond = model(ids[:, 8:], cache=in_parts).logits
    assert (beyond - whole[:, 8:]).abs().max() > 1e-4


@pytest.mark.peer
@pytest.mark.parametrize("name", [name for name, position in POSITIONS.items() if isinstance(position, c.Rope)])
@torch.no_grad()
def test_transformers_opens_what_a_llama_file_can_hold(name, tmp_path):
    """The scalings that have a name in Hugging Face's files compute the same there, inside the context and beyond."""
    transformers = pytest.importorskip("transformers")
    llama = dataclasses.replace(LLAMA, position=POSITIONS[name], context=16)
    if isinstance(llama.position.scaling, c.NtkScaling | c.ProportionalScaling):
        with pytest.raises(VolvelleError, match=r"a llama config\.json has no name for"):
            write_folder(build(llama), tmp_path)
        return
    model = build(llama)
    write_folder(model, tmp_path)
    assert read_folder(tmp_path).config == llama
    theirs = transformers.LlamaForCausalLM.from_pretrained(tmp_path).eval()
    for length in (16, 40):
        ids = some_ids(2, length)
        torch.testing.assert_close(model(ids).logits, theirs(ids).logits, rtol=0, atol=2e-5)
