"""What the attention kernels share: rows of a head as tiles, and the online softmax in powers of two.

Scores arrive multiplied by scale * log2(e), so that every exponential is one ``exp2``. The logarithm of a row's sum is
kept in the same unit; +inf marks a row that saw nothing, which makes its probabilities exactly zero in the backward.
Strides are tuples (image, head, row, column).
"""

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)


@triton.constexpr_function
def padded(width):
    """Columns of the tile that holds rows of this width: a power of two that ``tl.dot`` takes."""
    return max(16, 1 << (width - 1).bit_length())


@triton.jit
def head_of(base, strides, image, head):
    """Pointer to the first row of a head; 64 bits wide, as whole tensors may pass 2^31 elements."""
    return base + image.to(tl.int64) * strides[0] + head.to(tl.int64) * strides[1]


@triton.jit
def load_rows(base, rows, end, strides, WIDTH: tl.constexpr):
    """Rows of a head as a [rows, padded(WIDTH)] tile; zeros at and beyond ``end`` and beyond WIDTH columns."""
    columns = tl.arange(0, padded(WIDTH))
    inside = rows[:, None] < end
    if padded(WIDTH) != WIDTH:
        inside = inside & (columns[None, :] < WIDTH)
    return tl.load(base + rows[:, None] * strides[2] + columns[None, :] * strides[3], mask=inside, other=0.0)


@triton.jit
def store_rows(base, rows, end, strides, tile, WIDTH: tl.constexpr):
    """Write a tile where :func:`load_rows` would read it, in the pointer's dtype."""
    columns = tl.arange(0, padded(WIDTH))
    inside = rows[:, None] < end
    if padded(WIDTH) != WIDTH:
        inside = inside & (columns[None, :] < WIDTH)
    pointers = base + rows[:, None] * strides[2] + columns[None, :] * strides[3]
    tl.store(pointers, tile.to(base.dtype.element_ty), mask=inside)


@triton.jit
def softmax_start(ROWS: tl.constexpr, V_WIDTH: tl.constexpr):
    """State of rows that have seen no key: largest score, sum, weighted values."""
    peak = tl.full((ROWS,), float("-inf"), tl.float32)
    return peak, tl.zeros((ROWS,), tl.float32), tl.zeros((ROWS, padded(V_WIDTH)), tl.float32)


@triton.jit
def softmax_step(state, scores, v, PRECISION: tl.constexpr):
    """Take scores [rows, keys] (-inf where hidden) and values [keys, columns] into the state."""
    peak, total, out = state
    raised = tl.maximum(peak, tl.max(scores, 1))
    # Where nothing was seen yet, inf - inf would be NaN.
    origin = tl.where(raised == float("-inf"), 0.0, raised)
    p = tl.exp2(scores - origin[:, None])
    shrink = tl.exp2(peak - origin)
    total = total * shrink + tl.sum(p, 1)
    out = tl.dot(p.to(v.dtype), v, out * shrink[:, None], input_precision=PRECISION)
    return raised, total, out


@triton.jit
def softmax_end(state, alive):
    """State -> output and log2 of each row's sum; rows that are not alive or saw nothing give zeros and +inf."""
    peak, total, out = state
    seen = alive & (total != 0)  # NaN was seen
    log_sum = tl.where(seen, peak + tl.log2(tl.where(seen, total, 1.0)), float("inf"))
    return tl.where(seen[:, None], out / tl.where(seen, total, 1.0)[:, None], 0.0), log_sum


@triton.jit
def row_delta(grad_out, out):
    """rowsum(grad_out * out), which the gradient of every softmax subtracts."""
    return tl.sum(grad_out.to(tl.float32) * out.to(tl.float32), 1)
