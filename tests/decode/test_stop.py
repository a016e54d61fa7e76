"""Stop strings against an oracle that sees the whole text at once, over every way to cut it into pieces."""

import itertools
import random

import pytest

from volvelle.decode.stop import StopText
from volvelle.errors import UsageError


def oracle(text, stops):
    ends = [text.find(stop) for stop in stops if stop in text]
    return text[: min(ends)] if ends else text


def partitions(text):
    for cuts in itertools.product((False, True), repeat=len(text) - 1):
        piece, pieces = text[0], []
        for cut, character in zip(cuts, text[1:], strict=True):
            if cut:
                pieces.append(piece)
                piece = character
            else:
                piece += character
        yield [*pieces, piece]


@pytest.mark.parametrize(
    ("text", "stops"),
    [("abcabd", ["abd"]), ("aaaab", ["aab"]), ("abcdef", ["cd", "bcx"]), ("xyabab", ["abc"]), ("nothing", ["zz"])],
)
def test_every_partition_gives_the_same_text(text, stops):
    for pieces in partitions(text):
        stop = StopText(stops)
        shown = ""
        for piece in pieces:
            shown += stop.push(piece)
            assert oracle(text, stops).startswith(shown), "a part of a stop string was shown"
        if not stop.stopped:
            shown += stop.flush()
        assert shown == oracle(text, stops)
        assert stop.stopped == any(word in text for word in stops)


def test_random_texts():
    generator = random.Random(0)
    for _ in range(500):
        text = "".join(generator.choices("ab", k=12))
        stops = ["".join(generator.choices("ab", k=generator.randint(2, 5))) for _ in range(2)]
        stop, shown = StopText(stops), ""
        for character in text:
            shown += stop.push(character)
        shown += "" if stop.stopped else stop.flush()
        # Character by character the stop string that ends first wins; cut there.
        end = min((text.find(word) + len(word), text.find(word)) for word in [*stops, text] if word in text)
        candidates = [text.find(word) for word in stops if word in text and text.find(word) + len(word) == end[0]]
        assert shown == (text[: min(candidates)] if candidates else text)


def test_nothing_is_held_without_a_reason():
    stop = StopText(["###"])
    assert stop.push("plain text") == "plain text"
    assert stop.push(" #") == " "
    assert stop.push("1") == "#1"
    assert StopText().push("###") == "###"


def test_after_the_stop_nothing_comes():
    stop = StopText(["b"])
    assert stop.push("abc") == "a"
    assert stop.push("d") == ""
    assert stop.flush() == ""


@pytest.mark.parametrize("stop", ["text", [""], [1]])
def test_bad_stops_are_refused(stop):
    with pytest.raises(UsageError, match="stop: expected a list of non-empty strings"):
        StopText(stop)
