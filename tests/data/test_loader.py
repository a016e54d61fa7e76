from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from volvelle.data.loader import Loader


def make(count=23, batch=4, **options):
    return Loader(range(100, 100 + count), batch, collate=list, **({"seed": 5} | options))


def epoch(loader):
    return [batch.value for batch in loader]


def test_every_sample_once_and_ids_name_them():
    for options in ({}, {"shuffle": False}, {"lengths": list(range(23))}):
        batches = list(make(**options))
        assert sorted(v for b in batches for v in b.value) == list(range(100, 123))
        assert all([100 + i for i in b.ids] == b.value for b in batches)
        assert len(batches) == len(make()) == 6


def test_order_depends_on_seed_and_epoch_only():
    one, two = make(), make()
    first = epoch(one)
    assert first == epoch(two)
    second = epoch(one)
    assert second != first
    other = make()
    other.load_state_dict(one.state_dict() | {"epoch": 1, "position": 0})
    assert epoch(other) == second
    assert epoch(make(seed=6)) != first


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 30), st.booleans(), st.booleans())
def test_resumes_between_any_two_batches(stop, drop_last, grouped):
    options = {"drop_last": drop_last, "lengths": [i % 7 for i in range(23)] if grouped else None}

    def stream(loader):
        while True:
            yield from loader

    whole, part = stream(make(**options)), make(**options)
    expected = [next(whole).value for _ in range(40)]
    begun = stream(part)
    assert [next(begun).value for _ in range(stop)] == expected[:stop]
    state = json.loads(json.dumps(part.state_dict()))
    resumed = make(**options)
    resumed.load_state_dict(state)
    rest = stream(resumed)
    assert [next(rest).value for _ in range(40 - stop)] == expected[stop:]


def test_drop_last_drops_the_short_batch():
    assert [len(b) for b in epoch(make(drop_last=True))] == [4] * 5
    assert len(make(drop_last=True)) == 5
    assert [len(b) for b in epoch(make(shuffle=False))] == [4, 4, 4, 4, 4, 3]


def test_lengths_group_similar_samples():
    lengths = [(i * 37) % 100 for i in range(512)]
    grouped, plain = Loader(range(512), 8, seed=0, collate=list, lengths=lengths), make(512, 8)
    waste = lambda plan: sum(max(lengths[i] for i in b) * len(b) - sum(lengths[i] for i in b) for b in plan)  # noqa: E731
    assert waste(grouped.plan(0)) < waste(plain.plan(0)) / 3
    assert grouped.plan(0) != grouped.plan(1)


@pytest.mark.parametrize("field", ["seed", "samples", "batch_size"])
def test_a_cursor_of_other_data_is_refused(field):
    loader = make()
    with pytest.raises(ValueError, match=f"{field} was 999"):
        loader.load_state_dict(loader.state_dict() | {field: 999})


@pytest.mark.parametrize("options", [{"shuffle": False}, {"drop_last": True}, {"lengths": list(range(23))}])
def test_a_cursor_of_another_order_is_refused(options):
    with pytest.raises(ValueError, match=f"{next(iter(options))} was"):
        make().load_state_dict(make(**options).state_dict())
    same = make(**options)
    same.load_state_dict(make(**options).state_dict())
    older = {k: v for k, v in make().state_dict().items() if k not in ("shuffle", "drop_last", "lengths")}
    make().load_state_dict(older)  # saved before these were kept


def test_describe_names_sources():
    class Named(list):
        def source(self, i):
            return f"file:{i + 1}"

    assert Loader(Named("abc"), 2, seed=0, collate=list).describe([2, 0]) == "file:3, file:1"
    assert make().describe([2, 0]) == "2, 0"


def test_impossible_options():
    with pytest.raises(ValueError, match="batch_size"):
        make(batch=0)
    with pytest.raises(ValueError, match="empty"):
        make(count=0)
    with pytest.raises(ValueError, match="leaves no batch"):
        make(count=3, drop_last=True)
