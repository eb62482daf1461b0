"""Pictures that are there twice, whatever their files are called: in two splits, or within one."""

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from itertools import combinations

from .findings import NOTE, WARNING, Finding, Place, counted
from .records import Records


def picture_findings(splits: Sequence[tuple[Records, Mapping[int, bytes]]]) -> Iterator[Finding]:
    """Findings on splits with the hashes of their pictures, by place, as ``checks.file_problems`` makes them."""
    places: dict[bytes, list[Place]] = defaultdict(list)
    for records, pixels in splits:
        for index, picture in pixels.items():
            places[picture].append(Place(records, index))
    groups = [group for group in places.values() if len(group) > 1]
    names = [records.name for records, _ in splits]
    for one, other in combinations(names, 2):
        parts = [(group, {place.records.name for place in group}) for group in groups]
        cases = [_within(group, one, other) for group, there in parts if {one, other} <= there]
        if cases:
            message = (
                f"{counted(len(cases), 'picture')} in both, pixel by pixel, which flatters AP; take them out of one"
            )
            yield Finding(WARNING, "shared picture", f"{one} and {other}", message, cases)
    for name in names:
        cases = [case for group in groups if len(case := _within(group, name)) > 1]
        if cases:
            message = f"{counted(len(cases), 'picture')} more than once, pixel by pixel; keep one, with all its boxes"
            yield Finding(NOTE, "repeated picture", name, message, cases)


def _within(group: Sequence[Place], *splits: str) -> tuple[Place, ...]:
    return tuple(place for place in group if place.records.name in splits)
