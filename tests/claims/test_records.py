"""Records of claims, read back and put into words."""

import json

import pytest

from volvelle.claims import records
from volvelle.errors import VolvelleError


def finding(what="x", held=None, value=1.0):
    return {"what": what, "value": value, "unit": "s", "spread": None, "bound": None, "held": held}


@pytest.mark.parametrize("text", ["{", "[]", json.dumps({"claim": "lora"})])
def test_a_file_that_is_no_record_of_the_claim_is_named(tmp_path, text):
    (tmp_path / "rf.json").write_text(text)
    with pytest.raises(VolvelleError, match=r"rf\.json"):
        records.read("rf", tmp_path)


def test_no_file_is_no_record(tmp_path):
    assert records.read("rf", tmp_path) is None


def test_the_failed_bound_decides_else_the_first_that_held():
    good, bad = finding("good", held=True), finding("bad", held=False)
    assert records.deciding({"findings": [finding("told"), good, bad]}) == bad
    assert records.deciding({"findings": [finding("told"), good]}) == good
    assert records.deciding({"findings": [finding("told")]}) is None
    assert records.bounds({"findings": [finding("told"), good, bad]}) == (1, 2)
