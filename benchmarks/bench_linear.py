"""Float32 linear layers on a CPU, ours (oneDNN's products) against torch's own, forward and both passes.

``pytest benchmarks/bench_linear.py -s --results FILE``: rows are tokens or queries of two images; both are timed
alternately.
"""

import statistics
import time

import pytest
import torch
import torch.nn.functional as F

from dndetr.models.linear import linear

# rows, inputs, outputs
SHAPES = {
    "projection of 12760 tokens": (12760, 256, 256),
    "feed-forward of 12760 tokens": (12760, 256, 2048),
    "projection of 920 queries": (920, 256, 256),
    "feed-forward of 920 queries": (920, 256, 2048),
    "boxes of 920 queries": (920, 256, 4),
}


@pytest.mark.parametrize("shape", SHAPES)
def bench_linear(record, shape, seconds=2.0):
    rows, inputs, outputs = SHAPES[shape]
    torch.manual_seed(0)
    values = [torch.randn(*size, requires_grad=True) for size in ((rows, inputs), (outputs, inputs), (outputs,))]
    weighting = torch.randn(rows, outputs)

    def timed(function) -> tuple[float, float]:
        """Seconds of the forward pass, and of both passes."""
        start = time.perf_counter()
        out = function(*values)
        middle = time.perf_counter()
        torch.autograd.grad(out, values, weighting)
        return middle - start, time.perf_counter() - start

    functions, times = {"ours": linear, "torch": F.linear}, {"ours": [], "torch": []}
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(times["ours"]) < 5:
        for name, function in functions.items():
            times[name].append(timed(function))
    found = {name: [statistics.median(column) for column in zip(*rows, strict=True)] for name, rows in times.items()}
    for index, passes in enumerate(("forward", "forward and backward")):
        by_name = {name: both[index] for name, both in found.items()}
        record(f"linear, {passes}, {shape}", by_name)
        ratio = by_name["torch"] / by_name["ours"]
        print(f"\n{shape}, {passes}: ours {by_name['ours'] * 1e3:.2f} ms, torch {ratio:.2f}x that")
