"""Arrays in one file, written once and mapped by every process that reads them, so that memory holds them once.

The file is a word, the arrays, each at a round address, a table of them in JSON, its length and checksum, and the word
again: what was cut off has no end, and is seen to be damaged without reading it all.
"""

import contextlib
import fcntl
import json
import mmap
import os
import struct
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

_WORD = b"dndetr arrays 1\n"
_TAIL = struct.Struct(f"<QQ{len(_WORD)}s")  # length and checksum of the table, and the word
_ROUND = 4096  # bytes
_SHORT = 4 << 20  # bytes


class Damaged(ValueError):
    """A file that is not, or no longer, one of arrays."""


class ArrayWriter:
    """Writes arrays into an open binary file, one after the other."""

    def __init__(self, file: BinaryIO):
        self._file, self._table = file, {}
        file.write(_WORD)

    def add(self, name: str, blocks: Iterable[np.ndarray], dtype: np.dtype, row: tuple[int, ...] = ()) -> None:
        """An array [n, *row] that comes in blocks of its rows."""
        self._file.write(bytes(-self._file.tell() % _ROUND))
        start, count = self._file.tell(), 0
        for block in blocks:
            self._file.write(np.ascontiguousarray(block, dtype).data)
            count += len(block)
        self._table[name] = [np.dtype(dtype).str, [count, *row], start]

    def so_far(self) -> dict[str, np.ndarray]:
        """Those that are written, mapped."""
        self._file.flush()
        with open(self._file.name, "rb") as file:
            return _arrays(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), self._table)

    def finish(self, words: dict[str, Any]) -> None:
        """Ends the file, with what else there is to say of it, as JSON."""
        table = json.dumps({"arrays": self._table, "words": words}).encode()
        self._file.write(table)
        self._file.write(_TAIL.pack(len(table), zlib.crc32(table), _WORD))


class Mapped(np.ndarray):
    """An array in a file; it is pickled as the place of the file, and whoever reads that maps it too.

    Whatever is made of it, parts included, is an ordinary array. A short part is read from the file, not looked at in
    the mapping: of that every page, and those around it, would count as memory of the process that touched it.
    """

    _place: tuple[Path, str] | None = None
    _source: "tuple[BinaryIO, int] | None" = None  # the file, and where in it the array begins

    def __array_wrap__(self, array: np.ndarray, context: Any = None, return_scalar: bool = False) -> Any:
        return array[()] if return_scalar else array.view(np.ndarray)

    def __getitem__(self, index: Any) -> Any:
        if self._source is not None and isinstance(index, slice) and index.step in (None, 1):
            start, stop, _ = index.indices(len(self))
            row = self.strides[0]
            if 0 < (stop - start) * row <= _SHORT:
                file, offset = self._source
                content = os.pread(file.fileno(), (stop - start) * row, offset + start * row)
                return np.frombuffer(content, self.dtype).reshape(stop - start, *self.shape[1:])
        elif self._source is not None and isinstance(index, int):
            place = range(len(self))[index]
            return self[place : place + 1][0]
        found = super().__getitem__(index)
        return found.view(np.ndarray) if isinstance(found, Mapped) else found

    def __reduce__(self) -> tuple:
        return super().__reduce__() if self._place is None else (_map_again, self._place)


def map_arrays(path: Path) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """The arrays of a file, read-only, and what it says of them; Damaged or OSError.

    As long as one of the arrays is there, in this process or one that was forked from it, the file is ``in_use``.
    """
    file = open(path, "rb", buffering=0)  # noqa: SIM115 (it is closed with the last array)
    with contextlib.suppress(OSError):  # of a file system without locks
        fcntl.flock(file, fcntl.LOCK_SH)
    length = os.fstat(file.fileno()).st_size
    if length < len(_WORD) + _TAIL.size:
        raise Damaged(f"{path}: too short")
    content = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    size, checksum, word = _TAIL.unpack(content[-_TAIL.size :])
    if word != _WORD or content[: len(_WORD)] != _WORD or size > length - _TAIL.size:
        raise Damaged(f"{path}: no file of arrays, or cut off")
    text = content[length - _TAIL.size - size : length - _TAIL.size]
    if zlib.crc32(text) != checksum:
        raise Damaged(f"{path}: its table was changed")
    table = json.loads(text)
    arrays = _arrays(content, table["arrays"])
    for name, array in arrays.items():
        array._place, array._source = (path, name), (file, table["arrays"][name][2])
    return arrays, table["words"]


def in_use(path: Path) -> bool:
    """Whether a process has the file mapped, as far as the file system can tell."""
    with open(path, "rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return True
    return False


def _arrays(content: mmap.mmap, table: dict[str, list]) -> dict[str, np.ndarray]:
    found = {}
    for name, (dtype, shape, start) in table.items():
        count = int(np.prod(shape, dtype=np.int64))
        array = np.frombuffer(content, dtype, count, start) if count else np.empty(0, dtype)
        found[name] = array.reshape(shape).view(Mapped)
    return found


_opened: dict[Path, dict[str, np.ndarray]] = {}


def _map_again(path: Path, name: str) -> np.ndarray:
    """An array that another process has mapped; all that come with it share one mapping."""
    if path not in _opened:
        _opened[path] = _map_all(path)
    return _opened[path][name]


def _map_all(path: Path) -> dict[str, np.ndarray]:
    with contextlib.suppress(Damaged, OSError):
        return map_arrays(path)[0]
    raise RuntimeError(f"{path} was removed while a run needs it; start the run again, which makes it anew")
