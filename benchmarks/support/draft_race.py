"""Rounds of answers with and without drafts: each round takes one prompt of every kind, and every writer answers it.

How much drafts bring depends on the prompt, how fast the machine is on the minute. So the writers take turns at each
prompt, the rounds go through the prompts, and figures are of as many rounds as a kind has prompts.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from benchmarks import protocol
from volvelle.decode.request import Generation

Written = list[int] | Generation
Writer = Callable[[list[int]], Written]


@dataclass
class Raced:
    """What a race gave: seconds a token in each round, of every writer and of `writer|kind`, and the answers."""

    series: dict[str, protocol.Series] = field(default_factory=dict)
    answers: dict[tuple[str, str], list[Written]] = field(default_factory=dict)

    def add(self, who: str, kind: str | None, wall: float, cpu: float, tokens: int) -> None:
        """One round's seconds for `tokens` tokens."""
        one = self.series.setdefault(who if kind is None else f"{who}|{kind}", protocol.Series())
        one.wall.append(wall / tokens)
        one.cpu.append(cpu / tokens)

    def keep(self, last: int) -> None:
        """Forget all rounds but the last ones; their seconds stay as `dropped`."""
        for one in self.series.values():
            one.dropped += one.wall[:-last]
            one.wall, one.cpu = one.wall[-last:], one.cpu[-last:]
        for done in self.answers.values():
            del done[:-last]


def race(
    writers: Mapping[str, Writer], prompts: Mapping[str, Sequence[list[int]]], *, steady: Sequence[str], most: int
) -> Raced:
    """Answer in rounds, until the `steady` writers were calm through all prompts, or after `most` rounds.

    The seconds a token of those writers hardly depend on the prompt: where they do not agree, the machine changed.
    """
    rounds, raced, names = min(map(len, prompts.values())), Raced(), list(writers)
    for name in names:  # the first answer of each compiles and allocates
        writers[name](next(iter(prompts.values()))[0])
    for number in range(max(rounds, most)):
        totals = {name: [0.0, 0.0, 0] for name in names}
        for place, kind in enumerate(prompts):
            turn = (number + place) % len(names)
            for name in names[turn:] + names[:turn]:
                ids, done = prompts[kind][number % rounds], list[Written]()
                gc.collect()
                wall, cpu = protocol.timed(lambda name=name, ids=ids, done=done: done.append(writers[name](ids)))
                raced.answers.setdefault((name, kind), []).append(done[0])
                tokens = len(tokens_of(done[0]))
                raced.add(name, kind, wall, cpu, tokens)
                for at, more in enumerate((wall, cpu, tokens)):
                    totals[name][at] += more
        for name, (wall, cpu, tokens) in totals.items():
            raced.add(name, None, wall, cpu, int(tokens))
        told = ", ".join(f"{name} {1 / raced.series[name].wall[-1]:.0f}" for name in names)
        print(f"round {number + 1}, tokens/s: {told}", flush=True)
        if number + 1 >= rounds:
            raced.keep(rounds)
            if all(raced.series[name].jump <= protocol.MAX_JUMP for name in steady):
                break
    return raced


def tokens_of(answer: Written) -> list[int]:
    """The tokens of an answer, whoever wrote it."""
    return answer.tokens if isinstance(answer, Generation) else answer
