"""Fixtures of the training tests."""

from __future__ import annotations

import os
import subprocess

import pytest


@pytest.fixture
def small_disk(request, tmp_path):
    """A file system of 1 MB, or of what the test's parameter says; skipped where this user may not mount one."""
    path = tmp_path / "disk"
    path.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={getattr(request, 'param', '1m')}", "tmpfs", str(path)]
    if os.geteuid() or subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("mounting a small tmpfs needs privileges")
    yield path
    subprocess.run(["umount", str(path)], check=True)
