"""Provenance of every benchmark result: machine, versions, commit; written to the JSON's ``extra_info``."""

import json
import os
import platform
import subprocess
from pathlib import Path

import pytest

from dndetr import _process  # noqa: F401 isort: skip  (before torch: everything is timed as it runs in training)
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


def pytest_addoption(parser):
    parser.addoption("--results", type=Path, help="write what was measured to this JSON file")
    parser.addoption("--rounds", type=int, default=3, help="how often bench_step times each whole step")


@pytest.fixture(scope="session")
def record(request, provenance):
    """record(name, seconds, **counted): keep a result, ``seconds`` by implementation, for ``--results``."""
    results = {}

    def keep(name: str, seconds: dict[str, float], **counted) -> None:
        results[name] = {"seconds": seconds, **counted}

    yield keep
    path = request.config.getoption("--results")
    if path and results:
        content = {"provenance": provenance, "results": {}}
        if path.is_file():  # other benchmarks may have been run on their own
            before = json.loads(path.read_text())
            if before["provenance"] == provenance:
                content["results"] = before["results"]
        content["results"] |= results
        path.write_text(json.dumps(content, indent=1) + "\n")
