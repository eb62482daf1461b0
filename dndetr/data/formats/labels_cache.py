"""What was read of images and their label files, kept between runs: only files that have changed are read again."""

import hashlib
import io
import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ...files import cache_folder, write_atomic

_VERSION = 2  # of how rows are read
_NO_FILE = (0, 0, 0)


class Known(NamedTuple):
    """Images in columns: (height, width) [n, 2], numbers of objects [n]; their classes [m] and x, y, width, height in
    pixels [m, 4], image by image."""

    sizes: np.ndarray
    counts: np.ndarray
    classes: np.ndarray
    boxes: np.ndarray


def stamps(images: Sequence[str], labels: Sequence[str]) -> np.ndarray:
    """What changes with the files of each image and its labels [n, 6] int64; zeros for a file that is not there."""
    found = [(*_stamp(image), *_stamp(label)) for image, label in zip(images, labels, strict=True)]
    return np.array(found, np.int64).reshape(-1, 2 * len(_NO_FILE))


def _stamp(path: str) -> tuple[int, int, int]:
    try:
        status = os.stat(path)
    except (OSError, ValueError):
        return _NO_FILE
    # The time of the last change of any kind, which cannot be set back like that of the content.
    return status.st_size, status.st_mtime_ns, status.st_ctime_ns


class LabelsCache:
    """The images of one split whose files were good; key: whatever else decides how they are read."""

    def __init__(self, key: str):
        self._key = f"{_VERSION} {key}"
        self._names: list[str] = []
        self._stamps = np.zeros((0, 6), np.int64)
        self._known = Known(*(np.zeros(shape, np.int64) for shape in ((0, 2), 0, 0)), np.zeros((0, 4)))
        self._load()

    def recall(self, names: Sequence[str], now: np.ndarray) -> tuple[np.ndarray, Known]:
        """Which of the images [n] bool are known as their files are now, and those that are, in the order of ``names``.

        now: their ``stamps``.
        """
        if self._names == names and np.array_equal(self._stamps, now):
            return np.ones(len(names), bool), self._known
        place = {name: index for index, name in enumerate(self._names)}
        found = np.array([place.get(name, -1) for name in names], np.int64).reshape(-1)
        same = found >= 0
        same[same] = (self._stamps[found[same]] == now[same]).all(axis=1)
        chosen = found[same]
        sizes, counts, classes, boxes = self._known
        starts = np.concatenate(([0], counts.cumsum())).astype(np.int64)
        wanted = counts[chosen].astype(np.int64)
        # Rows of each chosen image: from its start on, as many as it has.
        rows = np.repeat(starts[chosen] - np.concatenate(([0], wanted.cumsum()))[:-1], wanted) + np.arange(wanted.sum())
        return same, Known(sizes[chosen], counts[chosen], classes[rows], boxes[rows])

    def keep(self, names: Sequence[str], now: np.ndarray, known: Known) -> None:
        """Remember these images; a cache that cannot be written only costs the time to read again."""
        if not names or (self._names == names and np.array_equal(self._stamps, now)):
            return
        content = io.BytesIO()
        listed = np.frombuffer("\0".join(names).encode("utf-8", "surrogateescape"), np.uint8)
        key = np.frombuffer(self._key.encode("utf-8", "surrogateescape"), np.uint8)
        np.savez(content, key=key, names=listed, stamps=now, **known._asdict())
        try:
            path = self._path()
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomic(path, content.getvalue())
        except (OSError, RuntimeError):
            pass

    def _load(self) -> None:
        try:
            with np.load(self._path(), allow_pickle=False) as content:
                parts = {name: content[name] for name in ("key", "names", "stamps", *Known._fields)}
        except Exception:  # whatever is wrong with it, the files themselves are there
            return
        if parts["key"].tobytes().decode("utf-8", "surrogateescape") == self._key:
            self._names = parts["names"].tobytes().decode("utf-8", "surrogateescape").split("\0")
            self._stamps = parts["stamps"]
            self._known = Known(*(parts[name] for name in Known._fields))

    def _path(self) -> Path:
        name = hashlib.blake2b(self._key.encode("utf-8", "surrogateescape"), digest_size=8).hexdigest()
        return cache_folder() / "labels" / f"{name}.npz"
