"""Every position encoding in a language model: the cache, padding and packing change nothing, and files keep it."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
from tests.systems.language.test_decoder import LLAMA, build, some_ids

from volvelle.decode import generate
from volvelle.errors import VolvelleError
from volvelle.systems.language import config as c
from volvelle.systems.language.huggingface import read_folder, write_folder
from volvelle.systems.language.projections import fuse_projections
from volvelle.train.recipes.language import PositionName
from volvelle.train.scratch import POSITIONS

RELATIVE = {"rope", "none", "shaw", "transformer-xl", "t5", "alibi"}


def config(name):
    family = "llama" if name == "rope" else "volvelle"
    return dataclasses.replace(LLAMA, family=family, position=POSITIONS[name])


def model_of(name):
    """Every weight random, so that no encoding starts as nothing."""
    model = build(config(name)).double()
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if "position" in parameter_name:
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return model


def test_the_recipe_and_the_table_name_the_same():
    assert set(POSITIONS) == set(PositionName.__args__)
    assert {type(position) for position in POSITIONS.values()} == set(c.Position.__args__)


@pytest.mark.parametrize("name", POSITIONS)
@torch.no_grad()
def test_steps_over_the_cache_equal_the_whole(name):
    model, ids = model_of(name), some_ids(2, 11)
    whole = model(ids).logits
    cache = model.new_cache(2, 16)
    for part in ids.split([4, 1, 1, 3, 2], 1):
        step = model(part, cache=cache).logits
        cache.commit()
        torch.testing.assert_close(step, whole[:, cache.length - part.shape[1] : cache.length], rtol=0, atol=1e-10)


@pytest.mark.parametrize("name", POSITIONS)
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


@pytest.mark.parametrize("name", POSITIONS)
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


@pytest.mark.parametrize("name", POSITIONS)
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


@pytest.mark.parametrize("name", POSITIONS)
@torch.no_grad()
def test_it_matters_where_a_token_stands(name):
    """Order matters to every encoding but `none` of a model of one layer; where it begins only to the absolute ones."""
    one = dataclasses.replace(config(name), depth=1)
    model = model_of(name)
    ids = some_ids(1, 8)
    shifted = model.hidden(ids, positions=torch.arange(5, 13))
    same = torch.allclose(shifted, model.hidden(ids), atol=1e-9)
    assert same == (name in RELATIVE)
    del model
    shallow = build(one).double()
    for parameter_name, parameter in shallow.named_parameters():
        if "position" in parameter_name:
            parameter.add_(torch.randn(parameter.shape, dtype=torch.float64))
    swapped = ids[:, [1, 0, *range(2, 8)]]
    last = torch.allclose(shallow.hidden(ids)[:, -1], shallow.hidden(swapped)[:, -1], atol=1e-9)
    assert last == (name == "none")


@pytest.mark.parametrize("name", POSITIONS)
def test_all_weights_learn_and_fused_decoding_agrees(name):
    model = model_of(name).float()
    ids = some_ids(2, 9)
    model(ids).logits.logsumexp(-1).sum().backward()
    for parameter_name, parameter in model.named_parameters():
        assert parameter.grad is not None, parameter_name
        assert parameter.grad.isfinite().all()
        # T5 and Shaw keep rows for distances that nine tokens do not have, but some row always moves
        assert parameter.grad.abs().sum() > 0 or name == "recurrent", parameter_name
    before = generate(model.eval(), ids[0, :4].tolist(), max_tokens=6, eos_ids=()).tokens
    fuse_projections(model)
    assert generate(model, ids[0, :4].tolist(), max_tokens=6, eos_ids=()).tokens == before


@pytest.mark.parametrize("name", POSITIONS)
@torch.no_grad()
def test_files_keep_it(name, tmp_path):
    model, ids = model_of(name).float(), some_ids()
    write_folder(model, tmp_path / "model")
    again = read_folder(tmp_path / "model")
    assert again.config == model.config
    assert torch.equal(again(ids).logits, model(ids).logits)


def test_a_native_configuration_names_what_is_wrong(tmp_path):
    write_folder(model_of("shaw").float(), tmp_path)
    path = tmp_path / "config.json"
    good = json.loads(path.read_text())
    for change, said in (
        ({"position": {"kind": "Shawl"}}, r"config.position: kind 'Shawl' is not known"),
        ({"position": {"kind": "Shaw", "reech": 3}}, r"config.position: unknown field 'reech'"),
        ({"widht": 3}, r"unknown field 'widht'"),
        ({"heads": 0}, r"heads must be positive"),
    ):
        path.write_text(json.dumps(good | {"config": good["config"] | change}))
        with pytest.raises(VolvelleError, match=said):
            read_folder(tmp_path)
    del good["config"]["width"]
    path.write_text(json.dumps(good))
    with pytest.raises(VolvelleError, match="config: width is missing"):
        read_folder(tmp_path)


@torch.no_grad()
def test_token_embeddings_are_scaled_and_no_foreign_file_forgets_it(tmp_path):
    model, ids = build(dataclasses.replace(config("none"), embedding_scale=3.0)), some_ids()
    embedded = model.model.embed(ids, torch.arange(ids.shape[1]), None)
    assert torch.equal(embedded, 3 * model.model.embed_tokens.weight[ids])
    write_folder(model, tmp_path)
    assert torch.equal(read_folder(tmp_path)(ids).logits, model(ids).logits)
    with pytest.raises(VolvelleError, match=r"cannot hold this model: embedding_scale = 3\.0"):
        write_folder(build(dataclasses.replace(LLAMA, embedding_scale=3.0)), tmp_path / "llama")
