"""What was found out about files, kept between runs in the cache folder: only files that change are read again."""

import hashlib
import io
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ..files import cache_folder, write_atomic

STAMP = 3
"""Numbers of a stamp."""


def stamp(status: os.stat_result | None) -> tuple[int, int, int]:
    """What changes with a file; zeros for one that is not there."""
    if status is None:
        return 0, 0, 0
    # The time of the last change of any kind, which cannot be set back like that of the content.
    return status.st_size, status.st_mtime_ns, status.st_ctime_ns


class Remembered:
    """Names of what was good, each with numbers that change with it, and what is known of these in ``columns``.

    kind: the folder in the cache; key: which data it is, and whatever else decides how they are read.
    """

    def __init__(self, kind: str, key: str):
        self._kind, self._key = kind, np.frombuffer(os.fsencode(key), np.uint8)
        self._names: list[str] = []
        self._stamps = np.zeros((0, 0), np.int64)
        self.columns: dict[str, np.ndarray] = {}
        try:
            with np.load(self._path(), allow_pickle=False) as content:
                columns = dict(content)
            if np.array_equal(columns.pop("key"), self._key):
                self._names = os.fsdecode(columns.pop("names").tobytes()).split("\0")
                self._stamps, self.columns = columns.pop("stamps"), columns
        except Exception:  # whatever is wrong with it, the files themselves are there
            pass

    def places(self, names: Sequence[str], stamps: np.ndarray) -> np.ndarray:
        """Where each of these is in what is remembered [n] int64; -1 for what is not, or has other stamps [n, s]."""
        if self._names == names and np.array_equal(self._stamps, stamps):
            return np.arange(len(names))
        if not self._names:
            return np.full(len(names), -1)
        place = {name: index for index, name in enumerate(self._names)}
        found = np.array([place.get(name, -1) for name in names], np.int64).reshape(-1)
        known = np.flatnonzero(found >= 0)
        changed = (self._stamps[found[known]] != stamps[known]).any(axis=1)
        found[known[changed]] = -1
        return found

    def keep(self, names: Sequence[str], stamps: np.ndarray, columns: dict[str, np.ndarray]) -> None:
        """Remember these instead; a cache that cannot be written only costs the time to read again."""
        if not names or (self._names == names and np.array_equal(self._stamps, stamps)):
            return
        content, listed = io.BytesIO(), np.frombuffer(os.fsencode("\0".join(names)), np.uint8)
        np.savez(content, key=self._key, names=listed, stamps=stamps, **columns)
        try:
            path = self._path()
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomic(path, content.getvalue())
        except (OSError, RuntimeError):  # the latter where there is no home
            pass

    def _path(self) -> Path:
        name = hashlib.blake2b(self._key.tobytes(), digest_size=8).hexdigest()
        return cache_folder() / self._kind / f"{name}.npz"
