"""`train language` with any encoding and any attention: the configuration it builds, and a run that can be opened."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from tests.train.test_recipes import folder, scratch

from volvelle.adapt import load_run
from volvelle.decode import generate
from volvelle.parts.attention.state_cache import StateCache
from volvelle.systems.language import config as c
from volvelle.systems.language.huggingface_config import config_from_dict, config_to_dict
from volvelle.train import train_language
from volvelle.train.observer import Quiet
from volvelle.train.recipes.choices import ATTENTIONS, POSITIONS
from volvelle.train.recipes.language import ModelShape
from volvelle.train.scratch import build_config

TOKENIZER = SimpleNamespace(vocabulary=300, bos_id=None, eos_ids=(0,), pad_id=0)
SHAPE = ModelShape(width=32, depth=2, heads=2, context=64)
OURS_ALONE = {"rope-ntk", "rope-proportional"}


@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize("position", POSITIONS)
def test_the_family_is_llama_where_its_files_can_hold_it(position, attention):
    spec = POSITIONS[position]
    if attention == "linear" and isinstance(spec, c.ScoreBias):
        with pytest.raises(ValueError, match="linear attention has none"):
            build_config(SHAPE, TOKENIZER, position, attention)
        return
    config = build_config(SHAPE, TOKENIZER, position, attention)
    held = isinstance(spec, c.Rope) and position not in OURS_ALONE and attention == "softmax"
    assert config.family == ("llama" if held else "volvelle")
    assert config_from_dict(config_to_dict(config)) == config
    assert type(config.position) is type(spec)
    assert config.attention == ATTENTIONS[attention]


@pytest.mark.parametrize(
    ("position", "attention"), [("rope", "linear"), ("deberta", "softmax"), ("dynamic", "softmax")]
)
def test_a_run_trains_is_planned_opens_and_writes(tmp_path, position, attention):
    recipe = scratch(tmp_path, steps=4, position=position, attention=attention, evaluate_every=None)
    run = folder(tmp_path, "run", "language", recipe)
    outcome = train_language(recipe, run, observer=Quiet())
    assert outcome.after["loss"] < outcome.before["loss"]
    model = load_run(run.path)
    assert model.config.attention == ATTENTIONS[attention]
    with torch.inference_mode():
        assert isinstance(model.new_cache(1, 8), StateCache) == (attention == "linear")
    assert len(generate(model, [1, 2, 3], max_tokens=5, eos_ids=()).tokens) == 5
