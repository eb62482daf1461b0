"""Pictures that are there twice, whatever their files are called: in two splits, or within one."""

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from itertools import combinations

import numpy as np
from scipy.spatial import KDTree

from ..records import Records
from .findings import NOTE, WARNING, Finding, Place, counted
from .fingerprints import looks

_NEAR = 3  # grey levels, in every place of two looks
# Of frames of one scene all are near all, which takes long to search and is soon known: the search goes on by so many
# pictures at a time until so many were found.
_CHUNK, _ENOUGH = 128, 100
_FLAT = 8  # grey levels from the darkest to the lightest place: such pictures all look alike

Split = tuple[Records, Mapping[int, bytes]]
"""A split with the fingerprints of its pictures, by their places."""


def picture_findings(splits: Sequence[Split]) -> Iterator[Finding]:
    """Findings on the pictures of splits, each compared with all others by their fingerprints."""
    places: dict[bytes, list[Place]] = defaultdict(list)
    for records, fingerprints in splits:
        for index, picture in fingerprints.items():
            places[picture].append(Place(records, index))
    groups = [group for group in places.values() if len(group) > 1]
    for one, other in combinations(splits, 2):
        yield from _shared(one, other, groups)
        yield from _alike(one, other)
    for records, _ in splits:
        cases = [case for group in groups if len(case := _within(group, records)) > 1]
        if cases:
            message = f"{counted(len(cases), 'picture')} more than once, pixel by pixel; keep one, with all its boxes"
            yield Finding(NOTE, "repeated picture", records.name, message, cases)


def _shared(one: Split, other: Split, groups: Sequence[Sequence[Place]]) -> Iterator[Finding]:
    """Pictures of the same pixels in two splits."""
    pair = one[0], other[0]
    cases = [_within(group, *pair) for group in groups if all(_within(group, records) for records in pair)]
    if cases:
        message = f"{counted(len(cases), 'picture')} in both, pixel by pixel, which flatters AP; take them out of one"
        yield Finding(WARNING, "shared picture", _both(one, other), message, cases)


def _alike(one: Split, other: Split) -> Iterator[Finding]:
    """Pictures of one split that look like one of another, and have not the same pixels."""
    known = set(one[1].values())
    first, second = _textured(one), [entry for entry in _textured(other) if entry[1] not in known]
    if not first or not second:
        return
    tree = KDTree(looks([picture for _, picture in first]))
    cases = []
    for start in range(0, len(second), _CHUNK):
        chunk = second[start : start + _CHUNK]
        sought = looks([picture for _, picture in chunk])
        _, nearest = tree.query(sought, p=np.inf, distance_upper_bound=_NEAR + 0.5)
        pairs = zip(nearest.tolist(), chunk, strict=True)
        # Without a neighbour it is one past the end.
        found = [(first[at][0], index) for at, (index, _) in pairs if at < len(first)]
        cases += [(Place(one[0], index), Place(other[0], another)) for index, another in found]
        if len(cases) >= _ENOUGH:
            break
    if cases:
        more = " or more" if len(cases) >= _ENOUGH else ""
        message = (
            f"{counted(len(cases), 'picture')}{more} almost the same in both (compressed or resized anew, or of one "
            "scene a moment apart), which flatters AP; look at some"
        )
        yield Finding(NOTE, "picture alike", _both(one, other), message, cases)


def _textured(split: Split) -> list[tuple[int, bytes]]:
    """The pictures of a split that can be told from others by their look."""
    entries = list(split[1].items())
    flat = np.ptp(looks([picture for _, picture in entries]), axis=1) < _FLAT
    return [entry for entry, is_flat in zip(entries, flat.tolist(), strict=True) if not is_flat]


def _both(one: Split, other: Split) -> str:
    return f"{one[0].name} and {other[0].name}"


def _within(group: Sequence[Place], *splits: Records) -> tuple[Place, ...]:
    return tuple(place for place in group if any(place.records is records for records in splits))
