"""LVIS and Objects365 as they are published: what their files are called, and where the images are that these name.

Images of LVIS have an address and no name: http://images.cocodataset.org/train2017/000000391895.jpg. Objects365 names
them by folders of its authors, images/v1/patch8/objects365_v1_00420917.jpg, of which its archives have the last one.
"""

import os
import re
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
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


def find_images(document: dict, folder: Path, inner: Sequence[str]) -> None:
    """Gives images that are named as in these sets the ``file_name`` that they have in a folder.

    Of the path as published, of its last two parts and of the last one, the first is taken that is in one of the
    ``inner`` folders; where none is, the path stays.
    """
    listed = cache(listing)

    @cache
    def places(parent: str) -> list[tuple[str, frozenset[str]]]:
        ends = dict.fromkeys((parent, parent.rpartition("/")[2], ""))
        found = [os.path.join(place, end, "") for end in ends for place in inner]
        return [(place, listed(os.path.join(folder, place))) for place in found]

    for image in document["images"]:
        if path := _published_path(image):
            parent, _, name = path.rpartition("/")
            image["file_name"] = next((place + name for place, names in places(parent) if name in names), path)


def _published_path(image: Mapping) -> str | None:
    """The path that an image has in one of these sets; None for all others."""
    name, address = image.get("file_name"), image.get("coco_url")
    if name is None and isinstance(address, str):
        return "/".join(list(filter(None, unquote(urlsplit(address).path).split("/")))[-2:])
    return name if isinstance(name, str) and _OF_OBJECTS365.match(name) else None
