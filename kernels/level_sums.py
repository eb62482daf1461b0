"""Sums over the rows of each level: programs take turns at tiles of a level, a second pass adds up what they found."""

import torch
import triton
import triton.language as tl

# Rows and columns of a tile, in bytes of which many are on their way, and where what is summed are few programs' sums.
_TILE = (16, 256)
_OF_SUMS = (128, 16)
_SHARES = 512  # programs of one level, at most; four for each multiprocessor of a large GPU


@triton.jit
def level_sums_kernel(
    grad,  # [images, pixels of all levels, COLUMNS]
    sums,  # [LEVELS, shares, COLUMNS]
    sizes,  # pixels of each level
    images,
    LEVELS: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    share, shares, level = tl.program_id(0), tl.num_programs(0), tl.program_id(1)
    start, pixels, whole = 0, 0, 0
    for other in tl.static_range(LEVELS):
        start += tl.where(level > other, sizes[other], 0)
        pixels += tl.where(level == other, sizes[other], 0)
        whole += sizes[other]
    column = tl.program_id(2) * BLOCK_C + tl.arange(0, BLOCK_C)
    total = tl.zeros([BLOCK_ROWS, BLOCK_C], tl.float32)
    rows = images * pixels
    for first in range(share * BLOCK_ROWS, rows, shares * BLOCK_ROWS):
        row = first + tl.arange(0, BLOCK_ROWS)
        image = row // pixels
        place = image.to(tl.int64) * whole + start + row - image * pixels
        inside = (row < rows)[:, None] & (column < COLUMNS)[None, :]
        total += tl.load(grad + place[:, None] * COLUMNS + column[None, :], mask=inside, other=0.0).to(tl.float32)
    to = sums + (level * shares + share) * COLUMNS + column
    tl.store(to, tl.sum(total, 0), mask=column < COLUMNS)


def _tile(columns: int, of_sums: bool) -> tuple[int, int]:
    """Rows and columns of a tile."""
    rows, width = _OF_SUMS if of_sums else _TILE
    block = min(triton.next_power_of_2(columns), width)
    return rows * width // block, block


def level_sums(grad, sizes: tuple[int, ...], sums) -> None:
    """Write sums [L, C] of contiguous grad [B, S, C], whose levels have these sizes."""
    images, _, columns = grad.shape
    rows, _ = _tile(columns, False)
    shares = min(max(triton.cdiv(images * max(sizes), rows), 1), _SHARES)
    parts = sums.view(len(sizes), 1, columns)
    if shares > 1:
        parts = torch.empty((len(sizes), shares, columns), dtype=torch.float32, device=grad.device)
    _launch(grad, parts, sizes, images, False)
    if shares > 1:
        _launch(parts, sums.view(len(sizes), 1, columns), (shares,) * len(sizes), 1, True)


def _launch(grad, sums, sizes, images, of_sums) -> None:
    levels, shares, columns = sums.shape
    block_rows, block_c = _tile(columns, of_sums)
    level_sums_kernel[(shares, levels, triton.cdiv(columns, block_c))](
        grad,
        sums,
        sizes,
        images,
        LEVELS=levels,
        COLUMNS=columns,
        BLOCK_ROWS=block_rows,
        BLOCK_C=block_c,
        num_warps=4,
    )
