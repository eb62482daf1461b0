"""Rows of columns found by their ids: by sorting, since dictionaries of millions of rows take too long and too much."""

from collections.abc import Iterator, Sequence

import numpy as np


def id_array(ids: Sequence) -> np.ndarray:
    """Ids as an array: int64, or texts."""
    return np.array(ids) if len(ids) else np.zeros(0, np.int64)


def places_in(known: np.ndarray, ids: np.ndarray) -> np.ndarray:
    """The place of each id [n] in ``known`` [k], which ascends -> [n] int64, -1 for those that are not there."""
    if not len(known) or (known.dtype.kind == "U") != (ids.dtype.kind == "U"):
        return np.full(len(ids), -1)
    place = np.searchsorted(known, ids).clip(max=len(known) - 1)
    place[known[place] != ids] = -1
    return place


def shared_keys(one: np.ndarray, other: np.ndarray) -> Iterator[tuple[slice, slice]]:
    """Where each key that both have begins and ends in either; both ascend."""
    keys = np.intersect1d(one, other)
    bounds = [np.searchsorted(column, keys, side).tolist() for column in (one, other) for side in ("left", "right")]
    for start, stop, other_start, other_stop in zip(*bounds, strict=True):
        yield slice(start, stop), slice(other_start, other_stop)
