"""The memory planner against the profiler: predicted and measured peak of tensor allocations, on real training steps.

    python -m benchmarks.planner [--only NAME ...] [--threads 2]     writes results/planner.json and prints the table

A run of some cases keeps the others' rows; the summary is over all of them.

Each measurement builds and trains its model for real, with random weights, in a process of its own; each plan is made
in another one and allocates nothing. Target: every error within 5 %, the median within 1 %. The resident set is shown
beside it: it is another quantity, which the planner does not promise.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

if not __package__:  # run as a file
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from benchmarks import protocol
from benchmarks.targets import PLANNER
from volvelle.inspect import measure_memory, measure_peak, plan_memory, plan_program
from volvelle.inspect.memory_measure import resident

SMOLLM2 = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": True,
}


@dataclass(frozen=True)
class Case:
    """One training step: a name, the model, its inputs, and the options of `plan_memory`.

    `program` instead of `build` is a whole program, as `plan_program` takes it.
    """

    title: str
    build: Callable[[], nn.Module] | None = None
    batch: Any = None
    options: dict[str, Any] = field(default_factory=dict)
    program: Callable[[Any], Callable[[], None]] | None = None


def decoder() -> nn.Module:
    from volvelle.systems.language.decoder import Decoder
    from volvelle.systems.language.huggingface_config import config_from_dict

    return Decoder(config_from_dict(SMOLLM2))


def decoder_loss(model: nn.Module, batch: Any) -> Tensor:
    from volvelle.train.language import completion_loss

    return completion_loss(model, batch).value


def hugging_face(model: str, config: str, **values: Any) -> Callable[[], nn.Module]:
    """A transformers model with weights that are not initialised: memory does not depend on their values."""

    def build() -> nn.Module:
        import transformers
        from transformers.initialization import no_init_weights

        with no_init_weights():
            return getattr(transformers, model)(getattr(transformers, config)(**values))

    return build


def smollm2_like() -> Callable[[], nn.Module]:
    values = {name: value for name, value in SMOLLM2.items() if name != "architectures"}
    return hugging_face("LlamaForCausalLM", "LlamaConfig", use_cache=False, **values)


def own_tokens(batch: int, length: int) -> dict[str, Tensor]:
    ids = torch.zeros(batch, length, dtype=torch.long)
    return {"ids": ids, "targets": ids}


def tokens(batch: int, length: int, *, mask: bool = False) -> dict[str, Tensor]:
    ids = torch.zeros(batch, length, dtype=torch.long)
    return {"input_ids": ids, "labels": ids} | ({"attention_mask": torch.ones_like(ids)} if mask else {})


def images(batch: int) -> dict[str, Tensor]:
    return {"pixel_values": torch.zeros(batch, 3, 224, 224), "labels": torch.zeros(batch, dtype=torch.long)}


def two_players(session: Any) -> Callable[[], None]:
    """A small GAN: two networks, two optimisers, two backward passes a step."""
    generator = nn.Sequential(
        nn.ConvTranspose2d(64, 256, 4, 1, 0),
        nn.BatchNorm2d(256),
        nn.ReLU(),
        nn.ConvTranspose2d(256, 128, 4, 2, 1),
        nn.BatchNorm2d(128),
        nn.ReLU(),
        nn.ConvTranspose2d(128, 64, 4, 2, 1),
        nn.BatchNorm2d(64),
        nn.ReLU(),
        nn.ConvTranspose2d(64, 3, 4, 2, 1),
        nn.Tanh(),
    )
    critic = nn.Sequential(
        nn.Conv2d(3, 64, 4, 2, 1),
        nn.LeakyReLU(0.2),
        nn.Conv2d(64, 128, 4, 2, 1),
        nn.BatchNorm2d(128),
        nn.LeakyReLU(0.2),
        nn.Conv2d(128, 256, 4, 2, 1),
        nn.BatchNorm2d(256),
        nn.LeakyReLU(0.2),
        nn.Flatten(),
        nn.Linear(256 * 16, 1),
    )
    players = [torch.optim.Adam(player.parameters()) for player in (generator, critic)]
    session.adopt(generator, critic, *players)

    def step() -> None:
        real, noise = torch.randn(64, 3, 32, 32), torch.randn(64, 64, 1, 1)
        with session.tracker.during("forward"):
            loss = critic(generator(noise).detach()).mean() - critic(real).mean()
        with session.tracker.during("backward"):
            loss.backward()
        with session.tracker.during("optimiser"):
            players[1].step()
            players[1].zero_grad()
        with session.tracker.during("forward"):
            loss = -critic(generator(noise)).mean()
        with session.tracker.during("backward"):
            loss.backward()
        with session.tracker.during("optimiser"):
            players[0].step()
            players[0].zero_grad()
            players[1].zero_grad()

    return step


EFFICIENTNET = {"image_size": 224, "width_coefficient": 1.0, "depth_coefficient": 1.0, "hidden_dim": 1280}
OWN = {"loss": decoder_loss}
CASES = {
    "smollm2-full": Case("SmolLM2-135M, full", decoder, own_tokens(2, 256), OWN),
    "smollm2-lora": Case("SmolLM2-135M, LoRA", decoder, own_tokens(2, 256), {**OWN, "method": "lora"}),
    "smollm2-checkpointed": Case(
        "SmolLM2-135M, full, checkpointed", decoder, own_tokens(4, 512), {**OWN, "checkpointing": True}
    ),
    "smollm2-autocast": Case(
        "SmolLM2-135M, full, bf16 autocast", decoder, own_tokens(2, 512), {**OWN, "precision": "amp"}
    ),
    "smollm2-masters": Case(
        "SmolLM2-135M, full, bf16 with fp32 masters", decoder, own_tokens(2, 256), {**OWN, "precision": "bf16-master"}
    ),
    "smollm2-adafactor": Case(
        "SmolLM2-135M, full, bf16, Adafactor",
        decoder,
        own_tokens(2, 256),
        {**OWN, "precision": "bf16", "optimizer": "adafactor"},
    ),
    "smollm2-prefix": Case(
        "SmolLM2-135M shape in transformers, prefix", smollm2_like(), tokens(2, 256), {"method": "prefix"}
    ),
    "smollm2-adapter": Case(
        "SmolLM2-135M shape in transformers, adapter", smollm2_like(), tokens(2, 256), {"method": "adapter"}
    ),
    "llama-full": Case("SmolLM2-135M shape in transformers, full", smollm2_like(), tokens(2, 256, mask=True)),
    "llama-lora": Case(
        "SmolLM2-135M shape in transformers, LoRA", smollm2_like(), tokens(2, 512, mask=True), {"method": "lora"}
    ),
    "bert": Case(
        "BERT base (transformers), masked LM", hugging_face("BertForMaskedLM", "BertConfig"), tokens(8, 128, mask=True)
    ),
    "gpt2-dropout": Case(
        "GPT-2 small (transformers), dropout 0.1", hugging_face("GPT2LMHeadModel", "GPT2Config"), tokens(2, 256)
    ),
    "resnet50": Case(
        "ResNet-50 (transformers)",
        hugging_face("ResNetForImageClassification", "ResNetConfig", num_labels=1000),
        images(16),
        {"optimizer": "momentum"},
    ),
    "resnet50-autocast": Case(
        "ResNet-50 (transformers), bf16 autocast",
        hugging_face("ResNetForImageClassification", "ResNetConfig", num_labels=1000),
        images(16),
        {"optimizer": "momentum", "precision": "amp"},
    ),
    "efficientnet-b0": Case(
        "EfficientNet-B0 (transformers)",
        hugging_face("EfficientNetForImageClassification", "EfficientNetConfig", dropout_rate=0.2, **EFFICIENTNET),
        images(16),
        {"optimizer": "momentum"},
    ),
    "efficientnet-b0-autocast": Case(
        "EfficientNet-B0 (transformers), bf16 autocast",
        hugging_face("EfficientNetForImageClassification", "EfficientNetConfig", dropout_rate=0.2, **EFFICIENTNET),
        images(16),
        {"optimizer": "momentum", "precision": "amp"},
    ),
    "vit": Case("ViT-B/16 (transformers)", hugging_face("ViTForImageClassification", "ViTConfig"), images(8)),
    "vit-autocast-checkpointed": Case(
        "ViT-B/16 (transformers), bf16 autocast, checkpointed",
        hugging_face("ViTForImageClassification", "ViTConfig"),
        images(8),
        {"precision": "amp", "checkpointing": True},
    ),
    "convnext": Case(
        "ConvNeXt-T (transformers), drop path 0.1",
        hugging_face("ConvNextForImageClassification", "ConvNextConfig", drop_path_rate=0.1),
        images(8),
    ),
    "two-players": Case("GAN, two players (toy)", program=two_players),
}


class _RealSession:
    """What `two_players` asks of a planning session, doing nothing: for the measured run."""

    class tracker:
        @staticmethod
        def during(phase: str) -> contextlib.AbstractContextManager[None]:
            return contextlib.nullcontext()

    @staticmethod
    def adopt(*parts: Any) -> None:
        return None


def plan(case: Case) -> dict[str, Any]:
    """Plan in this process, and watch that its memory does not grow by anything like the plan."""
    if case.build is not None:  # one small plan loads what fake tensors need
        plan_memory(lambda: nn.Linear(2, 2), torch.zeros(1, 2), loss=lambda model, x: model(x).sum())
    before = resident()
    began = time.perf_counter()
    if case.program is not None:
        planned = plan_program(case.program)
    else:
        planned = plan_memory(case.build, case.batch, **case.options)
    return {
        "planned": planned.peak,
        "composition": planned.composition,
        "at": f"{planned.op} in {planned.phase}",
        "branches": planned.branches,
        "plan_seconds": time.perf_counter() - began,
        "plan_resident_growth": resident("VmHWM") - before,
    }


def measure(case: Case) -> dict[str, Any]:
    """Train for real."""
    began = time.perf_counter()
    if case.program is not None:
        program = case.program
        measured = measure_peak(lambda: program(_RealSession))
    else:
        measured = measure_memory(case.build, case.batch, **case.options)
    seconds = time.perf_counter() - began
    return {"measured": measured.peak, "resident_growth": measured.resident_growth, "measure_seconds": seconds}


def row_of(name: str, threads: int) -> dict[str, Any]:
    """Both halves of one case, each in its own process."""
    row: dict[str, Any] = {"case": name, "title": CASES[name].title}
    for half in ("plan", "measure"):
        row |= protocol.in_subprocess(Path(__file__), ["--half", half, "--case", name, "--threads", str(threads)])
    row["error"] = row["planned"] / row["measured"] - 1
    return row


def line(row: dict[str, Any]) -> str:
    return (
        f"{row['title']:<54} {row['planned'] / 1e6:>9.2f} {row['measured'] / 1e6:>9.2f} {row['error']:>+8.3%} "
        f"{row['planned'] - row['measured']:>11,} {row['resident_growth'] / 1e6:>8.0f} {row['plan_seconds']:>6.1f}"
    )


HEADER = f"{'':<54} {'plan MB':>9} {'real MB':>9} {'error':>8} {'bytes':>11} {'RSS MB':>8} {'plan s':>6}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=list(CASES), default=list(CASES), metavar="NAME")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--half", choices=("plan", "measure"), help=argparse.SUPPRESS)
    parser.add_argument("--case", help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.half:
        warnings.simplefilter("ignore")
        print(json.dumps((plan if options.half == "plan" else measure)(CASES[options.case])))
        return 0
    with protocol.alone():
        for name in options.only:
            row = row_of(name, options.threads)
            keep(row, options.threads)
            print(line(row), flush=True)
    payload = protocol.read("planner")
    print(HEADER, *(line(row) for row in payload["rows"]), sep="\n")
    print("{cases} cases: worst {worst:.3%}, median {median:.4%}".format(**payload["summary"]))
    print(f"target 5 % and 1 %: {'held' if payload['summary']['held'] else 'NOT held'}")
    return 0 if payload["summary"]["held"] else 1


def keep(row: dict[str, Any], threads: int) -> None:
    """Put one row into results/planner.json beside those of the other cases, in the order of CASES."""
    rows = {old["case"]: old for old in protocol.read("planner").get("rows", [])} | {row["case"]: row}
    ordered = [rows[name] for name in CASES if name in rows]
    errors = [abs(found["error"]) for found in ordered]
    worst, median = max(errors), statistics.median(errors)
    held = worst <= PLANNER["worst"] and median <= PLANNER["median"]
    summary = {"cases": len(ordered), "worst": worst, "median": median, "held": held}
    machine = protocol.machine(["torch", "transformers"]) | {"threads": threads}
    protocol.write("planner", {"machine": machine, "summary": summary, "rows": ordered})


if __name__ == "__main__":
    raise SystemExit(main())
