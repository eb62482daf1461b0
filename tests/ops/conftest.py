"""Fixtures of the ops' tests: the threads and the instruction sets of the C++ kernels."""

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
