"""Classes as (category id, name) pairs in label order: what to call them, and those of one file among another's."""

import unicodedata
from collections import Counter, defaultdict
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


def distinct_names(classes: Classes) -> list[str]:
    """A name of its own for each class: with its id, "person (id 3)", where it is empty or others look like it."""
    looks = [unicodedata.normalize("NFC", name).strip() for _, name in classes]
    with_ids = [f"{look} (id {number})".lstrip() for look, (number, _) in zip(looks, classes, strict=True)]
    # A class may be called what another one becomes by its id.
    shared = {"", *(look for look, times in Counter([*looks, *set(with_ids)]).items() if times > 1)}
    rows = zip(looks, with_ids, classes, strict=True)
    return [with_id if look in shared else name for look, with_id, (_, name) in rows]


def listed(names: Sequence[str], most: int = 6) -> str:
    """The first few names, and how many more there are."""
    text = ", ".join(names[:most])
    return f"{text} and {len(names) - most} more" if len(names) > most else text
