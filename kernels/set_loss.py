"""Set loss: a program takes a tile of queries of one (layer, image), all classes; sums are added in a fixed order."""

import torch
import triton
import triton.language as tl

from .class_loss import beside_target, logistic
from .giou import iou_and_giou, share
from .set_loss_targets import losses_at_targets, pairs_of, targets_of


@triton.jit
def set_loss_forward_kernel(
    logits,  # [Y, B, Q, K]
    boxes,  # [Y, B, Q, 4]
    target,  # [Y, B, Q - noised]
    labels,  # [B, objects]
    target_boxes,  # [B, objects, 4]
    counts,  # [B]
    counted,  # [B]
    sums,  # [Y, 8, B, tiles of queries]
    batch,
    queries,
    classes,
    noised,
    objects,
    per_object,
    proposals,
    KIND: tl.constexpr,
    NOISED: tl.constexpr,
    ALPHA: tl.constexpr,
    EPS: tl.constexpr,
    PRECISE: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    problem = tl.program_id(0).to(tl.int64)
    layer, image = problem // batch, problem % batch
    q = tl.program_id(1) * BLOCK_Q + tl.arange(0, BLOCK_Q)
    matches, place = (target, labels, counts, counted), (problem, layer, image)
    sizes = (queries, noised, objects, per_object, proposals)
    partner, label, seen = targets_of(matches, place, q, sizes)
    row = problem * queries + q

    FOCAL: tl.constexpr = KIND == "focal" and NOISED == "focal"
    if not FOCAL:
        at, _slope_at = losses_at_targets(
            logits, boxes, target_boxes, matches, place, q, classes, sizes, KIND, NOISED, ALPHA, EPS, PRECISE
        )
    of_classes = tl.zeros([BLOCK_Q], PRECISE)
    for first in range(0, classes, BLOCK_K):
        k = first + tl.arange(0, BLOCK_K)
        read = seen[:, None] & (k < classes)[None, :]
        x = tl.load(logits + row[:, None] * classes + k[None, :], mask=read, other=0.0).to(PRECISE)
        positive = label[:, None] == k[None, :]
        if FOCAL:
            p, _rest, softplus = logistic(tl.where(positive, -x, x))
            weight = positive.to(PRECISE) * (2.0 * ALPHA - 1.0) + (1.0 - ALPHA)
            of_classes += tl.sum(tl.where(read, weight * p * p * softplus, 0.0), 1)
        else:
            beside, _slope = beside_target(x, (q >= noised)[:, None], KIND, NOISED, ALPHA)
            of_classes += tl.sum(tl.where(read, tl.where(positive, at[:, None], beside), 0.0), 1)

    paired = partner >= 0
    truth = image * objects + partner
    ax, ay, aw, ah, bx, by, bw, bh = pairs_of(boxes, row, target_boxes, truth, paired, PRECISE)
    l1 = tl.where(paired, tl.abs(ax - bx) + tl.abs(ay - by) + tl.abs(aw - bw) + tl.abs(ah - bh), 0.0)
    _iou, alike, _x, _y, _w, _h = iou_and_giou(ax, ay, aw, ah, bx, by, bw, bh, EPS)
    giou = tl.where(paired, 1.0 - alike, 0.0)

    tiles = tl.num_programs(1)
    to = sums + (layer * 8 * batch + image) * tiles + tl.program_id(1)
    part = batch * tiles
    matching = q >= noised
    tl.store(to, tl.sum(tl.where(matching, of_classes, 0.0), 0))
    tl.store(to + part, tl.sum(tl.where(matching, l1, 0.0), 0))
    tl.store(to + 2 * part, tl.sum(tl.where(matching, giou, 0.0), 0))
    tl.store(to + 3 * part, tl.sum(tl.where(matching, 0.0, of_classes), 0))
    tl.store(to + 4 * part, tl.sum(tl.where(matching, 0.0, l1), 0))
    tl.store(to + 5 * part, tl.sum(tl.where(matching, 0.0, giou), 0))


@triton.jit
def set_loss_reduce_kernel(
    sums,  # [Y, 8, count], of which 6 are used
    normalizers,  # [2]
    total,  # scalar
    parts,  # [Y, 6]
    layers,
    count,
    LABEL: tl.constexpr,
    L1: tl.constexpr,
    GIOU: tl.constexpr,
    PRECISE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    part = tl.arange(0, 8)
    used = part < 6
    term = part % 3
    coefficient = (term == 0).to(PRECISE) * LABEL + (term == 1).to(PRECISE) * L1 + (term == 2).to(PRECISE) * GIOU
    normalizer = tl.load(normalizers + part // 3, mask=used, other=1.0)
    whole = tl.zeros([8], PRECISE)
    for layer in range(0, layers):
        added = tl.zeros([8, BLOCK], PRECISE)
        for first in range(0, count, BLOCK):
            i = first + tl.arange(0, BLOCK)
            read = used[:, None] & (i < count)[None, :]
            added += tl.load(sums + (layer * 8 + part[:, None]) * count + i[None, :], mask=read, other=0.0)
        value = tl.sum(added, 1) / normalizer
        tl.store(parts + layer * 6 + part, value, mask=used)
        whole += tl.where(used, coefficient * value, 0.0)
    tl.store(total, tl.sum(whole, 0))


@triton.jit
def set_loss_backward_kernel(
    grad_total,  # scalar, or None
    grad_parts,  # [Y, 6], or None
    logits,
    boxes,
    target,
    labels,
    target_boxes,
    counts,
    counted,
    normalizers,
    grad_logits,
    grad_boxes,
    batch,
    queries,
    classes,
    noised,
    objects,
    per_object,
    proposals,
    LABEL: tl.constexpr,
    L1: tl.constexpr,
    GIOU: tl.constexpr,
    KIND: tl.constexpr,
    NOISED: tl.constexpr,
    ALPHA: tl.constexpr,
    EPS: tl.constexpr,
    PRECISE: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    problem = tl.program_id(0).to(tl.int64)
    layer, image = problem // batch, problem % batch
    q = tl.program_id(1) * BLOCK_Q + tl.arange(0, BLOCK_Q)
    inside = q < queries
    matches, place = (target, labels, counts, counted), (problem, layer, image)
    sizes = (queries, noised, objects, per_object, proposals)
    partner, label, seen = targets_of(matches, place, q, sizes)
    row = problem * queries + q

    half = tl.where(q < noised, 1, 0)
    by_label = tl.zeros([BLOCK_Q], PRECISE)
    by_l1, by_giou = by_label, by_label
    if grad_total is not None:
        whole = tl.load(grad_total)
        by_label, by_l1, by_giou = by_label + LABEL * whole, by_l1 + L1 * whole, by_giou + GIOU * whole
    if grad_parts is not None:
        part = grad_parts + layer * 6 + half * 3
        by_label, by_l1, by_giou = by_label + tl.load(part), by_l1 + tl.load(part + 1), by_giou + tl.load(part + 2)
    normalizer = tl.load(normalizers + half)
    by_label, by_l1, by_giou = by_label / normalizer, by_l1 / normalizer, by_giou / normalizer

    FOCAL: tl.constexpr = KIND == "focal" and NOISED == "focal"
    if not FOCAL:
        _loss_at, at = losses_at_targets(
            logits, boxes, target_boxes, matches, place, q, classes, sizes, KIND, NOISED, ALPHA, EPS, PRECISE
        )
    for first in range(0, classes, BLOCK_K):
        k = first + tl.arange(0, BLOCK_K)
        write = inside[:, None] & (k < classes)[None, :]
        read = write & seen[:, None]
        here = row[:, None] * classes + k[None, :]
        x = tl.load(logits + here, mask=read, other=0.0).to(PRECISE)
        positive = label[:, None] == k[None, :]
        if FOCAL:
            p, rest, softplus = logistic(tl.where(positive, -x, x))
            weight = (1.0 - ALPHA) - positive.to(PRECISE)  # and the sign of z
            slope = weight * p * p * (2.0 * rest * softplus + p)
        else:
            _loss, beside = beside_target(x, (q >= noised)[:, None], KIND, NOISED, ALPHA)
            slope = tl.where(positive, at[:, None], beside)
        grad = tl.where(read, by_label[:, None] * slope, 0.0)
        tl.store(grad_logits + here, grad.to(grad_logits.dtype.element_ty), mask=write)

    paired = partner >= 0
    truth = image * objects + partner
    ax, ay, aw, ah, bx, by, bw, bh = pairs_of(boxes, row, target_boxes, truth, paired, PRECISE)
    _iou, _giou, x, y, w, h = iou_and_giou(ax, ay, aw, ah, bx, by, bw, bh, EPS)
    # Twice the share of a maximum, less one, is the sign of the difference.
    x = by_l1 * (2.0 * share(ax, bx) - 1.0) - by_giou * x
    y = by_l1 * (2.0 * share(ay, by) - 1.0) - by_giou * y
    w = by_l1 * (2.0 * share(aw, bw) - 1.0) - by_giou * w
    h = by_l1 * (2.0 * share(ah, bh) - 1.0) - by_giou * h
    to = grad_boxes + row * 4
    element = grad_boxes.dtype.element_ty
    tl.store(to, tl.where(paired, x, 0.0).to(element), mask=inside)
    tl.store(to + 1, tl.where(paired, y, 0.0).to(element), mask=inside)
    tl.store(to + 2, tl.where(paired, w, 0.0).to(element), mask=inside)
    tl.store(to + 3, tl.where(paired, h, 0.0).to(element), mask=inside)


def _tile(classes: int) -> tuple[int, int]:
    """Queries and classes of a tile: about two thousand logits."""
    block_k = min(triton.next_power_of_2(max(classes, 1)), 128)
    return min(2048 // block_k, 128), block_k


def _warps_backward(kind: str, noised: str) -> int:
    """Slopes of losses that know the box need more registers, so that a thread gets half as many logits."""
    return 4 if kind == noised == "focal" else 8


def _precise(x: torch.Tensor):
    return tl.float64 if x.dtype == torch.float64 else tl.float32


def set_loss_forward(
    logits,
    boxes,
    target,
    labels,
    target_boxes,
    counts,
    counted,
    normalizers,
    groups,
    per_object,
    proposals,
    weights,
    kinds,
    total,
    parts,
) -> None:
    """Write total (scalar) and parts [Y, 6] of contiguous inputs; boxes and normalizers in the type of parts."""
    layers, batch, queries, classes = logits.shape
    objects = labels.shape[1]
    block_q, block_k = _tile(classes)
    tiles = triton.cdiv(queries, block_q)
    sums = parts.new_empty((layers, 8, batch, tiles))
    label, l1, giou, alpha, eps = weights
    kind, noised = kinds
    if sums.numel():
        set_loss_forward_kernel[(layers * batch, tiles)](
            logits,
            boxes,
            target,
            labels,
            target_boxes,
            counts,
            counted,
            sums,
            batch,
            queries,
            classes,
            groups * per_object * objects,
            max(objects, 1),
            per_object,
            proposals,
            KIND=kind,
            NOISED=noised,
            ALPHA=alpha,
            EPS=eps,
            PRECISE=_precise(parts),
            BLOCK_Q=block_q,
            BLOCK_K=block_k,
            num_warps=4,
        )
    set_loss_reduce_kernel[(1,)](
        sums,
        normalizers,
        total,
        parts,
        layers,
        batch * tiles,
        LABEL=label,
        L1=l1,
        GIOU=giou,
        PRECISE=_precise(parts),
        BLOCK=256,
        num_warps=4,
    )


def set_loss_backward(
    grad_total,
    grad_parts,
    logits,
    boxes,
    target,
    labels,
    target_boxes,
    counts,
    counted,
    normalizers,
    groups,
    per_object,
    proposals,
    weights,
    kinds,
    grad_logits,
    grad_boxes,
) -> None:
    """Write contiguous grad_logits and grad_boxes, given the gradients of total and parts (or None)."""
    layers, batch, queries, classes = logits.shape
    objects = labels.shape[1]
    if grad_boxes.numel() == 0:
        return
    block_q, block_k = _tile(classes)
    label, l1, giou, alpha, eps = weights
    kind, noised = kinds
    set_loss_backward_kernel[(layers * batch, triton.cdiv(queries, block_q))](
        grad_total,
        grad_parts,
        logits,
        boxes,
        target,
        labels,
        target_boxes,
        counts,
        counted,
        normalizers,
        grad_logits,
        grad_boxes,
        batch,
        queries,
        classes,
        groups * per_object * objects,
        max(objects, 1),
        per_object,
        proposals,
        LABEL=label,
        L1=l1,
        GIOU=giou,
        KIND=kind,
        NOISED=noised,
        ALPHA=alpha,
        EPS=eps,
        PRECISE=_precise(normalizers),
        BLOCK_Q=block_q,
        BLOCK_K=block_k,
        num_warps=_warps_backward(kind, noised),
    )
