"""Which tiles a kernel takes: from a table for the kind of GPU, or measured when ``DNDETR_AUTOTUNE=1``."""

import os
from collections.abc import Callable, Hashable, Iterable
from functools import cache

import torch
import triton

# Bytes of shared memory that a program may have on the GPU after which a table is named. Any GPU takes the first of
# these tables that its own suffices for.
SHARED = {90: 227 * 1024, 80: 163 * 1024, 86: 99 * 1024, 75: 64 * 1024}


@cache
def processors(device: torch.device) -> int:
    """Multiprocessors of a GPU; of an H100 where there is none (the interpreter)."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 132


@cache
def table_of(device: torch.device) -> int | str:
    """The key in tables of tiles for a GPU: Hopper's where there is none (the interpreter)."""
    if device.type != "cuda":
        return 90
    if torch.version.hip:
        return "amd"
    gpu = torch.cuda.get_device_properties(device)
    if gpu.major == 10:
        return 100
    return next((arch for arch, needed in SHARED.items() if needed <= gpu.shared_memory_per_block_optin), 75)


_tuned: dict[Hashable, tuple] = {}


def chosen(found: Hashable, tables: dict, candidates: Iterable[tuple], device: torch.device, launch: Callable) -> tuple:
    """The tile of a call of class ``found``: its GPU's in ``tables``, {kind of GPU: {class: tile}}.

    When ``DNDETR_AUTOTUNE=1`` on a GPU, the fastest of the candidates, which ``launch(tile)`` runs; once for each
    class, with a line for the table.
    """
    tunable = os.environ.get("DNDETR_AUTOTUNE") == "1" and device.type == "cuda"
    if found not in _tuned:
        if not tunable or torch.cuda.is_current_stream_capturing():
            return tables[table_of(device)][found]
        _tuned[found] = fastest(candidates, launch, triton.testing.do_bench)
        print(f"    {found}: {_tuned[found]},", flush=True)
    return _tuned[found]


def fastest(candidates: Iterable[tuple], launch: Callable, measure: Callable) -> tuple:
    """The candidate with the shortest ``measure(run)``; those that need too much shared memory are passed over."""
    times = {}
    for tile in candidates:
        try:
            times[tile] = measure(lambda tile=tile: launch(tile))
        except triton.runtime.errors.OutOfResources:
            continue
    return min(times, key=times.get)
