"""Classes as (category id, name) pairs in label order: finding those of one file among those of another."""

from collections import defaultdict
from collections.abc import Sequence

Classes = Sequence[tuple[int, str]]


def match_classes(own: Classes, others: Classes) -> list[int | None]:
    """For each of ``own`` its place among ``others``: the class of the same name, None where there is none.

    Where several share the name, the one that also has the id.
    """
    same, named = {}, defaultdict(list)
    for place, (number, name) in enumerate(others):
        same[number, name] = place
        named[name].append(place)
    alone = {name: places[0] for name, places in named.items() if len(places) == 1}
    return [same.get((number, name), alone.get(name)) for number, name in own]


def listed(names: Sequence[str], most: int = 6) -> str:
    """The first few names, and how many more there are."""
    text = ", ".join(names[:most])
    return f"{text} and {len(names) - most} more" if len(names) > most else text
