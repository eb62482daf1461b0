"""Products whose results meet an activation, or the gradient of one, in the program that made them.

Programs that follow each other take turns at the columns and share their rows; weights are small enough to stay in L2.
Products are summed in float32 and rounded before an activation sees them, as if it came in a pass of its own.
"""

import torch
import triton
import triton.language as tl

from .column_sums import column_sums
from .product_tiles import Tile, product_tile


@triton.jit
def place(columns, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Rows, 64 bits wide as whole tensors may pass 2^31 elements, and columns of a program."""
    across = tl.cdiv(columns, BLOCK_N)
    m = (tl.program_id(0) // across).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = (tl.program_id(0) % across) * BLOCK_N + tl.arange(0, BLOCK_N)
    return m, n


@triton.jit
def product(
    a,  # [M, K]
    b,  # [K, N] at any strides
    term_stride,  # of b, from one term to the next
    column_stride,
    m,
    n,
    rows,
    columns,
    terms,  # K
    BLOCK_K: tl.constexpr,
    WHOLE: tl.constexpr,  # nothing of the tiles lies beyond K and N
):
    """Rows m of a times columns n of b, float32; anything in rows and columns beyond the edges."""
    k = tl.arange(0, BLOCK_K)
    a += tl.minimum(m, rows - 1)[:, None] * terms + k[None, :]
    b += k[:, None] * term_stride + n[None, :] * column_stride
    total = tl.zeros([m.shape[0], n.shape[0]], tl.float32)
    for start in range(0, terms, BLOCK_K):
        if WHOLE:
            total = tl.dot(tl.load(a), tl.load(b), total, input_precision="ieee")
        else:
            left = k < terms - start
            a_tile = tl.load(a, mask=left[None, :], other=0.0)
            b_tile = tl.load(b, mask=left[:, None] & (n < columns)[None, :], other=0.0)
            total = tl.dot(a_tile, b_tile, total, input_precision="ieee")
        a += BLOCK_K
        b += BLOCK_K * term_stride
    return total


@triton.jit
def activated_product_kernel(
    x,  # [M, K]
    weight,  # [K, N] at any strides
    bias,  # [N]
    slope,  # [1], a PReLU's, or None for a ReLU
    out,  # [M, N]
    before,  # [M, N], or None: what the PReLU was given
    term_stride,  # of weight, from one term to the next
    column_stride,
    rows,
    columns,
    terms,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    WHOLE: tl.constexpr,
):
    m, n = place(columns, BLOCK_M, BLOCK_N)
    total = product(x, weight, term_stride, column_stride, m, n, rows, columns, terms, BLOCK_K, WHOLE)
    total += tl.load(bias + n, mask=n < columns, other=0.0).to(tl.float32)[None, :]
    value = total.to(out.dtype.element_ty)
    inside = (m < rows)[:, None] & (n < columns)[None, :]
    to = m[:, None] * columns + n[None, :]
    if before is not None:
        tl.store(before + to, value, mask=inside)
    # As torch has it, a NaN is neither below nor above zero, and stays one.
    precise = value.to(tl.float32)
    if slope is None:
        precise = tl.where(precise <= 0.0, 0.0, precise)
    else:
        precise = tl.where(precise > 0.0, precise, precise * tl.load(slope).to(tl.float32))
    tl.store(out + to, precise.to(out.dtype.element_ty), mask=inside)


@triton.jit
def activated_product_backward_kernel(
    grad,  # [M, K]
    weight,  # [K, N] at any strides
    kept,  # [M, N]: result of a ReLU, or what a PReLU was given
    slope,  # [1], a PReLU's, or None
    masked,  # [M, N]
    sums,  # [blocks of rows, N]
    slope_sums,  # [programs], or None: of the product times what the PReLU was given, where that is not above zero
    term_stride,  # of weight, from one term to the next
    column_stride,
    rows,
    columns,
    terms,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    WHOLE: tl.constexpr,
):
    m, n = place(columns, BLOCK_M, BLOCK_N)
    total = product(grad, weight, term_stride, column_stride, m, n, rows, columns, terms, BLOCK_K, WHOLE)
    inside = (m < rows)[:, None] & (n < columns)[None, :]
    to = m[:, None] * columns + n[None, :]
    value = total.to(masked.dtype.element_ty)
    # Beyond the edges a ReLU lets nothing pass, and a PReLU's slope, which may be infinite, multiplies nothing.
    at = tl.load(kept + to, mask=inside, other=0.0 if slope is None else 1.0)
    if slope is None:
        value = tl.where(at <= 0.0, 0.0, value)  # a NaN lets the gradient pass
    else:
        value, at = tl.where(inside, value, 0.0).to(tl.float32), at.to(tl.float32)
        tl.store(slope_sums + tl.program_id(0), tl.sum(tl.where(at > 0.0, 0.0, value * at)))
        value = tl.where(at > 0.0, value, value * tl.load(slope).to(tl.float32))
    tl.store(masked + to, value.to(masked.dtype.element_ty), mask=inside)
    block = (tl.program_id(0) // tl.cdiv(columns, BLOCK_N)).to(tl.int64)
    tl.store(sums + block * columns + n, tl.sum(value.to(tl.float32), 0).to(sums.dtype.element_ty), mask=n < columns)


def options(tile: Tile, columns: int, terms: int) -> dict[str, int]:
    """Constants and launch options of either kernel."""
    return {
        "BLOCK_M": tile.rows,
        "BLOCK_N": tile.columns,
        "BLOCK_K": tile.terms,
        "WHOLE": terms % tile.terms == 0 and columns % tile.columns == 0,
        "num_warps": tile.warps,
        "num_stages": tile.stages,
        **({"maxnreg": tile.registers} if tile.registers else {}),
    }


def activated_product(x, weight, bias, slope, out, before) -> None:
    """Write out [M, N] of contiguous x [M, K], not empty, and weight [N, K]; before [M, N], too, if it is there."""
    (rows, terms), columns = x.shape, len(weight)

    def launch(tile):
        grid = (triton.cdiv(rows, tile.rows) * triton.cdiv(columns, tile.columns),)
        sizes = *weight.t().stride(), rows, columns, terms
        activated_product_kernel[grid](x, weight, bias, slope, out, before, *sizes, **options(tile, columns, terms))

    launch(product_tile("forward", out, slope, launch))


def activated_product_backward(grad, weight, kept, slope, masked, sums, grad_slope) -> None:
    """Write masked [M, N] and sums [N] of contiguous grad [M, K], not empty, weight [K, N] and contiguous kept [M, N].

    Given the slope [1] of a PReLU, also its gradient [1].
    """
    (rows, terms), columns = grad.shape, weight.shape[1]

    def launch(tile):
        blocks, across = triton.cdiv(rows, tile.rows), triton.cdiv(columns, tile.columns)
        parts = sums if blocks == 1 else sums.new_empty((blocks, columns), dtype=torch.float32)
        slope_parts = None if slope is None else sums.new_empty((blocks * across, 1), dtype=torch.float32)
        sizes = *weight.stride(), rows, columns, terms
        activated_product_backward_kernel[blocks * across,](
            grad, weight, kept, slope, masked, parts, slope_parts, *sizes, **options(tile, columns, terms)
        )
        if blocks > 1:
            column_sums(parts, None, None, None, sums, None)
        if slope is not None:
            column_sums(slope_parts, None, None, None, grad_slope, None)

    launch(product_tile("backward", masked, slope, launch))
