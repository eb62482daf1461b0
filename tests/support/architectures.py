"""NVIDIA's GPUs that kernels are compiled for in tests, by a decorator that gives a test its ``arch``."""

import pytest

ARCHITECTURES = (75, 80, 86, 89, 90, 100, 120)


def on_architectures(*fast: int):
    """All of them; those that are not named only with ``-m slow``."""
    slow = pytest.mark.slow
    return pytest.mark.parametrize(
        "arch", [pytest.param(arch, marks=() if arch in fast else slow) for arch in ARCHITECTURES]
    )
