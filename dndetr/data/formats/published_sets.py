"""LVIS and Objects365 as they are published: what their files are called, and where the images are that these name.

Images of LVIS have an address and no name: http://images.cocodataset.org/train2017/000000391895.jpg. Objects365 names
them by folders of its authors, images/v1/patch8/objects365_v1_00420917.jpg, of which its archives have the last one.
"""

import os
import re
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from ..file_names import listing

_BEGINNINGS = ("lvis_v1_", "zhiyuan_objv2_")
_OF_OBJECTS365 = re.compile(r"images/v\d+/.")


def published_files(root: Path, names: Sequence[str]) -> list[tuple[str, Path]]:
    """Where the annotations of a split of one of these names may be, each with the name."""
    folders = root / "annotations", root
    return [(name, folder / f"{start}{name}.json") for name in names for folder in folders for start in _BEGINNINGS]


def is_published(file: Path) -> bool:
    """Whether an annotation file is called like one of these sets'."""
    return file.name.startswith(_BEGINNINGS)


class PublishedNames:
    """Gives images that are named as in these sets the name that they have in a folder; all others keep theirs.

    Of the path as published, of its last two parts and of the last one, the first is taken that is in one of the
    ``inner`` folders; where none is, the path stays.
    """

    def __init__(self, folder: Path, inner: Sequence[str]):
        self._folder, self._inner = folder, inner
        self._listed, self._places = cache(listing), cache(self._find_places)
        self.used = False
        """Whether there was such an image."""

    def __call__(self, name: Any, address: Any) -> Any:
        """The ``file_name`` of an image that has these as ``file_name`` and ``coco_url``."""
        path = _published_path(name, address)
        if not path:
            return name
        self.used = True
        parent, _, base = path.rpartition("/")
        return next((place + base for place, names in self._places(parent) if base in names), path)

    def layout(self) -> str:
        """What changes with the names that are found: the folders, and when something was last put into each."""
        folders = [os.path.join(self._folder, place) for place in self._inner]
        with_inner = {path for folder in folders for path in (folder, *_folders_in(folder))}
        return repr(sorted((path, _changed(path)) for path in with_inner))

    def _find_places(self, parent: str) -> list[tuple[str, frozenset[str]]]:
        ends = dict.fromkeys((parent, parent.rpartition("/")[2], ""))
        found = [os.path.join(place, end, "") for end in ends for place in self._inner]
        return [(place, self._listed(os.path.join(self._folder, place))) for place in found]


def _published_path(name: Any, address: Any) -> str | None:
    """The path that an image has in one of these sets; None for all others."""
    if name is None and isinstance(address, str):
        return "/".join(list(filter(None, unquote(urlsplit(address).path).split("/")))[-2:])
    return name if isinstance(name, str) and _OF_OBJECTS365.match(name) else None


def _folders_in(folder: str) -> list[str]:
    try:
        with os.scandir(folder) as entries:
            return [entry.path for entry in entries if entry.is_dir()]
    except OSError:
        return []


def _changed(folder: str) -> int:
    try:
        return os.stat(folder).st_mtime_ns
    except OSError:
        return 0
