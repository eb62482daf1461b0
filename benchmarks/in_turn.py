"""Differentiable functions timed in turn on the CPU."""

import statistics
import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def timed(function: Callable, values: Sequence[Tensor], weighting: Tensor) -> tuple[float, float]:
    """Seconds of the forward pass, and of both passes."""
    start = time.perf_counter()
    out = function(*values)
    middle = time.perf_counter()
    torch.autograd.grad(out, values, weighting)
    return middle - start, time.perf_counter() - start


def report(record: Callable, title: str, functions: dict[str, Callable], values, weighting, seconds: float) -> None:
    """Record and print medians of "ours" and the others, with ``{passes}`` in the title filled in."""
    times = {name: [] for name in functions}
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(times["ours"]) < 5:
        for name, function in functions.items():
            times[name].append(timed(function, values, weighting))
    for index, passes in enumerate(("forward", "forward and backward")):
        found = {name: statistics.median(rows[index] for rows in both) for name, both in times.items()}
        named = title.format(passes=passes)
        record(named, found)
        ratios = [f"{who} {median / found['ours']:.2f}x that" for who, median in found.items() if who != "ours"]
        print(f"\n{named}: ours {found['ours'] * 1e3:.2f} ms, {', '.join(ratios)}", end="")
