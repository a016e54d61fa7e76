"""The claim on multi-token prediction compares like with like."""

import torch

from volvelle.claims import mtp


def test_both_kinds_and_none_begin_alike_and_learn():
    train, held = mtp.corpus()
    size = mtp.SIZES["quick"] | {"steps": 20}
    found = {kind: mtp.run(kind, train, held, 0, size) for kind in (None, "sequential", "parallel")}
    assert set(found[None]) == {"loss", "perplexity"}
    for kind in ("sequential", "parallel"):
        assert set(found[kind]) == {"loss", "perplexity", "accuracy", "token_2_loss", "token_2_accuracy"}
        assert found[kind]["loss"] < 4 > found[kind]["token_2_loss"]  # log 256 is 5.5
        assert 0 < found[kind]["token_2_accuracy"] < 1
    # Before the first update nothing tells the three apart.
    untrained = {kind: mtp.run(kind, train[:200], held, 0, size | {"steps": 1})["loss"] for kind in found}
    assert max(untrained.values()) - min(untrained.values()) < 0.2
    assert torch.get_num_threads() >= 1
