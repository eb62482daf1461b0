"""What a COCO document becomes: its images and objects in columns, and everything that is wrong with it.

Where a block's entries have their types, arrays say whether they are sound; where they do not, or are not, the rules
are asked entry by entry, in dictionaries.
"""

from collections.abc import Callable, Iterable
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from ..limits import FARTHEST, LONGEST_SIDE, MOST_PIXELS
from ..records import Objects, Problem
from ..spool import Spool
from ..units import Shares
from ..verified import ABSENT, PARTIAL
from .coco_blocks import Block, ImageEntry, ObjectEntry
from .coco_rules import (
    LARGEST_AREA,
    annotation_problems,
    box_problem,
    category_problems,
    id_problem,
    image_problems,
    is_id,
    is_number_of_its_own,
    repeated_id,
)
from .coco_verified import Stated, is_number

_SPREAD = 8  # ids that are so close are looked up in a table, which is quicker than to search
_LOWEST = -(2**63)  # numpy has it as an integer, and no id may be it


class Blocks(Protocol):
    """A document, its lists in blocks."""

    def blocks(self, key: str) -> Iterable[Block]: ...


class Gathered:
    """The entries of a document that are sound by themselves, and what is wrong with all others, in ``problems``.

    names, ids [n] int64 (-1 for an unusable one) and sizes [n, 2] int64 (height, width) of the images; categories as
    they are. objects are in the order of the file, and a label is the place of the category in its list; with problems
    they cannot be relied upon. stated: what the images say of categories that were looked for. folder: where columns
    are kept meanwhile, by default in memory. rename: is given all images, block by block, and may change them. locate:
    makes a ``file_name`` of that and ``coco_url``.
    """

    def __init__(
        self,
        document: Blocks,
        folder: Path | None = None,
        rename: Callable[[list[dict]], None] | None = None,
        locate: Callable[[Any, Any], Any] = lambda name, address: name,
    ):
        self._locate, self.stated = locate, Stated()
        self._problems: list[Problem] = []
        self.names: list[str] = []
        numbers, self._sizes, self._ids = _Ids("image"), Spool(np.int64, (2,)), Spool(np.int64)
        for block in document.blocks("images"):
            if rename is not None:
                rename(block.entries())
                block.typed = None
            self._add_images(block, numbers)
        self.ids, self.sizes = self._ids.array(), self._sizes.array()
        self._known_images = _Places(numbers)

        self.categories = [entry for block in document.blocks("categories") for entry in block.entries()]
        known = _Ids("category")
        known.add(entry.get("id") for entry in self.categories)
        self._known_categories = _Places(known)
        named = [problem for entry in self.categories for problem in category_problems(entry)]

        kinds = {"image": int, "label": int, "boxes": float, "crowd": bool, "areas": float}
        self._columns = [Spool(kind, (4,) * (name == "boxes"), folder) for name, kind in kinds.items()]
        self._shares = Shares()
        own = _Ids("annotation", folder)
        for block in document.blocks("annotations"):
            self._add_objects(block, own)
        self.objects = Objects(*(column.array() for column in self._columns), own.array())
        self.problems = [*known.problems(), *numbers.problems(), *own.problems(), *named, *self._problems]
        if self._shares.are_all:
            what = "all lie within [0, 1] and seem to be shares of the image's sides"
            advice = "give x, y, width, height in pixels, from the top left corner"
            self.problems.append(Problem("units", f"the boxes {what}; {advice}"))
        categories = {number for entry in self.categories if is_number(number := entry.get("id"))}
        self.problems += self.stated.problems(categories)

    def _add_images(self, block: Block, numbers: "_Ids") -> None:
        if block.typed is not None and (found := self._sound_images(block.typed)) is not None:
            names, ids, sizes = found
            numbers.add_sound(ids)
            self.stated.add(
                (entry.id, entry.neg_category_ids, entry.not_exhaustive_category_ids) for entry in block.typed
            )
        else:
            entries = block.entries()
            numbers.add(entry.get("id") for entry in entries)
            self.stated.add((entry.get("id"), entry.get(ABSENT), entry.get(PARTIAL)) for entry in entries)
            for entry in entries:
                if (name := self._locate(entry.get("file_name"), entry.get("coco_url"))) is not None:
                    entry["file_name"] = name
            sound = []
            for entry in entries:
                problems = list(image_problems(entry))
                self._problems += problems
                sound += [] if problems else [entry]
            names = [entry["file_name"] for entry in sound]
            ids = [entry["id"] if is_number_of_its_own(entry.get("id")) else -1 for entry in sound]
            sizes = [(entry["height"], entry["width"]) for entry in sound]
        self.names += names
        self._ids.add(np.asarray(ids, np.int64))
        self._sizes.add(np.asarray(sizes, np.int64))

    def _sound_images(self, entries: list[ImageEntry]) -> tuple[list[str], np.ndarray, np.ndarray] | None:
        """Names, ids and sizes of typed images; None where the rules have to say what is wrong."""
        names = [self._locate(entry.file_name, entry.coco_url) for entry in entries]
        # What needs a closer look: the rules let pass some of it.
        if not all(name and name.isprintable() and ".." not in name and name[0] != "/" for name in names):
            return None
        try:
            ids = np.array([entry.id for entry in entries], np.int64)
            sizes = np.array([(entry.height, entry.width) for entry in entries], np.int64).reshape(-1, 2)
        except OverflowError:
            return None
        fits = (sizes > 0).all() and (sizes <= LONGEST_SIDE).all() and (sizes.prod(axis=1) <= MOST_PIXELS).all()
        return (names, ids, sizes) if fits and (ids != _LOWEST).all() else None

    def _add_objects(self, block: Block, numbers: "_Ids") -> None:
        if block.typed is None or (found := self._sound_objects(block.typed)) is None:
            entries = block.entries()
            numbers.add(entry.get("id") for entry in entries)
            found = self._objects_by_rule(entries)
        else:
            numbers.add_sound(found.pop())
        self._shares.add(found[2])
        for column, values in zip(self._columns, found, strict=True):
            column.add(values)

    def _sound_objects(self, entries: list[ObjectEntry]) -> list[np.ndarray] | None:
        """Columns of typed annotations, the ids last; None where the rules have to say what is wrong."""
        try:
            numbers = np.array([entry.id for entry in entries], np.int64)
            image = self._known_images.of(np.array([entry.image_id for entry in entries], np.int64))
            category = self._known_categories.of(np.array([entry.category_id for entry in entries], np.int64))
            crowd = np.array([entry.iscrowd or 0 for entry in entries], np.int64)
        except OverflowError:  # more than 64 bits
            return None
        boxes = np.fromiter(chain.from_iterable([entry.bbox for entry in entries]), np.float64).reshape(-1, 4)
        given = np.array([entry.area for entry in entries], np.float64)
        areas = np.where(np.isnan(given), boxes[:, 2] * boxes[:, 3], given)
        sound = (
            (numbers != _LOWEST).all()
            and (image >= 0).all()
            and (category >= 0).all()
            and ((crowd == 0) | (crowd == 1)).all()
            and (np.abs(boxes) < FARTHEST).all()
            and (boxes[:, 2:] >= 0).all()
            and (np.isnan(given) | ((given >= 0) & (given <= LARGEST_AREA))).all()
        )
        return [image, category, boxes, crowd != 0, areas, numbers] if sound else None

    def _objects_by_rule(self, entries: list[dict]) -> list[np.ndarray]:
        """Columns of annotations in dictionaries; of those with problems only the boxes count, which have a unit."""
        before = len(self._problems)
        for entry in entries:
            self._problems += annotation_problems(entry, self._known_images.all, self._known_categories.all)
        boxes = [entry["bbox"] for entry in entries if not box_problem(entry.get("bbox"))]
        boxes = np.array(boxes, np.float64).reshape(-1, 4)
        if len(self._problems) > before:
            nothing = np.zeros(len(boxes), np.int64)
            return [nothing, nothing, boxes, nothing, nothing]
        # An id that is known and yet too long is a problem of its image or category.
        image, category = (
            places.of(np.array([entry[key] if is_number_of_its_own(entry[key]) else -1 for entry in entries], np.int64))
            for places, key in ((self._known_images, "image_id"), (self._known_categories, "category_id"))
        )
        crowd = [bool(entry.get("iscrowd")) for entry in entries]
        given = np.array([np.nan if entry.get("area") is None else entry["area"] for entry in entries], np.float64)
        return [
            image,
            category,
            boxes,
            np.array(crowd, bool),
            np.where(np.isnan(given), boxes[:, 2] * boxes[:, 3], given),
        ]


class _Ids:
    """The ids of a list, in its order, and what is wrong with them."""

    def __init__(self, kind: str, folder: Path | None = None):
        self._kind, self._column, self._count = kind, Spool(np.int64, folder=folder), 0
        self.odd: dict[int, Any] = {}
        """Those that can be none, by their place."""

    def add_sound(self, ids: np.ndarray) -> None:
        """More of them, that are numbers of their own as far as they can be so alone."""
        self._column.add(ids)
        self._count += len(ids)

    def add(self, ids: Iterable[Any]) -> None:
        """More of them, whatever they are."""
        ids = list(ids)
        odd = {self._count + place: value for place, value in enumerate(ids) if not is_number_of_its_own(value)}
        self.add_sound(np.array([value if is_number_of_its_own(value) else -1 for value in ids], np.int64))
        self.odd |= odd

    def array(self) -> np.ndarray:
        """All of them [n] int64, -1 for an odd one."""
        return self._column.array()

    def usable(self) -> tuple[np.ndarray, np.ndarray]:
        """Places in the list [k], ascending, and ids [k] of those that are not odd."""
        ids = self.array()
        places = np.delete(np.arange(len(ids)), [*self.odd])
        return places, ids[places]

    def problems(self) -> list[Problem]:
        """What is wrong, in the order of the list."""
        ids = self.array()
        if not self.odd and ((ids[1:] > ids[:-1]).all() or len(np.unique(ids)) == len(ids)):
            return []
        places, ids = self.usable()
        found = {place: id_problem(self._kind, place, value) for place, value in self.odd.items()}
        order = np.argsort(ids, kind="stable")
        again = order[1:][ids[order[1:]] == ids[order[:-1]]]
        for place, number in zip(places[again].tolist(), ids[again].tolist(), strict=True):
            found[place] = repeated_id(self._kind, number)
        return [found[place] for place in sorted(found)]


class _Places:
    """Where in a list the entries with certain ids are."""

    def __init__(self, ids: _Ids):
        self._odd = ids.odd
        places, numbers = ids.usable()
        order = np.argsort(numbers, kind="stable")
        self._places, self._ids = places[order], numbers[order]
        self._table = None
        if len(numbers) and int(self._ids[-1]) - int(self._ids[0]) < _SPREAD * (len(numbers) + 1):
            self._table = np.full(int(self._ids[-1]) - int(self._ids[0]) + 1, -1)
            self._table[self._ids - self._ids[0]] = self._places

    def of(self, ids: np.ndarray) -> np.ndarray:
        """The place of each of these [n] int64; -1 where there is none."""
        if not len(self._ids):
            return np.full(len(ids), -1)
        if self._table is not None:
            inside = (ids >= self._ids[0]) & (ids <= self._ids[-1])
            return np.where(inside, self._table[np.where(inside, ids, self._ids[0]) - self._ids[0]], -1)
        found = np.searchsorted(self._ids, ids).clip(max=len(self._ids) - 1)
        return np.where(self._ids[found] == ids, self._places[found], -1)

    @cached_property
    def all(self) -> set[int]:
        """All ids, those that are too long too."""
        return {*self._ids.tolist(), *filter(is_id, self._odd.values())}
