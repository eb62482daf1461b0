"""What the classes of a data set show: one that only one split has, one that is rare, names that look alike."""

import re
import unicodedata
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from ..classes import Classes
from ..records import Records
from .findings import NOTE, WARNING, Finding, counted

_FEW = 10  # objects in training
_UNEVEN, _VERY_UNEVEN = 10, 100  # times as many objects as of another class


def class_findings(splits: Sequence[Records]) -> Iterator[Finding]:
    """Findings on the classes of splits without problems, the training split first if it is among them."""
    if not splits:
        return
    counts = {records.name: _counts(records) for records in splits}
    train = next((records for records in splits if records.name == "train"), None)
    yield from _alike(train or splits[0])
    if train is None:
        return
    yield from _rare(train.classes, counts["train"])
    for name in counts:
        if name != "train":
            yield from _missing(train.classes, counts, name)
    unused = _those(train.classes, lambda number: not any(found.get(number) for found in counts.values()))
    if unused:
        message = f"{_of(unused, train.classes)} without any object; leave out what the data does not have"
        yield Finding(NOTE, "class without objects", " and ".join(counts), message, classes=unused)


def _missing(classes: Classes, counts: dict[str, dict[int, int]], name: str) -> Iterator[Finding]:
    """What train and another split do not share."""
    unlearnt = _those(classes, lambda number: counts[name].get(number) and not counts["train"].get(number))
    if unlearnt:
        message = f"{_of(unlearnt, classes)} with objects here but none in train: never learnt, and scored as 0"
        yield Finding(WARNING, "class not in train", name, message, classes=unlearnt)
    unscored = _those(classes, lambda number: counts["train"].get(number) and not counts[name].get(number))
    if unscored:
        message = f"{_of(unscored, classes)} of train without objects here: AP says nothing of them"
        yield Finding(NOTE, f"class not in {name}", name, message, classes=unscored)


def _rare(classes: Classes, counts: dict[int, int]) -> Iterator[Finding]:
    """Classes with few objects to learn from, by themselves and beside others."""
    present = sorted(_those(classes, counts.get), key=lambda entry: counts[entry[0]])
    few = [entry for entry in present if counts[entry[0]] < _FEW]
    if few:
        message = f"{_of(few, classes)} with fewer than {_FEW} objects to learn from; annotate more"
        yield Finding(WARNING, "few objects", "train", message, classes=few)
    enough = present[len(few) :]
    if not enough:
        return
    (rarest, rare_name), (commonest, common_name) = enough[0], enough[-1]
    ratio = counts[commonest] / counts[rarest]
    if ratio >= _UNEVEN:
        message = (
            f"{ratio:,.0f} times as many objects of {common_name} ({counts[commonest]:,}) as of {rare_name} "
            f"({counts[rarest]:,}); look at AP class by class (python -m dndetr.evaluate)"
        )
        yield Finding(WARNING if ratio >= _VERY_UNEVEN else NOTE, "imbalance", "train", message)


def _alike(records: Records) -> Iterator[Finding]:
    """Names that differ in case, spaces, hyphens or a plural's s alone."""
    groups = defaultdict(list)
    for number, name in records.classes:
        look = re.sub(r"[\s_-]+", "", unicodedata.normalize("NFKC", name).casefold())
        groups[look].append((number, name))
    for look in sorted(groups):
        if look and f"{look}s" in groups:
            groups[look] += groups.pop(f"{look}s")
    for look, entries in groups.items():
        if look and len(entries) > 1:
            names = " and ".join(f"{name!r} (id {number})" for number, name in entries)
            message = f"classes {names} look alike; if one class is meant, give it one name and one id"
            yield Finding(WARNING, "classes alike", records.name, message)


def _counts(records: Records) -> dict[int, int]:
    """Objects that training or evaluation would use, by the id of their class."""
    _, _, used = records.clipped()
    found = np.bincount(records.objects.label[used], minlength=len(records.classes)).tolist()
    return dict(zip((number for number, _ in records.classes), found, strict=True))


def _those(classes: Classes, chosen: Callable[[int], object]) -> list[tuple[int, str]]:
    return [entry for entry in classes if chosen(entry[0])]


def _of(some: Classes, classes: Classes) -> str:
    return f"{len(some):,} of {counted(len(classes), 'class', 'classes')}"
