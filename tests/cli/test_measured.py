import json

import pytest

from volvelle.cli.console import json_output
from volvelle.cli.measured import by_class, chosen_part, figures
from volvelle.errors import UsageError

ROWS = [("road", 1200, 0.5), ("sign", 0, float("nan"))]


def test_classes_are_printed_with_counts_and_shares(capsys):
    by_class({"run": "r"}, {"ap": 0.25, "recall": -1.0}, ROWS, {"boxes": "boxes", "ap": "AP"}, ["a.png"])
    assert capsys.readouterr().out == (
        "class  boxes  AP\n"
        "-----  -----  -------\n"
        "road   1,200  50.00 %\n"
        "sign   0      none\n"
        "\n"
        "worst    a.png\n"
        "\n"
        "ap     25.00 %\n"
        "recall none\n"
    )  # fmt: skip


def test_the_record_has_all_of_it_by_name(capsys):
    with json_output(True):
        by_class({"run": "r"}, {"ap": 0.25}, ROWS[:1], {"boxes": "boxes", "ap": "AP"}, ["a.png"])
    record = {"run": "r", "ap": 0.25, "classes": {"road": {"boxes": 1200, "ap": 0.5}}, "worst": ["a.png"]}
    assert json.loads(capsys.readouterr().out) == record


def test_figures_stand_under_each_other(capsys):
    figures({"loss": 1.5, "accuracy": 0.25})
    figures({})
    assert capsys.readouterr().out == "loss     1.5000\naccuracy 0.2500\n"


@pytest.mark.parametrize(
    ("parts", "split", "chosen"),
    [(["train", "val", "test"], None, "val"), (["train", "test"], None, "test"), ([""], None, ""), (["a"], "a", "a")],
)
def test_the_part_to_measure_on(parts, split, chosen):
    assert chosen_part("data", parts, split) == chosen


def test_a_part_that_is_not_there_is_named():
    with pytest.raises(UsageError, match="data: has no val part") as caught:
        chosen_part("data", ["train"], "val")
    assert caught.value.tip == "it has: train"
