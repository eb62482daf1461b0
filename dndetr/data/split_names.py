"""What splits are called: names under which each may be found, and what is said where one is not."""

from collections.abc import Iterable
from pathlib import Path

from .errors import DataError

NAMES = {
    "train": ("train", "train2017", "training"),
    "val": ("val", "val2017", "valid", "validation"),
    "test": ("test", "test2017", "testing"),
}
"""In order of preference; any other name is a split of exactly that name."""


def names_of(split: str) -> tuple[str, ...]:
    """Names under which a split may be found; CVAT begins those of its subsets with a capital letter."""
    names = NAMES.get(split)
    return (split,) if names is None else (*names, *map(str.capitalize, names))


def no_split(root: Path, split: str, tried: Iterable[str], found: Iterable[str]) -> DataError:
    """The error of a data set without that split: where it was looked for, what there is, and the way out."""
    advice = "; to set a fifth of the training images apart give --val-share 0.2" if split == "val" else ""
    there_is = ", ".join(found) or "nothing else"
    once = {place.lower(): place for place in reversed([*tried])}  # not once more with a capital letter
    looked_for = ", ".join(reversed(once.values()))
    return DataError(f"{root}: no {split!r} split; looked for {looked_for}; there is {there_is}{advice}")


def way_without(split: str, remove: str) -> str:
    """What else can be done about a split that is named and not there, after "do this"; remove: what names it."""
    return {"train": "", "val": f", or {remove} and give --val-share 0.2"}.get(split, f", or {remove}")
