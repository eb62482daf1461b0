"""Ground truth in columns, of a data set's records or of a COCO document."""

from typing import NamedTuple, Self

import numpy as np

from ..data.classes import Classes
from ..data.records import Records
from .ids import id_array


class Truth(NamedTuple):
    """What detections are compared with.

    images [i]: ids of all images; classes: (category id, name) of all classes. Of the objects, in the data's order:
    image_ids [m] and category_ids [m]; boxes_xywh [m, 4] and areas [m] float64, in pixels; crowd [m] bool. Ids are
    int64, or texts where a document has such.
    """

    images: np.ndarray
    classes: Classes
    image_ids: np.ndarray
    category_ids: np.ndarray
    boxes_xywh: np.ndarray
    areas: np.ndarray
    crowd: np.ndarray

    @classmethod
    def of(cls, ground_truth: "Records | dict | Truth") -> Self:
        """The columns of records or of a COCO document, in which a missing ``area`` is w * h, a missing ``iscrowd`` 0.

        Without ``images`` or ``categories`` it has none. A ``Truth`` is given back as it is.
        """
        if isinstance(ground_truth, cls):
            return ground_truth
        if isinstance(ground_truth, Records):
            return cls._of_records(ground_truth)
        entries = ground_truth["annotations"]
        boxes = np.array([entry["bbox"] for entry in entries], np.float64).reshape(-1, 4)
        areas = np.array([entry.get("area") for entry in entries], np.float64)  # None becomes NaN
        return cls(
            id_array([image["id"] for image in ground_truth.get("images", ())]),
            [(category["id"], category["name"]) for category in ground_truth.get("categories", ())],
            id_array([entry["image_id"] for entry in entries]),
            id_array([entry["category_id"] for entry in entries]),
            boxes,
            np.where(np.isnan(areas), boxes[:, 2] * boxes[:, 3], areas),
            np.array([bool(entry.get("iscrowd")) for entry in entries], bool),
        )

    @classmethod
    def _of_records(cls, records: Records) -> Self:
        objects = records.objects
        numbers = id_array([number for number, _ in records.classes])
        return cls(
            records.ids,
            records.classes,
            records.ids[objects.image],
            numbers[objects.label],
            objects.boxes,
            objects.areas,
            objects.crowd,
        )
