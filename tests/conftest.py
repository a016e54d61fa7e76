"""Shared fixtures, and the rules for tests that need what a machine may not have."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]
SHARED_DATA = REPOSITORY.parent / "shared" / "data"

# Peers are quieter and do not fork tokenizer threads; set before any of them is imported.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip, with the reason, what cannot run here: no CUDA device, no development data."""
    _skip(items, "gpu", lambda: None if _cuda() else "no CUDA device")
    _skip(items, "shared_data", lambda: None if SHARED_DATA.is_dir() else f"no data folder {SHARED_DATA}")


def _skip(items, marker, reason):
    marked = [item for item in items if item.get_closest_marker(marker)]
    if marked and (why := reason()):
        for item in marked:
            item.add_marker(pytest.mark.skip(reason=why))


def _cuda() -> bool:
    import torch

    return torch.cuda.is_available()


@pytest.fixture(scope="session")
def repository() -> Path:
    """The root of the checkout."""
    return REPOSITORY


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of development data sets; a test that asks for it is skipped where it is absent."""
    if not SHARED_DATA.is_dir():
        pytest.skip(f"no data folder {SHARED_DATA}")
    return SHARED_DATA


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """A folder with text, examples and a trained run `base`, one for each file of tests (tests/small_runs.py)."""
    from tests.small_runs import train_base

    folder = tmp_path_factory.mktemp("trained")
    train_base(folder)
    return folder


@pytest.fixture
def in_trained(trained, monkeypatch) -> Path:
    """The folder of `trained`, which the test runs in."""
    monkeypatch.chdir(trained)
    return trained


def pytest_configure() -> None:
    """A shell's background job ignores Ctrl-C, and so would every process that a test starts."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
