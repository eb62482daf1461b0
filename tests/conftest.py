"""Fixtures for all tests: the repository, the compiled extension, fresh backend choices, a fake GPU."""

from pathlib import Path

import pytest

from dndetr import _process  # noqa: F401 isort: skip  (before torch: tests finish beside other busy processes, too)
from fake_gpu import NoHostSync, WithoutDevice
from short_runs import without_pictures
from torch._subclasses import FakeTensorMode

from dndetr.ops import _backend


@pytest.fixture(scope="session")
def root() -> Path:
    """The repository."""
    return Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def extension():
    """The compiled module, or a skip that says why there is none."""
    if reason := _backend.extension_obstacle():
        pytest.skip(reason)
    return _backend.compiled()


@pytest.fixture
def no_pictures():
    """Runs of training within draw nothing, which is most of a tiny run's time."""
    with without_pictures():
        yield


@pytest.fixture
def fresh_backends():
    """Backend choices are forgotten before and after, so that a test may change the environment."""
    _backend.forget()
    yield
    _backend.forget()


@pytest.fixture
def fake_cuda():
    """Tensors made with device="cuda" are fake ones of a GPU, and whatever would make the host wait for it raises.

    Works without a GPU and on torch's CPU build. Values do not exist: check shapes, dtypes, devices, and that it runs.
    """
    with FakeTensorMode() as mode, NoHostSync(), WithoutDevice():
        yield mode
