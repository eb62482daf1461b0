"""Shared by all tests: where recorded data lies, and how a missing part is skipped with its reason."""

import os
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def root() -> Path:
    """The repository."""
    return ROOT


@pytest.fixture(scope="session")
def shared() -> Path:
    """Folder of shared data and weights: ``DNDETR_SHARED``, default ../shared."""
    folder = ROOT / os.environ.get("DNDETR_SHARED", "../shared")
    if not folder.is_dir():
        pytest.skip(f"no shared data at {folder} (set DNDETR_SHARED)")
    return folder


@pytest.fixture(scope="session")
def golden() -> Path:
    """Folder of recorded results of the official code: ``DNDETR_GOLDEN``, default golden/ in the shared data."""
    shared = ROOT / os.environ.get("DNDETR_SHARED", "../shared")
    folder = ROOT / os.environ.get("DNDETR_GOLDEN", shared / "golden")
    if not folder.is_dir():
        pytest.skip(f"no golden data at {folder} (set DNDETR_GOLDEN)")
    return folder


@pytest.fixture
def fresh_backends():
    """Backend answers are dropped before and after, so that a test may change the environment."""
    from dndetr.ops import _backend

    _backend.forget()
    yield _backend
    _backend.forget()


@pytest.fixture(scope="session")
def extension():
    """The compiled module, or a skip that says why there is none."""
    from dndetr.ops import _backend

    if reason := _backend.extension_obstacle():
        pytest.skip(reason)
    return _backend.compiled()
