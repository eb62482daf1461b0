"""The result file of benchmarks, written anew with every result, so that what was measured outlives a kill."""

import json
import os
import platform
import subprocess
from pathlib import Path

import torch

import dndetr
from dndetr.files import write_json_atomic
from dndetr.ops import _backend


class Recording:
    """Results by name, in memory and in the file at ``path`` (None: nowhere).

    Results that the file already has from the same provenance are kept: benchmarks may be run one by one.
    """

    def __init__(self, path: Path | None, provenance: dict):
        self.path = path
        self.content = {"provenance": provenance, "results": {}}
        if path is None:
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.is_file():
            try:
                before = json.loads(path.read_text())
                same, results = before["provenance"] == provenance, before["results"]
            except (ValueError, KeyError, TypeError):
                raise ValueError(
                    f"--results {path}: the file is there and holds no results; name another one"
                ) from None
            if same:
                self.content["results"] = results

    def __call__(self, name: str, seconds: dict[str, float], **counted) -> None:
        """Keep a result, ``seconds`` by implementation; ``detail=True`` keeps it out of the README's table."""
        self.content["results"][name] = {"seconds": seconds, **counted}
        if self.path is not None:
            write_json_atomic(self.path, self.content, indent=1)


def provenance() -> dict:
    """Where a number comes from: machine, versions, commit."""
    return {
        "commit": _commit(),
        "dndetr": dndetr.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "cpu": _cpu(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "simd": None if _backend.extension_obstacle("simd") else _backend.compiled().simd(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        **_gpu(),
    }


def _cpu() -> str:
    """The processor's name, with what tells generations apart where virtual machines hide the rest of it."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().partition("\n\n")[0].splitlines() if cpuinfo.is_file() else []
    facts = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    if "model name" not in facts:
        return platform.processor()
    numbers = [f"{key.removeprefix('cpu ')} {facts[key]}" for key in ("cpu family", "model") if key in facts]
    return facts["model name"] + (f" ({', '.join(numbers)})" if numbers else "")


def _commit() -> str:
    """The commit, "-dirty" where files were changed since, other than the results that are being written.

    DNDETR_COMMIT says it of a copy that travelled without its history, or with a part of it.
    """
    if told := os.environ.get("DNDETR_COMMIT"):
        return told
    git = ("git", "-C", str(Path(__file__).resolve().parents[1]))
    commit = _told(*git, "describe", "--always")
    changed = _told(
        *git, "status", "--porcelain", "--untracked-files=no", "--", ":/", ":(top,exclude)benchmarks/results"
    )
    return commit + "-dirty" * bool(changed) or "unknown"


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
