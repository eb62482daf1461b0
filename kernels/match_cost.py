"""Matching cost: one program computes a tile of queries for one target slot block of one (layer, image)."""

import torch
import triton
import triton.language as tl


@triton.jit
def match_cost_kernel(
    logits,
    boxes,
    labels,
    target_boxes,
    counts,
    cost,  # [Y * B, T, N] contiguous
    batch,
    queries,
    slots,
    logits_layer_stride,
    logits_image_stride,
    logits_query_stride,
    boxes_layer_stride,
    boxes_image_stride,
    boxes_query_stride,
    label_weight,
    l1_weight,
    giou_weight,
    alpha,
    POSITION: tl.constexpr,
    PRECISE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    problem = tl.program_id(0).to(tl.int64)
    layer, image = problem // batch, problem % batch
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    t = tl.program_id(2) * BLOCK_T + tl.arange(0, BLOCK_T)
    in_n, in_t = n < queries, t < slots
    real = t < tl.load(counts + image)
    inside = in_t[:, None] & in_n[None, :]

    label = tl.load(labels + image * slots + t, mask=real & in_t, other=0)
    row = logits + layer * logits_layer_stride + image * logits_image_stride + n * logits_query_stride
    logit = tl.load(row[None, :] + label[:, None], mask=inside & real[:, None], other=0.0).to(PRECISE)
    # Rounded as the reference's, since 1 - p magnifies the last digit of a p near one; float64 always is.
    divisor = 1.0 + tl.exp(-logit)
    p = tl.div_rn(1.0, divisor) if tl.float32 == PRECISE else 1.0 / divisor

    a = boxes + layer * boxes_layer_stride + image * boxes_image_stride + n * boxes_query_stride
    ax = tl.load(a + 0, mask=in_n, other=0.0).to(PRECISE)[None, :]
    ay = tl.load(a + 1, mask=in_n, other=0.0).to(PRECISE)[None, :]
    aw = tl.load(a + 2, mask=in_n, other=0.0).to(PRECISE)[None, :]
    ah = tl.load(a + 3, mask=in_n, other=0.0).to(PRECISE)[None, :]
    b = target_boxes + (image * slots + t) * 4
    bx = tl.load(b + 0, mask=real & in_t, other=0.0).to(PRECISE)[:, None]
    by = tl.load(b + 1, mask=real & in_t, other=0.0).to(PRECISE)[:, None]
    bw = tl.load(b + 2, mask=real & in_t, other=0.0).to(PRECISE)[:, None]
    bh = tl.load(b + 3, mask=real & in_t, other=0.0).to(PRECISE)[:, None]
    l1 = tl.abs(ax - bx) + tl.abs(ay - by) + tl.abs(aw - bw) + tl.abs(ah - bh)

    # Corners first, areas from corners: the order of the reference, so that rounding agrees.
    ax0, ax1, ay0, ay1 = ax - 0.5 * aw, ax + 0.5 * aw, ay - 0.5 * ah, ay + 0.5 * ah
    bx0, bx1, by0, by1 = bx - 0.5 * bw, bx + 0.5 * bw, by - 0.5 * bh, by + 0.5 * bh
    overlap_w = tl.maximum(tl.minimum(ax1, bx1) - tl.maximum(ax0, bx0), 0.0)
    overlap_h = tl.maximum(tl.minimum(ay1, by1) - tl.maximum(ay0, by0), 0.0)
    intersection = overlap_w * overlap_h
    union = (ax1 - ax0) * (ay1 - ay0) + (bx1 - bx0) * (by1 - by0) - intersection
    hull_w = tl.maximum(tl.maximum(ax1, bx1) - tl.minimum(ax0, bx0), 0.0)
    hull_h = tl.maximum(tl.maximum(ay1, by1) - tl.minimum(ay0, by0), 0.0)
    hull = hull_w * hull_h
    giou = intersection / (union + 1e-6) - (hull - union) / (hull + 1e-6)

    if POSITION != 0:
        fit = tl.minimum(tl.maximum(0.5 * giou + 0.5, 0.0), 1.0)
        if POSITION == 0.5:
            p *= tl.sqrt_rn(fit) if tl.float32 == PRECISE else tl.sqrt(fit)
        else:
            p *= tl.where(fit > 0, tl.exp(POSITION * tl.log(fit)), 0.0)
    positive = alpha * (1.0 - p) * (1.0 - p) * -tl.log(p + 1e-8)
    negative = (1.0 - alpha) * p * p * -tl.log(1.0 - p + 1e-8)
    value = label_weight * (positive - negative) + l1_weight * l1 - giou_weight * giou
    value = tl.where(tl.abs(logit) < float("inf"), value, float("nan"))
    value = tl.where(real[:, None], value, float("inf"))
    tl.store(cost + (problem * slots + t[:, None]) * queries + n[None, :], value, mask=inside)


def match_cost_forward(logits, boxes, labels, target_boxes, counts, weights, cost):
    """Write the cost of logits [Y, B, N, K] and boxes [Y, B, N, 4], at any strides, into contiguous [Y, B, T, N]."""
    layers, batch, queries, _ = logits.shape
    slots = labels.shape[1]
    if cost.numel() == 0:
        return
    logits = logits if logits.stride(-1) == 1 else logits.contiguous()
    boxes = boxes if boxes.stride(-1) == 1 else boxes.contiguous()
    block_n, block_t = 128, min(triton.next_power_of_2(slots), 8)
    grid = (layers * batch, triton.cdiv(queries, block_n), triton.cdiv(slots, block_t))
    match_cost_kernel[grid](
        logits,
        boxes,
        labels.contiguous(),
        target_boxes.contiguous(),
        counts.contiguous(),
        cost,
        batch,
        queries,
        slots,
        *logits.stride()[:3],
        *boxes.stride()[:3],
        *weights[:4],
        POSITION=weights[4],
        PRECISE=tl.float64 if cost.dtype == torch.float64 else tl.float32,
        BLOCK_N=block_n,
        BLOCK_T=block_t,
        num_warps=4,
    )
