"""The studio over a folder with a real run, and the browser that the tests drive."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.serve.studio.browser import Page, no_browser, open_browser, studio_in, watched
from tests.small_runs import train_base

pytest.importorskip("fastapi", reason="wants the extra serve")


@pytest.fixture(scope="session")
def place(tmp_path_factory) -> Path:
    """A folder with a small language model that was trained in it: runs/base."""
    folder = tmp_path_factory.mktemp("studio")
    train_base(folder)
    return folder


@pytest.fixture(scope="session")
def studio(place) -> Iterator[str]:
    """The address of `volvelle studio` in that folder."""
    with studio_in(place, "model=runs/base") as url:
        yield url


@pytest.fixture(scope="session")
def chrome() -> Iterator[Any]:
    """One headless browser for all tests; a test that asks for it is skipped where none can be had."""
    pytest.importorskip("selenium", reason="wants the extra dev (selenium)")
    if (why := no_browser()) is not None:
        pytest.skip(why)
    session = open_browser()
    yield session
    session.quit()


@pytest.fixture
def page(chrome, studio) -> Iterator[Page]:
    """The browser at the studio, 1280 px wide and light."""
    with watched(chrome, studio) as found:
        yield found
