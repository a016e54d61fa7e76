"""The loader with threads and with processes against torch's DataLoader: decoding images, and work bound to Python.

    python -m benchmarks.loader [--quick] [--only jpeg camvid python] [--rounds 5] [--workers 2]

Every variant reads the same samples with the same collate; workers are started before the clock. Writes
results/loader.json; --quick reads little, and prints only.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader

if not __package__:  # run as a file
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from benchmarks import protocol, tables
from volvelle.data.loader import Loader

ROOT = Path(__file__).resolve().parent.parent
BATCH = 16
SIZE = 224
TITLES = {
    "jpeg": "JPEG, 640 x 480, decoded and resized to 224 x 224",
    "camvid": "CamVid scenes (JPEG, 480 x 360), decoded and resized",
    "python": "Python code that holds the lock, 30,000 steps of a loop a sample",
}


class Images:
    """Image files, decoded and resized to a float tensor (3, SIZE, SIZE)."""

    def __init__(self, files: list[Path]):
        self.files = files

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> torch.Tensor:
        with Image.open(self.files[index]) as image:
            pixels = np.asarray(image.convert("RGB").resize((SIZE, SIZE), Image.Resampling.BILINEAR))
        return torch.from_numpy(pixels.transpose(2, 0, 1).copy()).float().div_(255)


class Numbers:
    """A loop in Python, as in tokenizers, parsers and augmentation written by hand."""

    def __init__(self, count: int):
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> torch.Tensor:
        state = index
        for _ in range(30_000):
            state = (state * 1103515245 + 12345) % 2147483648
        return torch.tensor([state])


def main() -> None:
    options = _arguments()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch, protocol.alone():
        facts = protocol.machine(("torch", "pillow", "numpy"))
        rows = protocol.read("loader").get("rows", [])
        for name in options.only:
            dataset = DATASETS[name](Path(scratch), options.quick)
            if dataset is None:
                print(f"{name}: the data folder is absent, skipped")
                continue
            rows = protocol.keep(rows, measure(name, dataset, options.workers, options.rounds))
            if not options.quick:  # after every row: a run that is cut keeps what it measured
                print(protocol.write("loader", {"batch": BATCH, "machine": facts, "rows": rows}))
                tables.write("loader")


def measure(name: str, dataset: Any, workers: int, rounds: int) -> dict[str, Any]:
    """One epoch of every variant a round."""
    ours = partial(Loader, dataset, BATCH, seed=0, collate=torch.stack, shuffle=False)
    loaders: dict[str, Iterable] = {
        "ours, no workers": ours(),
        "ours, threads": ours(workers="threads", num_workers=workers),
        "ours, processes": ours(workers="processes", num_workers=workers),
        "torch, processes": DataLoader(
            dataset, BATCH, collate_fn=torch.stack, num_workers=workers, persistent_workers=True
        ),
    }
    series = protocol.interleave(
        {who: partial(_epoch, one) for who, one in loaders.items()}, rounds=rounds, most=3 * rounds
    )
    for loader in loaders.values():
        if isinstance(loader, Loader):
            loader.close()
    rate = {who: len(dataset) / one.summary()["wall_median"] for who, one in series.items()}
    speed = {who: protocol.compare(series, who, "torch, processes") for who in series if who.startswith("ours")}
    print(f"{name}: " + ", ".join(f"{who} {value:.0f}/s" for who, value in rate.items()))
    for who, found in speed.items():
        print(f"  {who}: {protocol.shown(found)} of torch", flush=True)
    seconds = {who: one.summary() for who, one in series.items()}
    return {
        "what": name, "title": TITLES[name], "samples": len(dataset), "workers": workers, "samples_per_second": rate,
        "seconds": seconds, "speed_against_torch": speed,
    }  # fmt: skip


def _epoch(loader: Iterable) -> int:
    return sum(1 for _ in loader)


def _jpeg(scratch: Path, quick: bool) -> Images:
    """Textured images, so that their JPEG files are as large as photographs are."""
    draw, files = np.random.default_rng(0), []
    for i in range(32 if quick else 512):
        coarse = Image.fromarray(draw.integers(0, 256, (60, 80, 3), dtype=np.uint8))
        files.append(scratch / f"{i:04}.jpg")
        coarse.resize((640, 480), Image.Resampling.BICUBIC).save(files[-1], quality=90)
    return Images(files)


def _camvid(_: Path, quick: bool) -> Images | None:
    folder = ROOT.parent / "shared" / "data" / "camvid" / "train"
    files = sorted(folder.glob("*.jpg"))
    return Images(files[:32] if quick else files) if files else None


def _numbers(_: Path, quick: bool) -> Numbers:
    return Numbers(64 if quick else 512)


DATASETS: dict[str, Callable[[Path, bool], Any]] = {"jpeg": _jpeg, "camvid": _camvid, "python": _numbers}


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a smoke run: little work, nothing written")
    parser.add_argument("--only", nargs="+", choices=DATASETS, default=list(DATASETS))
    parser.add_argument("--rounds", type=int, default=5, help="at least 5 for figures to publish")
    parser.add_argument("--workers", type=int, default=2)
    return parser.parse_args()


if __name__ == "__main__":
    main()
