"""Tile sizes of products with activations per kind of GPU and number of rows, and those that may be measured.

``DNDETR_AUTOTUNE=1`` measures every candidate at the first call of each class and prints lines for these tables.
"""

from typing import NamedTuple

import torch
import triton

from .tiles import chosen, processors


class Tile(NamedTuple):
    """Rows and columns of a program's result, terms added at a time, warps, stages of the pipeline, and registers.

    registers: that a thread may have at most, for two programs to find room on a multiprocessor; 0: no limit.
    """

    rows: int
    columns: int
    terms: int
    warps: int
    stages: int
    registers: int = 0


class Class(NamedTuple):
    """What a tile is chosen by.

    kernel: "forward" or "backward". activation: "relu" or "prelu". load: "few" where tiles of 128 x 128 would give
    every processor less than two programs.
    """

    kernel: str
    activation: str
    load: str


_SIZES = ((64, 32, 4), (64, 64, 4), (64, 128, 4), (128, 64, 4), (128, 128, 4), (128, 128, 8), (128, 256, 8))
CANDIDATES = tuple(
    Tile(rows, columns, terms, warps, stages, registers)
    for rows, columns, warps in _SIZES
    for terms in (32, 64)
    for stages in (2, 3, 4)
    for registers in ((0, 128) if (rows, columns, warps) == (128, 128, 8) else (0,))
)

# Chosen by what ahead-of-time builds (Triton 3.6 and 3.9) say of registers, spills and shared memory, and by this: with
# 256 terms a program soon ends, and one beside it keeps tensor cores busy while it writes. Nothing was tried on a GPU.
_MANY, _FEW = Tile(128, 128, 64, 8, 3), Tile(64, 64, 64, 4, 3)
_TABLE = {
    Class(kernel, activation, load): tile
    for kernel in ("forward", "backward")
    for activation in ("relu", "prelu")
    for load, tile in (("many", _MANY), ("few", _FEW))
}
TABLES = {
    100: _TABLE,
    90: _TABLE | {Class("backward", "relu", "many"): _MANY._replace(registers=128)},
    80: _TABLE,
    86: _TABLE,
    "amd": {found: Tile(64, 64, 64, 4, 2) for found in _TABLE},
}


def product_tile(kernel: str, out: torch.Tensor, slope: torch.Tensor | None, launch) -> Tile:
    """The tile of a call with result [M, N]; ``launch(tile)`` runs it, for measurement when ``DNDETR_AUTOTUNE=1``."""
    rows, columns = out.shape
    programs = triton.cdiv(rows, 128) * triton.cdiv(columns, 128)
    load = "few" if programs < 2 * processors(out.device) else "many"
    found = Class(kernel, "relu" if slope is None else "prelu", load)
    return chosen(found, TABLES, CANDIDATES, out.device, launch)
