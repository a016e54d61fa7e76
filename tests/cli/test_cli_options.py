from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

import pytest
from tyro.conf import Positional

from volvelle.cli.help import verb_page
from volvelle.cli.options import fields_of, parse
from volvelle.cli.table import Verb
from volvelle.errors import UsageError
from volvelle.runs import write_config


@dataclass(frozen=True)
class Lora:
    rank: int = 8
    """Rank of the update."""
    alpha: float | None = None


@dataclass(frozen=True)
class Options:
    model: Positional[str]
    """Folder, name or repo id."""
    data: Path
    """Text file."""
    prompt: Positional[str | None] = None
    """What to continue."""
    steps: int = 100
    """Optimiser steps,
    over the whole run."""
    lora: Lora = field(default_factory=Lora)
    targets: tuple[str, ...] = ("q_proj",)
    """Module names."""
    checkpointing: bool = False
    method: Literal["lora", "full"] = "lora"
    dtype: Literal["float32", "bfloat16"] | None = None
    from_: Path | None = None
    """Start from there."""
    max_tokens: int = 16


def read(*words: str) -> Options:
    return parse(Options, words, verb="adapt")


def test_bare_and_dashed_keys_mean_the_same():
    bare = read("smollm2", "data=a.txt", "steps=5", "lora.rank=4", "max_tokens=9", "from=x")
    dashed = read("--data", "a.txt", "--steps=5", "--lora.rank", "4", "smollm2", "--max-tokens", "9", "--from", "x")
    assert bare == dashed
    assert bare == Options("smollm2", Path("a.txt"), steps=5, lora=Lora(4), max_tokens=9, from_=Path("x"))


def test_positional_fields_by_key_and_by_place():
    assert read("m", "once upon", "data=a").prompt == "once upon"
    assert read("once upon", "data=a", "model=m").prompt == "once upon"
    assert read("data=a", "prompt=x=1", "model=m").prompt == "x=1"
    assert read("data=a", "m", "--", "x=1 --steps").prompt == "x=1 --steps"
    assert read("data=-a", "m", "-1") == Options("m", Path("-a"), "-1")


@pytest.mark.parametrize("text", ["q,v", "[q, v]", "('q', \"v\")"])
def test_sequences(text):
    assert read("m", "data=a", f"targets={text}").targets == ("q", "v")
    assert read("m", "data=a", "targets=").targets == ()


@pytest.mark.parametrize(("words", "value"), [(["checkpointing=true"], True), (["checkpointing=no"], False),
                                              (["--checkpointing"], True), (["--no-checkpointing"], False),
                                              (["--checkpointing", "false"], False)])  # fmt: skip
def test_flags(words, value):
    assert read("m", "data=a", *words).checkpointing is value
    assert read(*words, "m", "data=a").checkpointing is value


def test_none():
    assert read("m", "data=a", "lora.alpha=none", "dtype=None", "prompt=null") == Options("m", Path("a"))


@pytest.mark.parametrize(
    ("words", "message", "tip"),
    [
        (["m", "data=a", "stpes=5"], "unknown option stpes", "did you mean steps"),
        (["m", "data=a", "--stpes", "5"], "unknown option stpes", "did you mean steps"),
        (["m", "data=a", "rank=5"], "unknown option rank", "did you mean lora.rank"),
        (["m", "data=a", "lora.rnk=5"], "unknown option lora.rnk", "did you mean lora.rank"),
        (["m", "data=a", "steps=x"], "steps=x is not INT", "--help"),
        (["m", "data=a", "checkpointing=maybe"], "checkpointing=maybe is not true|false", "--help"),
        (["m", "data=a", "method=lroa"], "method=lroa is not one of lora, full", "did you mean lora"),
        (["m", "data=a", "dtype=bf16"], "dtype=bf16 is not one of", "bfloat16"),
        (["m"], "missing data=PATH", "--help"),
        (["data=a"], "missing MODEL", "--help"),
        ([], "missing MODEL, data=PATH", "--help"),
        (["m", "data=a", "--steps"], "--steps needs a value", None),
        (["m", "p", "data=a", "step"], "nothing to do with 'step'", "did you mean steps"),
        (["m", "p", "data=a", "another"], "nothing to do with 'another'", "key=value"),
    ],
)
def test_mistakes(words, message, tip):
    with pytest.raises(UsageError) as caught:
        read(*words)
    assert message in str(caught.value)
    assert caught.value.exit_code == 2
    if tip:
        assert tip in caught.value.tip


def test_dumped_config_comes_back_and_the_command_line_wins(tmp_path):
    options = read("m", "data=a", "lora.alpha=2.5", "targets=a,b", "from=x", "checkpointing=true")
    write_config(tmp_path / "config.yaml", asdict(options))
    assert read(f"config={tmp_path / 'config.yaml'}") == options
    assert read(f"--config={tmp_path}") == options
    changed = read(f"config={tmp_path}", "other", "steps=7", "lora.alpha=none", "targets=")
    assert (changed.model, changed.steps, changed.lora.alpha, changed.targets) == ("other", 7, None, ())
    assert changed.from_ == options.from_


@pytest.mark.parametrize(
    ("content", "message"),
    [("stpes: 3", "unknown option stpes"), ("[1]", "a mapping"), ("a: [", "not readable as YAML"), (None, "no such")],
)
def test_bad_config(tmp_path, content, message):
    file = tmp_path / "config.yaml"
    if content is not None:
        file.write_text(content)
    with pytest.raises(UsageError, match=message):
        read(f"config={file}", "m", "data=a")


def test_help_names_every_option_its_default_and_the_examples():
    page = verb_page(
        Verb("adapt", "adapt a model", "adapt", "use"), Options, ("volvelle adapt smollm2 data=x",), width=90
    )
    assert page.startswith("usage: volvelle adapt MODEL data=PATH [PROMPT] [key=value …]\n\nAdapt a model.\n")
    for line in (
        "data=PATH", "Text file. (required)", "steps=INT", "Optimiser steps, over the whole run. (default: 100)",
        "lora.rank=INT", "Rank of the update. (default: 8)", "targets=TEXT,…", "(default: q_proj)",
        "checkpointing=true|false", "method=lora|full", "from=PATH", "--json", "volvelle adapt smollm2 data=x",
    ):  # fmt: skip
        assert line in page
    assert max(map(len, page.splitlines())) <= 90


def test_fields_know_their_keys():
    assert list(fields_of(Options))[:6] == ["model", "data", "prompt", "steps", "lora.rank", "lora.alpha"]
