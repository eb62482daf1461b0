"""Whole training steps: ours with denoising, Hugging Face's detector without, and ours on the plain torch references.

``pytest benchmarks/bench_step.py -s --results FILE``, on a CPU: float32, two images (``--images``) of 480 x 640,
ResNet-50, dropout 0, the same sizes for all. Minutes per model: ``--rounds N`` sets how often each is timed (3). Steps
on a GPU are in ``bench_gpu_step.py``.
"""

import contextlib
import ctypes
import gc
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from floors import floating_point_floor
from operations import Operations
from peers import hf_step, make_batch, our_step, references

from dndetr.counting.stages import STAGES, stages

WARM = 3  # rounds until the memory that steps need has been touched
PRESETS = ("dn-deformable-detr-r50", "dn-detr-r50")


def peak_memory(function) -> int | None:
    """Bytes that a call needs beyond what is there before; None where the system does not say."""
    gc.collect()
    try:
        ctypes.CDLL(None).malloc_trim(0)  # what earlier calls freed would be used again, and not seen
        Path("/proc/self/clear_refs").write_text("5")
        before = _status("VmRSS")
        function()
        return _status("VmHWM") - before
    except (OSError, AttributeError):
        return None


def _status(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{key}:"))


def shares(step, batch, names) -> dict[str, float]:
    """Part of one step's time in each of these stages."""
    spent = dict.fromkeys(names, 0.0)

    @contextlib.contextmanager
    def timed(name):
        start = time.perf_counter()
        try:
            yield
        finally:
            spent[name] += time.perf_counter() - start

    with stages(step, timed, names):
        start = time.perf_counter()
        step(batch)
        whole = time.perf_counter() - start
    return {name: round(seconds / whole, 3) for name, seconds in spent.items()} | {
        "other": round(1 - sum(spent.values()) / whole, 3)
    }


def on_references(step, batch) -> Callable[[], object]:
    """The step on its batch with all ops on plain torch."""

    def run():
        with references():
            return step(batch)

    return run


def compare(record, title: str, step, batch, others: dict[str, Callable], rounds: int, names=STAGES) -> None:
    """Our step on its batch beside the others, functions of nothing, in turn: times, counts, shares of these stages."""
    run = {"ours": lambda: step(batch), **others}
    times = {name: [] for name in run}
    for number in range(rounds + WARM):
        for name, function in run.items():
            start = time.perf_counter()
            function()
            if number >= WARM:
                times[name].append(time.perf_counter() - start)
    median = {name: statistics.median(values) for name, values in times.items()}
    counted = {}
    for name, function in run.items():
        with Operations() as operations:
            memory = peak_memory(function)
        counted[name] = {"operations": operations.count, "waits": operations.waits, "peak_memory": memory}
    parts, floor = shares(step, batch, names), floating_point_floor(run["ours"])
    fraction = floor / median["ours"]
    record(title, median, counted=counted, shares=parts, floor=floor, floor_fraction=fraction)
    for name, seconds in median.items():
        print(f"\n{title}: {name} {seconds:.2f} s ({seconds / median['ours']:.2f}x), {counted[name]}")
    print(f"shares of ours: {parts}; floor {floor:.2f} s, {fraction:.0%} of it reached")


@pytest.mark.parametrize("preset", PRESETS)
def bench_step(request, record, preset):
    pytest.importorskip("transformers")
    rounds, images = (request.config.getoption(option) for option in ("--rounds", "--images"))
    batch = make_batch(images, 480, 640, [7, 12])
    peer = "HF DeformableDetr" if "deformable" in preset else "HF DabDetr"
    others = {peer: hf_step(preset, batch), "reference ops": on_references(our_step(preset), batch)}
    compare(record, f"step of {preset}, {images} images of 480x640", our_step(preset), batch, others, rounds)
