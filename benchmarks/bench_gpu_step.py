"""Whole training steps on a GPU, 2 and 16 images of 800 x 1333: ours, Hugging Face's, ours on references, the official.

``pytest benchmarks/bench_gpu_step.py -s --results FILE``. Ours run under bfloat16 autocast, captured ("ours") and
eager; others without autocast and with it, as users run them. Every step brings its images from the host. All are timed
in turn, in bursts that end in one synchronisation, as training runs. Counted as well: images per second, peak memory,
launches and waits of the host, what the device's time is spent on, and the least time that products and convolutions
take. The official implementation is used where ``DNDETR_OFFICIAL`` says there is a copy.
"""

import gc
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import cuda_calls
import official
import pytest
import torch
from floors import floating_point_floor
from peers import hf_step, make_batch, our_step, references
from stages import STAGES, stages
from torch.profiler import record_function

SIZE = (800, 1333)
COUNTS = [7, 12, 3, 20]
CASES = [(preset, images) for images in (2, 16) for preset in ("dn-deformable-detr-r50", "dn-detr-r50")]
WARM = 3  # steps before the ones that count: the first allocates, the second is captured
BURST = 4  # steps between two synchronisations
SLOW = 0.2  # seconds of a step, beyond which a burst of one is long enough
ROUNDS, SECONDS = 15, 25.0  # of all in turn, whichever ends first
BFLOAT16, FLOAT32 = torch.bfloat16, torch.float32


def contenders(preset: str, batch) -> dict[str, Callable[[], Callable[[], object]]]:
    """Name -> what makes the step; a step is a function of nothing."""
    peer = "HF DeformableDetr" if "deformable" in preset else "HF DabDetr"

    def ours(precision: torch.dtype, graph: bool):
        return partial(our_step(preset, device="cuda", precision=precision, graph=graph), batch)

    def plain(precision: torch.dtype):
        step = ours(precision, graph=False)

        def run():
            with references():
                return step()

        return run

    return {
        "ours": lambda: ours(BFLOAT16, graph=True),
        "ours, eager": lambda: ours(BFLOAT16, graph=False),
        f"{peer}, bfloat16": lambda: hf_step(preset, batch, "cuda", BFLOAT16),
        f"{peer}, float32": lambda: hf_step(preset, batch, "cuda", FLOAT32),
        "reference ops, bfloat16": lambda: plain(BFLOAT16),
        "reference ops, float32": lambda: plain(FLOAT32),
        "official, float32": lambda: official.step(preset, batch, "cuda"),
    }


def made(make: Callable) -> tuple[Callable[[], object], dict[str, int]]:
    """A warm step, and the bytes it needs: at the peak, and in all that torch keeps for it."""
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before, reserved = torch.cuda.memory_allocated(), torch.cuda.memory_reserved()
    run = make()
    for _ in range(WARM):
        run()
    torch.cuda.synchronize()
    peak, kept = torch.cuda.max_memory_allocated() - before, torch.cuda.memory_reserved() - reserved
    return run, {"peak_memory": peak, "reserved_memory": kept}


def burst(run: Callable[[], object], steps: int) -> float:
    """Seconds of a step, in a row of them."""
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(steps):
        run()
    torch.cuda.synchronize()
    return (time.perf_counter() - start) / steps


def refused_wait(run: Callable[[], object]) -> str | None:
    """torch's words where a step makes the host wait, None where none does."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        run()
    except RuntimeError as failure:
        return in_a_line(failure)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return None


def in_a_line(failure: Exception) -> str:
    return f"{type(failure).__name__}: {failure}".splitlines()[0][:200]


def take_turns(running: dict[str, Callable], missing: dict[str, str], keep: Callable[[dict], None]) -> dict[str, float]:
    """Median seconds of each step; whatever fails leaves the race. ``keep`` gets the medians after every round."""
    times = {name: [] for name in running}
    median = {}
    end = time.perf_counter() + SECONDS
    for number in range(ROUNDS):
        for name in [*running]:
            try:
                times[name].append(burst(running[name], BURST if median.get(name, 0) < SLOW else 1))
            except (RuntimeError, ValueError) as failure:
                missing[name] = in_a_line(failure)
                del running[name], times[name]
        median = {name: statistics.median(values) for name, values in times.items()}
        keep(median)
        if number >= 2 and time.perf_counter() > end:
            break
    return median


def shares(run: partial) -> dict[str, float]:
    """Part of the device's time that each stage of an eager step launches."""
    with stages(run.func, record_function):
        return cuda_calls.stage_shares(cuda_calls.trace(run), STAGES)


@pytest.mark.gpu
@pytest.mark.parametrize(("preset", "images"), CASES)
def bench_gpu_step(record, preset, images):
    batch = make_batch(images, *SIZE, COUNTS)
    batch = replace(batch, images=batch.images.contiguous())  # as the data loader has them
    title = f"step of {preset}, {images} images of {SIZE[0]}x{SIZE[1]}"
    running, counted, missing, found = {}, {}, {}, {}

    def keep(median: dict[str, float]) -> None:
        speed = {name: images / seconds for name, seconds in median.items()}
        record(title, median, images_per_second=speed, counted=counted, missing=missing, **found)

    for name, make in contenders(preset, batch).items():
        try:
            running[name], counted[name] = made(make)
        except (ImportError, RuntimeError, ValueError, TypeError, AttributeError) as failure:  # out of memory, too
            missing[name] = in_a_line(failure)
    median = take_turns(running, missing, keep)
    for name, run in running.items():
        events = cuda_calls.trace(run)
        counted[name] |= cuda_calls.per_step(events)
        if name == "ours":
            found["dearest"] = cuda_calls.dearest(events)
        keep(median)
    found["refused_wait"] = {name: refused_wait(running[name]) for name in ("ours", "ours, eager") if name in running}
    if "ours, eager" in running:
        found["shares"] = shares(running["ours, eager"])
        found["floor"] = floating_point_floor(running["ours, eager"], "cuda")
        found["floor_fraction"] = found["floor"] / median.get("ours", median["ours, eager"])
    keep(median)
    show(title, median, counted, missing, found)
    # What was promised of a captured step; everything measured is in the file by now.
    assert "ours" in running, missing
    assert not any(found["refused_wait"].values()), found["refused_wait"]
    assert counted["ours"]["waits"] == 0 and counted["ours"]["launches"] <= 3, counted["ours"]


def show(title: str, median: dict, counted: dict, missing: dict, found: dict) -> None:
    """The same in words."""
    ours = median.get("ours", float("nan"))
    for name, seconds in median.items():
        about = {key: value for key, value in counted[name].items() if key != "calls"}
        print(f"\n{title}: {name} {seconds * 1e3:.1f} ms ({seconds / ours:.2f}x), {about}")
    for name, reason in missing.items():
        print(f"\n{title}: not measured: {name}, {reason}")
    for kernel in found.pop("dearest", ()):
        print(f"  {kernel['share']:6.1%} {kernel['seconds'] * 1e3:8.3f} ms {kernel['calls']:6.1f} x {kernel['name']}")
    print(found)
