"""Sums over rows: a program adds a block of columns over its share of the rows, a second pass the shares of all.

What is summed depends on the shape alone, so the same input gives the same bits on every device.
"""

import torch
import triton
import triton.language as tl

_FEW = 4096  # rows that one program per block of columns adds sooner than two passes do
_TALL = (1024, 16, 16)  # rows and columns of a tile, warps: many rows in flight where there are few programs
_PROGRAMS = 1024  # some eight for each multiprocessor of a large GPU
_SHARES = 512


@triton.jit
def column_sums_kernel(
    grad,  # [M, N]
    x,  # [M, N], or None: result of a ReLU, or what a PReLU was given
    slope,  # [1], a PReLU's, or None
    masked,  # [M, N], or None: grad where x is above zero, elsewhere times the slope or zero
    sums,  # [shares, N]
    slope_sums,  # [shares, blocks of columns], or None: of grad x where x is not above zero
    rows,
    columns,
    rows_per_share,  # a multiple of BLOCK_M
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    share = tl.program_id(1).to(tl.int64)
    first = share * rows_per_share
    start = first * columns
    left = tl.minimum(rows - first, rows_per_share).to(tl.int32)
    m, n = tl.arange(0, BLOCK_M), tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    if slope is not None:
        factor = tl.load(slope).to(tl.float32)
        by_slope = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for above in range(0, rows_per_share, BLOCK_M):
        inside = (above + m < left)[:, None] & (n < columns)[None, :]
        place = (above + m)[:, None] * columns + n[None, :]
        value = tl.load(grad + start + place, mask=inside, other=0.0)
        if x is not None:
            # Beyond the edges nothing is multiplied: factors may be infinite.
            at = tl.load(x + start + place, mask=inside, other=1.0).to(tl.float32)
            # As torch has it, a NaN lets the gradient pass a ReLU, but is not above zero for a PReLU.
            if slope is None:
                value = tl.where(at <= 0.0, 0.0, value)
            else:
                value = value.to(tl.float32)
                by_slope += tl.where(at > 0.0, 0.0, value * at)
                value = tl.where(at > 0.0, value, value * factor)
            tl.store(masked + start + place, value.to(masked.dtype.element_ty), mask=inside)
        total += value.to(tl.float32)
    if slope is not None:
        tl.store(slope_sums + share * tl.num_programs(0) + tl.program_id(0), tl.sum(by_slope))
    tl.store(sums + share * columns + n, tl.sum(total, 0).to(sums.dtype.element_ty), mask=n < columns)


def plan(rows: int, columns: int, masks: bool, slope: bool = False) -> tuple[int, int, int, int]:
    """Rows and columns of a tile, its warps, and how many rows are a program's share.

    masks: whether the masked gradient is written, too; slope: whether its activation's is summed. Tiles of many rows
    are those that an H200 preferred.
    """
    if rows <= _FEW:
        block_m, block_n, warps = _TALL
        block_m //= 2 if slope else 1  # sums of two kinds would not fit in the registers of so many warps
        shares = 1
    else:
        warps = 4 if masks else 2
        block_n = min(max(triton.next_power_of_2(columns), 16), 32 * warps)
        block_m = 1024 * warps // block_n
        shares = min(max(_PROGRAMS // triton.cdiv(columns, block_n), 1), _SHARES)
    return block_m, block_n, warps, block_m * max(triton.cdiv(rows, block_m * shares), 1)


def column_sums(grad, x, slope, masked, sums, grad_slope) -> None:
    """Write sums [N] of contiguous grad [M, N]; given x [M, N], also masked [M, N], whose sums they are then.

    Given the slope [1] of a PReLU, also its gradient [1].
    """
    rows, columns = grad.shape
    block_m, block_n, warps, rows_per_share = plan(rows, columns, x is not None, slope is not None)
    shares = max(triton.cdiv(rows, rows_per_share), 1)
    parts = sums if shares == 1 else sums.new_empty((shares, columns), dtype=torch.float32)
    blocks = triton.cdiv(columns, block_n)
    slope_parts = None if slope is None else sums.new_empty((shares * blocks, 1), dtype=torch.float32)
    column_sums_kernel[(blocks, shares)](
        grad,
        x,
        slope,
        masked,
        parts,
        slope_parts,
        rows,
        columns,
        rows_per_share,
        BLOCK_M=block_m,
        BLOCK_N=block_n,
        num_warps=warps,
    )
    if shares > 1:
        column_sums(parts, None, None, None, sums, None)
    if slope is not None:
        column_sums(slope_parts, None, None, None, grad_slope, None)
