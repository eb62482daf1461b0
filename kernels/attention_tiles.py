"""Tile sizes of the attention kernels per kind of GPU, number format and shape class, and their measurement.

Training never tunes: it looks tiles up here. ``DNDETR_AUTOTUNE=1`` measures every candidate at the first call of each
class instead and prints lines for these tables.
"""

from typing import NamedTuple

import torch
import triton

from .tiles import chosen, processors


class Tile(NamedTuple):
    """Rows that a program holds, rows that it streams past them, warps, and stages of the software pipeline."""

    hold: int
    stream: int
    warps: int
    stages: int


class Class(NamedTuple):
    """What a tile is chosen by.

    numbers: "half" (bfloat16, float16), or the precision of float32 products. width: 32, 64 or 128, the next to the
    widest head in play. load: "few" where tiles of 64 queries would give every processor less than two programs.
    """

    kernel: str
    numbers: str
    width: int
    load: str


WIDTHS = (32, 64, 128)
CANDIDATES = tuple(
    Tile(hold, stream, warps, stages)
    for hold in (32, 64, 128)
    for stream in (16, 32, 64)
    for warps in (2, 4, 8)
    for stages in (1, 2, 3)
)


def _table(rows: dict) -> dict[Class, Tile]:
    """{kernel, numbers: tiles of widths 32, 64, 128 as (many, few)} -> {class: tile}."""
    return {
        Class(kernel, numbers, width, load): Tile(*tile)
        for (kernel, numbers), pairs in rows.items()
        for width, pair in zip(WIDTHS, pairs, strict=False)
        for load, tile in zip(("many", "few"), pair, strict=True)
    }


# Chosen by what ahead-of-time builds (Triton 3.6 and 3.9) say of registers, spills and shared memory. On a GPU, an
# H200, only those of many rows in half precision, 32 wide, were tried: they are within a fifth of each call's best.
# Three TF32 products keep two halves of every operand, which does not fit in registers at 128 columns.
TABLES = {
    90: _table(
        {
            ("group_attention_forward", "half"): [
                ((64, 64, 4, 3), (32, 64, 2, 3)),
                ((64, 64, 4, 3), (32, 32, 2, 3)),
                ((64, 32, 4, 2), (32, 32, 4, 2)),
            ],
            ("group_attention_forward", "tf32"): [
                ((64, 64, 4, 2), (32, 32, 2, 2)),
                ((64, 32, 4, 2), (32, 32, 2, 2)),
                ((64, 32, 4, 2), (32, 32, 4, 2)),
            ],
            ("group_attention_forward", "tf32x3"): [
                ((64, 32, 4, 2), (32, 32, 2, 2)),
                ((64, 32, 4, 2), (32, 32, 4, 2)),
            ],
            ("group_attention_forward", "ieee"): [
                ((32, 32, 4, 1), (32, 32, 4, 1)),
                ((32, 32, 4, 1), (32, 32, 4, 1)),
                ((32, 16, 8, 1), (32, 16, 8, 1)),
            ],
            ("group_attention_backward", "half"): [
                ((64, 64, 4, 1), (32, 32, 2, 2)),
                ((64, 64, 4, 2), (32, 32, 2, 2)),
                ((64, 32, 8, 2), (32, 32, 4, 2)),
            ],
            ("group_attention_backward", "tf32"): [
                ((64, 32, 4, 2), (32, 32, 4, 1)),
                ((64, 32, 4, 2), (32, 32, 8, 1)),
                ((32, 32, 8, 1), (32, 32, 8, 1)),
            ],
            ("group_attention_backward", "tf32x3"): [
                ((64, 32, 4, 2), (64, 32, 4, 2)),
                ((32, 32, 8, 1), (32, 32, 8, 1)),
            ],
            ("group_attention_backward", "ieee"): [
                ((32, 32, 4, 1), (32, 32, 4, 1)),
                ((32, 32, 8, 1), (32, 32, 8, 1)),
                ((16, 16, 8, 1), (16, 16, 8, 1)),
            ],
            ("conditional_attention_forward", "half"): [
                ((64, 64, 4, 3), (32, 64, 2, 3)),
                ((64, 64, 4, 3), (32, 64, 2, 3)),
                ((64, 32, 4, 2), (32, 32, 4, 2)),
            ],
            ("conditional_attention_forward", "tf32"): [
                ((64, 64, 4, 2), (32, 32, 2, 2)),
                ((64, 32, 4, 2), (32, 32, 2, 2)),
                ((32, 32, 4, 2), (32, 32, 4, 2)),
            ],
            ("conditional_attention_forward", "tf32x3"): [
                ((64, 32, 4, 2), (32, 32, 4, 2)),
                ((32, 32, 4, 2), (32, 32, 4, 2)),
            ],
            ("conditional_attention_forward", "ieee"): [
                ((32, 32, 4, 1), (32, 32, 4, 1)),
                ((32, 32, 4, 1), (32, 32, 4, 1)),
                ((32, 32, 8, 1), (32, 32, 8, 1)),
            ],
            ("conditional_attention_backward", "half"): [
                ((64, 64, 4, 1), (32, 32, 2, 2)),
                ((64, 64, 4, 2), (32, 32, 2, 2)),
                ((32, 32, 8, 2), (32, 32, 4, 2)),
            ],
            ("conditional_attention_backward", "tf32"): [
                ((64, 32, 4, 2), (32, 32, 4, 1)),
                ((64, 32, 8, 2), (64, 32, 8, 2)),
                ((32, 32, 8, 1), (32, 32, 8, 1)),
            ],
            ("conditional_attention_backward", "tf32x3"): [
                ((64, 32, 4, 2), (64, 32, 4, 2)),
                ((32, 16, 8, 1), (32, 16, 8, 1)),
            ],
            ("conditional_attention_backward", "ieee"): [
                ((32, 32, 4, 1), (32, 32, 4, 1)),
                ((32, 32, 8, 1), (32, 32, 8, 1)),
                ((16, 16, 8, 1), (16, 16, 8, 1)),
            ],
        }
    ),
}
TABLES[80] = TABLES[90] | _table(
    {
        ("group_attention_forward", "half"): [
            ((64, 64, 4, 3), (64, 64, 4, 3)),
            ((64, 64, 4, 3), (32, 32, 2, 3)),
            ((64, 32, 4, 3), (32, 32, 4, 2)),
        ],
        ("group_attention_forward", "tf32"): [
            ((64, 64, 4, 2), (32, 32, 2, 2)),
            ((64, 32, 4, 2), (32, 32, 2, 2)),
            ((64, 32, 8, 2), (64, 32, 8, 2)),
        ],
        ("group_attention_forward", "tf32x3"): [
            ((64, 32, 4, 2), (32, 32, 2, 2)),
            ((32, 32, 8, 2), (32, 32, 8, 2)),
        ],
        ("group_attention_backward", "half"): [
            ((64, 32, 4, 2), (32, 32, 2, 2)),
            ((64, 32, 4, 2), (32, 32, 2, 2)),
            ((64, 32, 8, 2), (64, 32, 8, 2)),
        ],
        ("group_attention_backward", "tf32"): [
            ((64, 32, 4, 2), (64, 32, 4, 2)),
            ((64, 16, 8, 1), (32, 32, 8, 1)),
            ((32, 32, 8, 1), (32, 32, 8, 1)),
        ],
        ("group_attention_backward", "tf32x3"): [
            ((64, 16, 8, 1), (64, 16, 8, 1)),
            ((32, 32, 8, 1), (32, 32, 8, 1)),
        ],
        ("conditional_attention_backward", "half"): [
            ((64, 32, 4, 2), (32, 32, 2, 2)),
            ((64, 16, 4, 2), (32, 32, 2, 2)),
            ((64, 32, 8, 2), (32, 32, 4, 2)),
        ],
        ("conditional_attention_backward", "tf32"): [
            ((64, 32, 4, 2), (32, 32, 4, 1)),
            ((32, 32, 4, 2), (32, 32, 4, 2)),
            ((32, 32, 8, 1), (32, 32, 8, 1)),
        ],
        ("conditional_attention_backward", "tf32x3"): [
            ((32, 16, 4, 1), (32, 16, 4, 1)),
            ((32, 32, 8, 1), (32, 32, 8, 1)),
        ],
    }
)

# For 10.x: other tiles where an H100's spill.
TABLES[100] = TABLES[90] | _table(
    {
        ("group_attention_forward", "tf32x3"): [
            ((64, 32, 4, 2), (32, 32, 2, 2)),
            ((64, 32, 8, 2), (32, 32, 8, 2)),
        ],
        ("group_attention_forward", "ieee"): [
            ((32, 32, 8, 1), (32, 32, 8, 1)),
            ((32, 32, 4, 1), (32, 32, 4, 1)),
            ((32, 16, 8, 1), (32, 16, 8, 1)),
        ],
        ("conditional_attention_forward", "tf32x3"): [
            ((64, 32, 4, 2), (32, 32, 4, 2)),
            ((32, 32, 8, 2), (32, 32, 8, 2)),
        ],
        ("conditional_attention_backward", "tf32x3"): [
            ((32, 16, 4, 1), (32, 16, 4, 1)),
            ((16, 16, 8, 1), (16, 16, 8, 1)),
        ],
    }
)
# For 8.6, 8.9 and 12.x: other tiles where an A100's need too much shared memory, or spill.
TABLES[86] = TABLES[80] | _table(
    {
        ("group_attention_forward", "tf32"): [
            ((64, 64, 4, 2), (32, 32, 4, 2)),
            ((64, 32, 4, 2), (64, 32, 4, 2)),
            ((64, 32, 8, 2), (64, 32, 8, 2)),
        ],
        ("group_attention_backward", "tf32"): [
            ((32, 32, 4, 1), (32, 32, 4, 1)),
            ((64, 16, 8, 1), (32, 32, 8, 1)),
            ((16, 16, 8, 1), (16, 16, 8, 1)),
        ],
        ("conditional_attention_backward", "tf32"): [
            ((32, 32, 4, 1), (32, 32, 4, 1)),
            ((32, 32, 4, 2), (32, 32, 4, 2)),
            ((16, 16, 8, 1), (16, 16, 8, 1)),
        ],
        ("conditional_attention_backward", "tf32x3"): [
            ((32, 16, 4, 1), (32, 16, 4, 1)),
            ((32, 16, 8, 1), (32, 16, 8, 1)),
        ],
    }
)


def _same(rows: dict) -> dict[Class, Tile]:
    """{kernel, numbers: tiles of widths 32, 64, 128} -> {class: tile}."""
    return _table({names: [(tile, tile) for tile in tiles] for names, tiles in rows.items()})


# Triton uses no tensor cores before 8.0: products are of float32 in registers, whatever the numbers.
TABLES[75] = _same(
    {
        ("group_attention_forward", "half"): [(32, 32, 4, 1), (32, 32, 4, 1), (32, 16, 8, 1)],
        ("group_attention_forward", "ieee"): [(32, 32, 8, 1), (32, 32, 4, 1), (32, 16, 8, 1)],
        ("group_attention_backward", "half"): [(32, 32, 8, 1), (16, 16, 8, 1), (16, 16, 8, 1)],
        ("group_attention_backward", "ieee"): [(32, 32, 4, 1), (32, 32, 8, 1), (16, 16, 8, 1)],
        ("conditional_attention_forward", "half"): [(32, 32, 4, 1), (32, 32, 8, 1), (16, 16, 8, 1)],
        ("conditional_attention_forward", "ieee"): [(32, 32, 4, 1), (32, 32, 4, 1), (32, 16, 8, 1)],
        ("conditional_attention_backward", "half"): [(32, 32, 8, 1), (16, 16, 8, 1), (16, 16, 8, 1)],
        ("conditional_attention_backward", "ieee"): [(32, 32, 4, 1), (32, 32, 8, 1), (16, 16, 8, 1)],
    }
)
TABLES["amd"] = _same(
    {
        (f"{op}_attention_{direction}", numbers): tiles
        for op in ("group", "conditional")
        for direction in ("forward", "backward")
        for numbers, tiles in (
            ("half", [(64, 64, 4, 2), (64, 64, 4, 2), (32, 32, 4, 2)]),
            ("ieee", [(32, 32, 4, 1), (32, 32, 4, 1), (32, 16, 4, 1)]),
        )
    }
)


def classify(kernel: str, q: torch.Tensor, v: torch.Tensor, precision: str) -> Class:
    """The class of a call, q [B, H, Q, D] and v [B, H, S, D']."""
    batch, heads, queries, width = q.shape
    return Class(
        kernel,
        "half" if q.dtype.itemsize == 2 else precision,
        next(bound for bound in WIDTHS if max(width, v.shape[3]) <= bound),
        "few" if batch * heads * triton.cdiv(queries, 64) < 2 * processors(q.device) else "many",
    )


def attention_tile(kernel: str, q: torch.Tensor, v: torch.Tensor, precision: str, launch) -> Tile:
    """The tile of a call; ``launch(tile)`` runs it, for measurement when ``DNDETR_AUTOTUNE=1``."""
    return chosen(classify(kernel, q, v, precision), TABLES, CANDIDATES, q.device, launch)
