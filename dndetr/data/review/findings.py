"""What a check finds in a data set: how bad it is, what it is, and where; in a line, and in full as JSON."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from ..classes import Classes, listed
from ..records import Problem, Records

ERROR, WARNING, NOTE = "error", "warning", "note"
"""What stops a run; what spoils its result, or the numbers that are said of it; what is good to know."""

# In a line, at most: cases, places of a case, objects of a place, and classes.
_EXAMPLES, _PLACES, _OBJECTS, _CLASSES = 5, 3, 3, 12


class Place(NamedTuple):
    """An image of a split, by its place there, with the places of those of its objects that are meant."""

    records: Records
    image: int
    objects: tuple[int, ...] = ()

    def __str__(self) -> str:
        name = self.records.names[self.image]
        image = f"image {self.records.ids[self.image]} ({name})" if self.records.numbered else name
        if not self.objects:
            return image
        noun = "annotation" if self.records.numbered else "object"
        numbers = listed([str(number) for number in self._numbers()], _OBJECTS)
        return f"{image} {noun}{'s' if len(self.objects) > 1 else ''} {numbers}"

    def as_json(self) -> dict:
        """Split, file and id of the image, with the numbers of the objects: their ids, where users know these."""
        place = {"split": self.records.name, "file": self.records.names[self.image]}
        if self.records.numbered:
            place["image_id"] = int(self.records.ids[self.image])
        if self.objects:
            place["annotation_ids" if self.records.numbered else "objects"] = self._numbers()
        return place

    def _numbers(self) -> list[int]:
        """Ids of the objects, or counted within their image from 1 on where users know no ids."""
        if self.records.numbered:
            return self.records.objects.ids[list(self.objects)].tolist()
        first = int(np.searchsorted(self.records.objects.image, self.image))
        return [place - first + 1 for place in self.objects]


class Finding(NamedTuple):
    """Something found: severity ERROR, WARNING or NOTE, a kind to count by, where, and what, with the way out.

    split: maybe several ("train and val"). cases: all of them, each one or several places that belong together;
    classes: those that are meant.
    """

    severity: str
    kind: str
    split: str
    message: str
    cases: Sequence[tuple[Place, ...]] = ()
    classes: Classes = ()

    def line(self) -> str:
        """In one line, with the first few cases; an error names its place itself, as it does where it stops a run."""
        if self.severity == ERROR:
            return f"problem: {self.message}"
        shown = [_case(case) for case in self.cases[:_EXAMPLES]]
        if len(self.cases) > _EXAMPLES:
            shown.append(f"and {len(self.cases) - _EXAMPLES:,} more")
        if self.classes:
            shown.append(listed([name for _, name in self.classes], _CLASSES))
        return f"{self.severity}: {': '.join(filter(None, (self.split, self.message, '; '.join(shown))))}"

    def as_json(self) -> dict:
        """All of it."""
        return {
            "severity": self.severity,
            "kind": self.kind,
            "split": self.split,
            "message": self.message,
            "classes": [{"id": number, "name": name} for number, name in self.classes],
            "cases": [[place.as_json() for place in case] for case in self.cases],
        }


def _case(case: Sequence[Place]) -> str:
    several = len({place.records.name for place in case}) > 1
    places = [f"{place.records.name} {place}" if several else str(place) for place in case]
    return " = ".join(places[:_PLACES]) + (f" and {len(places) - _PLACES:,} more" if len(places) > _PLACES else "")


def problem_finding(problem: Problem, records: Records, cases: Sequence[tuple[Place, ...]] = ()) -> Finding:
    """What is wrong with a split, as a finding."""
    return Finding(ERROR, problem.kind, records.name, records.of(problem), cases)


def counted(count: int, noun: str, plural: str | None = None) -> str:
    """A number with its noun: "1 image", "1,234 images"."""
    return f"{count:,} {noun if count == 1 else plural or noun + 's'}"
