"""Fixtures of the ops' tests: the instruction sets of the C++ kernels."""

import pytest

from dndetr.ops import _backend


@pytest.fixture(params=("plain", "avx2", "avx512"))
def simd(request, extension, monkeypatch):
    """The kernels run on this instruction set, or the widest below it that the machine has."""

    class Module:
        def __getattr__(self, name):
            found = getattr(extension, name)
            return found if isinstance(found, type) else lambda *given: found(*given, request.param)

    monkeypatch.setattr(_backend, "compiled", Module)
    return request.param
