"""Attention of denoising groups and matching queries: one launch forward, one backward, no mask, no atomics.

A program holds one tile of rows (queries, or keys in the backward) and streams the other side past it. Tiles never
straddle the border between denoising and matching rows. A tile may see at most two ranges: its own groups, where two
comparisons per score sort out the rows, and the matching part, which needs none but in its last, partial tile.
"""

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

# Run-time integers: no other number of groups, slots or queries ever compiles a kernel again.
STRUCTURE = ["heads", "groups", "slots", "matching"]


@triton.jit
def tile_start(tile, noised, HOLD: tl.constexpr):
    """First row of a tile: the denoising tiles come first, then those of the matching part."""
    noised_tiles = tl.cdiv(noised, HOLD)
    return tl.where(tile < noised_tiles, tile * HOLD, noised + (tile - noised_tiles) * HOLD)


@triton.jit
def own_groups(rows, first, noised, active, image, slots, HOLD: tl.constexpr):
    """Live range [low, high) of each row's group, and [start, stop) around them all, empty for a matching tile."""
    live = slots
    if active is not None:
        live = tl.minimum(tl.load(active + image), slots)
    slots = tl.maximum(slots, 1)
    low = rows // slots * slots
    start = first // slots * slots
    last = tl.minimum(first + HOLD, noised) - 1
    stop = tl.where(first < noised, last // slots * slots + live, start)
    return low, low + live, start, stop


@triton.jit
def attend(
    state, q, k, v, k_strides, v_strides, start, stop, low, high, scale,
    WIDTH: tl.constexpr, V_WIDTH: tl.constexpr, STREAM: tl.constexpr, MASKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Stream keys [start, stop) past a tile of queries; with MASKED a row sees only those in its [low, high)."""
    for at in range(start, stop, STREAM):
        keys = at + tl.arange(0, STREAM)
        k_tile = load_rows(k, keys, stop, k_strides, WIDTH)
        v_tile = load_rows(v, keys, stop, v_strides, V_WIDTH)
        scores = tl.dot(q, tl.trans(k_tile), input_precision=PRECISION) * scale
        if MASKED:
            seen = (keys[None, :] >= low[:, None]) & (keys[None, :] < high[:, None])
            scores = tl.where(seen, scores, float("-inf"))
        state = softmax_step(state, scores, v_tile, PRECISION)
    return state


@triton.jit(do_not_specialize=STRUCTURE)
def group_attention_forward_kernel(
    q, k, v, active, out, lse, q_strides, k_strides, v_strides, out_strides,
    heads, groups, slots, matching, scale,
    WIDTH: tl.constexpr, V_WIDTH: tl.constexpr, HOLD: tl.constexpr, STREAM: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    image, head = tl.program_id(1) // heads, tl.program_id(1) % heads
    q, k = head_of(q, q_strides, image, head), head_of(k, k_strides, image, head)
    v, out = head_of(v, v_strides, image, head), head_of(out, out_strides, image, head)
    noised = groups * slots
    queries = noised + matching
    lse += tl.program_id(1).to(tl.int64) * queries
    first = tile_start(tl.program_id(0), noised, HOLD)
    rows = first + tl.arange(0, HOLD)
    end = tl.where(first < noised, noised, queries)
    low, high, start, stop = own_groups(rows, first, noised, active, image, slots, HOLD)
    q_tile = load_rows(q, rows, end, q_strides, WIDTH)
    whole = noised + matching // STREAM * STREAM
    scale *= LOG2_E
    state = softmax_start(HOLD, V_WIDTH)
    state = attend(
        state, q_tile, k, v, k_strides, v_strides, start, stop, low, high, scale,
        WIDTH, V_WIDTH, STREAM, True, PRECISION,
    )  # fmt: skip
    state = attend(
        state, q_tile, k, v, k_strides, v_strides, noised, whole, low, high, scale,
        WIDTH, V_WIDTH, STREAM, False, PRECISION,
    )  # fmt: skip
    state = attend(
        state, q_tile, k, v, k_strides, v_strides, whole, queries, low * 0, low * 0 + queries, scale,
        WIDTH, V_WIDTH, STREAM, True, PRECISION,
    )  # fmt: skip
    tile, log_sum = softmax_end(state, (rows < high) | (rows >= noised))
    store_rows(out, rows, end, out_strides, tile, V_WIDTH)
    tl.store(lse + rows, log_sum, mask=rows < end)


@triton.jit
def gather_query_gradient(
    grad_q, q, grad_out, log_sum, delta, k, v, k_strides, v_strides, start, stop, low, high, scale,
    WIDTH: tl.constexpr, V_WIDTH: tl.constexpr, STREAM: tl.constexpr, MASKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Stream keys past a tile of queries as :func:`attend` does, and add up ds k."""
    for at in range(start, stop, STREAM):
        keys = at + tl.arange(0, STREAM)
        k_tile = load_rows(k, keys, stop, k_strides, WIDTH)
        v_tile = load_rows(v, keys, stop, v_strides, V_WIDTH)
        p = tl.exp2(tl.dot(q, tl.trans(k_tile), input_precision=PRECISION) * scale - log_sum[:, None])
        if MASKED:
            p = tl.where((keys[None, :] >= low[:, None]) & (keys[None, :] < high[:, None]), p, 0.0)
        ds = p * (tl.dot(grad_out, tl.trans(v_tile), input_precision=PRECISION) - delta[:, None])
        grad_q = tl.dot(ds.to(k_tile.dtype), k_tile, grad_q, input_precision=PRECISION)
    return grad_q


@triton.jit
def gather_key_gradients(
    grad_k, grad_v, k, v, q, grad_out, out, lse, q_strides, grad_out_strides, out_strides,
    start, stop, low, high, scale,
    WIDTH: tl.constexpr, V_WIDTH: tl.constexpr, STREAM: tl.constexpr, MASKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Stream queries [start, stop) past a tile of keys and add up ds^T q and p^T grad_out."""
    for at in range(start, stop, STREAM):
        rows = at + tl.arange(0, STREAM)
        q_tile = load_rows(q, rows, stop, q_strides, WIDTH)
        grad_tile = load_rows(grad_out, rows, stop, grad_out_strides, V_WIDTH)
        delta = row_delta(grad_tile, load_rows(out, rows, stop, out_strides, V_WIDTH))
        log_sum = tl.load(lse + rows, mask=rows < stop, other=float("inf"))
        p = tl.exp2(tl.dot(k, tl.trans(q_tile), input_precision=PRECISION) * scale - log_sum[None, :])
        if MASKED:
            p = tl.where((rows[None, :] >= low[:, None]) & (rows[None, :] < high[:, None]), p, 0.0)
        grad_v = tl.dot(p.to(grad_tile.dtype), grad_tile, grad_v, input_precision=PRECISION)
        ds = p * (tl.dot(v, tl.trans(grad_tile), input_precision=PRECISION) - delta[None, :])
        grad_k = tl.dot(ds.to(q_tile.dtype), q_tile, grad_k, input_precision=PRECISION)
    return grad_k, grad_v


@triton.jit(do_not_specialize=STRUCTURE)
def group_attention_backward_kernel(
    grad_out, q, k, v, active, out, lse, grad_q, grad_k, grad_v,
    grad_out_strides, q_strides, k_strides, v_strides, out_strides, grad_q_strides, grad_k_strides, grad_v_strides,
    heads, groups, slots, matching, scale,
    WIDTH: tl.constexpr, V_WIDTH: tl.constexpr, HOLD: tl.constexpr, STREAM: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    image, head = tl.program_id(1) // heads, tl.program_id(1) % heads
    q, k = head_of(q, q_strides, image, head), head_of(k, k_strides, image, head)
    v, out = head_of(v, v_strides, image, head), head_of(out, out_strides, image, head)
    grad_out = head_of(grad_out, grad_out_strides, image, head)
    noised = groups * slots
    queries = noised + matching
    lse += tl.program_id(1).to(tl.int64) * queries
    # Every tile has two programs, one for its keys and one for its queries. Those of the matching keys see every query
    # and take longest: they start first.
    tiles = tl.cdiv(noised, HOLD) + tl.cdiv(matching, HOLD)
    of_keys = tl.program_id(0) < tiles
    tile = tl.where(of_keys, tiles - 1 - tl.program_id(0), tl.program_id(0) - tiles)
    first = tile_start(tile, noised, HOLD)
    rows = first + tl.arange(0, HOLD)
    end = tl.where(first < noised, noised, queries)
    low, high, start, stop = own_groups(rows, first, noised, active, image, slots, HOLD)
    scale_log2 = scale * LOG2_E
    if of_keys:
        k_tile, v_tile = load_rows(k, rows, end, k_strides, WIDTH), load_rows(v, rows, end, v_strides, V_WIDTH)
        dk, dv = tl.zeros((HOLD, padded(WIDTH)), tl.float32), tl.zeros((HOLD, padded(V_WIDTH)), tl.float32)
        if first < noised:
            dk, dv = gather_key_gradients(
                dk, dv, k_tile, v_tile, q, grad_out, out, lse, q_strides, grad_out_strides, out_strides,
                start, stop, low, tl.where(rows < high, high, low), scale_log2,  # nobody sees the keys of dead slots
                WIDTH, V_WIDTH, STREAM, True, PRECISION,
            )  # fmt: skip
        else:
            dk, dv = gather_key_gradients(
                dk, dv, k_tile, v_tile, q, grad_out, out, lse, q_strides, grad_out_strides, out_strides,
                0, queries, low, high, scale_log2, WIDTH, V_WIDTH, STREAM, False, PRECISION,
            )  # fmt: skip
        store_rows(head_of(grad_k, grad_k_strides, image, head), rows, end, grad_k_strides, dk * scale, WIDTH)
        store_rows(head_of(grad_v, grad_v_strides, image, head), rows, end, grad_v_strides, dv, V_WIDTH)
    else:
        q_tile = load_rows(q, rows, end, q_strides, WIDTH)
        grad_tile = load_rows(grad_out, rows, end, grad_out_strides, V_WIDTH)
        delta = row_delta(grad_tile, load_rows(out, rows, end, out_strides, V_WIDTH))
        log_sum = tl.load(lse + rows, mask=rows < end, other=float("inf"))
        whole = noised + matching // STREAM * STREAM
        dq = tl.zeros((HOLD, padded(WIDTH)), tl.float32)
        dq = gather_query_gradient(
            dq, q_tile, grad_tile, log_sum, delta, k, v, k_strides, v_strides, start, stop, low, high, scale_log2,
            WIDTH, V_WIDTH, STREAM, True, PRECISION,
        )  # fmt: skip
        dq = gather_query_gradient(
            dq, q_tile, grad_tile, log_sum, delta, k, v, k_strides, v_strides, noised, whole, low, high, scale_log2,
            WIDTH, V_WIDTH, STREAM, False, PRECISION,
        )  # fmt: skip
        dq = gather_query_gradient(
            dq, q_tile, grad_tile, log_sum, delta, k, v, k_strides, v_strides, whole, queries,
            low * 0, low * 0 + queries, scale_log2, WIDTH, V_WIDTH, STREAM, True, PRECISION,
        )  # fmt: skip
        store_rows(head_of(grad_q, grad_q_strides, image, head), rows, end, grad_q_strides, dq * scale, WIDTH)


def _tiles(groups: int, slots: int, matching: int, hold: int) -> int:
    return triton.cdiv(groups * slots, hold) + triton.cdiv(matching, hold)


def group_attention_forward(q, k, v, active, groups, slots, matching, scale, precision, out, lse, tile=None):
    """Write out and lse [B, H, Q] float32 for q, k [B, H, Q, D], v [B, H, Q, D'] at any strides, active [B] int32."""
    batch, heads, _, width = q.shape
    if out.numel() == 0:
        return

    def launch(tile):
        group_attention_forward_kernel[(_tiles(groups, slots, matching, tile.hold), batch * heads)](
            q, k, v, active, out, lse, q.stride(), k.stride(), v.stride(), out.stride(),
            heads, groups, slots, matching, scale,
            width, v.shape[3], tile.hold, tile.stream, precision,
            num_warps=tile.warps, num_stages=tile.stages, enable_fp_fusion=True,
        )  # fmt: skip

    launch(tile or attention_tile("group_attention_forward", q, v, precision, launch))


def group_attention_backward(
    grad_out, q, k, v, active, out, lse, groups, slots, matching, scale, precision, grad_q, grad_k, grad_v, tile=None
):
    """Write the gradients of q, k and v, every element of them, from what the forward left."""
    batch, heads, _, width = q.shape
    if out.numel() == 0:
        return

    def launch(tile):
        group_attention_backward_kernel[(2 * _tiles(groups, slots, matching, tile.hold), batch * heads)](
            grad_out, q, k, v, active, out, lse, grad_q, grad_k, grad_v,
            grad_out.stride(), q.stride(), k.stride(), v.stride(), out.stride(),
            grad_q.stride(), grad_k.stride(), grad_v.stride(),
            heads, groups, slots, matching, scale,
            width, v.shape[3], tile.hold, tile.stream, precision,
            num_warps=tile.warps, num_stages=tile.stages, enable_fp_fusion=True,
        )  # fmt: skip

    launch(tile or attention_tile("group_attention_backward", q, v, precision, launch))
