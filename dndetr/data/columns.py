"""Columns of a data set that behave as sequences of Python's values, of which none is kept: numbers, rows, names."""

from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise
from typing import Any

import numpy as np

_BLOCK = 1 << 16  # values made at a time


class Column(Sequence):
    """An array [n] as a sequence of numbers, or one [n, k] as a sequence of tuples; equal to a list of the same."""

    def __init__(self, values: np.ndarray):
        self._values = values

    def __len__(self) -> int:
        return len(self._values)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return Column(self._values[index])
        value = self._values[index].tolist()
        return tuple(value) if isinstance(value, list) else value

    def __iter__(self) -> Iterator[Any]:
        rows = self._values.ndim > 1
        for at in range(0, len(self._values), _BLOCK):
            block = self._values[at : at + _BLOCK].tolist()
            yield from map(tuple, block) if rows else block

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.array(self._values, dtype, copy=copy)

    def __eq__(self, other: object) -> bool:
        return _equal(self, other)

    __hash__ = None

    def __repr__(self) -> str:
        return repr(list(self))


class Names(Sequence):
    """Texts in one run of bytes: text i is content[starts[i]:starts[i + 1]]; equal to a list of the same.

    content [b] uint8, UTF-8 in which a surrogate that stands alone is written as any other character; starts [n + 1]
    int64.
    """

    def __init__(self, content: np.ndarray, starts: np.ndarray):
        self.content, self.starts = content, starts

    @classmethod
    def of(cls, texts: Iterable[str]) -> "Names":
        """These texts."""
        encoded = [text.encode("utf-8", "surrogatepass") for text in texts]
        starts = np.zeros(len(encoded) + 1, np.int64)
        np.cumsum([len(text) for text in encoded], out=starts[1:])
        return cls(np.frombuffer(b"".join(encoded), np.uint8), starts)

    def __len__(self) -> int:
        return len(self.starts) - 1

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[place] for place in range(*index.indices(len(self)))]
        place = range(len(self))[index]
        return self._text(int(self.starts[place]), int(self.starts[place + 1]))

    def __iter__(self) -> Iterator[str]:
        for at in range(0, len(self), _BLOCK):
            ends = self.starts[at : at + _BLOCK + 1].tolist()
            content = self.content[ends[0] : ends[-1]].tobytes()
            first = ends[0]
            for start, end in pairwise(ends):
                yield content[start - first : end - first].decode("utf-8", "surrogatepass")

    def __eq__(self, other: object) -> bool:
        return _equal(self, other)

    __hash__ = None

    def __repr__(self) -> str:
        return repr(list(self))

    def _text(self, start: int, end: int) -> str:
        return self.content[start:end].tobytes().decode("utf-8", "surrogatepass")


def _equal(one: Sequence, other: object) -> bool:
    if not isinstance(other, Sequence) or isinstance(other, str | bytes):
        return NotImplemented
    return len(one) == len(other) and all(a == b for a, b in zip(one, other, strict=True))
