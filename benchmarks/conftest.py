"""Provenance and file of every benchmark result (``--results``)."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest

from dndetr import _process  # noqa: F401 isort: skip  (before torch: everything is timed as it runs in training)
import recording


@pytest.fixture(scope="session")
def provenance() -> dict:
    """Where a number comes from."""
    return recording.provenance()


def pytest_addoption(parser):
    parser.addoption("--results", type=Path, help="write what was measured to this JSON file")
    parser.addoption(
        "--contenders", help="of steps on a GPU and of group attention: those whose whole name matches (all)"
    )
    parser.addoption("--rounds", type=int, default=3, help="how often bench_step times each whole step")
    parser.addoption("--images", type=int, default=2, help="images in a batch of bench_step")


@pytest.fixture(scope="session")
def chosen(request) -> Callable[[str], bool]:
    """Whether a contender of this name is to be timed."""
    pattern = request.config.getoption("--contenders") or ".*"
    return lambda name: re.fullmatch(pattern, name) is not None


@pytest.fixture(scope="session")
def record(request, provenance):
    """record(name, seconds, **counted): keep a result, ``seconds`` by implementation, for ``--results``."""
    return recording.Recording(request.config.getoption("--results"), provenance)
