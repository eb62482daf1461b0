"""Exact assignment on the CPU: our batch against a loop over scipy, the two timed alternately in one process.

``pytest benchmarks/bench_matching.py -s``; the ratio of medians is printed and stored in ``extra_info``.
Costs are DETR-like: "trained" predictions scatter over the image, "collapsed" ones nearly coincide, as at the start.
"""

import statistics
import time

import pytest
import torch
from scipy.optimize import linear_sum_assignment

from dndetr.batch import Targets
from dndetr.ops import CostWeights, assign, match, match_cost

# problems (layers x images), queries, smallest and largest count, target slots
SHAPES = {"300x7-20": (96, 300, 7, 20, 32), "300x100": (96, 300, 100, 100, 128), "30x4-8": (48, 30, 4, 8, 8)}


def predictions(shape: str, kind: str) -> tuple[torch.Tensor, torch.Tensor, Targets]:
    """Logits and boxes of one "layer" per problem, and targets."""
    problems, queries, low, high, slots = SHAPES[shape]
    draw = torch.Generator().manual_seed(0)
    counts = torch.randint(low, high + 1, (problems,), generator=draw, dtype=torch.int32)

    def boxes(*size):
        return torch.cat((torch.rand(*size, 2, generator=draw), 0.05 + 0.3 * torch.rand(*size, 2, generator=draw)), -1)

    spread = 1.0 if kind == "trained" else 1e-3
    predicted = 0.5 + spread * (boxes(1, problems, queries) - 0.5)
    logits = spread * torch.randn(1, problems, queries, 91, generator=draw) - 3
    labels = torch.randint(91, (problems, slots), generator=draw)
    return logits, predicted, Targets(labels, boxes(problems, slots), counts)


def alternate(first, second, seconds: float = 1.0) -> tuple[float, float]:
    """Median seconds of two functions, called in turn so that both meet the same machine."""
    times: tuple[list, list] = ([], [])
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(times[0]) < 5:
        for function, into in zip((first, second), times, strict=True):
            start = time.perf_counter()
            function()
            into.append(time.perf_counter() - start)
    return statistics.median(times[0]), statistics.median(times[1])


@pytest.mark.parametrize("kind", ["trained", "collapsed"])
@pytest.mark.parametrize("shape", SHAPES)
def bench_assign(benchmark, provenance, shape, kind):
    logits, boxes, targets = predictions(shape, kind)
    cost, counts = match_cost(logits, boxes, targets, CostWeights()).flatten(0, 1), targets.counts
    # The loop gets its matrices ready: cut to the real targets, contiguous, query-major, on the host.
    matrices = [c[:, :count].double().contiguous().numpy() for c, count in zip(cost, counts.tolist(), strict=True)]
    scipy, ours = alternate(lambda: list(map(linear_sum_assignment, matrices)), lambda: assign(cost, counts, "cpp"))
    benchmark.extra_info.update(provenance, scipy_seconds=scipy, seconds=ours, ratio=scipy / ours)
    print(f"\nassign {shape} {kind}: scipy loop {scipy * 1e3:.2f} ms, ours {ours * 1e3:.3f} ms, {scipy / ours:.1f}x")
    benchmark(assign, cost, counts, "cpp")


@pytest.mark.parametrize("shape", SHAPES)
def bench_match(benchmark, provenance, shape):
    benchmark.extra_info.update(provenance)
    benchmark(match, *predictions(shape, "trained"), CostWeights())
