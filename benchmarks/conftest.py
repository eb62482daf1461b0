"""Provenance of every benchmark result (machine, versions, commit), and the file that ``--results`` names."""

import os
import platform
import subprocess
from pathlib import Path

import pytest

from dndetr import _process  # noqa: F401 isort: skip  (before torch: everything is timed as it runs in training)
import torch
from recording import Recording

import dndetr
from dndetr.ops import _backend


def _commit() -> str:
    root = Path(__file__).resolve().parents[1]
    described = _told("git", "-C", str(root), "describe", "--always", "--dirty")
    return described or os.environ.get("DNDETR_COMMIT") or "unknown"


def _told(*command: str) -> str:
    """What a command prints; nothing where it fails or does not exist."""
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


def _gpu() -> dict:
    """What else a GPU's numbers depend on; nothing where there is none."""
    if not torch.cuda.is_available():
        return {}
    fields = ("driver_version", "clocks.max.sm", "clocks.max.memory", "power.limit")
    told = _told("nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader", "--id=0").split(", ")
    return {"cuda": torch.version.cuda, **dict(zip(fields, told, strict=False))}


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
        **_gpu(),
    }


def pytest_addoption(parser):
    parser.addoption("--results", type=Path, help="write what was measured to this JSON file")
    parser.addoption("--rounds", type=int, default=3, help="how often bench_step times each whole step")
    parser.addoption("--images", type=int, default=2, help="images in a batch of bench_step")


@pytest.fixture(scope="session")
def record(request, provenance):
    """record(name, seconds, **counted): keep a result, ``seconds`` by implementation, for ``--results``."""
    return Recording(request.config.getoption("--results"), provenance)
