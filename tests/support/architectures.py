"""NVIDIA's GPUs that kernels are compiled for in tests, by a decorator that gives a test its ``arch``."""

from types import SimpleNamespace
from unittest import mock

import pytest
import torch

# Bytes of shared memory that a block may ask for, as GPUs say.
SHARED_BUDGET = {
    75: 64 * 1024,
    80: 163 * 1024,
    86: 99 * 1024,
    89: 99 * 1024,
    90: 227 * 1024,
    100: 227 * 1024,
    120: 99 * 1024,
}
ARCHITECTURES = tuple(arch for arch in SHARED_BUDGET if arch not in (86, 89))  # whose code is that of 80


def on_architectures(*fast: int):
    """All of them; those that are not named only with ``-m slow``."""
    slow = pytest.mark.slow
    return pytest.mark.parametrize(
        "arch", [pytest.param(arch, marks=() if arch in fast else slow) for arch in ARCHITECTURES]
    )


def tiles_for(tables: dict, arch: int) -> dict:
    """Of tables of tiles, the one that a GPU of this architecture takes."""
    from dndetr.kernels.tiles import table_of

    gpu = SimpleNamespace(major=arch // 10, shared_memory_per_block_optin=SHARED_BUDGET[arch])
    with mock.patch("torch.cuda.get_device_properties", return_value=gpu):
        return tables[table_of.__wrapped__(torch.device("cuda"))]
