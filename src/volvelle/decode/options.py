"""How the next token is chosen, as frozen data. Importing this file does not import torch."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from numbers import Integral
from typing import Any, Literal

from volvelle.errors import UsageError
from volvelle.systems.language.encoder_decoder_config import EncoderDecoderConfig, Writing


@dataclass(frozen=True)
class Sampling:
    """Options for choosing tokens; the defaults are greedy decoding.

    The rules apply in this order, as in transformers: `repetition_penalty` (> 1 makes tokens of the prompt and of the
    answer less likely; Keskar et al. 2019), `presence_penalty` and `frequency_penalty` (what is taken off the logit of
    a token that the answer holds, once and for each time; OpenAI's, from -2 to 2), `temperature` (0 = always the
    likeliest token), `top_k` (keep the k likeliest), `top_p` (keep the likeliest tokens up to that share; Holtzman et
    al. 2020), `min_p` (keep tokens of at least that fraction of the likeliest one's probability; Nguyen et al. 2024).
    With a `seed` a request gives the same tokens every time, whatever else is in its batch; without one it is drawn
    from torch's global generator. That holds with drafts too that are chosen (lookup, n-grams, Medusa's likeliest
    guesses). Drafts that are drawn (a smaller model's, MTP modules', Medusa's with `drawn`) take random numbers by
    their lengths: with them it holds for the same texts together, and where the policy is fixed (`ALWAYS`, which
    `generate` takes where there is a seed and no `policy=`).

    >>> Sampling(temperature=0.7, top_p=0.9).greedy, Sampling().greedy
    (False, True)
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int | None = None

    def __post_init__(self) -> None:
        checks = {
            f"temperature must be 0 (greedy) or at least 1e-6, got {self.temperature}": (
                self.temperature == 0 or 1e-6 <= self.temperature < float("inf")
            ),
            f"top_k must be a whole number of at least 1, got {self.top_k}": (
                self.top_k is None or (isinstance(self.top_k, Integral) and self.top_k >= 1)
            ),
            f"top_p must be in (0, 1], got {self.top_p}": self.top_p is None or 0 < self.top_p <= 1,
            f"min_p must be in [0, 1], got {self.min_p}": self.min_p is None or 0 <= self.min_p <= 1,
            f"repetition_penalty must be above 0, got {self.repetition_penalty}": (
                0 < self.repetition_penalty < float("inf")
            ),
            f"presence_penalty must be in [-2, 2], got {self.presence_penalty}": -2 <= self.presence_penalty <= 2,
            f"frequency_penalty must be in [-2, 2], got {self.frequency_penalty}": -2 <= self.frequency_penalty <= 2,
            f"seed must be a whole number of 64 bits, from -2^63 to 2^64 - 1, got {self.seed}": (
                self.seed is None or (isinstance(self.seed, Integral) and -(2**63) <= self.seed < 2**64)
            ),
        }
        for message, holds in checks.items():
            if not holds:
                raise UsageError(f"sampling: {message}")

    @property
    def greedy(self) -> bool:
        """Whether the likeliest token is always taken."""
        return self.temperature == 0

    @property
    def counts(self) -> bool:
        """Whether it matters how often the answer holds a token."""
        return self.presence_penalty != 0 or self.frequency_penalty != 0


@dataclass(frozen=True)
class Rules:
    """What an answer must and must not hold, whatever is likely; each is a rule of the same name in transformers.

    `min_tokens`: no end before so many tokens (min_new_tokens). `no_repeat_ngram_size` n: no n tokens in a row that
    occur in the prompt or the answer already (Paulus et al. 2018); 0 = no such rule. `forced_first` is the answer's
    first token, `forced_last` its last one where `max_tokens` cuts it off; None: what the model's configuration asks
    for (BART's forced_bos_token_id and forced_eos_token_id).
    """

    min_tokens: int = 0
    no_repeat_ngram_size: int = 0
    forced_first: int | None = None
    forced_last: int | None = None

    def __post_init__(self) -> None:
        for name in ("min_tokens", "no_repeat_ngram_size", "forced_first", "forced_last"):
            value = getattr(self, name)
            if value is not None and value < 0:
                raise UsageError(f"rules.{name} must not be negative, got {value}")

    def bind(self, written: int, max_tokens: int) -> bool:
        """Whether any rule has a say on the token after `written` ones of at most `max_tokens`."""
        return (
            written < self.min_tokens
            or self.no_repeat_ngram_size > 0
            or (written == 0 and self.forced_first is not None)
            or (written == max_tokens - 1 and self.forced_last is not None)
        )


@dataclass(frozen=True)
class Beams:
    """Beam search: the `width` likeliest beginnings of an answer are continued side by side (num_beams).

    A finished answer's score is its log-probability / (its tokens ** `length_penalty`): above 0 longer ones gain.
    `early_stopping` True ends the search with the `width`-th finished answer, False when the best open one would not
    reach the worst finished one if it ended now, "never" when it could not even at the length that suits it best.

    >>> Beams(width=4, length_penalty=2.0).early_stopping
    False
    """

    width: int = 4
    length_penalty: float = 1.0
    early_stopping: bool | Literal["never"] = False

    def __post_init__(self) -> None:
        if self.width < 1:
            raise UsageError(f"beams.width must be at least 1, got {self.width}")
        if self.early_stopping not in (True, False, "never"):
            raise UsageError(f"beams.early_stopping must be true, false or never, got {self.early_stopping!r}")


@dataclass(frozen=True)
class AskedBeams:
    """The fields of `Beams` that somebody asks for; None: as the model's configuration has it, else no beam search."""

    width: int | None = None
    length_penalty: float | None = None
    early_stopping: bool | Literal["never"] | None = None


@dataclass(frozen=True)
class AskedRules:
    """The fields of `Rules` that somebody asks for; None: as the model's configuration has it, else no such rule."""

    min_tokens: int | None = None
    no_repeat_ngram_size: int | None = None
    forced_first: int | None = None
    forced_last: int | None = None


def settle(config: Any, beams: AskedBeams, rules: AskedRules) -> tuple[Beams, Rules, str]:
    """What is asked for, completed by what the model's `config` has; and in words what was taken from there.

    An encoder-decoder's folder says how its answers are to be written (num_beams, length_penalty, early_stopping and
    no_repeat_ngram_size of generation_config.json). The words are empty where nothing of it has a say.

    >>> settle(None, AskedBeams(width=2), AskedRules())[:2] == (Beams(width=2), Rules())
    True
    """
    writing = config.writing if isinstance(config, EncoderDecoderConfig) else Writing()
    own = dataclasses.asdict(writing)
    own_rules = Rules(no_repeat_ngram_size=own.pop("no_repeat_ngram_size"))
    found, found_rules = _completed(Beams(**own), beams), _completed(own_rules, rules)
    taken = _taken("rules", rules, found_rules, Rules())
    if found.width > 1:
        taken = _taken("beams", beams, found, Beams(width=1)) + taken
    return found, found_rules, " ".join(taken)


def _taken(group: str, asked: Any, settled: Any, neutral: Any) -> list[str]:
    """The fields that nobody asked for and that do something, as words of the command line."""
    values = dataclasses.asdict(settled)
    shown = {name: str(value).lower() if isinstance(value, bool) else f"{value}" for name, value in values.items()}
    return [
        f"{group}.{name}={shown[name]}"
        for name, value in values.items()
        if getattr(asked, name) is None and value != getattr(neutral, name)
    ]


def _completed(own: Any, asked: Any) -> Any:
    given = {name: value for name, value in dataclasses.asdict(asked).items() if value is not None}
    return dataclasses.replace(own, **given)
