"""What memory does at best on this machine, measured in the same run as the ops."""

import time

import torch
from device_code import call, library

MIB = 1 << 20


def measure(device: str) -> dict[str, float]:
    """Bytes per second by kind. Rows are of 128 bytes, one head's channels of a pixel in float32."""
    return on_gpu() if device == "cuda" else on_cpu()


def on_cpu() -> dict[str, float]:
    """Of torch's threads: a copy (bytes read and written), random rows out of a core's cache and out of memory."""
    source = torch.rand(64 * MIB // 4)
    target = torch.empty_like(source)
    ceilings = {"copy": 2 * source.nbytes / _seconds(lambda: target.copy_(source))}
    for kind, window in (("gather in cache", MIB // 2), ("gather in memory", 64 * MIB)):
        rows = torch.rand(window // 128, 32)
        index, out = torch.randint(len(rows), (4 * MIB // 128,)), torch.empty(4 * MIB // 128, 32)
        ceilings[kind] = out.nbytes / _seconds(
            lambda rows=rows, index=index, out=out: torch.index_select(rows, 0, index, out=out)
        )
    return ceilings


def _seconds(function, repeats: int = 50) -> float:
    function()
    best = float("inf")
    for _ in range(repeats):
        start = time.perf_counter()
        function()
        best = min(best, time.perf_counter() - start)
    return best


def on_gpu() -> dict[str, float]:
    """A copy (bytes read and written), random rows out of L1 and L2, vector reductions in L2."""
    code = library("ceilings")
    source = torch.rand(512 * MIB // 4, device="cuda")
    target, out = torch.empty_like(source), torch.zeros(1, dtype=torch.int32, device="cuda")
    blocks, rounds = 8 * torch.cuda.get_device_properties(0).multi_processor_count, 256
    moved, in_l1, in_l2 = blocks * 128 * rounds * 8 * 16, 8192 // 128, 16 * MIB // 128
    return {
        "copy": 2 * source.nbytes / gpu_seconds(lambda: target.copy_(source)),
        # Eight blocks of a multiprocessor with 8 KiB each stay in its L1.
        "gather in L1": moved / gpu_seconds(lambda: call(code.run_gather, source, in_l1, in_l1, blocks, rounds, out)),
        "gather in L2": moved / gpu_seconds(lambda: call(code.run_gather, source, in_l2, 0, blocks, rounds, out)),
        "reductions in L2": moved / gpu_seconds(lambda: call(code.run_reduce, source, in_l2, blocks, rounds)),
    }


def gpu_seconds(function, calls: int = 10, repeats: int = 10) -> float:
    """Median seconds of GPU time of one call, replayed from a CUDA graph so that launches cost nothing."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        function()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(calls):
            function()
    graph.replay()
    times = []
    for _ in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1e-3 / calls)
    return sorted(times)[len(times) // 2]
