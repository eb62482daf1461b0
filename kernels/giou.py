"""Generalised IoU of boxes within a kernel, and its gradient; ties and bounds are those of dndetr/boxes.py."""

import triton
import triton.language as tl


@triton.jit
def share(a, b):
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
    high = by_side + by_inner * share(b1, a1) + by_outer * share(a1, b1)
    low = -(by_side + by_inner * share(a0, b0) + by_outer * share(b0, a0))
    return low + high, 0.5 * (high - low)


@triton.jit
def iou_and_giou(ax, ay, aw, ah, bx, by, bw, bh, EPS: tl.constexpr):
    """IoU and GIoU of boxes a and b, and the gradient of GIoU with respect to a; EPS is added to divisors."""
    ax0, ax1, bx0, bx1, inner_x, outer_x = _side(ax, aw, bx, bw)
    ay0, ay1, by0, by1, inner_y, outer_y = _side(ay, ah, by, bh)
    inner_w, inner_h = tl.maximum(inner_x, 0.0), tl.maximum(inner_y, 0.0)
    outer_w, outer_h = tl.maximum(outer_x, 0.0), tl.maximum(outer_y, 0.0)
    side_x, side_y = ax1 - ax0, ay1 - ay0
    overlap, hull = inner_w * inner_h, outer_w * outer_h
    union = side_x * side_y + (bx1 - bx0) * (by1 - by0) - overlap
    per_union, per_hull = 1.0 / (union + EPS), 1.0 / (hull + EPS)
    iou = overlap / (union + EPS)
    giou = iou - (hull - union) / (hull + EPS)
    by_area = per_hull - overlap * per_union * per_union
    by_overlap = per_union - by_area
    by_hull = -(union + EPS) * per_hull * per_hull
    grad_x, grad_w = _ends(
        ax0, ax1, bx0, bx1, inner_x, outer_x, by_area * side_y, by_overlap * inner_h, by_hull * outer_h
    )
    grad_y, grad_h = _ends(
        ay0, ay1, by0, by1, inner_y, outer_y, by_area * side_x, by_overlap * inner_w, by_hull * outer_w
    )
    return iou, giou, grad_x, grad_y, grad_w, grad_h
