import json
import re
import subprocess
import sys

import pytest

from volvelle.data.countries import (
    HELDOUT_TEMPLATES,
    TRAIN_TEMPLATES,
    Country,
    country_examples,
    is_heldout,
    read_countries,
)
from volvelle.errors import VolvelleError

ROW = {
    "name": "Chile", "iso": "CL", "capital": "Santiago", "continentcode": "SA", "currencyname": "Peso",
    "population": 18729160, "areakm2": 756950, "languages": "es-CL", "neighbours": "PE,ZZ",
}  # fmt: skip
PERU = {
    **ROW,
    "name": "Peru ",
    "iso": "PE",
    "capital": "Lima",
    "currencyname": "Sol",
    "neighbours": "CL",
    "languages": "es,qu",
}


def made(count: int = 200) -> list[Country]:
    """Countries that do not exist, each the neighbour of the one before."""
    names = [f"Land{index}" for index in range(count)]
    return [
        Country(name, f"City{i}", "Asia", "Real", 1000 + i, 10.0 + i, ("en",), (names[i - 1],) if i else ())
        for i, name in enumerate(names)
    ]


def test_reads_the_table(tmp_path):
    (tmp_path / "countries.json").write_text(json.dumps({"PE": PERU, "CL": ROW}))
    chile, peru = read_countries(tmp_path / "countries.json")
    assert chile == Country("Chile", "Santiago", "South America", "Peso", 18729160, 756950.0, ("es-CL",), ("Peru",))
    assert (peru.name, peru.languages, peru.neighbours) == ("Peru", ("es", "qu"), ("Chile",))


@pytest.mark.parametrize("content", ["", "[1]", '{"CL": {"name": "Chile"}}', '{"CL": 3}'])
def test_another_file_is_refused(tmp_path, content):
    (tmp_path / "x.json").write_text(content)
    with pytest.raises(VolvelleError, match="country table"):
        read_countries(tmp_path / "x.json")
    with pytest.raises(VolvelleError, match="no such file"):
        read_countries(tmp_path / "none.json")


def test_splits_share_no_entity_and_no_template():
    countries = made()
    train, heldout = (country_examples(countries, split=split) for split in ("train", "heldout"))
    names = [{re.match(r"name: (\w+)", e["prompt"])[1] for e in part} for part in (train, heldout)]
    assert not names[0] & names[1]
    assert len(names[0]) + len(names[1]) == len(countries)
    assert 20 <= len(names[1]) <= 60
    mentioned = {word for e in train for word in re.findall(r"Land\d+", e["prompt"] + e["completion"])}
    assert not mentioned & names[1]
    shape = lambda e: re.sub(r"Land\d+|City\d+|[\d,]+", "_", e["completion"])  # noqa: E731
    shapes = [{shape(e) for e in part} for part in (train, heldout)]
    assert not shapes[0] & shapes[1]
    assert len(shapes[0]) >= 6
    assert len(shapes[1]) >= 3
    assert not set(TRAIN_TEMPLATES) & set(HELDOUT_TEMPLATES)


def test_prompt_holds_every_value_of_the_sentence():
    for example in country_examples(made(), split="train"):
        row = dict(field.split(": ") for field in example["prompt"].split(" | "))
        assert all(value in example["completion"] for value in row.values())
        assert "{" not in example["completion"]
        assert example["completion"].startswith(" ")


def test_unknown_fields_are_never_told():
    name = next(f"Isle{i}" for i in range(100) if not is_heldout(f"Isle{i}"))
    bare = Country(name, "", "Asia", "Real", 0, 0.44, (), ())
    examples = country_examples([bare], split="train", per_country=99)
    assert all("population" not in e["prompt"] and "capital" not in e["prompt"] for e in examples)


def test_same_everywhere_and_in_any_order():
    script = (
        "import hashlib; from volvelle.data.countries import *\n"
        "c = [Country(f'Land{i}', 'a', 'b', 'c', 1, 2.0, (), ()) for i in range(50)]\n"
        "print(hashlib.sha256(repr(country_examples(c, split='train')).encode()).hexdigest())"
    )
    runs = {
        subprocess.run(
            [sys.executable, "-c", script], env={"PYTHONHASHSEED": seed}, capture_output=True, check=True
        ).stdout
        for seed in ("1", "2")
    }
    assert len(runs) == 1
    forward = country_examples(made(50), split="train")
    backward = country_examples(made(50)[::-1], split="train")
    assert sorted(map(str, forward)) == sorted(map(str, backward))


def test_bad_split():
    with pytest.raises(ValueError, match="split must be"):
        country_examples([], split="test")  # pyright: ignore[reportArgumentType]
