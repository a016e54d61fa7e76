"""The Inspect room: curves against formulas, fields and plans against the library, work that ends when nobody waits."""

from __future__ import annotations

import asyncio
import math
import os
import time

import pytest
import torch
from fastapi.testclient import TestClient

import volvelle.serve.studio.inspect_room as room
from volvelle.errors import VolvelleError
from volvelle.serve.errors import Refused
from volvelle.serve.studio.apart import Gone, apart
from volvelle.serve.studio.inspect_positions import CurvesAsked, curves
from volvelle.serve.studio.inspect_work import field_of, memory_of
from volvelle.serve.studio.shell import create_studio

API = "/studio/api/inspect"


def client():
    return TestClient(create_studio([room.router()]), base_url="http://127.0.0.1")


def drawn(**asked):
    """Charts by label, each with its series by name."""
    charts = curves(CurvesAsked(**asked))["charts"]
    return [{one["name"]: one["points"] for one in chart["series"]} for chart in charts]


def test_ropes_curve_is_the_sum_of_cosines():
    scores, waves = drawn(kind="rope", length=200, dim=16, base=1000)
    theta = [1000 ** (-2 * i / 16) for i in range(8)]
    for distance, score in scores["plain"]:
        assert score == pytest.approx(sum(math.cos(distance * angle) for angle in theta) / 8, abs=1e-9)
    assert [y for _, y in waves["plain"]] == pytest.approx([2 * math.pi / angle for angle in theta])


def test_linear_scaling_stretches_the_curve():
    plain, _ = drawn(kind="rope", length=101, dim=16)
    scaled, waves = drawn(kind="rope", length=401, dim=16, scaling="linear", factor=4)
    by_distance = dict(map(tuple, scaled["linear"]))
    shared = [(d, score) for d, score in plain["plain"] if 4 * d in by_distance]
    assert len(shared) > 50
    assert [by_distance[4 * d] for d, _ in shared] == pytest.approx([score for _, score in shared])
    assert set(waves) == {"plain", "linear", "trained length"}


@pytest.mark.parametrize("scaling", ["ntk", "dynamic-ntk", "yarn", "llama3"])
def test_every_scaling_slows_the_slowest_pair(scaling):
    _, waves = drawn(kind="rope", length=8192, scaling=scaling, factor=8, original=2048)
    assert waves[scaling][-1][1] > 2 * waves["plain"][-1][1]
    assert waves[scaling][0][1] == pytest.approx(waves["plain"][0][1])


def test_sinusoidal_alibi_and_t5():
    products, _ = drawn(kind="sinusoidal", length=64, dim=32)
    assert products["PE(0) · PE(m)"][0] == [0, pytest.approx(1.0)]
    bias, slopes = drawn(kind="alibi", length=50, heads=4)
    assert [y for _, y in slopes["slope"]] == [0.25, 0.0625, 0.015625, 0.00390625]
    assert bias["head 1: slope 0.25"] == [[x, pytest.approx(-0.25 * x)] for x in range(50)]
    (buckets,) = drawn(kind="t5", length=512, max_distance=128)
    assert [y for _, y in buckets["keys before, both directions"]][:9] == [0, 1, 2, 3, 4, 5, 6, 7, 8]
    assert max(y for _, y in buckets["keys after, both directions"]) == 31


def test_a_scaling_without_meaning_is_refused():
    with pytest.raises(Refused, match="t5: "):
        curves(CurvesAsked.model_construct(kind="t5", length=64, buckets=4096, max_distance=65))


def test_a_field_is_that_of_the_library():
    found = field_of("resnet-18")
    first, last = found["layers"][0], found["layers"][-1]
    axis = {"size": 7, "local": 7, "count": 7, "offset": -3, "stride": 2.0, "centre": 0.0}
    assert (first["module"], first["grid"], first["axes"]) == ("conv1", [112, 112], [axis, axis])
    assert (last["grid"], last["axes"][0]["size"], last["axes"][0]["stride"]) == ([7, 7], 435, 32.0)


@pytest.fixture
def configured(tmp_path):
    """A folder with the configuration of a small Llama of nine blocks."""
    (tmp_path / "config.json").write_text(
        '{"model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 500, "hidden_size": 64,'
        '"intermediate_size": 128, "num_hidden_layers": 9, "num_attention_heads": 4, "max_position_embeddings": 128}'
    )
    return str(tmp_path)


def test_a_plan_is_the_trainings_own_estimate(configured):
    from volvelle.inspect.memory_models import find_config
    from volvelle.train.estimate import estimate_memory

    step = {
        "method": "full",
        "precision": "fp32",
        "batch": 2,
        "length": 64,
        "optimizer": "adamw",
        "checkpointing": False,
    }
    found = memory_of(configured, **step, cards=0, gigabytes=80, shard="ddp")
    ids, targets = torch.zeros(2, 2, 64, dtype=torch.long)
    known = estimate_memory(find_config(configured).config, {"ids": ids, "targets": targets})
    assert (found["sizes"]["weights"], found["sizes"]["optimiser"]) == (known.weights, known.optimizer)
    assert found["total"] == known.total
    assert (found["fits"], found["how"]) == (None, "planned at 3 and 5 blocks, continued to 9")
    tight = memory_of(configured, **step | {"checkpointing": True}, cards=1, gigabytes=0.001, shard="ddp")
    assert tight["fits"] is False
    assert tight["sizes"]["activations"] < found["sizes"]["activations"]


def test_what_cannot_be_inspected_is_said():
    with client() as studio:
        assert "resnet-18" in studio.get(API).json()["backbones"]
        for path, body, said in [
            ("field", {"model": "../resnet"}, "is not a backbone here"),
            ("memory", {"model": "/etc"}, "is not a model whose configuration is known"),
            ("memory", {"model": "gpt2", "length": 4096}, "gpt2 has a context of 1024 tokens"),
            ("memory", {"model": "gpt2", "batch": 0}, "batch"),
            ("trace", {"ranks": 9}, "ranks"),
            ("trace", {"algorithm": "two-level"}, "algorithm"),
            ("curves", {"kind": "none"}, "kind"),
        ]:
            answer = studio.post(f"{API}/{path}", json=body)
            assert answer.status_code == 400
            assert said in answer.json()["error"]["message"]


def test_an_answer_is_kept_for_the_next_one_that_asks(monkeypatch):
    calls = []

    async def counted(program, arguments, *, gone):
        calls.append(arguments)
        return {"model": arguments[1]["name"]}

    monkeypatch.setattr(room, "apart", counted)
    with client() as studio:
        for name in ("snet49", "snet49", "resnet-50"):
            assert studio.post(f"{API}/field", json={"model": name}).json() == {"model": name}
    assert [given["name"] for _, given in calls] == ["snet49", "resnet-50"]


def pid_and(what, file):
    """A program for a process of its own; `file` says which process it was."""
    with open(file, "w", encoding="utf-8") as out:
        out.write(str(os.getpid()))
    if what == "fail":
        raise VolvelleError("not like this")
    if what == "die":
        os._exit(3)
    if what == "sleep":
        time.sleep(600)
    return os.getpid()


async def never():
    return False


def test_work_apart_answers_fails_and_ends(tmp_path):
    file = tmp_path / "pid"

    async def asked_until_written():
        return file.exists() and file.read_text() != ""

    async def some():
        assert await apart(pid_and, ("answer", file), gone=never) == int(file.read_text()) != os.getpid()
        with pytest.raises(VolvelleError, match="not like this"):
            await apart(pid_and, ("fail", file), gone=never)
        with pytest.raises(VolvelleError, match="ended without an answer"):
            await apart(pid_and, ("die", file), gone=never)
        file.unlink()
        with pytest.raises(Gone):
            await apart(pid_and, ("sleep", file), gone=asked_until_written)
        with pytest.raises(ProcessLookupError):
            os.kill(int(file.read_text()), 0)

    asyncio.run(some())
