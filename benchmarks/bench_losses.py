"""Set loss, and the whole criterion, against the reference and against the usual layer-by-layer sequence.

``pytest benchmarks/bench_losses.py -s --results FILE``: all are timed alternately in one process, forward and both
passes, on the GPU where there is one; there the device's own time of ours is counted as well.
"""

import importlib
import statistics
import time
from functools import partial

import ceilings
import pytest
import torch
from per_layer_losses import per_layer_losses

from dndetr.models.dn_detr import Predictions
from dndetr.ops import LossWeights, set_loss
from dndetr.training.criterion import Criterion

op = importlib.import_module("dndetr.ops.set_loss")
CRITERION = Criterion()
KIND = {"set loss": "focal", "set loss by position": "position"}
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def fused(backend, kind, case):
    return set_loss(*case, LossWeights(kind=kind, noised=kind), backend)[0]


def criterion(case):
    return CRITERION(Predictions(*case[:2], case[3]), case[4]).total


def layer_by_layer(case):
    return per_layer_losses(Predictions(*case[:2], case[3]), case[4], CRITERION.cost, CRITERION.weights)[0]


def timed(function, case, device) -> tuple[float, float]:
    """Seconds of the forward pass, and of both passes, until the device is done."""
    start = time.perf_counter()
    total = function(case)
    _wait(device)
    middle = time.perf_counter()
    torch.autograd.grad(total, case[:2])
    _wait(device)
    return middle - start, time.perf_counter() - start


def _wait(device) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def medians(functions: dict, case, device: str, seconds: float) -> dict[str, list[float]]:
    """Median seconds of each function, called in turn so that all meet the same machine."""
    times = {name: [] for name in functions}
    for function in functions.values():
        timed(function, case, device)
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(times["ours"]) < 5:
        for name, function in functions.items():
            times[name].append(timed(function, case, device))
    return {name: [statistics.median(column) for column in zip(*rows, strict=True)] for name, rows in times.items()}


def gpu_times(function, case) -> tuple[float, float]:
    """Seconds of the device alone, for the forward pass and for both."""

    def both():
        torch.autograd.grad(function(case), case[:2])

    return ceilings.gpu_seconds(lambda: function(case)), ceilings.gpu_seconds(both)


@pytest.mark.parametrize("what", [*KIND, "criterion"])
@pytest.mark.parametrize("name", ["uneven", "coco"])
def bench_losses(benchmark, record, name, what, device=DEVICE, seconds=2.0):
    logits, boxes, *rest = op.make_case(name, device)
    case = (logits.requires_grad_(), boxes.requires_grad_(), *rest)
    if what in KIND:
        functions = {"ours": partial(fused, None, KIND[what]), "reference": partial(fused, "reference", KIND[what])}
    else:
        functions = {"ours": criterion, "layer by layer": layer_by_layer}
    found = medians(functions, case, device, seconds)
    of_gpu = gpu_times(functions["ours"], case) if device == "cuda" else None
    for index, passes in enumerate(("forward", "forward and backward")):
        by_name = {who: times[index] for who, times in found.items()}
        counted = {"gpu_seconds": of_gpu[index]} if of_gpu else {}
        record(f"{what}, {passes}, {name}", by_name, **counted)
        print(f"\n{what} {name} {passes}: " + ", ".join(f"{who} {t * 1e3:.3f} ms" for who, t in by_name.items()))
        for kind, spent in counted.items():
            print(f"  {kind} of ours: {spent * 1e6:.1f} us")
    benchmark(timed, functions["ours"], case, device)
