"""Fixtures for all tests: the repository, the compiled extension, Triton's interpreter, fresh backends, a fake GPU."""

import importlib.metadata
import os
from pathlib import Path

import pytest

from dndetr import _process  # noqa: F401 isort: skip  (before torch: tests finish beside other busy processes, too)
from fake_gpu import NoHostSync, WithoutDevice
from forks import forks
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


@pytest.fixture(scope="session")
def interpreter(root, tmp_path_factory):
    """``interpreter(program)`` runs Python's text where Triton interprets kernels on the CPU -> what it printed."""
    pytest.importorskip("triton")
    folder = tmp_path_factory.mktemp("interpreter")
    paths = (root, *(root / "tests" / name for name in ("ops", "models", "support")))
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = os.pathsep.join(map(str, paths))
    imports = "import pytest, torch._dynamo, torch.testing._internal.optests, triton, dndetr.training.step"

    def interpret(program: str) -> str:
        status, said, error = run(program, folder)
        assert status == 0, f"after {said.split()}: {error[-3000:]}"
        return said

    with forks(imports, environment) as run:
        if run("import loop_in_the_interpreter", folder)[1].split() != ["3"]:
            triton, numpy = (importlib.metadata.version(name) for name in ("triton", "numpy"))
            pytest.skip(f"the interpreter of Triton {triton} runs no loops with NumPy {numpy}")
        yield interpret


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
