"""Which folders of a large split were looked through, so that later starts look at a sample of its images alone.

A folder's times change when a file in it is added, removed or renamed. What becomes of the content of a file is seen in
the sample, or when the file is read.
"""

import contextlib
import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ..files import cache_folder, write_json_atomic
from .records import Records
from .remembered import stamp

LARGE = 200_000
"""Images of a split from which on not each of them is looked at whenever training starts."""
_SAMPLE = 2000  # images that are


class KnownFolders:
    """The folders of a split's images as they were when all was well.

    how: what was looked for. A cache that cannot be written costs only the time to look again.
    """

    def __init__(self, records: Records, how: str):
        self._records = records
        key = f"{how} {records.file.resolve()}\n{records.folder.resolve()}\n{records.name}\n{len(records)}"
        self._name = hashlib.blake2b(os.fsencode(key), digest_size=8).hexdigest()
        self._now = list(stamp(records.file.stat()))

    def to_look_at(self) -> Sequence[int]:
        """Numbers of the images that are to be looked at, ascending: all, or a sample where nothing has changed."""
        images = len(self._records)
        if images < LARGE or not self._unchanged():
            return range(images)
        return np.sort(np.random.default_rng().choice(images, min(_SAMPLE, images), replace=False)).tolist()

    def keep(self) -> None:
        """All is well with all of the images."""
        if len(self._records) < LARGE or self._unchanged():
            return
        root = str(self._records.folder)
        folders = sorted({os.path.dirname(name) for name in self._records.names})
        with contextlib.suppress(OSError, RuntimeError):  # the latter where there is no home
            content = {"file": self._now, "folders": {inner: _times(os.path.join(root, inner)) for inner in folders}}
            self._path().parent.mkdir(parents=True, exist_ok=True)
            write_json_atomic(self._path(), content)

    def _unchanged(self) -> bool:
        try:
            content = json.loads(self._path().read_text())
            root = str(self._records.folder)
            return content["file"] == self._now and all(
                _times(os.path.join(root, inner)) == times for inner, times in content["folders"].items()
            )
        except (OSError, RuntimeError, ValueError, KeyError, AttributeError, TypeError):
            return False

    def _path(self) -> Path:
        return cache_folder() / "checked" / f"{self._name}.json"


def _times(folder: str) -> list[int]:
    """What changes with the names in a folder."""
    return list(stamp(os.stat(folder)))[1:]
