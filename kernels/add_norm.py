"""Residual sum and layer norm: a program takes tiles of whole rows; what goes to weight and bias is added in order."""

import torch
import triton
import triton.language as tl

_TILE = 1024  # elements: eight for each thread, and for C = 256 a row for each warp
_PROGRAMS = 1024  # of the backward, at most: eight on each multiprocessor of an H100, but the same everywhere


@triton.jit
def _place(first, rows, COLUMNS: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_C: tl.constexpr):
    """Of a tile of rows: their numbers, which of them exist, the offsets of the elements, and which of those exist."""
    row = first + tl.arange(0, BLOCK_ROWS).to(tl.int64)
    column = tl.arange(0, BLOCK_C)
    real = row < rows
    return row, real, row[:, None] * COLUMNS + column[None, :], real[:, None] & (column < COLUMNS)[None, :]


@triton.jit(do_not_specialize=["rows"])
def add_norm_forward_kernel(
    x,  # [rows, COLUMNS], as all that has no other shape
    y,
    weight,  # [COLUMNS]
    bias,  # [COLUMNS]
    position,  # or None
    out,
    low,  # or None
    positioned,  # or None
    normalized,  # or None
    rstd,  # [rows], or None
    rows,
    eps,
    COLUMNS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    first = tl.program_id(0).to(tl.int64) * BLOCK_ROWS
    row, real, at, inside = _place(first, rows, COLUMNS, BLOCK_ROWS, BLOCK_C)
    column = tl.arange(0, BLOCK_C)
    w = tl.load(weight + column, mask=column < COLUMNS, other=0.0).to(tl.float32)
    b = tl.load(bias + column, mask=column < COLUMNS, other=0.0).to(tl.float32)
    added = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    added += tl.load(y + at, mask=inside, other=0.0).to(tl.float32)
    centred = tl.where(inside, added - (tl.sum(added, 1) / COLUMNS)[:, None], 0.0)
    scale = tl.rsqrt(tl.sum(centred * centred, 1) / COLUMNS + eps)
    unit = centred * scale[:, None]
    value = unit * w[None, :] + b[None, :]
    tl.store(out + at, value.to(out.dtype.element_ty), mask=inside)
    if low is not None:
        tl.store(low + at, value.to(low.dtype.element_ty), mask=inside)
    if position is not None:
        value += tl.load(position + at, mask=inside, other=0.0).to(tl.float32)
        tl.store(positioned + at, value.to(positioned.dtype.element_ty), mask=inside)
    if normalized is not None:
        tl.store(normalized + at, unit, mask=inside)
        tl.store(rstd + row, scale, mask=real)


@triton.jit(do_not_specialize=["rows"])
def add_norm_backward_kernel(
    grad_out,  # [rows, COLUMNS], as the next two, or None
    grad_low,
    grad_positioned,
    normalized,
    rstd,
    weight,
    grad_x,
    grad_y,  # or None
    partials,  # [programs, 2, COLUMNS]: of weight, of bias
    rows,
    COLUMNS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    column = tl.arange(0, BLOCK_C)
    w = tl.load(weight + column, mask=column < COLUMNS, other=0.0).to(tl.float32)
    by_weight = tl.zeros([BLOCK_ROWS, BLOCK_C], tl.float32)
    by_bias = tl.zeros([BLOCK_ROWS, BLOCK_C], tl.float32)
    for first in range(tl.program_id(0) * BLOCK_ROWS, rows, tl.num_programs(0) * BLOCK_ROWS):
        row, real, at, inside = _place(first, rows, COLUMNS, BLOCK_ROWS, BLOCK_C)
        unit = tl.load(normalized + at, mask=inside, other=0.0)
        scale = tl.load(rstd + row, mask=real, other=0.0)
        grad = tl.zeros([BLOCK_ROWS, BLOCK_C], tl.float32)
        if grad_out is not None:
            grad += tl.load(grad_out + at, mask=inside, other=0.0).to(tl.float32)
        if grad_low is not None:
            grad += tl.load(grad_low + at, mask=inside, other=0.0).to(tl.float32)
        if grad_positioned is not None:
            grad += tl.load(grad_positioned + at, mask=inside, other=0.0).to(tl.float32)
        by_weight += grad * unit
        by_bias += grad
        grad *= w[None, :]
        along, mean = tl.sum(grad * unit, 1) / COLUMNS, tl.sum(grad, 1) / COLUMNS
        grad = (grad - unit * along[:, None] - mean[:, None]) * scale[:, None]
        tl.store(grad_x + at, grad.to(grad_x.dtype.element_ty), mask=inside)
        if grad_y is not None:
            tl.store(grad_y + at, grad.to(grad_y.dtype.element_ty), mask=inside)
    to = partials + tl.program_id(0) * 2 * COLUMNS + column
    tl.store(to, tl.sum(by_weight, 0), mask=column < COLUMNS)
    tl.store(to + COLUMNS, tl.sum(by_bias, 0), mask=column < COLUMNS)


@triton.jit(do_not_specialize=["programs"])
def add_norm_reduce_kernel(
    partials,  # [programs, 2, COLUMNS]
    grad_weight,  # [COLUMNS]
    grad_bias,  # [COLUMNS]
    programs,
    COLUMNS: tl.constexpr,
    BLOCK_PROGRAMS: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    column = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    of = tl.program_id(1)
    added = tl.zeros([BLOCK_PROGRAMS, BLOCK_C], tl.float32)
    for first in range(0, programs, BLOCK_PROGRAMS):
        program = first + tl.arange(0, BLOCK_PROGRAMS)
        inside = (program < programs)[:, None] & (column < COLUMNS)[None, :]
        at = (program[:, None] * 2 + of) * COLUMNS + column[None, :]
        added += tl.load(partials + at, mask=inside, other=0.0)
    whole = tl.sum(added, 0)
    if of == 0:
        tl.store(grad_weight + column, whole.to(grad_weight.dtype.element_ty), mask=column < COLUMNS)
    else:
        tl.store(grad_bias + column, whole.to(grad_bias.dtype.element_ty), mask=column < COLUMNS)


def _tile(columns: int) -> tuple[int, int]:
    """Rows and columns of a tile."""
    block = triton.next_power_of_2(columns)
    return max(_TILE // block, 1), block


def add_norm_forward(x, y, weight, bias, position, eps, out, low, positioned, normalized, rstd) -> None:
    """Write out and what is not None of the rest, given contiguous x, y, position [..., C]."""
    columns = len(weight)
    rows = out.numel() // columns
    if rows == 0:
        return
    block_rows, block_c = _tile(columns)
    add_norm_forward_kernel[(triton.cdiv(rows, block_rows),)](
        x,
        y,
        weight,
        bias,
        position,
        out,
        low,
        positioned,
        normalized,
        rstd,
        rows,
        eps,
        COLUMNS=columns,
        BLOCK_ROWS=block_rows,
        BLOCK_C=block_c,
        num_warps=4,
    )


def add_norm_backward(
    grad_out, grad_low, grad_positioned, normalized, rstd, weight, grad_x, grad_y, grad_weight, grad_bias
) -> None:
    """Write grad_x, grad_y (or None), grad_weight and grad_bias, given contiguous gradients, each of them or None."""
    columns = len(weight)
    rows = normalized.numel() // columns
    block_rows, block_c = _tile(columns)
    programs = min(triton.cdiv(rows, block_rows), _PROGRAMS)
    partials = torch.empty((programs, 2, columns), dtype=torch.float32, device=normalized.device)
    if programs:
        add_norm_backward_kernel[(programs,)](
            grad_out,
            grad_low,
            grad_positioned,
            normalized,
            rstd,
            weight,
            grad_x,
            grad_y,
            partials,
            rows,
            COLUMNS=columns,
            BLOCK_ROWS=block_rows,
            BLOCK_C=block_c,
            num_warps=4,
        )
    add_norm_reduce_kernel[(triton.cdiv(columns, 16), 2)](
        partials,
        grad_weight,
        grad_bias,
        programs,
        COLUMNS=columns,
        BLOCK_PROGRAMS=128,
        BLOCK_C=16,
        num_warps=4,
    )
