"""Set loss: a program takes a tile of queries of one (layer, image), all classes; sums are added in a fixed order."""

import torch
import triton
import triton.language as tl


@triton.jit
def _logistic(z):
    """sigmoid(z), 1 - sigmoid(z) and softplus(z), neither overflowing nor losing digits."""
    e = tl.exp(-tl.abs(z))
    u = 1.0 + e
    above = u - 1.0  # what of e is left in u; the quotient corrects the logarithm for the rest
    log_u = tl.where(above == 0.0, e, tl.log(u) * (e / above))
    high, low = 1.0 / u, e / u
    return tl.where(z < 0.0, low, high), tl.where(z < 0.0, high, low), log_u + tl.where(z < 0.0, 0.0, z)


@triton.jit
def _share(a, b):
    """How much of max(a, b) moves with a: equal numbers share its gradient."""
    return tl.where(a > b, 1.0, tl.where(a < b, 0.0, 0.5))


@triton.jit
def _side(a, size_a, b, size_b):
    """Along one axis: a's low and high end, a's and b's extent, the overlap's and the hull's."""
    a0, a1, b0, b1 = a - 0.5 * size_a, a + 0.5 * size_a, b - 0.5 * size_b, b + 0.5 * size_b
    return a0, a1, b0, b1, tl.minimum(a1, b1) - tl.maximum(a0, b0), tl.maximum(a1, b1) - tl.minimum(a0, b0)


@triton.jit
def _ends(a0, a1, b0, b1, inner, outer, by_side, by_inner, by_outer):
    """Gradients of a's centre and size from those of the side, the overlap's and the hull's extent."""
    by_inner = tl.where(inner >= 0.0, by_inner, 0.0)
    by_outer = tl.where(outer >= 0.0, by_outer, 0.0)
    high = by_side + by_inner * _share(b1, a1) + by_outer * _share(a1, b1)
    low = -(by_side + by_inner * _share(a0, b0) + by_outer * _share(b0, a0))
    return low + high, 0.5 * (high - low)


@triton.jit
def _giou(ax, ay, aw, ah, bx, by, bw, bh):
    """GIoU of boxes a and b, and its gradient with respect to a."""
    ax0, ax1, bx0, bx1, inner_x, outer_x = _side(ax, aw, bx, bw)
    ay0, ay1, by0, by1, inner_y, outer_y = _side(ay, ah, by, bh)
    inner_w, inner_h = tl.maximum(inner_x, 0.0), tl.maximum(inner_y, 0.0)
    outer_w, outer_h = tl.maximum(outer_x, 0.0), tl.maximum(outer_y, 0.0)
    side_x, side_y = ax1 - ax0, ay1 - ay0
    overlap, hull = inner_w * inner_h, outer_w * outer_h
    union = side_x * side_y + (bx1 - bx0) * (by1 - by0) - overlap
    per_union, per_hull = 1.0 / (union + 1e-6), 1.0 / (hull + 1e-6)
    giou = overlap / (union + 1e-6) - (hull - union) / (hull + 1e-6)
    by_area = per_hull - overlap * per_union * per_union
    by_overlap = per_union - by_area
    by_hull = -(union + 1e-6) * per_hull * per_hull
    grad_x, grad_w = _ends(
        ax0, ax1, bx0, bx1, inner_x, outer_x, by_area * side_y, by_overlap * inner_h, by_hull * outer_h
    )
    grad_y, grad_h = _ends(
        ay0, ay1, by0, by1, inner_y, outer_y, by_area * side_x, by_overlap * inner_w, by_hull * outer_w
    )
    return giou, grad_x, grad_y, grad_w, grad_h


@triton.jit
def _targets(
    target, labels, counts, counted, problem, layer, image, q, queries, noised, objects, per_object, proposals
):
    """Per query: its target (-1: none), its class (-1: none), whether it counts."""
    inside, matching = q < queries, q >= noised
    slot = q % (objects * per_object)
    seen = inside & (matching | (slot < tl.where(layer < proposals, 0, tl.load(counted + image))))
    restored = slot // per_object
    restores = seen & (restored * per_object == slot) & (restored < tl.load(counts + image))
    found = tl.load(target + problem * (queries - noised) + q - noised, mask=inside & matching, other=-1)
    partner = tl.where(matching, tl.where(found < objects, found, -1), tl.where(restores, restored, -1))
    label = tl.load(labels + image * objects + partner, mask=partner >= 0, other=-1)
    return partner, label, seen


@triton.jit
def _pairs(boxes, row, target_boxes, truth, paired, PRECISE: tl.constexpr):
    """Predicted boxes and their targets, x, y, w, h each; zeros where there is no pair."""
    a, b = boxes + row * 4, target_boxes + truth * 4
    ax, bx = tl.load(a, mask=paired, other=0.0).to(PRECISE), tl.load(b, mask=paired, other=0.0).to(PRECISE)
    ay, by = tl.load(a + 1, mask=paired, other=0.0).to(PRECISE), tl.load(b + 1, mask=paired, other=0.0).to(PRECISE)
    aw, bw = tl.load(a + 2, mask=paired, other=0.0).to(PRECISE), tl.load(b + 2, mask=paired, other=0.0).to(PRECISE)
    ah, bh = tl.load(a + 3, mask=paired, other=0.0).to(PRECISE), tl.load(b + 3, mask=paired, other=0.0).to(PRECISE)
    return ax, ay, aw, ah, bx, by, bw, bh


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
    ALPHA: tl.constexpr,
    PRECISE: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    problem = tl.program_id(0).to(tl.int64)
    layer, image = problem // batch, problem % batch
    q = tl.program_id(1) * BLOCK_Q + tl.arange(0, BLOCK_Q)
    partner, label, seen = _targets(
        target, labels, counts, counted, problem, layer, image, q, queries, noised, objects, per_object, proposals
    )
    row = problem * queries + q

    focal = tl.zeros([BLOCK_Q], PRECISE)
    for first in range(0, classes, BLOCK_K):
        k = first + tl.arange(0, BLOCK_K)
        read = seen[:, None] & (k < classes)[None, :]
        x = tl.load(logits + row[:, None] * classes + k[None, :], mask=read, other=0.0).to(PRECISE)
        positive = label[:, None] == k[None, :]
        p, _rest, softplus = _logistic(tl.where(positive, -x, x))
        weight = positive.to(PRECISE) * (2.0 * ALPHA - 1.0) + (1.0 - ALPHA)
        focal += tl.sum(tl.where(read, weight * p * p * softplus, 0.0), 1)

    paired = partner >= 0
    truth = image * objects + partner
    ax, ay, aw, ah, bx, by, bw, bh = _pairs(boxes, row, target_boxes, truth, paired, PRECISE)
    l1 = tl.where(paired, tl.abs(ax - bx) + tl.abs(ay - by) + tl.abs(aw - bw) + tl.abs(ah - bh), 0.0)
    overlap, _x, _y, _w, _h = _giou(ax, ay, aw, ah, bx, by, bw, bh)
    giou = tl.where(paired, 1.0 - overlap, 0.0)

    tiles = tl.num_programs(1)
    to = sums + (layer * 8 * batch + image) * tiles + tl.program_id(1)
    part = batch * tiles
    matching = q >= noised
    tl.store(to, tl.sum(tl.where(matching, focal, 0.0), 0))
    tl.store(to + part, tl.sum(tl.where(matching, l1, 0.0), 0))
    tl.store(to + 2 * part, tl.sum(tl.where(matching, giou, 0.0), 0))
    tl.store(to + 3 * part, tl.sum(tl.where(matching, 0.0, focal), 0))
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
    ALPHA: tl.constexpr,
    PRECISE: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    problem = tl.program_id(0).to(tl.int64)
    layer, image = problem // batch, problem % batch
    q = tl.program_id(1) * BLOCK_Q + tl.arange(0, BLOCK_Q)
    inside = q < queries
    partner, label, seen = _targets(
        target, labels, counts, counted, problem, layer, image, q, queries, noised, objects, per_object, proposals
    )
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

    for first in range(0, classes, BLOCK_K):
        k = first + tl.arange(0, BLOCK_K)
        write = inside[:, None] & (k < classes)[None, :]
        read = write & seen[:, None]
        place = row[:, None] * classes + k[None, :]
        x = tl.load(logits + place, mask=read, other=0.0).to(PRECISE)
        positive = label[:, None] == k[None, :]
        p, rest, softplus = _logistic(tl.where(positive, -x, x))
        weight = (1.0 - ALPHA) - positive.to(PRECISE)  # and the sign of z
        slope = weight * p * p * (2.0 * rest * softplus + p)
        grad = tl.where(read, by_label[:, None] * slope, 0.0)
        tl.store(grad_logits + place, grad.to(grad_logits.dtype.element_ty), mask=write)

    paired = partner >= 0
    truth = image * objects + partner
    ax, ay, aw, ah, bx, by, bw, bh = _pairs(boxes, row, target_boxes, truth, paired, PRECISE)
    _value, x, y, w, h = _giou(ax, ay, aw, ah, bx, by, bw, bh)
    # Twice the share of a maximum, less one, is the sign of the difference.
    x = by_l1 * (2.0 * _share(ax, bx) - 1.0) - by_giou * x
    y = by_l1 * (2.0 * _share(ay, by) - 1.0) - by_giou * y
    w = by_l1 * (2.0 * _share(aw, bw) - 1.0) - by_giou * w
    h = by_l1 * (2.0 * _share(ah, bh) - 1.0) - by_giou * h
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
    total,
    parts,
) -> None:
    """Write total (scalar) and parts [Y, 6] of contiguous inputs; boxes and normalizers in the type of parts."""
    layers, batch, queries, classes = logits.shape
    objects = labels.shape[1]
    block_q, block_k = _tile(classes)
    tiles = triton.cdiv(queries, block_q)
    sums = parts.new_empty((layers, 8, batch, tiles))
    label, l1, giou, alpha = weights
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
            ALPHA=alpha,
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
    grad_logits,
    grad_boxes,
) -> None:
    """Write contiguous grad_logits and grad_boxes, given the gradients of total and parts (or None)."""
    layers, batch, queries, classes = logits.shape
    objects = labels.shape[1]
    if grad_boxes.numel() == 0:
        return
    block_q, block_k = _tile(classes)
    label, l1, giou, alpha = weights
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
        ALPHA=alpha,
        PRECISE=_precise(normalizers),
        BLOCK_Q=block_q,
        BLOCK_K=block_k,
        num_warps=4,
    )
