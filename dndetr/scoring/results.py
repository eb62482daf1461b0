"""Detections in columns, which are also a sequence of dictionaries in COCO's results format."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Self

import numpy as np

from .ids import id_array

_AT_ONCE = 10_000  # rows that are Python's objects at a time


@dataclass(frozen=True, eq=False)
class Results(Sequence):
    """Detections of many images.

    image_ids [n] and category_ids [n] int64, ids of the data; boxes_xywh [n, 4] float64, in pixels; scores [n] float64.
    A row is a dictionary in COCO's results format, made when it is asked for; a slice is a ``Results`` on the same
    memory. Equal to any sequence of equal dictionaries.
    """

    image_ids: np.ndarray
    category_ids: np.ndarray
    boxes_xywh: np.ndarray
    scores: np.ndarray

    @classmethod
    def of(cls, results: Iterable[dict]) -> Self:
        """The columns of COCO results, whose ids may also be texts; a ``Results`` is given back as it is."""
        if isinstance(results, cls):
            return results
        rows = list(results)
        return cls(
            id_array([row["image_id"] for row in rows]),
            id_array([row["category_id"] for row in rows]),
            np.array([row["bbox"] for row in rows], np.float64).reshape(-1, 4),
            np.array([row["score"] for row in rows], np.float64),
        )

    @classmethod
    def joined(cls, parts: Sequence[Self]) -> Self:
        """One after the other; none are no detections."""
        parts = parts or [cls.of([])]
        return cls(*(np.concatenate(column) for column in zip(*(part.columns for part in parts), strict=True)))

    @property
    def columns(self) -> tuple[np.ndarray, ...]:
        """image_ids, category_ids, boxes_xywh, scores."""
        return tuple(getattr(self, field.name) for field in fields(self))

    def where(self, chosen: np.ndarray | slice) -> Self:
        """Those that an index, a mask or a slice chooses."""
        return type(self)(*(column[chosen] for column in self.columns))

    def __len__(self) -> int:
        return len(self.scores)

    def __getitem__(self, place: int | slice) -> "dict | Results":
        if isinstance(place, slice):
            return self.where(place)
        place = range(len(self))[place]
        return next(iter(self.where(slice(place, place + 1))))

    def __iter__(self) -> Iterator[dict]:
        for start in range(0, len(self), _AT_ONCE):
            columns = (column[start : start + _AT_ONCE].tolist() for column in self.columns)
            for image_id, category_id, box, score in zip(*columns, strict=True):
                yield {"image_id": image_id, "category_id": category_id, "bbox": box, "score": score}

    def __eq__(self, other: object) -> bool:
        if isinstance(other, Results):
            return all(map(np.array_equal, self.columns, other.columns))
        if not isinstance(other, Sequence) or isinstance(other, str):
            return NotImplemented
        return len(self) == len(other) and all(mine == its for mine, its in zip(self, other, strict=True))

    __hash__ = None
