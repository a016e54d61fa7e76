import pytest

from volvelle.errors import UsageError, VolvelleError, did_you_mean


def test_message_and_tip_are_kept_apart():
    error = VolvelleError("model.gguf: not a GGUF file", tip="download it again")
    assert str(error) == "model.gguf: not a GGUF file"
    assert error.tip == "download it again"
    assert VolvelleError("no tip").tip is None


def test_exit_codes():
    assert VolvelleError("x").exit_code == 1
    assert UsageError("x").exit_code == 2
    with pytest.raises(VolvelleError):
        raise UsageError("a usage error is caught where the others are")


@pytest.mark.parametrize("word", ["lroa", "LORA", "lor", "loraa"])
def test_close_names_are_suggested(word):
    assert did_you_mean(word, ["lora", "prefix", "full"]) == "did you mean lora?"


def test_several_suggestions_closest_first_and_limited():
    known = ["q_proj", "k_proj", "v_proj", "o_proj"]
    assert did_you_mean("k_prj", known, limit=2).startswith("did you mean k_proj or ")
    assert did_you_mean("k_prj", known, limit=2).count("_proj") == 2


def test_nothing_near_gives_no_tip():
    assert did_you_mean("xyz", ["lora", "prefix"]) is None
    assert did_you_mean("lora", []) is None
    assert did_you_mean("lora", iter(["lora"])) == "did you mean lora?"
