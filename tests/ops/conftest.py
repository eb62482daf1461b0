"""Fixtures of the ops' tests: the instruction sets of the C++ kernels, and Triton's interpreter."""

import importlib.metadata
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from dndetr.ops import _backend


@pytest.fixture(autouse=True)
def _a_team_of_threads():
    """Kernels run as they do in training, also where every process of the tests has one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(max(threads, 2))
    yield
    torch.set_num_threads(threads)


@pytest.fixture(params=("plain", "avx2", "avx512"))
def simd(request, extension, monkeypatch):
    """The kernels run on this instruction set, or the widest below it that the machine has."""

    class Module:
        def __getattr__(self, name):
            found = getattr(extension, name)
            return found if isinstance(found, type) else lambda *given: found(*given, request.param)

    monkeypatch.setattr(_backend, "compiled", Module)
    return request.param


@pytest.fixture(scope="session")
def interpreter() -> dict:
    """The environment of a process in which Triton interprets kernels on the CPU, or a skip where it cannot."""
    pytest.importorskip("triton")
    root = Path(__file__).parents[2]
    folders = (root, root / "tests" / "ops", root / "tests" / "support")
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = os.pathsep.join(map(str, folders))
    probe = [sys.executable, Path(__file__).with_name("loop_in_the_interpreter.py")]
    done = subprocess.run(probe, env=environment, capture_output=True, text=True, check=False)
    if done.stdout.split() != ["3"]:
        triton, numpy = (importlib.metadata.version(name) for name in ("triton", "numpy"))
        pytest.skip(f"the interpreter of Triton {triton} runs no loops with NumPy {numpy}")
    return environment
