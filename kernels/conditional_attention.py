"""Attention whose scores add a content and a position product: one launch forward, one backward, no atomics.

Both products accumulate into the same scores, so queries and keys are never concatenated and values keep their own
width. Hidden keys carry a bias of -inf. With few queries and many keys the forward splits the keys among programs, and
a second, small launch joins the parts by their log-sums.
"""

import torch
import triton
import triton.language as tl

from .attention_tiles import attention_tile
from .online_softmax import (
    LOG2_E,
    head_of,
    load_rows,
    padded,
    row_delta,
    softmax_end,
    softmax_start,
    softmax_step,
    store_rows,
)
from .tiles import processors

JOIN_ROWS = 16
STRUCTURE = ["heads", "queries", "keys", "span", "splits"]


@triton.jit
def key_bias(valid, keys, end, valid_strides):
    """0 for keys that are seen, -inf for others."""
    seen = keys < end
    if valid is not None:
        seen = tl.load(valid + keys * valid_strides[1], mask=seen, other=0) != 0
    return tl.where(seen, 0.0, float("-inf"))


@triton.jit
def two_products(a_content, a_position, b_content, b_position, PRECISION: tl.constexpr):
    """a_content b_content^T + a_position b_position^T in one accumulator."""
    content = tl.dot(a_content, tl.trans(b_content), input_precision=PRECISION)
    return tl.dot(a_position, tl.trans(b_position), content, input_precision=PRECISION)


@triton.jit(do_not_specialize=STRUCTURE)
def conditional_attention_forward_kernel(
    q_content, q_position, k_content, k_position, v, valid, part, part_lse,
    q_content_strides, q_position_strides, k_content_strides, k_position_strides, v_strides,
    valid_strides, part_strides,
    heads, queries, keys, span, scale,
    C_WIDTH: tl.constexpr, P_WIDTH: tl.constexpr, V_WIDTH: tl.constexpr,
    HOLD: tl.constexpr, STREAM: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    image, head = tl.program_id(1) // heads, tl.program_id(1) % heads
    split = tl.program_id(2).to(tl.int64)
    q_content = head_of(q_content, q_content_strides, image, head)
    q_position = head_of(q_position, q_position_strides, image, head)
    k_content = head_of(k_content, k_content_strides, image, head)
    k_position = head_of(k_position, k_position_strides, image, head)
    v = head_of(v, v_strides, image, head)
    part = head_of(part, part_strides, image, head) + split * part_strides[4]
    part_lse += (split * tl.num_programs(1) + tl.program_id(1)) * queries
    if valid is not None:
        valid += image.to(tl.int64) * valid_strides[0]
    rows = tl.program_id(0) * HOLD + tl.arange(0, HOLD)
    qc = load_rows(q_content, rows, queries, q_content_strides, C_WIDTH)
    qp = load_rows(q_position, rows, queries, q_position_strides, P_WIDTH)
    start = tl.program_id(2) * span
    stop = tl.minimum(start + span, keys)
    scale *= LOG2_E
    state = softmax_start(HOLD, V_WIDTH)
    for at in range(start, stop, STREAM):
        columns = at + tl.arange(0, STREAM)
        kc = load_rows(k_content, columns, stop, k_content_strides, C_WIDTH)
        kp = load_rows(k_position, columns, stop, k_position_strides, P_WIDTH)
        v_tile = load_rows(v, columns, stop, v_strides, V_WIDTH)
        bias = key_bias(valid, columns, stop, valid_strides)
        state = softmax_step(state, two_products(qc, qp, kc, kp, PRECISION) * scale + bias[None, :], v_tile, PRECISION)
    tile, log_sum = softmax_end(state, rows < queries)
    store_rows(part, rows, queries, part_strides, tile, V_WIDTH)
    tl.store(part_lse + rows, log_sum, mask=rows < queries)


@triton.jit(do_not_specialize=STRUCTURE)
def join_splits_kernel(
    part, part_lse, out, lse, part_strides, out_strides, heads, queries, splits,
    V_WIDTH: tl.constexpr, HOLD: tl.constexpr,
):  # fmt: skip
    image, head = tl.program_id(1) // heads, tl.program_id(1) % heads
    part, out = head_of(part, part_strides, image, head), head_of(out, out_strides, image, head)
    rows = tl.program_id(0) * HOLD + tl.arange(0, HOLD)
    row_lse = tl.program_id(1).to(tl.int64) * queries + rows
    peak, total, tile = softmax_start(HOLD, V_WIDTH)
    part_lse += row_lse
    for _ in range(splits):
        log_sum = tl.load(part_lse, mask=rows < queries, other=float("inf"))
        log_sum = tl.where(log_sum == float("inf"), float("-inf"), log_sum)
        raised = tl.maximum(peak, log_sum)
        origin = tl.where(raised == float("-inf"), 0.0, raised)
        shrink, weight = tl.exp2(peak - origin), tl.exp2(log_sum - origin)
        tile = tile * shrink[:, None] + load_rows(part, rows, queries, part_strides, V_WIDTH) * weight[:, None]
        total = total * shrink + weight
        peak = raised
        part += part_strides[4]
        part_lse += tl.num_programs(1) * queries
    tile, log_sum = softmax_end((peak, total, tile), rows < queries)
    store_rows(out, rows, queries, out_strides, tile, V_WIDTH)
    tl.store(lse + row_lse, log_sum, mask=rows < queries)


@triton.jit(do_not_specialize=STRUCTURE)
def conditional_attention_backward_kernel(
    grad_out, q_content, q_position, k_content, k_position, v, valid, out, lse,
    grad_q_content, grad_q_position, grad_k_content, grad_k_position, grad_v,
    grad_out_strides, q_content_strides, q_position_strides, k_content_strides, k_position_strides, v_strides,
    valid_strides, out_strides,
    grad_q_content_strides, grad_q_position_strides, grad_k_content_strides, grad_k_position_strides, grad_v_strides,
    heads, queries, keys, scale,
    C_WIDTH: tl.constexpr, P_WIDTH: tl.constexpr, V_WIDTH: tl.constexpr,
    HOLD: tl.constexpr, STREAM: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    image, head = tl.program_id(1) // heads, tl.program_id(1) % heads
    q_content = head_of(q_content, q_content_strides, image, head)
    q_position = head_of(q_position, q_position_strides, image, head)
    k_content = head_of(k_content, k_content_strides, image, head)
    k_position = head_of(k_position, k_position_strides, image, head)
    v, out = head_of(v, v_strides, image, head), head_of(out, out_strides, image, head)
    grad_out = head_of(grad_out, grad_out_strides, image, head)
    lse += tl.program_id(1).to(tl.int64) * queries
    if valid is not None:
        valid += image.to(tl.int64) * valid_strides[0]
    scale_log2 = scale * LOG2_E
    # The programs of query tiles come first: there are usually more keys than queries, so they take longest.
    tile = tl.program_id(0)
    query_tiles = tl.cdiv(queries, HOLD)
    if tile < query_tiles:
        rows = tile * HOLD + tl.arange(0, HOLD)
        qc = load_rows(q_content, rows, queries, q_content_strides, C_WIDTH)
        qp = load_rows(q_position, rows, queries, q_position_strides, P_WIDTH)
        do = load_rows(grad_out, rows, queries, grad_out_strides, V_WIDTH)
        delta = row_delta(do, load_rows(out, rows, queries, out_strides, V_WIDTH))
        log_sum = tl.load(lse + rows, mask=rows < queries, other=float("inf"))
        dqc, dqp = tl.zeros((HOLD, padded(C_WIDTH)), tl.float32), tl.zeros((HOLD, padded(P_WIDTH)), tl.float32)
        for at in range(0, keys, STREAM):
            columns = at + tl.arange(0, STREAM)
            kc = load_rows(k_content, columns, keys, k_content_strides, C_WIDTH)
            kp = load_rows(k_position, columns, keys, k_position_strides, P_WIDTH)
            v_tile = load_rows(v, columns, keys, v_strides, V_WIDTH)
            bias = key_bias(valid, columns, keys, valid_strides)
            scores = two_products(qc, qp, kc, kp, PRECISION) * scale_log2 + bias[None, :]
            p = tl.exp2(scores - log_sum[:, None])
            ds = p * (tl.dot(do, tl.trans(v_tile), input_precision=PRECISION) - delta[:, None])
            dqc = tl.dot(ds.to(kc.dtype), kc, dqc, input_precision=PRECISION)
            dqp = tl.dot(ds.to(kp.dtype), kp, dqp, input_precision=PRECISION)
        grad_q_content = head_of(grad_q_content, grad_q_content_strides, image, head)
        grad_q_position = head_of(grad_q_position, grad_q_position_strides, image, head)
        store_rows(grad_q_content, rows, queries, grad_q_content_strides, dqc * scale, C_WIDTH)
        store_rows(grad_q_position, rows, queries, grad_q_position_strides, dqp * scale, P_WIDTH)
    else:
        rows = (tile - query_tiles) * HOLD + tl.arange(0, HOLD)
        kc = load_rows(k_content, rows, keys, k_content_strides, C_WIDTH)
        kp = load_rows(k_position, rows, keys, k_position_strides, P_WIDTH)
        v_tile = load_rows(v, rows, keys, v_strides, V_WIDTH)
        bias = key_bias(valid, rows, keys, valid_strides)
        dkc, dkp = tl.zeros((HOLD, padded(C_WIDTH)), tl.float32), tl.zeros((HOLD, padded(P_WIDTH)), tl.float32)
        dv = tl.zeros((HOLD, padded(V_WIDTH)), tl.float32)
        for at in range(0, queries, STREAM):
            columns = at + tl.arange(0, STREAM)
            qc = load_rows(q_content, columns, queries, q_content_strides, C_WIDTH)
            qp = load_rows(q_position, columns, queries, q_position_strides, P_WIDTH)
            do = load_rows(grad_out, columns, queries, grad_out_strides, V_WIDTH)
            delta = row_delta(do, load_rows(out, columns, queries, out_strides, V_WIDTH))
            log_sum = tl.load(lse + columns, mask=columns < queries, other=float("inf"))
            scores = two_products(kc, kp, qc, qp, PRECISION) * scale_log2 + bias[:, None]
            p = tl.exp2(scores - log_sum[None, :])
            dv = tl.dot(p.to(do.dtype), do, dv, input_precision=PRECISION)
            ds = p * (tl.dot(v_tile, tl.trans(do), input_precision=PRECISION) - delta[None, :])
            dkc = tl.dot(ds.to(qc.dtype), qc, dkc, input_precision=PRECISION)
            dkp = tl.dot(ds.to(qp.dtype), qp, dkp, input_precision=PRECISION)
        grad_k_content = head_of(grad_k_content, grad_k_content_strides, image, head)
        grad_k_position = head_of(grad_k_position, grad_k_position_strides, image, head)
        store_rows(grad_k_content, rows, keys, grad_k_content_strides, dkc * scale, C_WIDTH)
        store_rows(grad_k_position, rows, keys, grad_k_position_strides, dkp * scale, P_WIDTH)
        store_rows(head_of(grad_v, grad_v_strides, image, head), rows, keys, grad_v_strides, dv, V_WIDTH)


def key_splits(programs: int, blocks: int, processors: int) -> int:
    """Parts into which the keys are cut: as many as fill the GPU twice, of at least four blocks each."""
    return max(1, min(2 * processors // max(programs, 1), blocks // 4, 16))


def _widths(q_content, q_position, v):
    return q_content.shape[3], q_position.shape[3], v.shape[3]


def conditional_attention_forward(
    q_content, q_position, k_content, k_position, v, valid, scale, precision, out, lse, tile=None, splits=None
):
    """Write out and lse [B, H, Q] float32 for queries [B, H, Q, .], keys and values [B, H, S, .] at any strides."""
    batch, heads, queries, _ = q_content.shape
    keys = v.shape[2]
    if out.numel() == 0:
        return

    def launch(tile, splits=splits):
        tiles = triton.cdiv(queries, tile.hold)
        blocks = triton.cdiv(keys, tile.stream)
        splits = splits or key_splits(tiles * batch * heads, blocks, processors(v.device))
        span = triton.cdiv(blocks, splits) * tile.stream
        part, part_lse = out[None], lse
        if splits > 1:
            part = out.new_empty((splits, *out.shape), dtype=torch.float32)
            part_lse = lse.new_empty((splits, *lse.shape))
        part_strides = (*part.stride()[1:], part.stride(0))
        conditional_attention_forward_kernel[(tiles, batch * heads, splits)](
            q_content, q_position, k_content, k_position, v, valid, part, part_lse,
            q_content.stride(), q_position.stride(), k_content.stride(), k_position.stride(), v.stride(),
            (0, 0) if valid is None else valid.stride(), part_strides,
            heads, queries, keys, span, scale,
            *_widths(q_content, q_position, v), tile.hold, tile.stream, precision,
            num_warps=tile.warps, num_stages=tile.stages, enable_fp_fusion=True,
        )  # fmt: skip
        if splits > 1:
            join_splits_kernel[(triton.cdiv(queries, JOIN_ROWS), batch * heads)](
                part, part_lse, out, lse, part_strides, out.stride(), heads, queries, splits,
                v.shape[3], JOIN_ROWS, num_warps=4, enable_fp_fusion=True,
            )  # fmt: skip

    launch(tile or attention_tile("conditional_attention_forward", q_content, v, precision, launch))


def conditional_attention_backward(
    grad_out, q_content, q_position, k_content, k_position, v, valid, out, lse, scale, precision, grads, tile=None
):
    """Write the gradients of the five inputs, every element of them, from what the forward left."""
    batch, heads, queries, _ = q_content.shape
    keys = v.shape[2]
    if batch * heads * (queries + keys) == 0:
        return

    def launch(tile):
        tiles = triton.cdiv(queries, tile.hold) + triton.cdiv(keys, tile.hold)
        conditional_attention_backward_kernel[(tiles, batch * heads)](
            grad_out, q_content, q_position, k_content, k_position, v, valid, out, lse, *grads,
            grad_out.stride(), q_content.stride(), q_position.stride(), k_content.stride(), k_position.stride(),
            v.stride(), (0, 0) if valid is None else valid.stride(), out.stride(),
            *(grad.stride() for grad in grads),
            heads, queries, keys, scale,
            *_widths(q_content, q_position, v), tile.hold, tile.stream, precision,
            num_warps=tile.warps, num_stages=tile.stages, enable_fp_fusion=True,
        )  # fmt: skip

    launch(tile or attention_tile("conditional_attention_backward", q_content, v, precision, launch))
