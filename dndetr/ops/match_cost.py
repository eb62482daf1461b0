"""Pairwise cost between predicted queries and their image's targets, for all decoder layers at once.

With p = sigmoid(logit at the target's label) and boxes a (predicted), b (target):

    cost = label * (alpha (1-p)^2 (-log(p + 1e-8)) - (1-alpha) p^2 (-log(1-p + 1e-8)))
         + l1 * |a - b|_1 (cxcywh) - giou * GIoU(a, b)

With ``position`` > 0 the label's term is of p ((GIoU(a, b) + 1) / 2)^position instead of p, the fraction kept in
[0, 1]: a score counts as much as its box fits (Stable-DINO, arXiv 2304.04742, whose exponent is 0.5, and whose code
also stretches the fractions of an image until the largest is 1).
No gradient flows through it. Math and result are float32 (float64 for float64 input). A logit or box that is not
finite gives a cost that is not. The memory of the result is target-major, [Y, B, T, N], which is how ``assign`` reads
it fastest. The C++ and Triton kernels gather the one logit they need and write each cost once; the reference
materialises about twenty [Y, B, T, N] temporaries.
"""

from contextlib import contextmanager
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from ..batch import Targets
from ..boxes import cxcywh_to_xyxy, generalized_iou
from . import _backend


class CostWeights(NamedTuple):
    """Weights of the matching cost, alpha of its focal term (DETR's values for sigmoid focal loss), and position."""

    label: float = 2.0
    l1: float = 5.0
    giou: float = 2.0
    alpha: float = 0.25
    position: float = 0.0


def match_cost_reference(logits: Tensor, boxes: Tensor, targets: Targets, weights: CostWeights) -> Tensor:
    """The cost in plain torch: the specification."""
    precise = torch.promote_types(logits.dtype, torch.float32)
    layers, batch, queries, _ = logits.shape
    slots = targets.labels.shape[1]
    index = targets.labels[None, :, :, None].expand(layers, batch, slots, queries)
    logit = logits.transpose(-1, -2).gather(2, index).to(precise)
    p = logit.sigmoid()
    a, b = boxes.to(precise)[..., None, :, :], targets.boxes.to(precise)[..., None, :]
    overlap = generalized_iou(cxcywh_to_xyxy(a), cxcywh_to_xyxy(b))
    if weights.position:
        p = p * (0.5 * overlap + 0.5).clamp(0, 1).pow(weights.position)
    positive = weights.alpha * (1 - p) ** 2 * -(p + 1e-8).log()
    negative = (1 - weights.alpha) * p**2 * -(1 - p + 1e-8).log()
    distance = sum((x - y).abs() for x, y in zip(a.unbind(-1), b.unbind(-1), strict=True))
    cost = weights.label * (positive - negative) + weights.l1 * distance - weights.giou * overlap
    cost = cost.masked_fill(~logit.isfinite(), float("nan"))  # p would be 0 or 1, and hide it
    return cost.masked_fill(~targets.valid[:, :, None], float("inf")).transpose(-1, -2)


# The backend travels through the op: Triton's interpreter also runs on CPU tensors.
torch.library.define(
    "dndetr::match_cost",
    "(Tensor logits, Tensor boxes, Tensor labels, Tensor target_boxes, Tensor counts, float[] weights, str backend)"
    " -> Tensor",
)


@torch.library.impl("dndetr::match_cost", ("cpu", "cuda"))
def _match_cost(logits, boxes, labels, target_boxes, counts, weights, backend):
    cost = _empty_cost(logits, labels)
    if backend == "cpp":
        module = _backend.compiled()
        with compiled_inputs(module, logits, boxes, labels, target_boxes, counts, weights) as inputs:
            module.match_cost(inputs, cost.data_ptr(), torch.get_num_threads())
        return cost
    from ..kernels.match_cost import match_cost_forward

    with torch.cuda.device_of(logits):
        match_cost_forward(logits, boxes, labels, target_boxes, counts, weights, cost.transpose(-1, -2))
    return cost


@contextmanager
def compiled_inputs(module, logits, boxes, labels, target_boxes, counts, weights):
    """Predictions and targets as compiled code takes them, alive within the block."""
    alive = (
        logits if logits.stride(-1) == 1 else logits.contiguous(),
        boxes if boxes.stride(-1) == 1 else boxes.contiguous(),
        labels.contiguous(),
        target_boxes.contiguous(),
        counts.contiguous(),
    )
    logits, boxes, labels, target_boxes, counts = alive
    yield module.MatchInputs(
        (*logits.shape, labels.shape[1]),
        _backend.pointer(logits),
        logits.stride()[:3],
        _backend.pointer(boxes),
        boxes.stride()[:3],
        labels.data_ptr(),
        _backend.pointer(target_boxes),
        counts.data_ptr(),
        weights,
    )
    del alive


@torch.library.register_fake("dndetr::match_cost")
def _match_cost_fake(logits, boxes, labels, target_boxes, counts, weights, backend):
    return _empty_cost(logits, labels)


def _empty_cost(logits: Tensor, labels: Tensor) -> Tensor:
    layers, batch, queries, _ = logits.shape
    precise = torch.promote_types(logits.dtype, torch.float32)
    return logits.new_empty((layers, batch, labels.shape[1], queries), dtype=precise).transpose(-1, -2)


@torch.no_grad()
def match_cost(
    logits: Tensor,
    boxes: Tensor,
    targets: Targets,
    weights: CostWeights = CostWeights(),
    backend: str | None = None,
) -> Tensor:
    """Cost of matching every query with every target of its image.

    logits [Y, B, N, K], boxes [Y, B, N, 4] cxcywh, targets padded to T
    -> [Y, B, N, T], +inf where padded; float32 (float64 for float64 logits), no gradient.
    """
    validate("match_cost", logits, boxes, targets, weights)
    name, _ = _backend.choose("match_cost", backend, logits.device.type)
    if name == "reference":
        return match_cost_reference(logits, boxes, targets, weights)
    return torch.ops.dndetr.match_cost(
        logits, boxes, targets.labels, targets.boxes, targets.counts, [float(weight) for weight in weights], name
    )


def validate(op: str, logits: Tensor, boxes: Tensor, targets: Targets, weights: CostWeights) -> None:
    """ValueError if shapes, dtypes or the exponent are not those that ``op`` takes."""
    if not weights.position >= 0:
        raise ValueError(f"{op}: weights.position must be 0 or more, got {weights.position}")
    if logits.ndim != 4 or boxes.shape != (*logits.shape[:3], 4):
        given = f"{list(logits.shape)} and {list(boxes.shape)}"
        raise ValueError(f"{op}: logits must be [Y, B, N, K] and boxes [Y, B, N, 4], got {given}")
    if targets.labels.shape[0] != logits.shape[1]:
        raise ValueError(f"{op}: {logits.shape[1]} images in logits, {targets.labels.shape[0]} in targets")
    if targets.labels.dtype != torch.int64 or targets.counts.dtype != torch.int32:
        raise ValueError(
            f"{op}: labels must be int64 and counts int32, got {targets.labels.dtype} and {targets.counts.dtype}"
        )


# name: (Y, B, N, K, counts per image, T, dtype)
CASES = {
    "tiny": (2, 2, 5, 3, (2, 0), 4, torch.float32),
    "uneven": (3, 3, 37, 11, (8, 1, 5), 8, torch.float32),
    "bf16": (1, 2, 20, 4, (3, 7), 8, torch.bfloat16),
    "f16": (1, 2, 20, 4, (3, 7), 8, torch.float16),
    "f64": (2, 1, 17, 5, (16,), 16, torch.float64),
    "no-targets": (2, 2, 9, 3, (0, 0), 8, torch.float32),
    "coco": (6, 2, 300, 91, (7, 20), 32, torch.float32),
}


def make_case(name: str, device: str = "cpu", seed: int = 0) -> tuple[Tensor, Tensor, Targets]:
    """(logits, boxes, targets) of a case."""
    layers, batch, queries, classes, counts, slots, dtype = CASES[name]
    draw = torch.Generator().manual_seed(seed)
    precise = torch.promote_types(dtype, torch.float32)
    logits = 2 * torch.randn(layers, batch, queries, classes, generator=draw, dtype=precise) - 2
    boxes = torch.rand(layers, batch, queries, 4, generator=draw, dtype=precise) * 0.8 + 0.1
    targets = Targets(
        torch.randint(classes, (batch, slots), generator=draw),
        torch.rand(batch, slots, 4, generator=draw, dtype=precise) * 0.8 + 0.1,
        torch.tensor(counts, dtype=torch.int32),
    )
    valid = targets.valid
    targets = Targets(targets.labels * valid, targets.boxes * valid[..., None], targets.counts)
    return logits.to(device, dtype), boxes.to(device), targets.to(device)


def _self_test(backend: str, device_type: str) -> float:
    logits, boxes, targets = make_case("tiny", device_type)
    weights = CostWeights()
    given = torch.ops.dndetr.match_cost(
        logits, boxes, targets.labels, targets.boxes, targets.counts, list(weights), backend
    )
    expected = match_cost_reference(logits, boxes, targets, weights)
    return _backend.largest_error([given], [expected])


def _cpp_obstacle(device_type: str) -> str | None:
    return _backend.extension_obstacle("match_cost") if device_type == "cpu" else "it works on CPU tensors"


_backend.register(
    "match_cost",
    _backend.Backend("cpp", ("cpu",), _cpp_obstacle, partial(_self_test, "cpp"), tolerance=1e-4),
    _backend.Backend("triton", ("cuda",), _backend.triton_obstacle, partial(_self_test, "triton"), tolerance=1e-4),
)
