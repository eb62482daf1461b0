"""The set loss of all decoder layers at once: focal, L1 and generalised IoU, for matched and denoising queries.

    label = sum over queries and classes of  a_t (1 - p_t)^2 (-ln p_t) / normalizer
    l1    = sum over matched pairs of |box - target|_1 / normalizer
    giou  = sum over matched pairs of (1 - GIoU) / normalizer

with p = sigmoid(logit), p_t = p for the target's class and 1 - p elsewhere, a_t = alpha or 1 - alpha. A matching query
without a partner has no target class. A denoising query's target is the object it was made from, so its part needs no
matching; slots that hold no object count for nothing. Both parts have normalizers of their own.

With z = -logit for the target's class and the logit elsewhere: loss = a_t sigmoid(z)^2 softplus(z), which neither
overflows nor loses digits, and d loss / dz = a_t sigmoid(z)^2 (2 (1 - sigmoid(z)) softplus(z) + sigmoid(z)).

Where a box touches its target: |x| has slope 0 at 0, equal edges share the gradient of their maximum or minimum, half
each, and an extent of 0 passes its gradient on (dndetr/boxes.py).

The fused paths (csrc/set_loss, kernels/set_loss.py) read every logit once forward and once backward, keep nothing
but the inputs, and add in an order that depends on neither threads nor timing.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..batch import Targets
from ..boxes import cxcywh_to_xyxy, generalized_iou
from . import _backend
from .group_attention import GroupLayout
from .match import Matches, invert


class LossWeights(NamedTuple):
    """Coefficients of the loss terms, and the focal loss's alpha."""

    label: float = 1.0
    l1: float = 5.0
    giou: float = 2.0
    alpha: float = 0.25


PARTS = ("label", "l1", "giou", "dn_label", "dn_l1", "dn_giou")


def focal_loss(logits: Tensor, labels: Tensor, alpha: float) -> Tensor:
    """Focal loss (arXiv 1708.02002, gamma 2) summed over classes.

    logits [..., K], labels [...] int64 in [0, K), or negative for no class -> [...].
    """
    positive = labels[..., None] == torch.arange(logits.shape[-1], device=logits.device)
    away = torch.where(positive, -logits, logits)
    weight = positive.to(logits.dtype) * (2 * alpha - 1) + (1 - alpha)
    return (weight * away.sigmoid().square() * F.softplus(away, threshold=40)).sum(-1)


def set_loss_reference(
    logits: Tensor,
    boxes: Tensor,
    matches: Matches,
    layout: GroupLayout,
    targets: Targets,
    normalizers: Tensor,
    weights: LossWeights,
) -> tuple[Tensor, Tensor]:
    """The specification in plain torch; arguments and result as :func:`set_loss`."""
    precise = _precise(logits, boxes)
    logits, boxes, target_boxes = (x.to(precise) for x in (logits, boxes, targets.boxes))
    layers, batch = logits.shape[:2]
    slots, noised = targets.labels.shape[1], layout.denoising
    # The target of every query, -1 for none: a denoising query's is the object in its own slot.
    slot = torch.arange(slots, device=logits.device).repeat(layout.groups)
    own = torch.where(slot < targets.counts[:, None], slot, -1)
    partner = torch.cat((own.expand(layers, batch, noised), matches.target.long()), dim=2)
    paired, index = partner >= 0, partner.clamp(min=0)
    if slots:
        label = targets.labels.expand(layers, batch, slots).gather(2, index).masked_fill(~paired, -1)
        truth = target_boxes.expand(layers, batch, slots, 4).gather(2, index[..., None].expand(-1, -1, -1, 4))
    else:
        label, truth = partner, boxes.detach()
    counted = F.pad(paired[:, :, :noised], (0, logits.shape[2] - noised), value=True)
    apart = boxes - truth
    terms = (
        focal_loss(logits, label, weights.alpha).masked_fill(~counted, 0),
        (apart * apart.detach().sign()).sum(-1).masked_fill(~paired, 0),  # |apart|, with slope 0 at 0
        (1 - generalized_iou(cxcywh_to_xyxy(boxes), cxcywh_to_xyxy(truth))).masked_fill(~paired, 0),
    )
    halves = (slice(noised, None), slice(noised))
    sums = [term[:, :, half].sum((1, 2)) for half in halves for term in terms]
    parts = torch.stack(sums, dim=1) / normalizers.to(precise).repeat_interleave(3)
    coefficients = (weights.label, weights.l1, weights.giou) * 2
    total = sum(coefficient * part for coefficient, part in zip(coefficients, parts.sum(0).unbind(), strict=True))
    return total, parts


def _precise(logits: Tensor, boxes: Tensor) -> torch.dtype:
    return torch.promote_types(torch.promote_types(logits.dtype, boxes.dtype), torch.float32)


_INPUTS = (
    "Tensor logits, Tensor boxes, Tensor target, Tensor labels, Tensor target_boxes, Tensor counts, "
    "Tensor normalizers, int groups, float[] weights, str backend"
)
torch.library.define("dndetr::set_loss", f"({_INPUTS}) -> (Tensor, Tensor)")
torch.library.define(
    "dndetr::set_loss_backward", f"(Tensor? grad_total, Tensor? grad_parts, {_INPUTS}) -> (Tensor, Tensor)"
)


@torch.library.impl("dndetr::set_loss", ("cpu", "cuda"))
def _forward(logits, boxes, target, labels, target_boxes, counts, normalizers, groups, weights, backend):
    total, parts = _forward_fake(
        logits, boxes, target, labels, target_boxes, counts, normalizers, groups, weights, backend
    )
    inputs = _contiguous(logits, boxes, target, labels, target_boxes, counts, normalizers)
    if backend == "triton":
        from ..kernels.set_loss import set_loss_forward

        with torch.cuda.device_of(logits):
            set_loss_forward(*inputs, groups, weights, total, parts)
    else:
        module = _backend.compiled()
        problem = _problem(module, inputs, groups, weights)
        module.set_loss(problem, total.data_ptr(), parts.data_ptr(), torch.get_num_threads())
    return total, parts


@torch.library.impl("dndetr::set_loss_backward", ("cpu", "cuda"))
def _backward(
    grad_total,
    grad_parts,
    logits,
    boxes,
    target,
    labels,
    target_boxes,
    counts,
    normalizers,
    groups,
    weights,
    backend,
):
    grads = [torch.empty_like(x, memory_format=torch.contiguous_format) for x in (logits, boxes)]
    inputs = _contiguous(logits, boxes, target, labels, target_boxes, counts, normalizers)
    precise = _precise(logits, boxes)
    grad_total, grad_parts = (None if x is None else x.to(precise).contiguous() for x in (grad_total, grad_parts))
    if backend == "triton":
        from ..kernels.set_loss import set_loss_backward

        with torch.cuda.device_of(logits):
            set_loss_backward(grad_total, grad_parts, *inputs, groups, weights, *grads)
    else:
        module = _backend.compiled()
        given = [0 if x is None else x.data_ptr() for x in (grad_total, grad_parts)]
        problem = _problem(module, inputs, groups, weights)
        module.set_loss_backward(problem, *given, *map(_backend.pointer, grads), torch.get_num_threads())
    return tuple(grads)


def _contiguous(logits, boxes, target, labels, target_boxes, counts, normalizers) -> tuple[Tensor, ...]:
    """Inputs as kernels take them: contiguous, targets and normalizers in the computing type."""
    precise = _precise(logits, boxes)
    inputs = (logits, boxes, target, labels, target_boxes.to(precise), counts, normalizers.to(precise))
    return tuple(x.contiguous() for x in inputs)


def _problem(module, inputs, groups, weights):
    """Inputs as the compiled module takes them; whoever asks keeps them alive."""
    logits, boxes, *others = inputs
    layers, batch, queries, classes = logits.shape
    sizes = (layers, batch, queries, classes, groups, inputs[3].shape[1])
    pointers = [x.data_ptr() for x in others]
    return module.SetLoss(sizes, _backend.pointer(logits), _backend.pointer(boxes), pointers, weights)


@torch.library.register_fake("dndetr::set_loss")
def _forward_fake(logits, boxes, target, labels, target_boxes, counts, normalizers, groups, weights, backend):
    precise = _precise(logits, boxes)
    return logits.new_empty((), dtype=precise), logits.new_empty((logits.shape[0], len(PARTS)), dtype=precise)


@torch.library.register_fake("dndetr::set_loss_backward")
def _backward_fake(grad_total, grad_parts, logits, boxes, *others):
    return tuple(torch.empty_like(x, memory_format=torch.contiguous_format) for x in (logits, boxes))


def _setup_context(ctx, inputs, output):
    *tensors, ctx.groups, ctx.weights, ctx.backend = inputs
    ctx.save_for_backward(*tensors)
    ctx.set_materialize_grads(False)


def _differentiate(ctx, grad_total, grad_parts):
    none = (None,) * 8
    if grad_total is None and grad_parts is None:
        return None, None, *none
    grads = torch.ops.dndetr.set_loss_backward(
        grad_total, grad_parts, *ctx.saved_tensors, ctx.groups, ctx.weights, ctx.backend
    )
    return *grads, *none


torch.library.register_autograd("dndetr::set_loss", _differentiate, setup_context=_setup_context)


def set_loss(
    logits: Tensor,
    boxes: Tensor,
    matches: Matches,
    layout: GroupLayout,
    targets: Targets,
    normalizers: Tensor,
    weights: LossWeights = LossWeights(),
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Loss of every decoder layer over matching and denoising queries.

    logits [Y, B, Q, K], boxes [Y, B, Q, 4] cxcywh, matches from :func:`dndetr.ops.match` on the matching part, targets
    with T = layout.slots where there are groups, normalizers [2] (matching, denoising), which pass no gradient
    -> total (scalar) and parts [Y, 6], unweighted, in the order of ``PARTS``; at least float32.
    """
    layers, batch, queries, _ = logits.shape
    slots = targets.labels.shape[1]
    if layout.groups and slots != layout.slots:
        raise ValueError(
            f"set_loss: targets are padded to {slots} per image, but the denoising groups have {layout.slots} slots"
        )
    expected = {
        "boxes": (boxes, (layers, batch, queries, 4)),
        "matches.target": (matches.target, (layers, batch, queries - layout.denoising)),
        "targets.labels": (targets.labels, (batch, slots)),
        "targets.boxes": (targets.boxes, (batch, slots, 4)),
        "targets.counts": (targets.counts, (batch,)),
        "normalizers": (normalizers, (2,)),
    }
    for name, (tensor, shape) in expected.items():
        if tensor.shape != shape:
            given = f"logits {list(logits.shape)} and {layout}"
            raise ValueError(f"set_loss: {name} must be {list(shape)} with {given}, got {list(tensor.shape)}")
    name, _ = _backend.choose("set_loss", backend, logits.device.type)
    if name == "reference":
        return set_loss_reference(logits, boxes, matches, layout, targets, normalizers, weights)
    return torch.ops.dndetr.set_loss(
        logits,
        boxes,
        matches.target,
        targets.labels,
        targets.boxes,
        targets.counts,
        normalizers,
        layout.groups,
        [float(weight) for weight in weights],
        name,
    )


# name: (Y, B, (groups, slots, matching), K, counts per image, dtype)
CASES = {
    "tiny": (2, 2, (2, 3, 5), 3, (2, 0), torch.float32),
    "f64": (3, 2, (2, 4, 7), 5, (4, 1), torch.float64),
    "uneven": (3, 3, (5, 8, 37), 11, (8, 1, 5), torch.float32),
    "no-groups": (2, 2, (0, 8, 9), 4, (3, 8), torch.float32),
    "no-targets": (2, 2, (2, 8, 9), 4, (0, 0), torch.float32),
    "no-slots": (2, 2, (0, 0, 9), 4, (0, 0), torch.float32),
    "one-class": (2, 1, (1, 4, 6), 1, (3,), torch.float32),
    "more-targets": (1, 2, (1, 16, 4), 3, (16, 9), torch.float32),
    "no-images": (2, 0, (2, 4, 5), 3, (), torch.float32),
    "many-classes": (1, 1, (1, 4, 6), 1203, (4,), torch.float32),
    "bf16": (2, 2, (2, 8, 20), 7, (3, 7), torch.bfloat16),
    "f16": (2, 2, (2, 8, 20), 7, (3, 7), torch.float16),
    "coco": (6, 2, (5, 32, 300), 91, (7, 20), torch.float32),
}


def make_case(name: str, device: str = "cpu", seed: int = 0) -> tuple:
    """Arguments of :func:`set_loss` for a case, all but the weights; the matching is random."""
    layers, batch, layout, classes, counts, dtype = CASES[name]
    layout = GroupLayout(*layout)
    draw = torch.Generator().manual_seed(seed)
    precise = torch.promote_types(dtype, torch.float32)

    def boxes(*size):
        return torch.rand(*size, 4, generator=draw, dtype=precise) * 0.6 + 0.2

    logits = 3 * torch.randn(layers, batch, layout.queries, classes, generator=draw, dtype=precise) - 1
    labels = torch.randint(classes, (batch, layout.slots), generator=draw)
    targets = Targets(labels, boxes(batch, layout.slots), torch.tensor(counts, dtype=torch.int32))
    targets = Targets(labels * targets.valid, targets.boxes * targets.valid[..., None], targets.counts)
    query = torch.full((layers, batch, 1, layout.slots), -1, dtype=torch.int32)
    for image, count in enumerate(counts):
        for layer in range(layers):
            found = torch.randperm(layout.matching, generator=draw)[:count]
            query[layer, image, 0, : len(found)] = found
    matches = Matches(query, invert(query, layout.matching), torch.ones(layers, batch, dtype=torch.bool))
    objects = torch.tensor([sum(counts), sum(counts) * layout.groups], dtype=precise).clamp(min=1)
    given = logits.to(device, dtype), boxes(layers, batch, layout.queries).to(device)
    return *given, Matches(*(x.to(device) for x in matches)), layout, targets.to(device), objects.to(device)


def _self_test(device_type: str, backend: str) -> float:
    logits, boxes, *rest = make_case("tiny", device_type)
    inputs = [logits.requires_grad_(), boxes.requires_grad_()]
    matches, layout, targets, normalizers = rest
    weights = LossWeights()
    with torch.enable_grad():
        total, parts = set_loss_reference(*inputs, *rest, weights)
        expected = [parts.detach(), *torch.autograd.grad(total, inputs)]
    given = (logits.detach(), boxes.detach(), matches.target, targets.labels, targets.boxes, targets.counts)
    others = (*given, normalizers, layout.groups, list(weights), backend)
    total, parts = torch.ops.dndetr.set_loss(*others)
    grads = torch.ops.dndetr.set_loss_backward(torch.ones_like(total), None, *others)
    return _backend.largest_error((parts, *grads), expected)


def _cpp_obstacle(device_type: str) -> str | None:
    return _backend.extension_obstacle("set_loss") if device_type == "cpu" else "it works on CPU tensors"


_backend.register(
    "set_loss",
    _backend.Backend("cpp", ("cpu",), _cpp_obstacle, lambda device: _self_test(device, "cpp"), tolerance=1e-4),
    _backend.Backend(
        "triton", ("cuda",), _backend.triton_obstacle, lambda device: _self_test(device, "triton"), tolerance=1e-4
    ),
)
