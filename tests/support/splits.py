"""A split of a data set on the disk, in one call."""

from pathlib import Path

from dndetr.data.records import Records
from dndetr.data.source import open_source


def read_split(path: str | Path, split: str) -> Records:
    """That split of the data set at a path."""
    return open_source(path).read(split)
