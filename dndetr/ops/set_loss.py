"""The set loss of all decoder layers at once: class, L1 and generalised IoU, for matched and denoising queries.

    label = sum over queries and classes of the class loss / normalizer
    l1    = sum over matched pairs of |box - target|_1 / normalizer
    giou  = sum over matched pairs of (1 - GIoU) / normalizer

Class losses are in class_loss.py. The focal one is a_t (1 - p_t)^2 (-ln p_t), with p = sigmoid(logit), p_t = p for the
target's class and 1 - p elsewhere, a_t = alpha or 1 - alpha. A matching query without a partner has no target class.
Both parts have normalizers of their own.

A denoising query's target is the object it was made from, so its part needs no matching. A group has R slots for each
object, next to each other: the first restores the object, the others have no target class and no box (R = 2 is the
contrastive denoising of arXiv 2203.03605, section 3.3). Of each group the first ``counted`` slots count, those without
an object as background, and all others for nothing. In layers of the encoder's proposals no denoising query counts.

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
from ..boxes import cxcywh_to_xyxy, generalized_iou, iou_and_union
from . import _backend
from .class_loss import KINDS, Kind, class_loss
from .group_attention import GroupLayout
from .match import Matches, invert


class LossWeights(NamedTuple):
    """Coefficients of the loss terms, and what they are made of.

    alpha, kind: of the class loss; noised: its kind for denoising queries; eps: added to the divisors of IoU and GIoU.
    """

    label: float = 1.0
    l1: float = 5.0
    giou: float = 2.0
    alpha: float = 0.25
    kind: Kind = "focal"
    noised: Kind = "focal"
    eps: float = 1e-6


PARTS = ("label", "l1", "giou", "dn_label", "dn_l1", "dn_giou")


def set_loss_reference(
    logits: Tensor,
    boxes: Tensor,
    matches: Matches,
    layout: GroupLayout,
    targets: Targets,
    normalizers: Tensor,
    weights: LossWeights,
    counted: Tensor,
    proposals: int,
) -> tuple[Tensor, Tensor]:
    """The specification in plain torch; arguments and result as :func:`set_loss`."""
    precise = _precise(logits, boxes)
    logits, boxes, target_boxes = (x.to(precise) for x in (logits, boxes, targets.boxes))
    layers, batch = logits.shape[:2]
    objects, noised, per_object = targets.labels.shape[1], layout.denoising, _per_object(layout, targets)
    slot = torch.arange(layout.slots, device=logits.device).repeat(layout.groups)
    decoded = torch.arange(layers, device=logits.device)[:, None, None] >= proposals
    counts = decoded & (slot < counted[:, None])
    restores = counts & (slot % per_object == 0) & (slot // per_object < targets.counts[:, None])
    # The target of every query, -1 for none.
    partner = torch.cat((torch.where(restores, slot // per_object, -1), matches.target.long()), dim=2)
    paired, index = partner >= 0, partner.clamp(min=0)
    counts = F.pad(counts, (0, logits.shape[2] - noised), value=True)
    # What does not count gets no gradient, whatever it holds.
    logits, boxes = logits.masked_fill(~counts[..., None], 0), boxes.masked_fill(~paired[..., None], 0)
    if objects:
        label = targets.labels.expand(layers, batch, objects).gather(2, index).masked_fill(~paired, -1)
        truth = target_boxes.expand(layers, batch, objects, 4).gather(2, index[..., None].expand(-1, -1, -1, 4))
    else:
        label, truth = partner, boxes.detach()
    apart = boxes - truth
    corners = cxcywh_to_xyxy(boxes), cxcywh_to_xyxy(truth)
    overlap = iou_and_union(*corners, weights.eps)[0].detach().masked_fill(~paired, 0)
    halves = (slice(noised, None), slice(noised))
    classes = [
        class_loss(logits[:, :, half], label[:, :, half], overlap[:, :, half], kind, weights.alpha)
        for half, kind in zip(halves, (weights.kind, weights.noised), strict=True)
    ]
    terms = (
        torch.cat(classes[::-1], dim=2).masked_fill(~counts, 0),
        (apart * apart.detach().sign()).sum(-1).masked_fill(~paired, 0),  # |apart|, with slope 0 at 0
        (1 - generalized_iou(*corners, weights.eps)).masked_fill(~paired, 0),
    )
    sums = [term[:, :, half].sum((1, 2)) for half in halves for term in terms]
    parts = torch.stack(sums, dim=1) / normalizers.to(precise).repeat_interleave(3)
    coefficients = (weights.label, weights.l1, weights.giou) * 2
    total = sum(coefficient * part for coefficient, part in zip(coefficients, parts.sum(0).unbind(), strict=True))
    return total, parts


def _per_object(layout: GroupLayout, targets: Targets) -> int:
    objects = targets.labels.shape[1]
    return layout.slots // objects if layout.groups and objects else 1


def _precise(logits: Tensor, boxes: Tensor) -> torch.dtype:
    return torch.promote_types(torch.promote_types(logits.dtype, boxes.dtype), torch.float32)


_INPUTS = (
    "Tensor logits, Tensor boxes, Tensor target, Tensor labels, Tensor target_boxes, Tensor counts, Tensor counted, "
    "Tensor normalizers, int groups, int per_object, int proposals, float[] weights, str backend"
)
torch.library.define("dndetr::set_loss", f"({_INPUTS}) -> (Tensor, Tensor)")
torch.library.define(
    "dndetr::set_loss_backward", f"(Tensor? grad_total, Tensor? grad_parts, {_INPUTS}) -> (Tensor, Tensor)"
)


@torch.library.impl("dndetr::set_loss", ("cpu", "cuda"))
def _forward(logits, boxes, *others):
    total, parts = _forward_fake(logits, boxes)
    *others, groups, per_object, proposals, weights, backend = others
    inputs = _contiguous(logits, boxes, *others)
    if backend == "triton":
        from ..kernels.set_loss import set_loss_forward

        with torch.cuda.device_of(logits):
            set_loss_forward(*inputs, groups, per_object, proposals, weights, total, parts)
    else:
        module = _backend.compiled()
        problem = _problem(module, inputs, groups, per_object, proposals, weights)
        module.set_loss(problem, total.data_ptr(), parts.data_ptr(), torch.get_num_threads())
    return total, parts


@torch.library.impl("dndetr::set_loss_backward", ("cpu", "cuda"))
def _backward(grad_total, grad_parts, logits, boxes, *others):
    grads = _backward_fake(grad_total, grad_parts, logits, boxes)
    *others, groups, per_object, proposals, weights, backend = others
    inputs = _contiguous(logits, boxes, *others)
    precise = _precise(logits, boxes)
    grad_total, grad_parts = (None if x is None else x.to(precise).contiguous() for x in (grad_total, grad_parts))
    if backend == "triton":
        from ..kernels.set_loss import set_loss_backward

        with torch.cuda.device_of(logits):
            set_loss_backward(grad_total, grad_parts, *inputs, groups, per_object, proposals, weights, *grads)
    else:
        module = _backend.compiled()
        given = [0 if x is None else x.data_ptr() for x in (grad_total, grad_parts)]
        problem = _problem(module, inputs, groups, per_object, proposals, weights)
        module.set_loss_backward(problem, *given, *map(_backend.pointer, grads), torch.get_num_threads())
    return grads


def _contiguous(logits, boxes, target, labels, target_boxes, counts, counted, normalizers) -> tuple[Tensor, ...]:
    """Inputs as kernels take them: contiguous, numbers int32, target boxes and normalizers in the computing type."""
    precise = _precise(logits, boxes)
    numbers = counts.int(), counted.int()
    inputs = (logits, boxes, target, labels, target_boxes.to(precise), *numbers, normalizers.to(precise))
    return tuple(x.contiguous() for x in inputs)


def _problem(module, inputs, groups, per_object, proposals, weights):
    """Inputs as the compiled module takes them; whoever asks keeps them alive."""
    logits, boxes, _, labels, *_ = inputs
    sizes = (*logits.shape, labels.shape[1], groups, per_object, proposals)
    pointers = [x.data_ptr() for x in inputs[2:]]
    return module.SetLoss(sizes, _backend.pointer(logits), _backend.pointer(boxes), pointers, weights)


@torch.library.register_fake("dndetr::set_loss")
def _forward_fake(logits, boxes, *others):
    precise = _precise(logits, boxes)
    return logits.new_empty((), dtype=precise), logits.new_empty((logits.shape[0], len(PARTS)), dtype=precise)


@torch.library.register_fake("dndetr::set_loss_backward")
def _backward_fake(grad_total, grad_parts, logits, boxes, *others):
    return tuple(torch.empty_like(x, memory_format=torch.contiguous_format) for x in (logits, boxes))


def _setup_context(ctx, inputs, output):
    *tensors, ctx.groups, ctx.per_object, ctx.proposals, ctx.weights, ctx.backend = inputs
    ctx.save_for_backward(*tensors)
    ctx.set_materialize_grads(False)


def _differentiate(ctx, grad_total, grad_parts):
    none = (None,) * 11
    if grad_total is None and grad_parts is None:
        return None, None, *none
    others = ctx.groups, ctx.per_object, ctx.proposals, ctx.weights, ctx.backend
    return *torch.ops.dndetr.set_loss_backward(grad_total, grad_parts, *ctx.saved_tensors, *others), *none


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
    counted: Tensor | None = None,
    proposals: int = 0,
) -> tuple[Tensor, Tensor]:
    """Loss of every decoder layer over matching and denoising queries.

    logits [Y, B, Q, K], boxes [Y, B, Q, 4] cxcywh, matches from :func:`dndetr.ops.match` on the matching part, targets
    with layout.slots a multiple of T where there are groups (twice for contrastive ones), normalizers [2] (matching,
    denoising), which pass no gradient; counted [B] int32: slots of each group that count, at most layout.slots (None:
    those of objects); proposals: so many of the first layers are the encoder's
    -> total (scalar) and parts [Y, 6], unweighted, in the order of ``PARTS``; at least float32. ValueError where sizes
    do not fit each other.
    """
    layers, batch, queries, _ = logits.shape
    objects, per_object = targets.labels.shape[1], _per_object(layout, targets)
    if layout.groups and (per_object * objects != layout.slots or per_object == 0):
        raise ValueError(
            f"set_loss: targets are padded to {objects} per image, but the denoising groups have {layout.slots} slots, "
            "which is no multiple of that"
        )
    if not 0 <= proposals <= layers:
        raise ValueError(f"set_loss: proposals must be between 0 and the {layers} layers of logits, got {proposals}")
    if counted is None:
        counted = targets.counts if per_object == 1 else targets.counts * per_object
    expected = {
        "boxes": (boxes, (layers, batch, queries, 4)),
        "matches.target": (matches.target, (layers, batch, queries - layout.denoising)),
        "targets.labels": (targets.labels, (batch, objects)),
        "targets.boxes": (targets.boxes, (batch, objects, 4)),
        "targets.counts": (targets.counts, (batch,)),
        "counted": (counted, (batch,)),
        "normalizers": (normalizers, (2,)),
    }
    for name, (tensor, shape) in expected.items():
        if tensor.shape != shape:
            given = f"logits {list(logits.shape)} and {layout}"
            raise ValueError(f"set_loss: {name} must be {list(shape)} with {given}, got {list(tensor.shape)}")
    for field, kind in zip(("kind", "noised"), (weights.kind, weights.noised), strict=True):
        if kind not in KINDS:
            raise ValueError(f"set_loss: weights.{field} must be one of {', '.join(KINDS)}, got {kind!r}")
    name, _ = _backend.choose("set_loss", backend, logits.device.type)
    if name == "reference" or weights[4:] != LossWeights()[4:]:
        return set_loss_reference(logits, boxes, matches, layout, targets, normalizers, weights, counted, proposals)
    return torch.ops.dndetr.set_loss(
        logits,
        boxes,
        matches.target,
        targets.labels,
        targets.boxes,
        targets.counts,
        counted,
        normalizers,
        layout.groups,
        per_object,
        proposals,
        [float(weight) for weight in weights[:4]],
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
    "contrastive": (3, 2, (2, 12, 9), 5, (5, 2), torch.float32),
    "contrastive-f64": (3, 2, (2, 8, 7), 3, (3, 1), torch.float64),
    "contrastive-bf16": (2, 2, (2, 16, 20), 7, (3, 7), torch.bfloat16),
    "contrastive-f16": (2, 2, (2, 16, 20), 7, (3, 7), torch.float16),
    "contrastive-many-classes": (2, 1, (1, 8, 6), 1203, (3,), torch.float32),
    "contrastive-no-targets": (2, 2, (2, 8, 9), 4, (0, 0), torch.float32),
    "contrastive-no-slots": (2, 2, (2, 0, 9), 4, (0, 0), torch.float32),
    "contrastive-no-images": (2, 0, (2, 8, 5), 3, (), torch.float32),
    "three-slots": (2, 2, (3, 12, 5), 4, (3, 1), torch.float32),
    "counted": (2, 3, (2, 5, 6), 4, (2, 4, 5), torch.float32),
    "proposals": (2, 2, (2, 4, 6), 4, (2, 4), torch.float32),
}
# name: (slots of an object, slots that count in each image, layers of proposals), where that is not (1, None, 0)
DENOISING = {
    "contrastive": (2, (12, 3), 1),
    "contrastive-f64": (2, (8, 1), 1),
    "contrastive-bf16": (2, None, 0),
    "contrastive-f16": (2, (5, 16), 1),
    "contrastive-many-classes": (2, (7,), 1),
    "contrastive-no-targets": (2, (8, 0), 0),
    "contrastive-no-slots": (2, (0, 0), 1),
    "contrastive-no-images": (2, (), 1),
    "three-slots": (3, (12, 2), 0),
    "counted": (1, (4, 1, 0), 0),
    "proposals": (1, None, 2),
}


def make_options(name: str, device: str = "cpu") -> dict:
    """Further arguments of :func:`set_loss` for a case."""
    _, counted, proposals = DENOISING.get(name, (1, None, 0))
    counted = None if counted is None else torch.tensor(counted, dtype=torch.int32, device=device)
    return {"counted": counted, "proposals": proposals}


def make_case(name: str, device: str = "cpu", seed: int = 0) -> tuple:
    """Arguments of :func:`set_loss` for a case, all up to the weights; the matching is random."""
    layers, batch, layout, classes, counts, dtype = CASES[name]
    layout = GroupLayout(*layout)
    padded = layout.slots // DENOISING.get(name, (1,))[0]
    draw = torch.Generator().manual_seed(seed)
    precise = torch.promote_types(dtype, torch.float32)

    def boxes(*size):
        return torch.rand(*size, 4, generator=draw, dtype=precise) * 0.6 + 0.2

    logits = 3 * torch.randn(layers, batch, layout.queries, classes, generator=draw, dtype=precise) - 1
    labels = torch.randint(classes, (batch, padded), generator=draw)
    targets = Targets(labels, boxes(batch, padded), torch.tensor(counts, dtype=torch.int32))
    targets = Targets(labels * targets.valid, targets.boxes * targets.valid[..., None], targets.counts)
    query = torch.full((layers, batch, 1, padded), -1, dtype=torch.int32)
    for image, count in enumerate(counts):
        for layer in range(layers):
            found = torch.randperm(layout.matching, generator=draw)[:count]
            query[layer, image, 0, : len(found)] = found
    matches = Matches(query, invert(query, layout.matching), torch.ones(layers, batch, dtype=torch.bool))
    objects = torch.tensor([sum(counts), sum(counts) * layout.groups], dtype=precise).clamp(min=1)
    given = logits.to(device, dtype), boxes(layers, batch, layout.queries).to(device)
    return *given, Matches(*(x.to(device) for x in matches)), layout, targets.to(device), objects.to(device)


def _self_test(device_type: str, backend: str) -> float:
    name = "contrastive"
    logits, boxes, *rest = make_case(name, device_type)
    inputs = [logits.requires_grad_(), boxes.requires_grad_()]
    matches, layout, targets, normalizers = rest
    options, weights = make_options(name, device_type), LossWeights()
    with torch.enable_grad():
        total, parts = set_loss_reference(*inputs, *rest, weights, **options)
        expected = [parts.detach(), *torch.autograd.grad(total, inputs)]
    given = (logits.detach(), boxes.detach(), matches.target, targets.labels, targets.boxes, targets.counts)
    numbers = layout.groups, _per_object(layout, targets), options["proposals"]
    others = (*given, options["counted"], normalizers, *numbers, list(weights[:4]), backend)
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
