"""Pictures from a prior: speed beside transformers and beside a loop without a cache, drafts, windows, positions.

    python -m benchmarks.generation [--quick] [--only sampling drafts window positions] [--rounds 5] [--threads N]
                                    [--run RUN] [--drafter RUN] [--data FOLDER] [--steps 600]

sampling   greedy codes of a random prior of taming-transformers' shape (8 layers of 256, 16 x 16 codes of 1,024) in
           fp32: `draw_images`, transformers' generate on the same folder of weights, and a loop that runs the whole
           text again for every code, taming's default; and whether the codes are the same. The last for a single
           picture only: for many it takes minutes, and gains nothing by them
drafts     pictures of --run at temperature 1 and greedy ones, with --drafter (a run of `volvelle draft`) and without
window     nats a code of pictures of --data twice as large as --run was trained on, outside its own size: the window of
           RowWindow, the window run anew for each code, and positions that simply go on
positions  held-out nats a code of fresh priors on the codes of --run, by how they know where a code stands
Writes results/generation.json; --quick prints only. Parts without what they need are left out.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

if not __package__:  # run as a file
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from benchmarks import protocol, tables
from benchmarks.support import prior_trials
from volvelle.decode.drafters.opening import open_drafter
from volvelle.decode.images import draw_images
from volvelle.decode.options import Sampling
from volvelle.systems.generation.layout import Layout
from volvelle.systems.generation.prior import Prior, read_prior
from volvelle.systems.language.config import GatedMLP, LanguageConfig, RMSNorm, Rope
from volvelle.systems.language.decoder import Decoder
from volvelle.systems.language.huggingface import write_folder
from volvelle.systems.language.projections import fuse_projections

PARTS = ("sampling", "drafts", "window", "positions")
HF, UNCACHED = "transformers", "no cache"
TAMING = Layout(codes=1024, rows=16, columns=16)
SMALL = Layout(codes=64, rows=4, columns=4)
BATCHES = (1, 8, 32)


def main() -> None:
    parser = protocol.parser(__doc__, PARTS)
    parser.add_argument("--run", type=Path, help="a run of train prior")
    parser.add_argument("--drafter", type=Path, help="a run of draft for it")
    parser.add_argument("--data", help="pictures for window")
    parser.add_argument("--steps", type=int, default=600, help="training steps of each of the positions")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    rounds = options.rounds or (1 if options.quick else 5)
    with protocol.alone():
        record = protocol.read("generation") | {"machine": protocol.machine(("torch", "transformers"))}
        if "sampling" in options.only:
            record["sampling"] = sampling(rounds, quick=options.quick)
        if "drafts" in options.only and options.run and options.drafter:
            record["drafts"] = drafts(options.run, options.drafter, rounds)
        if "window" in options.only and options.run and options.data:
            record["window"] = prior_trials.window(read_prior(options.run), options.data, 4 if options.quick else 64)
        if "positions" in options.only and options.run:
            record["positions"] = prior_trials.positions(options.run, 2 if options.quick else options.steps)
        if options.quick:
            print({part: record.get(part) for part in options.only})
            return
        print(protocol.write("generation", record))
        tables.write("generation")


def random_prior(layout: Layout, depth: int, width: int) -> Prior:
    """A prior of that shape with weights lively enough that its pictures are not all one code."""
    torch.manual_seed(0)
    config = LanguageConfig(
        "llama", vocabulary=layout.vocabulary, width=width, depth=depth, heads=width // 32, context=layout.context,
        norm=RMSNorm(), mlp=GatedMLP(-(-width * 8 // 3 // 32) * 32), position=Rope(), init_std=0.1,
    )  # fmt: skip
    return Prior(Decoder(config).eval(), layout)


def sampling(rounds: int, *, quick: bool) -> list[dict[str, Any]]:
    """Seconds of a batch of pictures of each way, and how many codes agree with transformers'."""
    prior = random_prior(SMALL, 2, 64) if quick else random_prior(TAMING, 8, 256)
    with tempfile.TemporaryDirectory() as folder:
        theirs = _transformers(prior, Path(folder))
    found = []
    for batch in BATCHES[:2] if quick else BATCHES:
        prompt = torch.tensor([prior.prompt()] * batch)
        variants: dict[str, Callable[[], Tensor]] = {
            HF: lambda prompt=prompt: _theirs(theirs, prompt, prior.layout),
            "ours": lambda batch=batch: draw_images(prior, [None] * batch, sampling=Sampling()).codes.flatten(1),
        }
        if batch == 1:
            variants[UNCACHED] = lambda prompt=prompt: _uncached(prior, prompt)
        codes = {who: work() for who, work in variants.items()}
        baselines = [who for who in variants if who != "ours"]
        same = {who: float((codes[who] == codes[HF]).double().mean()) for who in variants if who != HF}
        series = protocol.interleave(variants, rounds=rounds, most=1 if quick else 3 * rounds, steady=baselines)
        row = {
            "batch": batch,
            "codes": prior.layout.picture,
            "same": same,
            "distinct": len(codes["ours"].unique()),
            "speed": {who: protocol.compare(series, "ours", who) for who in baselines},
            "seconds": {who: one.summary() for who, one in series.items()},
        }
        told = ", ".join(f"{protocol.shown(speed)} of {who}" for who, speed in row["speed"].items())
        print(f"sampling: batch {batch}: {told}; same codes {same}", flush=True)
        found.append(row)
    return found


def _transformers(prior: Prior, folder: Path) -> Any:
    """The same weights in transformers' Llama."""
    from transformers import AutoModelForCausalLM

    write_folder(prior.model, folder)
    return AutoModelForCausalLM.from_pretrained(folder).eval()


@torch.no_grad()
def _theirs(model: Any, prompt: Tensor, layout: Layout) -> Tensor:
    """Greedy codes (b, places) by generate; what it must not write is in the folder's generation_config.json."""
    whole = model.generate(
        prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=layout.picture, do_sample=False
    )
    return whole[:, prompt.shape[1] :]


@torch.no_grad()
def _uncached(prior: Prior, prompt: Tensor) -> Tensor:
    """Greedy codes by a loop that runs the whole text again for every code, by the same fast path as ours."""
    fuse_projections(prior.model)
    ids = prompt
    for _ in range(prior.layout.picture):
        hidden = prior.model.hidden(ids)[:, -1:]
        ids = torch.cat((ids, prior.model.logits(hidden).argmax(-1)), 1)
    return ids[:, prompt.shape[1] :]


def drafts(run: Path, drafter: Path, rounds: int) -> list[dict[str, Any]]:
    """Seconds for a picture at batch 1 with drafts and without, and codes a step; drawn, and greedily."""
    prior = read_prior(run)
    made, classes = open_drafter(drafter, prior.model), max(1, len(prior.layout.classes))
    shows = [i % classes if prior.layout.classes else None for i in range(8)]
    found: list[dict[str, Any]] = []
    for temperature in (1.0, 0.0):
        sampling, gained = Sampling(temperature=temperature, seed=0), list[float]()

        def with_drafts(sampling: Sampling = sampling, gained: list[float] = gained) -> None:
            gained.append(draw_images(prior, shows, sampling=sampling, batch=1, drafter=made).accepted_per_step)

        def plain(sampling: Sampling = sampling) -> None:
            draw_images(prior, shows, sampling=sampling, batch=1)

        series = protocol.interleave(
            {"plain": plain, "drafts": with_drafts}, rounds=rounds, most=3 * rounds, steady=["plain"]
        )
        speed, names = protocol.compare(series, "drafts", "plain"), {"run": run.name, "drafter": drafter.name}
        found.append(names | {"temperature": temperature, "speed": speed, "codes_per_step": gained[-1]})
        print(f"drafts: temperature {temperature}: {protocol.shown(speed)} of plain, {gained[-1]:.2f} codes a step")
    return found


if __name__ == "__main__":
    main()
