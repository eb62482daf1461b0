"""Classes as (category id, name) pairs in label order: finding those of one file among those of another."""

from collections.abc import Sequence

Classes = Sequence[tuple[int, str]]


def match_classes(own: Classes, others: Classes) -> list[int | None]:
    """For each of ``own`` its place among ``others``: the class of the same name, None where there is none.

    Where several share the name, the one that also has the id.
    """
    places = []
    for number, name in own:
        named = [place for place, (_, other) in enumerate(others) if other == name]
        same = [place for place in named if others[place][0] == number]
        places.append(same[0] if same else named[0] if len(named) == 1 else None)
    return places


def listed(names: Sequence[str], most: int = 6) -> str:
    """The first few names, and how many more there are."""
    text = ", ".join(names[:most])
    return f"{text} and {len(names) - most} more" if len(names) > most else text
