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
    out,  # [M, N], or None
    masked,  # [M, N], or None: grad where out is above zero
    sums,  # [shares, N]
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
    for above in range(0, rows_per_share, BLOCK_M):
        inside = (above + m < left)[:, None] & (n < columns)[None, :]
        place = (above + m)[:, None] * columns + n[None, :]
        value = tl.load(grad + start + place, mask=inside, other=0.0)
        if out is not None:
            # As torch has it, a NaN lets the gradient pass.
            closed = tl.load(out + start + place, mask=inside, other=0.0) <= 0.0
            value = tl.where(closed, 0.0, value)
            tl.store(masked + start + place, value, mask=inside)
        total += value.to(tl.float32)
    tl.store(sums + share * columns + n, tl.sum(total, 0).to(sums.dtype.element_ty), mask=n < columns)


def plan(rows: int, columns: int) -> tuple[int, int, int, int]:
    """Rows and columns of a tile, its warps, and how many rows are a program's share."""
    if rows <= _FEW:
        block_m, block_n, warps = _TALL
        shares = 1
    else:
        block_n = min(max(triton.next_power_of_2(columns), 16), 128)
        block_m, warps = 4096 // block_n, 4
        shares = min(max(_PROGRAMS // triton.cdiv(columns, block_n), 1), _SHARES)
    return block_m, block_n, warps, block_m * max(triton.cdiv(rows, block_m * shares), 1)


def column_sums(grad, out, masked, sums) -> None:
    """Write sums [N] of contiguous grad [M, N]; given out [M, N], also masked [M, N], whose sums they are then."""
    rows, columns = grad.shape
    block_m, block_n, warps, rows_per_share = plan(rows, columns)
    shares = max(triton.cdiv(rows, rows_per_share), 1)
    parts = sums if shares == 1 else sums.new_empty((shares, columns), dtype=torch.float32)
    column_sums_kernel[(triton.cdiv(columns, block_n), shares)](
        grad,
        out,
        masked,
        parts,
        rows,
        columns,
        rows_per_share,
        BLOCK_M=block_m,
        BLOCK_N=block_n,
        num_warps=warps,
    )
    if shares > 1:
        column_sums(parts, None, None, sums)
