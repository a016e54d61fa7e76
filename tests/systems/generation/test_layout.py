"""Layout: what is said before a picture, and what it refuses."""

import json

import pytest

from volvelle.errors import UsageError, VolvelleError
from volvelle.systems.generation.layout import Layout

CLASSES = Layout(codes=10, rows=2, columns=3, classes=("coat", "Bag"))
WORDS = Layout(codes=10, rows=2, columns=3, words=20, caption=4)
PLAIN = Layout(codes=10, rows=2, columns=3)


def test_ids_do_not_overlap_and_the_table_is_round():
    for layout in (CLASSES, WORDS, PLAIN):
        assert layout.codes == layout.begin < layout.nothing < layout.first
        assert layout.vocabulary % 16 == 0
        assert layout.first + len(layout.classes) + layout.words <= layout.vocabulary < layout.first + 2 + 20 + 16
        assert layout.context == layout.said + 1 + 6


def test_prompts():
    assert PLAIN.prompt() == [10]
    assert CLASSES.prompt(1) == [13, 10]
    assert CLASSES.prompt() == WORDS.prompt() == WORDS.prompt([]) == [11, 10]
    assert WORDS.prompt([0, 19]) == [12, 31, 10]


@pytest.mark.parametrize(
    ("layout", "shows"), [(CLASSES, 2), (CLASSES, -1), (PLAIN, 0), (WORDS, [20]), (WORDS, [-1]), (WORDS, [0] * 5)]
)
def test_what_has_no_place(layout, shows):
    with pytest.raises(VolvelleError):
        layout.prompt(shows)


def test_classes_by_name_and_number():
    assert CLASSES.number("bag") == CLASSES.number("Bag") == CLASSES.number("1") == 1
    with pytest.raises(UsageError) as caught:
        CLASSES.number("coats")
    assert "coat" in str(caught.value.tip)
    with pytest.raises(UsageError, match="no such class"):
        CLASSES.number("2")


@pytest.mark.parametrize("layout", [CLASSES, WORDS, PLAIN])
def test_it_goes_to_json_and_back(layout):
    assert Layout.from_dict(json.loads(json.dumps(layout.to_dict()))) == layout


@pytest.mark.parametrize(
    "sizes",
    [
        {"codes": 0}, {"rows": 0}, {"columns": -1}, {"words": 3}, {"caption": 3},
        {"classes": ("a", "b"), "words": 3, "caption": 3},
    ],
)  # fmt: skip
def test_sizes_that_mean_nothing(sizes):
    with pytest.raises(ValueError, match="Layout:"):
        Layout(**{"codes": 4, "rows": 2, "columns": 2} | sizes)
