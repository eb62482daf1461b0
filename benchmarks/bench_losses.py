"""Set loss, and the whole criterion, against the reference and against the usual layer-by-layer sequence.

``pytest benchmarks/bench_losses.py -s``: all are timed alternately in one process, forward and both passes.
"""

import importlib
import statistics
import time
from functools import partial

import pytest
import torch
from per_layer_losses import per_layer_losses

from dndetr.criterion import Criterion
from dndetr.models.dn_detr import Predictions
from dndetr.ops import LossWeights, set_loss

op = importlib.import_module("dndetr.ops.set_loss")
CRITERION = Criterion()


def fused(backend, case):
    return set_loss(*case, LossWeights(), backend)[0]


def criterion(case):
    return CRITERION(Predictions(*case[:2], case[3]), case[4]).total


def layer_by_layer(case):
    return per_layer_losses(Predictions(*case[:2], case[3]), case[4], CRITERION.cost, CRITERION.weights)[0]


def timed(function, case) -> tuple[float, float]:
    """Seconds of the forward pass, and of both passes."""
    start = time.perf_counter()
    total = function(case)
    middle = time.perf_counter()
    torch.autograd.grad(total, case[:2])
    return middle - start, time.perf_counter() - start


def medians(functions: dict, case, seconds: float) -> dict[str, list[float]]:
    """Median seconds of each function, called in turn so that all meet the same machine."""
    times = {name: [] for name in functions}
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(times["ours"]) < 5:
        for name, function in functions.items():
            times[name].append(timed(function, case))
    return {name: [statistics.median(column) for column in zip(*rows, strict=True)] for name, rows in times.items()}


@pytest.mark.parametrize("what", ["set loss", "criterion"])
@pytest.mark.parametrize("name", ["uneven", "coco"])
def bench_losses(benchmark, record, provenance, name, what, seconds=2.0):
    logits, boxes, *rest = op.make_case(name)
    case = (logits.requires_grad_(), boxes.requires_grad_(), *rest)
    if what == "set loss":
        functions = {"ours": partial(fused, None), "reference": partial(fused, "reference")}
    else:
        functions = {"ours": criterion, "layer by layer": layer_by_layer}
    found = medians(functions, case, seconds)
    for index, passes in enumerate(("forward", "forward and backward")):
        by_name = {who: times[index] for who, times in found.items()}
        record(f"{what}, {passes}, {name}", by_name)
        print(f"\n{what} {name} {passes}: " + ", ".join(f"{who} {t * 1e3:.2f} ms" for who, t in by_name.items()))
    benchmark.extra_info.update(provenance, seconds=found)
    benchmark(timed, functions["ours"], case)
