"""Whole training steps on a GPU, 2 and 16 images of 800 x 1333: ours, Hugging Face's, ours on references, the official.

``pytest benchmarks/bench_gpu_step.py -s --results FILE [--contenders "ours|official"]``. Ours run under bfloat16
autocast, captured ("ours") and eager; others without autocast and with it, as users run them; "classical kernels" are
ours with deformable attention as the original extension maps it, in float32, and all else on references. Every step
brings its images from the host and is timed in bursts that end in one synchronisation, as training runs. One
contender is in memory at a time, and its result is kept before the next one is made. Counted as well: images per
second, peak memory, launches and waits of the host, what the device's time is spent on, and the least time that
products and convolutions take. The official implementation is used where ``DNDETR_OFFICIAL`` says there is a copy.
"""

import gc
import importlib
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from unittest import mock

import cuda_calls
import deform_attn_peers
import official
import pytest
import torch
from floors import floating_point_floor
from peers import hf_step, make_batch, our_step, references
from torch.profiler import record_function

from dndetr.counting.stages import STAGES, stages

deformable = importlib.import_module("dndetr.ops.ms_deform_attn")

SIZE = (800, 1333)
COUNTS = [7, 12, 3, 20]
CASES = [(preset, images) for images in (2, 16) for preset in ("dn-deformable-detr-r50", "dn-detr-r50")]
WARM = 3  # steps before the ones that count: the first allocates, the second is captured
BURST = 4  # steps between two synchronisations
BURSTS = 9
FEWEST, ENOUGH = 5, 3.0  # bursts of what takes longer than these seconds
BFLOAT16, FLOAT32 = torch.bfloat16, torch.float32


def contenders(preset: str, batch) -> dict[str, Callable[[], Callable[[], object]]]:
    """Name -> what makes the step, a function of nothing; in order of importance, as time may run out."""
    peer = "HF DeformableDetr" if "deformable" in preset else "HF DabDetr"

    def ours(precision: torch.dtype, graph: bool):
        return partial(our_step(preset, device="cuda", precision=precision, graph=graph), batch)

    def plain(precision: torch.dtype):
        step = ours(precision, graph=False)

        def run():
            with references():
                return step()

        return run

    def classical():
        step, extension = ours(BFLOAT16, graph=False), deform_attn_peers.classical()

        def attention(value, shapes, locations, weights):
            inputs = (x.float().contiguous() for x in (locations, weights))
            return extension(value.float().contiguous(), shapes, *inputs).to(value.dtype)

        def run():
            with references(), mock.patch.object(deformable, "ms_deform_attn_reference", attention):
                return step()

        return run

    found = {
        "ours": lambda: ours(BFLOAT16, graph=True),
        "ours, eager": lambda: ours(BFLOAT16, graph=False),
        f"{peer}, bfloat16": lambda: hf_step(preset, batch, "cuda", BFLOAT16),
        f"{peer}, float32": lambda: hf_step(preset, batch, "cuda", FLOAT32),
        "official, float32": lambda: official.step(preset, batch, "cuda"),
    }
    if "deformable" in preset:
        found["classical kernels, bfloat16"] = classical
    return found | {
        "reference ops, bfloat16": lambda: plain(BFLOAT16),
        "reference ops, float32": lambda: plain(FLOAT32),
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


def timed(run: Callable[[], object]) -> tuple[float, float, float]:
    """Seconds of a step: the median of bursts, the least and the most."""
    times, start = [], time.perf_counter()
    while len(times) < BURSTS and (len(times) < FEWEST or time.perf_counter() - start < ENOUGH):
        times.append(burst(run, BURST))
    return statistics.median(times), min(times), max(times)


def shares(run: partial, names: Sequence[str]) -> dict[str, float]:
    """Part of the device's time that each of these stages of an eager step launches."""
    with stages(run.func, record_function, names):
        return cuda_calls.stage_shares(cuda_calls.trace(run), names)


@pytest.mark.gpu
@pytest.mark.parametrize(("preset", "images"), CASES)
def bench_gpu_step(record, chosen, preset, images):
    batch = make_batch(images, *SIZE, COUNTS)
    compare(record, chosen, preset, images, contenders(preset, batch))


def compare(
    record, chosen, preset: str, images: int, contenders: dict[str, Callable], names: Sequence[str] = STAGES
) -> None:
    """Time and count those contenders that are chosen, one after the other; shares are of the named stages."""
    title = f"step of {preset}, {images} images of {SIZE[0]}x{SIZE[1]}"
    median, spread, counted, missing, found = {}, {}, {}, {}, {"refused_wait": {}}

    def keep() -> None:
        speed = {name: images / seconds for name, seconds in median.items()}
        record(title, median, images_per_second=speed, spread=spread, counted=counted, missing=missing, **found)

    for name, make in contenders.items():
        if not chosen(name):
            continue
        run = None
        try:
            run, counted[name] = made(make)
            median[name], *spread[name] = timed(run)
            keep()
            events = cuda_calls.trace(run)
            counted[name] |= cuda_calls.per_step(events)
            if name == "ours":
                found["dearest"] = cuda_calls.dearest(events)
            if name.startswith("ours"):
                found["refused_wait"][name] = refused_wait(run)
            if name == "ours, eager":
                found["shares"] = shares(run, names)
                found["floor"] = floating_point_floor(run, "cuda")
                found["floor_fraction"] = found["floor"] / median.get("ours", median[name])
        except Exception as failure:  # out of memory, what is not installed, what a compiler says
            missing[name] = in_a_line(failure)
        keep()
    show(title, median, counted, missing, found)
    # What was promised of a captured step; everything measured is in the file by now.
    assert "ours" in median, missing
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
