"""Exact matching: our batch against what is used today, timed in turn in one process, on the CPU and on a GPU if any.

``pytest benchmarks/bench_matching.py -s --results FILE``; medians and their ratios are printed. ``bench_match`` starts
from predictions: against the official path (cost of all queries with all targets of the batch, copied to the host,
scipy image by image, all of it once per layer). ``bench_assign`` starts from costs: against a loop over scipy on ready
float64 matrices, and the packages that are importable. Costs are DETR-like: "trained" predictions lie on their targets
or scatter over the image, "collapsed" ones nearly coincide, as at the start.
"""

import statistics
import time

import ceilings
import pytest
import torch
from per_layer_losses import generalized_iou
from scipy.optimize import linear_sum_assignment

from dndetr.batch import Targets
from dndetr.boxes import cxcywh_to_xyxy
from dndetr.ops import CostWeights, assign, match, match_cost

LAYERS, CLASSES = 6, 91
# smallest and largest count of an image, target slots; "coco" has 7 on average, as the training images of COCO
COUNTS = {"coco": (1, 13, 16), "7-20": (7, 20, 32), "20": (20, 20, 32), "100": (100, 100, 128), "300": (300, 300, 320)}
SHAPES = [(16, 300, "7-20"), *((b, n, t) for b in (2, 16, 64) for n in (300, 900) for t in COUNTS if t != "7-20")]
IDS = [f"{images}x{LAYERS}-{queries}x{counts}" for images, queries, counts in SHAPES]
DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
MOST = 2**26  # costs that a slow path may be given: beyond, it takes gigabytes or minutes


def predictions(images: int, queries: int, counts: str, kind: str) -> tuple[torch.Tensor, torch.Tensor, Targets]:
    """Logits, boxes and targets."""
    low, high, slots = COUNTS[counts]
    draw = torch.Generator().manual_seed(0)

    def boxes(*size):
        return torch.cat((torch.rand(*size, 2, generator=draw), 0.05 + 0.3 * torch.rand(*size, 2, generator=draw)), -1)

    targets = Targets(
        torch.randint(CLASSES, (images, slots), generator=draw),
        boxes(images, slots),
        torch.randint(low, high + 1, (images,), generator=draw, dtype=torch.int32),
    )
    logits = torch.randn(LAYERS, images, queries, CLASSES, generator=draw) - 4
    predicted = boxes(LAYERS, images, queries)
    if kind == "collapsed":
        return 1e-3 * logits - 4, 0.5 + 1e-3 * (predicted - 0.5), targets
    # Each target is found by one query of its own, at places that differ by image, by each layer a bit better.
    found = min(slots, queries)
    places = torch.stack([torch.randperm(queries, generator=draw)[:found] for _ in range(images)])
    for layer in range(LAYERS):
        noise = 0.02 * torch.randn(images, found, 4, generator=draw) / (layer + 1)
        near = (targets.boxes[:, :found] + noise).clamp(0.01, 0.99)
        predicted[layer].scatter_(1, places[..., None].expand(-1, -1, 4), near)
        logits[layer, torch.arange(images)[:, None], places, targets.labels[:, :found]] += 3 + layer
    return logits, predicted, targets


def official(logits, boxes, targets: Targets, weights: CostWeights) -> list:
    """The official matcher, layer by layer."""
    counts = targets.counts.tolist()
    labels = torch.cat([row[:count] for row, count in zip(targets.labels, counts, strict=True)])
    wanted = torch.cat([row[:count] for row, count in zip(targets.boxes, counts, strict=True)])
    found = []
    for layer_logits, layer_boxes in zip(logits, boxes, strict=True):
        p = layer_logits.flatten(0, 1).sigmoid()
        negative = (1 - weights.alpha) * p**2 * -(1 - p + 1e-8).log()
        positive = weights.alpha * (1 - p) ** 2 * -(p + 1e-8).log()
        label = positive[:, labels] - negative[:, labels]
        flat = layer_boxes.flatten(0, 1)
        distance = torch.cdist(flat, wanted, p=1)
        overlap = generalized_iou(cxcywh_to_xyxy(flat)[:, None], cxcywh_to_xyxy(wanted))
        cost = weights.l1 * distance + weights.label * label - weights.giou * overlap
        cost = cost.view(*layer_logits.shape[:2], -1).cpu()
        pairs = [linear_sum_assignment(part[i]) for i, part in enumerate(cost.split(counts, -1))]
        found.append([(torch.as_tensor(q), torch.as_tensor(t)) for q, t in pairs])
    return found


def alternate(functions: dict, device: str, seconds: float = 1.0) -> dict[str, float]:
    """Median seconds of functions that are called in turn, so that all meet the same machine."""
    times = {name: [] for name in functions}
    for function in functions.values():
        function()
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(times[next(iter(times))]) < 3:
        for name, function in functions.items():
            if device == "cuda":
                torch.cuda.synchronize()
            start = time.perf_counter()
            function()
            if device == "cuda":
                torch.cuda.synchronize()
            times[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in times.items()}


def report(benchmark, record, label: str, functions: dict, device: str) -> None:
    """Time, print and store; on a GPU also the device's time of ours, which launches are no part of."""
    seconds = alternate(functions, device)
    found = {"gpu_seconds": ceilings.gpu_seconds(functions["ours"])} if device == "cuda" else {}
    record(label, seconds, detail=True, **found)
    ours = seconds["ours"]
    rest = [f"{name} {time * 1e3:.2f} ms ({time / ours:.1f}x)" for name, time in seconds.items() if name != "ours"]
    rest += [f"{found['gpu_seconds'] * 1e6:.1f} us of the GPU"] if found else []
    print(f"\n{label}: ours {ours * 1e3:.3f} ms, {', '.join(rest)}")
    benchmark.pedantic(functions["ours"], rounds=3)


def packages(cost: torch.Tensor, counts: torch.Tensor, matrices: list, device: str) -> dict:
    """Solvers of other packages that are importable."""
    functions = {}
    try:
        from torch_linear_assignment import batch_linear_assignment
    except ImportError:
        pass
    else:
        # It takes one shape: padded targets, which cost the same everywhere, get what is left (if there is enough).
        slots = cost.shape[2]
        if slots <= cost.shape[1]:
            real = torch.arange(slots, device=cost.device) < counts[:, None]
            padded = torch.where(real[..., None], cost.mT, 0).contiguous()
            functions["torch-linear-assignment"] = lambda: batch_linear_assignment(padded)
    try:
        import lap
    except ImportError:
        pass
    else:
        functions["lap"] = lambda: [lap.lapjv(matrix, extend_cost=True) for matrix in matrices]
    return functions


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kind", ["trained", "collapsed"])
@pytest.mark.parametrize("shape", SHAPES, ids=IDS)
def bench_match(benchmark, record, shape, kind, device):
    logits, boxes, targets = predictions(*shape, kind)
    costs = shape[0] * shape[1] * int(targets.counts.sum())  # of one layer, as the official path takes them
    inputs = (logits.to(device), boxes.to(device), targets.to(device), CostWeights())
    functions = {"ours": lambda: match(*inputs)}
    if costs < MOST:
        functions["official"] = lambda: official(*inputs)
    report(benchmark, record, f"match {device} {IDS[SHAPES.index(shape)]} {kind}", functions, device)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kind", ["trained", "collapsed"])
@pytest.mark.parametrize("shape", SHAPES, ids=IDS)
def bench_assign(benchmark, record, shape, kind, device):
    logits, boxes, targets = predictions(*shape, kind)
    cost, counts = match_cost(logits, boxes, targets, CostWeights()).flatten(0, 1), targets.counts.repeat(LAYERS)
    # The loop gets its matrices ready: cut to the real targets, contiguous, query-major, on the host.
    matrices = [c[:, :count].double().contiguous().numpy() for c, count in zip(cost, counts.tolist(), strict=True)]
    cost, counts = cost.to(device), counts.to(device)
    functions = {"ours": lambda: assign(cost, counts), "scipy": lambda: list(map(linear_sum_assignment, matrices))}
    if cost.numel() < MOST // 16:
        functions |= packages(cost, counts, matrices, device)
    report(benchmark, record, f"assign {device} {IDS[SHAPES.index(shape)]} {kind}", functions, device)
