"""The tests beside this file can fail: each mistake below, made on purpose, is caught by the test that is named."""

from __future__ import annotations

import pytest
import torch
from tests.adapt import test_bottleneck, test_every_method, test_model, test_named
from tests.parts.lowrank import test_kinds

from volvelle.adapt import bottleneck, model, sites, switch
from volvelle.parts.lowrank import dora, kinds, lora
from volvelle.systems.language.decoder import Decoder


def fresh_decoder():
    torch.manual_seed(0)
    return Decoder(test_every_method.config("llama")).eval()


def fresh_net():
    torch.manual_seed(0)
    return test_model.Net()


def without_order(layer, x, result, rows):
    """Groups put back in the order in which they were computed."""
    parts = []
    for update in dict.fromkeys(rows):
        at = torch.tensor([i for i, row in enumerate(rows) if row is update])
        part = result[at]
        parts.append(part if update is None else update.update(layer, x[at], part))
    return torch.cat(parts)


def rows_without_scale(original):
    def stacked(updates, rows):
        a, b = original(updates, rows)
        scales = torch.tensor([1.0 if row is None else row.scale for row in rows], dtype=b.dtype)
        return a, b / scales[:, None, None]

    return stacked


def mixed(mix):
    return lambda: test_named.test_a_mixed_batch_equals_one_by_one(mix, torch.float64)


def stated(name):
    return lambda: test_every_method.test_only_what_is_stated_trains_and_has_optimiser_state(fresh_decoder(), name)


def merged(kind, layer):
    return lambda: test_kinds.test_the_update_is_the_merged_weight(test_kinds.LAYERS[layer](), kind, False)


def as_one_group(self, layer, a, b):
    return b.flatten(1) @ a.flatten(1)[: b.shape[1]]


def halved_change(original):
    return lambda self, layer: 0.5 * original(self, layer)


def unscaled(original):
    return lambda self, layer: original(self, layer) / self.scale


def not_zero(original):
    def init(self, *args, **options):
        original(self, *args, **options)
        torch.nn.init.normal_(self.up)

    return init


def step_zero():
    test_every_method.test_step_zero_is_the_base_bit_for_bit(fresh_decoder(), "houlsby", torch.float32, False)


def behind():
    test_bottleneck.test_what_is_added_where("pfeiffer")


def without_trace():
    test_model.test_merge_unmerge_remove(fresh_net())


MUTANTS = {
    "groups are not put back in order": (sites, "by_group", lambda _: without_order, mixed("all kinds")),
    "mixed rows lose the scale": (lora, "stacked", rows_without_scale, mixed("LoRA")),
    "half of DoRA's magnitude": (dora.DoRAUpdate, "change", halved_change, merged(dora.DoRAUpdate, "linear")),
    "a merge without the scale": (lora.LowRank, "delta", unscaled, merged(lora.LoRAUpdate, "conv1d")),
    "groups merged as one": (kinds.Conv2dKind, "product", lambda _: as_one_group, merged(lora.LoRAUpdate, "groups")),
    "the base is not frozen": (model, "activate", lambda _: lambda *_: None, stated("lora")),
    "no residual": (bottleneck.Behind, "update", lambda _: lambda self, _, x, y: self(y) - y, behind),
    "a bottleneck starts anywhere": (bottleneck.BottleneckAdapter, "__init__", not_zero, step_zero),
    "a backward pass asks nobody": (
        switch.Switch, "selection", lambda _: lambda self: self.chosen,
        test_named.test_a_backward_pass_for_another_adapter_is_refused,
    ),
    "unmerge forgets the original": (
        sites.Seat, "merge", lambda merge: lambda self, *, originals: merge(self, originals=False), without_trace
    ),
    "a module keeps its class": (
        sites.Seat, "restore", lambda _: lambda self: self.layer.adapters.pop(self.name), without_trace
    ),
}  # fmt: skip


@pytest.mark.parametrize("mistake", MUTANTS)
def test_a_mistake_is_caught(mistake, monkeypatch):
    place, attribute, make, check = MUTANTS[mistake]
    check()
    monkeypatch.setattr(place, attribute, make(getattr(place, attribute)))
    with pytest.raises((AssertionError, RuntimeError, pytest.fail.Exception)):
        check()
