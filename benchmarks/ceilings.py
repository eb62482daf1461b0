"""What memory, products and launches do at best on this machine, measured in the same run as what they limit."""

import time

import torch
from device_code import call, library

from dndetr.models.linear import linear
from dndetr.ops.conv3x3 import conv3x3

MIB = 1 << 20


def measure(device: str) -> dict[str, float]:
    """Bytes per second by kind. Rows are of 128 bytes, one head's channels of a pixel in float32."""
    return on_gpu() if device == "cuda" else on_cpu()


def products(device: str) -> dict[str, float]:
    """Floating-point operations per second of large products and 3x3 convolutions, as the model computes them.

    On a GPU "products" and "convolutions" are bfloat16, as under autocast; on a CPU float32, with our own convolutions
    apart, whose operations are counted as the definition has them.
    """
    if device == "cpu":
        rows, weight = torch.randn(4096, 1024), torch.randn(1024, 1024)
        image, kernel = _convolution(2, 60, 80)
        return {
            "products": 2 * rows.numel() * 1024 / _seconds(lambda: linear(rows, weight), 7),
            "convolutions": 2 * 9 * 256 * image.numel() / _seconds(lambda: torch.conv2d(image, kernel, padding=1), 7),
            "3x3 convolutions": 2 * 9 * 256 * image.numel() / _seconds(lambda: conv3x3(image, kernel), 7),
        }
    rates = {}
    for name, dtype, size in (("products", torch.bfloat16, 8192), ("float32 products", torch.float32, 4096)):
        a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
        rates[name] = 2 * size**3 / gpu_seconds(lambda a=a, b=b: a @ b)
    image, kernel = (x.to(device, torch.bfloat16) for x in _convolution(16, 100, 168))
    seconds = gpu_seconds(lambda: torch.conv2d(image, kernel, padding=1))
    return rates | {"convolutions": 2 * 9 * 256 * image.numel() / seconds}


def _convolution(images: int, height: int, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """An image and a 3x3 kernel of 256 channels, both channels last."""
    draws = torch.randn(images, 256, height, width), torch.randn(256, 256, 3, 3)
    return tuple(x.contiguous(memory_format=torch.channels_last) for x in draws)


def launches() -> dict[str, float]:
    """Seconds that a GPU and its host need to start work: a small kernel, alone and in graphs, and an empty wait."""
    x = torch.zeros(1, device="cuda")
    torch.cuda.synchronize()

    def graph_of(kernels: int) -> torch.cuda.CUDAGraph:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for _ in range(kernels):
                x.add_(1)
        return graph

    def each(function, count: int) -> float:
        function()
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(count):
            function()
        torch.cuda.synchronize()
        return (time.perf_counter() - start) / count

    return {
        "small kernel": each(lambda: x.add_(1), 1000),
        "small graph": each(graph_of(1).replay, 1000),
        "small kernel in a long graph": each(graph_of(2000).replay, 10) / 2000,
        "wait for nothing": each(torch.cuda.synchronize, 1000),
    }


def to_device() -> float:
    """Bytes per second of a copy from page-locked memory of the host."""
    source = torch.empty(256 * MIB, dtype=torch.uint8).pin_memory()
    target = torch.empty_like(source, device="cuda")
    return source.nbytes / gpu_seconds(lambda: target.copy_(source, non_blocking=True))


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
    source, out = torch.rand(512 * MIB // 4, device="cuda"), torch.zeros(1, dtype=torch.int32, device="cuda")
    blocks, rounds = 8 * torch.cuda.get_device_properties(0).multi_processor_count, 256
    moved, in_l1, in_l2 = blocks * 128 * rounds * 8 * 16, 8192 // 128, 16 * MIB // 128
    return {
        "copy": gpu_copy(),
        # Eight blocks of a multiprocessor with 8 KiB each stay in its L1.
        "gather in L1": moved / gpu_seconds(lambda: call(code.run_gather, source, in_l1, in_l1, blocks, rounds, out)),
        "gather in L2": moved / gpu_seconds(lambda: call(code.run_gather, source, in_l2, 0, blocks, rounds, out)),
        "reductions in L2": moved / gpu_seconds(lambda: call(code.run_reduce, source, in_l2, blocks, rounds)),
    }


def gpu_copy() -> float:
    """Bytes per second, read and written, of a copy that is too large for any cache."""
    source = torch.rand(512 * MIB // 4, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.nbytes / gpu_seconds(lambda: target.copy_(source))


def gpu_seconds(function, calls: int = 10, repeats: int = 10, budget: float = 0.5) -> float:
    """Median seconds of GPU time of one call, replayed from a CUDA graph so that launches cost nothing.

    calls in the graph and repeats of it: fewer, for a function that would take longer than ``budget`` seconds in all.
    """
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        function()  # first uses compile and allocate
        one = _elapsed(function)
    torch.cuda.current_stream().wait_stream(side)
    affordable = max(3, int(budget / max(one, 1e-6)))
    calls = max(1, min(calls, affordable // 3))
    repeats = max(3, min(repeats, affordable // calls))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(calls):
            function()
    graph.replay()
    times = [_elapsed(graph.replay) / calls for _ in range(repeats)]
    return sorted(times)[len(times) // 2]


def _elapsed(function) -> float:
    """Seconds between events on the current stream before and after a call."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    function()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) * 1e-3
