"""What a step asks of a GPU, read from a trace: launches, waits of the host, and where the device's time goes.

A trace is torch's in Chrome's format: calls of the host have category ``cuda_runtime`` or ``cuda_driver``, what runs on
the device ``kernel``, ``gpu_memcpy`` or ``gpu_memset``, and both the number of the call that they belong to. All
kernels of a graph belong to its launch.
"""

import json
import os
import re
import tempfile
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, record_function

# A second trace in a process that replays graphs crashes in some versions of CUDA, unless the tracer stays attached.
os.environ.setdefault("DISABLE_CUPTI_LAZY_REINIT", "1")
os.environ.setdefault("TEARDOWN_CUPTI", "0")

STEP = "counted step"
_HOST, _DEVICE = ("cuda_runtime", "cuda_driver"), ("kernel", "gpu_memcpy", "gpu_memset")
_LAUNCH = re.compile(r"_*cu(da)?(Launch|GraphLaunch|Memcpy|Memset)")
_WAIT = re.compile(r"cu(da)?(\w*Synchronize|Memcpy|MemcpyDtoH|MemcpyHtoD)$")
_ALLOCATION = re.compile(r"cu(da)?(Malloc|Free|HostAlloc|MemAlloc|MemFree|MemCreate|MemMap|HostRegister)")


def trace(function: Callable[[], object], steps: int = 2) -> list[dict]:
    """The events of ``steps`` calls, each within a mark named ``STEP``."""
    on_gpu = torch.cuda.is_available()
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    with torch.profiler.profile(activities=activities) as profiler:
        for _ in range(steps):
            with record_function(STEP):
                function()
        if on_gpu:
            torch.cuda.synchronize()  # outside of the marks, so not counted
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "trace.json")
        profiler.export_chrome_trace(str(path))
        return json.loads(path.read_text())["traceEvents"]


def _spans(events: Sequence[dict], name: str) -> list[tuple[float, float]]:
    """Starts and ends of the host's marks of that name, in microseconds."""
    marks = [event for event in events if event.get("cat") == "user_annotation" and event["name"] == name]
    return [(event["ts"], event["ts"] + event["dur"]) for event in marks]


def _inside(event: dict, spans: Sequence[tuple[float, float]]) -> bool:
    return any(start <= event["ts"] < end for start, end in spans)


def _belongs_to(event: dict) -> int | None:
    return event.get("args", {}).get("correlation")


def _counted(events: Sequence[dict]) -> tuple[int, list[dict], list[dict]]:
    """Steps, calls of the host within them, and what these made the device do."""
    steps = _spans(events, STEP)
    calls = [event for event in events if event.get("cat") in _HOST and _inside(event, steps)]
    numbers = {_belongs_to(call) for call in calls}
    work = [event for event in events if event.get("cat") in _DEVICE and _belongs_to(event) in numbers]
    return len(steps), calls, work


def per_step(events: Sequence[dict]) -> dict:
    """Means per step -> launches (kernels, graphs, copies), waits, allocations, kernels, device_seconds, calls by name.

    launches and waits are calls of the host; kernels, those of graphs too, and seconds are the device's.
    """
    steps, calls, work = _counted(events)
    # Names may end in the version of their interface: cudaGraphLaunch_v10000.
    names = Counter(re.sub(r"(_v\d+)?(_pt(sz|ds))?$", "", call["name"]) for call in calls)

    def of(pattern: re.Pattern) -> float:
        return sum(count for name, count in names.items() if pattern.match(name)) / steps

    return {
        "launches": of(_LAUNCH),
        "waits": of(_WAIT),
        "allocations": of(_ALLOCATION),
        "kernels": sum(event["cat"] == "kernel" for event in work) / steps,
        "device_seconds": sum(event["dur"] for event in work) / steps * 1e-6,
        "calls": {name: count / steps for name, count in names.most_common()},
    }


def stage_shares(events: Sequence[dict], stages: Sequence[str]) -> dict[str, float]:
    """Part of the device's time that was launched within the marks of each stage; the rest is "other"."""
    _, calls, work = _counted(events)
    spans = {stage: _spans(events, stage) for stage in stages}
    stage_of = {
        _belongs_to(call): next((stage for stage in stages if _inside(call, spans[stage])), "other") for call in calls
    }
    spent = dict.fromkeys((*stages, "other"), 0.0)
    for event in work:
        spent[stage_of[_belongs_to(event)]] += event["dur"]
    whole = max(sum(spent.values()), 1e-9)
    return {stage: round(time / whole, 3) for stage, time in spent.items()}


def dearest(events: Sequence[dict], count: int = 12) -> list[dict]:
    """The kernels and copies with most of the device's time: name, calls and seconds per step, share."""
    steps, _, work = _counted(events)
    by_name = defaultdict(list)
    for event in work:
        by_name[event["name"]].append(event["dur"])
    whole = max(sum(map(sum, by_name.values())), 1e-9)
    ranked = sorted(by_name.items(), key=lambda item: -sum(item[1]))[:count]
    return [
        {
            "name": name[:120],
            "calls": len(times) / steps,
            "seconds": sum(times) / steps * 1e-6,
            "share": round(sum(times) / whole, 3),
        }
        for name, times in ranked
    ]
