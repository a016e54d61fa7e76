"""What each rank does in the tests of multi-token prediction: train the tiny decoder with modules."""

from __future__ import annotations

from pathlib import Path

import torch
from tests.train.programs import Ear, tiny_decoder
from tests.train.toys import Folder

from volvelle.train.loop import fit
from volvelle.train.ranks import Ranks


def train_several(ranks: Ranks, out: Path, options, kind: str, *, resume=False, seed=0):
    """Train decoder and two modules on windows of numbers; leave their weights, and what they compute, in `out`."""
    from volvelle.data.loader import Loader
    from volvelle.data.packing import Windows, collate_windows
    from volvelle.systems.language.mtp import KINDS, MultiToken
    from volvelle.train.mtp import MultiTokenObjective

    out.mkdir(parents=True, exist_ok=True)
    tokens = torch.randint(61, (401,), generator=torch.Generator().manual_seed(1))
    windows = Windows(tokens, 16)
    model, ear = tiny_decoder(seed), Ear()
    both = MultiToken(model, KINDS[kind](model.config, 2))
    held = Loader(windows, 4, seed=0, collate=collate_windows, shuffle=False)
    objective = MultiTokenObjective(both, options, weight=0.6, held_out=held)
    data = Loader(windows, options.batch, seed=5, collate=collate_windows)
    result = fit(objective, data, options=options, run=Folder(out / "run"), observer=ear, resume=resume, ranks=ranks)
    with torch.no_grad():
        states = torch.stack(both.states(torch.arange(20)[None]))
    found = {"weights": both.state_dict(), "states": states, "kind": type(both).__name__}
    torch.save(found, out / f"rank-{ranks.rank}.pt")
    return {"resumed_from": result.resumed_from, "metrics": result.metrics, "said": ear.said}
