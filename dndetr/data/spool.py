"""Columns that grow by blocks and may be larger than memory."""

import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from ..files import writing

_ROWS = 1 << 18  # that are moved together


class Spool:
    """A column [n, *row] that grows: in memory, or in a file without a name in ``folder``, which ends with it.

    Unwritten where that has no room.
    """

    def __init__(self, dtype: type, row: tuple[int, ...] = (), folder: Path | None = None):
        self._dtype, self._row, self._folder = np.dtype(dtype), row, folder
        self._blocks: list[np.ndarray] = []
        self._count = 0
        if folder is not None:
            with writing(folder):
                self._file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115 (it is closed with the column)

    def add(self, block: np.ndarray) -> None:
        """More rows."""
        block = np.ascontiguousarray(block, self._dtype).reshape(-1, *self._row)
        self._count += len(block)
        if self._folder is None:
            self._blocks.append(block)
            return
        with writing(self._folder):
            self._file.write(block.data)

    def array(self) -> np.ndarray:
        """All rows; those of a file are mapped."""
        if self._folder is None or not self._count:
            return np.concatenate([np.empty((0, *self._row), self._dtype), *self._blocks])
        with writing(self._folder):
            self._file.flush()
        return np.memmap(self._file, self._dtype, "r", shape=(self._count, *self._row))


def in_order(column: np.ndarray, order: np.ndarray | None) -> Iterator[np.ndarray]:
    """A column's rows in that order, or as they are, in blocks."""
    for at in range(0, len(column), _ROWS):
        yield column[at : at + _ROWS] if order is None else column[order[at : at + _ROWS]]
