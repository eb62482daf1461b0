"""Folders and all that lies below them, behind links too."""

import os
from collections.abc import Iterator


def walk(folder: str | os.PathLike) -> Iterator[tuple[str, list[str]]]:
    """A folder and those below it with the names of their files; links are followed, but not in circles."""
    seen = set()
    for place, folders, names in os.walk(folder, followlinks=True):
        if (real := os.path.realpath(place)) in seen:
            folders.clear()
            continue
        seen.add(real)
        yield place, names
