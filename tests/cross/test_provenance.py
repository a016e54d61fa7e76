"""docs/provenance.md names the licence and source of everything that is fetched, shown or measured on."""

from __future__ import annotations

import pytest

from volvelle.data.countries import ATTRIBUTION
from volvelle.hub import ASSETS


@pytest.fixture
def page(repository):
    return (repository / "docs" / "provenance.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", ASSETS)
def test_every_asset_has_its_row(name, page):
    asset = ASSETS[name]
    [row] = [line for line in page.splitlines() if line.startswith(f"| `{name}` |")]
    for told in (asset.what, str(asset.source), asset.licence):
        assert told
        assert told in row


def test_attribution_that_a_licence_asks_for_is_given(page):
    assert ATTRIBUTION.partition(", via")[0] in " ".join(page.split())


def test_pictures_in_the_pages_are_of_known_origin(page, repository):
    known = ("docs/pictures", "benchmarks/results/claims")
    kinds = {".png", ".jpg", ".jpeg", ".gif", ".webp", ".svg"}
    found = [path.relative_to(repository) for path in (repository / "docs").rglob("*") if path.suffix in kinds]
    assert all(path.as_posix().startswith(known) for path in found)
    assert all(folder in page for folder in known)
