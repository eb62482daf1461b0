"""Provenance of every benchmark result: machine, versions, commit; written to the JSON's ``extra_info``."""

import os
import platform
import subprocess
from pathlib import Path

import pytest
import torch

import dndetr
from dndetr.ops import _backend


def _commit() -> str:
    root = Path(__file__).resolve().parents[1]
    command = ["git", "-C", str(root), "describe", "--always", "--dirty"]
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    return found.stdout.strip() or "unknown"


@pytest.fixture(scope="session")
def provenance() -> dict:
    """Where a number comes from."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return {
        "commit": _commit(),
        "dndetr": dndetr.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "cpu": names[0] if names else platform.processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "simd": None if _backend.extension_obstacle("simd") else _backend.compiled().simd(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }
