"""The trainings behind the claim prefix: one model, a task with topics, short runs that differ in the method only."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch

from volvelle.adapt import apply, remove
from volvelle.adapt.methods import Full, Method
from volvelle.adapt.prefix_methods import PrefixTuning, PromptTuning
from volvelle.claims.claim import Budget
from volvelle.data.countries import ATTRIBUTION, Country, country_examples, is_heldout, read_countries
from volvelle.data.loader import Loader
from volvelle.data.text import Corpus, Example
from volvelle.data.tokens import collate, encode_corpus
from volvelle.processor import bf16_flags
from volvelle.systems.language.load import load_language_model
from volvelle.train.language import completion_loss, held_out_loss
from volvelle.train.precision import Precision

WEBNLG = Path("..") / "shared" / "data" / "webnlg"
"""Where the folder of WebNLG is looked for; without it the countries' table stands in."""
RATES = (1e-4, 1e-3, 3e-3)
LENGTH = 10


class Task(NamedTuple):
    """Examples to learn from, and two held-out sets: of the same topics, and of topics that training never sees."""

    name: str
    train: list[Example]
    seen: list[Example]
    unseen: list[Example]


@dataclass(frozen=True)
class Result:
    """A trained model's loss a token on seen and on unseen topics, and the learning rate that was best."""

    rate: float
    seen: float
    unseen: float


@dataclass
class Bench:
    """One model and one task; every training is made once."""

    model: Any
    task: Task
    counts: tuple[int, ...]
    rates: tuple[float, ...]
    steps: int
    held: int
    precision: Any
    batch: int = 4
    seed: int = 0
    """Of what a method adds to the model."""
    results: dict[tuple[str, int], Result] = field(default_factory=dict)

    @property
    def stored_share(self) -> float:
        """Numbers in a prefix's file over the model's parameters."""
        config = self.model.config
        stored = LENGTH * 2 * config.depth * config.kv_heads * config.head_width
        return stored / sum(p.numel() for p in self.model.parameters())

    @property
    def setting(self) -> dict[str, object]:
        """What the figures depend on."""
        return {
            "model": "SmolLM2-135M-Instruct",
            "task": self.task.name,
            "prefix": f"{LENGTH} positions, network of {PrefixTuning().hidden}",
            "steps": f"{self.steps} of {self.batch} examples, AdamW, rate falling to 0",
            "learning rates": list(self.rates),
            "held out": f"{self.held} examples of seen and of unseen topics each",
            "precision": str(self.precision),
            "threads": torch.get_num_threads(),
        }

    @property
    def peers(self) -> dict[str, str]:
        """Full fine-tuning by torch's own optimiser is what prefixes are held against."""
        return {"torch.optim.AdamW": torch.__version__}

    @property
    def note(self) -> str:
        """What the task is."""
        return f"task: {self.task.name}"

    def code_loss(self, code: str) -> float:
        """Loss a token of the frozen model behind a fixed text."""
        length = len(self.model.tokenizer.encode(code))
        apply(self.model, PromptTuning(length, text=code))
        try:
            return self._loss(self.model, self.task.seen)
        finally:
            remove(self.model)

    def best(self, kind: str, n: int) -> Result:
        """The best learning rate, chosen on examples beside the n; `kind` names a method, or is a code to begin at."""
        if (kind, n) not in self.results:
            chosen = self.task.train[:n]
            tuning = self.task.train[n : n + self.held]
            runs = []
            first = min(self.counts)
            # The rate is chosen with the fewest examples, and kept.
            rates = self.rates if n == first else (self.best(kind, first).rate,)
            for rate in rates:
                model = self._trained(kind, chosen, rate)
                runs.append((self._loss(model, tuning), rate, *self._held_out(model)))
            _, rate, seen, unseen = min(runs)
            self.results[kind, n] = Result(rate, seen, unseen)
        return self.results[kind, n]

    def _held_out(self, model: Any) -> tuple[float, float]:
        return self._loss(model, self.task.seen), self._loss(model, self.task.unseen)

    def _method(self, kind: str) -> Method:
        methods: dict[str, Method] = {
            "full": Full(),
            "prefix": PrefixTuning(LENGTH),
            "random prefix": PrefixTuning(LENGTH, init="random"),
            "prompt": PromptTuning(LENGTH),
        }
        return methods.get(kind) or PrefixTuning(LENGTH, text=kind)

    def _trained(self, kind: str, examples: Sequence[Example], rate: float) -> Any:
        """A copy of the model, trained for the bench's steps."""
        method = self._method(kind)
        model = copy.deepcopy(self.model)
        if not method.trains_base and self.precision == "bf16":
            model = model.bfloat16()  # a frozen model may be stored as it is multiplied
        adapted = apply(model, method, generator=torch.Generator().manual_seed(self.seed))
        parameters = list(adapted.trainable.values())
        optimiser = torch.optim.AdamW(parameters, lr=rate, weight_decay=0.0)
        model.train()
        numbers = Precision(self.precision, model.device)
        for step, batch in zip(range(self.steps), self._batches(examples), strict=False):
            optimiser.param_groups[0]["lr"] = rate * (1 - step / self.steps)
            with numbers.autocast():
                loss = completion_loss(model, batch).value
            optimiser.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimiser.step()
        return model.eval()

    def _batches(self, examples: Sequence[Example]) -> Iterator[Any]:
        loader = self._loader(examples, shuffle=True)
        while True:
            yield from (batch.value for batch in loader)

    def _loader(self, examples: Sequence[Example], shuffle: bool = False) -> Loader:
        dataset = encode_corpus(Corpus("", list(examples)), self.model.tokenizer, context=256, on_bad="skip")
        return Loader(dataset, self.batch, seed=0, collate=collate, shuffle=shuffle, lengths=dataset.lengths)

    def _loss(self, model: Any, examples: Sequence[Example]) -> float:
        return held_out_loss(model, self._loader(examples), self.precision)["loss"]


def open_bench(budget: Budget) -> Bench:
    """Load the model and the task; raises VolvelleError when one of them cannot be had."""
    quick = budget == "quick"
    held = 16 if quick else 32
    task = webnlg(held) if (WEBNLG / "train.jsonl").is_file() else countries(held)
    model = load_language_model("smollm2", dtype=torch.float32)
    return Bench(
        model,
        task,
        counts=(50,) if quick else (50, 100, 200, 500),
        rates=RATES[:2] if quick else RATES,
        steps=8 if quick else 40,
        held=held,
        precision="bf16" if bf16_flags() else "fp32",
    )


def webnlg(held: int) -> Task:
    """WebNLG (Gardent et al. 2017): triples to text; the last third of the categories is never trained on."""
    parts = {part: [json.loads(line) for line in (WEBNLG / f"{part}.jsonl").open()] for part in ("train", "dev")}
    categories = sorted({row["category"] for row in parts["train"]})
    unseen = set(categories[-len(categories) // 3 :])
    dev = _shuffled(parts["dev"])
    sides = [[_triples(row) for row in dev if (row["category"] in unseen) == side] for side in (False, True)]
    # A few sets of facts stand in two categories.
    held_out = {example.prompt for side in sides for example in side}
    known = [_triples(row) for row in _shuffled(parts["train"]) if row["category"] not in unseen]
    train = [example for example in known if example.prompt not in held_out]
    return Task(f"WebNLG, without {', '.join(sorted(unseen))} in training", train, sides[0][:held], sides[1][:held])


def countries(held: int) -> Task:
    """Sentences over GeoNames' table: topics are continents, Africa is never trained on."""
    table = [country for country in read_countries() if not is_heldout(country.name)]
    africa = [country for country in table if country.continent == "Africa"]
    others = [country for country in _shuffled(table) if country.continent != "Africa"]
    kept = len(others) // 5
    groups = (others[kept:], others[:kept], africa)
    train, seen, unseen = (_sentences(group) for group in groups)
    name = f"templated sentences over a table of countries, a stand-in where WebNLG is absent ({ATTRIBUTION})"
    return Task(name, train, seen[:held], unseen[:held])


def _sentences(group: Sequence[Country]) -> list[Example]:
    rows = country_examples(group, split="train", per_country=8)
    return [Example(f"{row['prompt']} =>", (row["completion"],)) for row in rows]


def _triples(row: dict[str, Any]) -> Example:
    facts = " ; ".join(" | ".join(triple).replace("_", " ") for triple in row["triples"])
    return Example(f"{facts} =>", (f" {row['references'][0]}",))


def _shuffled(items: Sequence[Any]) -> list[Any]:
    return random.Random(0).sample(list(items), len(items))
