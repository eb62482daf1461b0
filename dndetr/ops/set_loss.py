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
from ._set_loss_cases import make_case, make_options
from .class_loss import KINDS, Kind, class_loss
from .group_attention import GroupLayout
from .match import Matches


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

    @property
    def floats(self) -> list[float]:
        """Label, l1, giou, alpha and eps, as kernels take them."""
        return [float(weight) for weight in (self.label, self.l1, self.giou, self.alpha, self.eps)]

    @property
    def kinds(self) -> list[int]:
        """Places in ``KINDS`` of kind and noised; ValueError for what is none, or alpha outside 0 to 1 with iou."""
        for field, kind in (("kind", self.kind), ("noised", self.noised)):
            if kind not in KINDS:
                raise ValueError(f"set_loss: weights.{field} must be one of {', '.join(KINDS)}, got {kind!r}")
        if "iou" in (self.kind, self.noised) and not 0 <= self.alpha <= 1:
            raise ValueError(f"set_loss: weights.alpha must be 0 to 1 with iou, got {self.alpha}")
        return [KINDS.index(self.kind), KINDS.index(self.noised)]


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
    "Tensor normalizers, int groups, int per_object, int proposals, float[] weights, int[] kinds, str backend"
)
torch.library.define("dndetr::set_loss", f"({_INPUTS}) -> (Tensor, Tensor)")
torch.library.define(
    "dndetr::set_loss_backward", f"(Tensor? grad_total, Tensor? grad_parts, {_INPUTS}) -> (Tensor, Tensor)"
)


@torch.library.impl("dndetr::set_loss", ("cpu", "cuda"))
def _forward(logits, boxes, *others):
    total, parts = _forward_fake(logits, boxes)
    *others, groups, per_object, proposals, weights, kinds, backend = others
    inputs = _contiguous(logits, boxes, *others)
    numbers = groups, per_object, proposals, weights
    if backend == "triton":
        from ..kernels.set_loss import set_loss_forward

        with torch.cuda.device_of(logits):
            set_loss_forward(*inputs, *numbers, _names(kinds), total, parts)
    else:
        module = _backend.compiled()
        problem = _problem(module, inputs, *numbers, kinds)
        module.set_loss(problem, total.data_ptr(), parts.data_ptr(), torch.get_num_threads())
    return total, parts


@torch.library.impl("dndetr::set_loss_backward", ("cpu", "cuda"))
def _backward(grad_total, grad_parts, logits, boxes, *others):
    grads = _backward_fake(grad_total, grad_parts, logits, boxes)
    *others, groups, per_object, proposals, weights, kinds, backend = others
    inputs = _contiguous(logits, boxes, *others)
    numbers = groups, per_object, proposals, weights
    precise = _precise(logits, boxes)
    grad_total, grad_parts = (None if x is None else x.to(precise).contiguous() for x in (grad_total, grad_parts))
    if backend == "triton":
        from ..kernels.set_loss import set_loss_backward

        with torch.cuda.device_of(logits):
            set_loss_backward(grad_total, grad_parts, *inputs, *numbers, _names(kinds), *grads)
    else:
        module = _backend.compiled()
        given = [0 if x is None else x.data_ptr() for x in (grad_total, grad_parts)]
        problem = _problem(module, inputs, *numbers, kinds)
        module.set_loss_backward(problem, *given, *map(_backend.pointer, grads), torch.get_num_threads())
    return grads


def _names(kinds: list[int]) -> list[Kind]:
    return [KINDS[number] for number in kinds]


def _contiguous(logits, boxes, target, labels, target_boxes, counts, counted, normalizers) -> tuple[Tensor, ...]:
    """Inputs as kernels take them: contiguous, numbers int32, target boxes and normalizers in the computing type."""
    precise = _precise(logits, boxes)
    numbers = counts.int(), counted.int()
    inputs = (logits, boxes, target, labels, target_boxes.to(precise), *numbers, normalizers.to(precise))
    return tuple(x.contiguous() for x in inputs)


def _problem(module, inputs, groups, per_object, proposals, weights, kinds):
    """Inputs as the compiled module takes them; whoever asks keeps them alive."""
    logits, boxes, _, labels, *_ = inputs
    sizes = (*logits.shape, labels.shape[1], groups, per_object, proposals)
    pointers = [x.data_ptr() for x in inputs[2:]]
    return module.SetLoss(sizes, _backend.pointer(logits), _backend.pointer(boxes), pointers, weights, kinds)


@torch.library.register_fake("dndetr::set_loss")
def _forward_fake(logits, boxes, *others):
    precise = _precise(logits, boxes)
    return logits.new_empty((), dtype=precise), logits.new_empty((logits.shape[0], len(PARTS)), dtype=precise)


@torch.library.register_fake("dndetr::set_loss_backward")
def _backward_fake(grad_total, grad_parts, logits, boxes, *others):
    return tuple(torch.empty_like(x, memory_format=torch.contiguous_format) for x in (logits, boxes))


def _setup_context(ctx, inputs, output):
    *tensors, ctx.groups, ctx.per_object, ctx.proposals, ctx.weights, ctx.kinds, ctx.backend = inputs
    ctx.save_for_backward(*tensors)
    ctx.set_materialize_grads(False)


def _differentiate(ctx, grad_total, grad_parts):
    none = (None,) * 12
    if grad_total is None and grad_parts is None:
        return None, None, *none
    others = ctx.groups, ctx.per_object, ctx.proposals, ctx.weights, ctx.kinds, ctx.backend
    return *torch.ops.dndetr.set_loss_backward(grad_total, grad_parts, *ctx.saved_tensors, *others), *none


torch.library.register_autograd("dndetr::set_loss", _differentiate, setup_context=_setup_context)
_backend.differentiable_once("set_loss")


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
    -> total (scalar) and parts [Y, 6], unweighted, in the order of ``PARTS``; at least float32. Kernels' results can
    be differentiated once. ValueError where sizes do not fit each other.
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
    kinds = weights.kinds
    name, _ = _backend.choose("set_loss", backend, logits.device.type)
    if name == "reference":
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
        weights.floats,
        kinds,
        name,
    )


def _self_test(device_type: str, backend: str) -> float:
    two = LossWeights(), LossWeights(kind="position", noised="mal", eps=1e-3)
    return _backend.worst(_error(device_type, backend, weights) for weights in two)


def _error(device_type: str, backend: str, weights: LossWeights) -> float:
    name = "contrastive"
    logits, boxes, *rest = make_case(name, device_type)
    inputs = [logits.requires_grad_(), boxes.requires_grad_()]
    matches, layout, targets, normalizers = rest
    options = make_options(name, device_type)
    with torch.enable_grad():
        total, parts = set_loss_reference(*inputs, *rest, weights, **options)
        expected = [parts.detach(), *torch.autograd.grad(total, inputs)]
    given = (logits.detach(), boxes.detach(), matches.target, targets.labels, targets.boxes, targets.counts)
    numbers = layout.groups, _per_object(layout, targets), options["proposals"]
    others = (*given, options["counted"], normalizers, *numbers, weights.floats, weights.kinds, backend)
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
