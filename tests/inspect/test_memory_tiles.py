"""A plan computes one tile of attention, and packed rows as what they take."""

from __future__ import annotations

import pytest
import torch
from tests.systems.language.test_decoder import LLAMA, some_ids

from volvelle.functional import attention
from volvelle.inspect.memory_branches import one_tile
from volvelle.parts.attention import tiled
from volvelle.systems.language.components import written_out
from volvelle.train.estimate import estimate_memory


def test_one_tile_is_computed_and_everything_is_put_back(monkeypatch):
    computed = []
    original = tiled._Call.scores

    def scores(self, room, rows, columns, tile):
        computed.append(tile)
        return original(self, room, rows, columns, tile)

    monkeypatch.setattr(tiled._Call, "scores", scores)
    q = torch.zeros(2, 2, 700, 4)
    segments = torch.arange(700).expand(2, -1) // 300
    expected = attention(q, q, q, segments=segments, backend="tiled")
    assert len(computed) > 2
    computed.clear()
    with one_tile():
        assert attention(q, q, q, segments=segments, backend="tiled").shape == q.shape
    assert len(computed) == 1
    assert torch.equal(attention(q, q, q, segments=segments, backend="tiled"), expected)


@pytest.mark.parametrize("length", [40, 300])
def test_packed_rows_take_no_more_than_with_a_mask(length):
    ids, documents = some_ids(4, length), torch.arange(length).expand(4, -1) // 20 + 1
    plans = [
        estimate_memory(LLAMA, {"ids": ids, "targets": ids, "mask": mask}).total
        for mask in (documents, written_out(documents, True))
    ]
    assert 0.5 * plans[1] < plans[0] <= 1.05 * plans[1]
