"""`draft=` of generate and chat: what it names, what is refused, and what is shown."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import pytest

from volvelle.cli.drafts import DraftOptions, Marks, Way, cost_line, open_draft, parse_draft, parse_drafts
from volvelle.cli.main import main
from volvelle.decode.request import Generation
from volvelle.errors import UsageError

LONG = ("the cat sat on the mat and the", "max_tokens=24", "precision=fp32")


def test_names_are_ways_models_or_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs/heads").mkdir(parents=True)
    (tmp_path / "old: text").write_text("one two")
    assert parse_draft("lookup") == Way("lookup", "")
    assert parse_draft("lookup:old: text") == Way("lookup", "old: text")
    assert parse_draft("old: text") == Way("model", "old: text")
    assert parse_draft("medusa:runs/heads") == Way("medusa", "runs/heads")
    assert parse_draft("mtp:owner/name") == Way("mtp", "owner/name")
    assert parse_draft("model:smollm2") == parse_draft("smollm2") == Way("model", "smollm2")
    assert parse_draft("runs/heads") == Way("model", "runs/heads")
    assert parse_draft("owner/name") == Way("model", "owner/name")


@pytest.mark.parametrize(
    ("text", "message", "tip"),
    [
        ("lokup", "lokup is neither a path here nor a known model", "did you mean lookup?"),
        ("medsua:runs/heads", "no way to draft called medsua", "did you mean medusa?"),
        ("medusa", "what drafts is missing", "draft=medusa:RUN"),
        ("medusa:runs/haeds", "runs/haeds is neither", "runs/heads"),
        ("heads", "heads is neither", "runs/heads"),
        ("skip:many", "a number of layers", "draft=skip:8"),
        ("skip:0", "a number of layers", "draft=skip:8"),
        ("zzzz", "zzzz is neither", "draft=lookup, medusa:RUN"),
    ],
)
def test_mistakes_get_a_tip(tmp_path, monkeypatch, text, message, tip):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs/heads").mkdir(parents=True)
    with pytest.raises(UsageError, match=message) as caught:
        parse_draft(text)
    assert tip in (caught.value.tip or "")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("stats=true",), "nothing drafts"),
        (("draft=lookup", "beams.width=2"), "a beam search takes no drafts"),
        (("draft=lookup", "draft_length=0"), "draft_length must be at least 1"),
        (("draft=skip:2",), "leaves no layer"),
        (("draft=medusa:runs/base",), "holds no medusa"),
        (("draft=lookup", "acceptance=tipical"), "did you mean typical?"),
    ],
)
def test_what_does_not_fit_is_refused(in_trained, capsys, words, message):
    assert main(["generate", "runs/base", "the cat", *words]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("draft", ["lookup", "lookup:text.txt", "runs/base"])
def test_answers_are_those_without_drafts(in_trained, capsys, draft):
    main(["generate", "runs/base", *LONG, "--json"])
    plain = json.loads(capsys.readouterr().out)
    assert main(["generate", "runs/base", *LONG, f"draft={draft}", "stats=true", "--json"]) == 0
    out = capsys.readouterr()
    found = json.loads(out.out)
    assert found["text"] == plain["text"]
    assert found["same_as_plain"] is True
    assert "".join(text for text, _ in found["spans"]) == found["text"]
    assert all(before[1] != after[1] for before, after in zip(found["spans"], found["spans"][1:], strict=False))
    assert found["accepted_per_step"] >= 1
    assert sum(found["draft_lengths"].values()) > 0
    assert found["lossless"] is True
    assert isinstance(found["near_ties"], int)
    assert "plain (the same prompt again, just now)" in out.err
    assert "token for token" in out.err


def test_several_ways_stand_side_by_side(tmp_path, monkeypatch):
    assert parse_drafts("lookup+mtp:owner/name") == [Way("lookup", ""), Way("mtp", "owner/name")]
    monkeypatch.chdir(tmp_path)
    (tmp_path / "lookup+skip:2").write_text("")
    assert parse_drafts("lookup+skip:2") == [Way("model", "lookup+skip:2")]
    with pytest.raises(UsageError, match="no way to draft called skpi"):
        parse_drafts("lookup+skpi:2")


def test_layers_and_lengths_reach_the_drafter():
    from volvelle.decode.drafters.early_exit import EarlyExit
    from volvelle.decode.drafters.prompt_lookup import PromptLookup

    model: Any = SimpleNamespace(config=SimpleNamespace(depth=6))
    drafter = open_draft(DraftOptions(draft="skip:2", draft_length=7), model)
    assert isinstance(drafter, EarlyExit)
    assert len(drafter.layers) == 4
    assert drafter.k == 7
    drafter = open_draft(DraftOptions(draft="lookup", draft_length=7), model)
    assert isinstance(drafter, PromptLookup)
    assert drafter.k == 7
    assert open_draft(DraftOptions(), model) is None


def test_statistics_in_a_pipe(in_trained, capsys):
    assert main(["generate", "runs/base", *LONG, "draft=lookup", "stats=true"]) == 0
    out = capsys.readouterr().out
    assert out.count("⟦") == out.count("⟧")
    assert "\x1b" not in out
    for line in ("accepted per step", "tokens a second", "near ties", "draft lengths", "time of n tokens"):
        assert f"\n{line}" in out
    assert main(["generate", "runs/base", *LONG, "draft=lookup"]) == 0
    out = capsys.readouterr().out
    assert "⟦" not in out
    assert "tokens a second" not in out


def test_cost_line_counts_what_was_drafted():
    answer = Generation([1, 2, 3], "abc", "length", 4, 2, 1.5, 0.5, drafted=[False, True, False], proposed=[1])
    assert cost_line(answer) == "[3 tokens, 1 of them drafted, at max_tokens, 2.0 tokens/s; prompt of 4 in 0.50 s]"


def test_bitwise_is_exact_in_bf16(in_trained, capsys):
    words = (*LONG[:2], "precision=bf16", "draft=lookup", "exact=bitwise", "stats=true", "--json")
    assert main(["generate", "runs/base", *words]) == 0
    assert json.loads(capsys.readouterr().out)["same_as_plain"] is True


def test_typical_acceptance_is_called_lossy(in_trained, capsys):
    words = ("draft=lookup", "acceptance=typical", "stats=true", "sampling.temperature=1", "sampling.seed=1")
    assert main(["generate", "runs/base", *LONG, *words]) == 0
    assert "is lossy" in capsys.readouterr().out


def test_drawn_drafts_with_a_seed_do_not_go_by_the_clock(in_trained, capsys):
    words = ("generate", "runs/base", *LONG, "draft=runs/base", "stats=true", "sampling.temperature=1")
    answers = []
    for _ in range(2):
        assert main([*words, "sampling.seed=1", "--json"]) == 0
        out = capsys.readouterr()
        answers.append(json.loads(out.out))
        assert "draft lengths       the longest" in out.err
    assert answers[0]["text"] == answers[1]["text"]
    assert not {"draft_lengths", "switched_off", "cost_curve"} & set(answers[0])
    assert main([*words, "--json"]) == 0
    assert {"draft_lengths", "switched_off", "cost_curve"} <= set(json.loads(capsys.readouterr().out))


def test_marks_by_the_stream(capsys, monkeypatch):
    def written() -> str:
        marks = Marks()
        for text, drafted in (("a", False), ("b", True), ("", False), ("c", True), ("d", False), ("e", True)):
            token: Any = SimpleNamespace(text=text, drafted=drafted)
            marks.push(token)
        marks.close()
        assert marks.spans == [["a", False], ["bc", True], ["d", False], ["e", True]]
        return capsys.readouterr().out

    assert written() == "a⟦bc⟧d⟦e⟧"
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert written() == "a\x1b[4;36mbc\x1b[0md\x1b[4;36me\x1b[0m"
    monkeypatch.setenv("NO_COLOR", "1")
    assert written() == "a⟦bc⟧d⟦e⟧"


def test_chat_drafts_too(in_trained, capsys, monkeypatch):
    from volvelle.systems.language.tokenizer import TextTokenizer

    template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    monkeypatch.setattr(TextTokenizer, "chat_template", template)
    monkeypatch.setattr(TextTokenizer, "chat_ids", lambda self, messages: self.encode(messages[-1]["content"]))
    words = ("the cat sat on the", "max_tokens=12", "precision=fp32", "draft=lookup", "stats=true", "--json")
    assert main(["chat", "runs/base", *words]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["same_as_plain"] is True
    assert found["spans"]
    assert main(["chat", "runs/base", "hello", "draft=lokup"]) == 2
    assert "did you mean lookup?" in capsys.readouterr().err
