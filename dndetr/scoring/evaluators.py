"""COCO's matching, one class at a time: by pycocotools, the referee, or by hotcoco, with the same numbers sooner.

Classes are scored independently of each other, so no more than the largest of them is ever held in the form that an
evaluator wants, and images without anything of a class cost nothing.
"""

import contextlib
import io
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from .ids import places_in
from .results import Results
from .truth import Truth


class OneClass(NamedTuple):
    """Objects and detections of a class, on the images that have any.

    images: how many, with the numbers 1, 2, ... in the order of their ids, since evaluators keep ids as they like, some
    as doubles. Of the objects: image [m], boxes_xywh [m, 4], areas [m], crowd [m]. Of the detections: found_image [n],
    found_boxes_xywh [n, 4], scores [n].
    """

    images: int
    image: np.ndarray
    boxes_xywh: np.ndarray
    areas: np.ndarray
    crowd: np.ndarray
    found_image: np.ndarray
    found_boxes_xywh: np.ndarray
    scores: np.ndarray


Evaluator = Callable[[OneClass], tuple[np.ndarray, np.ndarray]]
"""-> precision [10, 101, 4, 3] and recall [10, 4, 3]: IoU, recall, area, most detections of an image."""


def by_pycocotools(one: OneClass) -> tuple[np.ndarray, np.ndarray]:
    """The numbers that count; an ``Evaluator``."""
    with np.errstate(over="ignore"):
        found_areas = one.found_boxes_xywh[:, 2] * one.found_boxes_xywh[:, 3]
    nobody = np.zeros(len(one.scores), bool)
    truth = _pycocotools_data(one.images, one.image, one.boxes_xywh, one.areas, one.crowd)
    found = _pycocotools_data(one.images, one.found_image, one.found_boxes_xywh, found_areas, nobody, one.scores)
    with contextlib.redirect_stdout(io.StringIO()):
        referee = COCOeval(truth, found, "bbox")
        referee.evaluate()
        referee.accumulate()
    return referee.eval["precision"][:, :, 0], referee.eval["recall"][:, 0]


def by_hotcoco(one: OneClass) -> tuple[np.ndarray, np.ndarray]:
    """The same; an ``Evaluator``. ModuleNotFoundError where hotcoco is missing."""
    hotcoco = demand_hotcoco()
    if not (_have_areas(one.boxes_xywh) and _have_areas(one.found_boxes_xywh)):
        return by_pycocotools(one)
    images = [{"id": number} for number in range(1, one.images + 1)]
    columns = {"boxes": one.boxes_xywh, "area": one.areas, "iscrowd": one.crowd}
    category = np.ones(len(one.image), np.int64)
    truth = hotcoco.COCO.from_arrays(
        images, [{"id": 1, "name": "1"}], image_ids=one.image, category_ids=category, **columns
    )
    rows = np.column_stack((one.found_image, one.found_boxes_xywh, one.scores, np.ones(len(one.scores))))
    evaluation = hotcoco.COCOeval(truth, truth.load_res(rows), "bbox")
    evaluation.evaluate()
    evaluation.accumulate()
    return evaluation.eval["precision"][:, :, 0], evaluation.eval["recall"][:, 0]


def _have_areas(boxes_xywh: np.ndarray) -> bool:
    """Whether no area is lost to the range of doubles: IoUs of 0 / 0 match for pycocotools, and do not for hotcoco."""
    sides = np.abs(boxes_xywh[:, 2:])
    return bool(((sides == 0) | ((sides > 1e-100) & (sides < 1e100))).all())


def demand_hotcoco():
    """hotcoco's module; ModuleNotFoundError that says what to install, where it is missing."""
    try:
        import hotcoco
    except ImportError as error:
        raise ModuleNotFoundError('--fast-eval needs hotcoco: pip install -e ".[fast-eval]"') from error
    return hotcoco


def class_by_class(
    truth: Truth, found: Results, images: np.ndarray, category_ids: np.ndarray, evaluate: Evaluator
) -> tuple[np.ndarray, np.ndarray]:
    """precision [10, 101, K, 4, 3] and recall [10, K, 4, 3] as pycocotools has them, -1 where there are no objects.

    images [i] and category_ids [K]: the ids to score, ascending; what belongs to others is left out.
    """
    precision = np.full((10, 101, len(category_ids), 4, 3), -1.0)
    recall = np.full((10, len(category_ids), 4, 3), -1.0)
    for label, one in _classes(truth, found, images, category_ids):
        precision[:, :, label], recall[:, label] = evaluate(one)
    return precision, recall


def _classes(
    truth: Truth, found: Results, images: np.ndarray, category_ids: np.ndarray
) -> Iterator[tuple[int, OneClass]]:
    """Place and content of each class that has objects."""
    object_image, found_image = places_in(images, truth.image_ids), places_in(images, found.image_ids)
    objects = _rows_by_label(places_in(category_ids, truth.category_ids), object_image, len(category_ids))
    detections = _rows_by_label(places_in(category_ids, found.category_ids), found_image, len(category_ids))
    for label, (mine, its) in enumerate(zip(objects, detections, strict=True)):
        if len(mine):
            both = np.concatenate((object_image[mine], found_image[its]))
            used, image = np.unique(both, return_inverse=True)
            columns = truth.boxes_xywh[mine], truth.areas[mine], truth.crowd[mine]
            mine_image, its_image = np.split(image + 1, [len(mine)])
            yield label, OneClass(len(used), mine_image, *columns, its_image, found.boxes_xywh[its], found.scores[its])


def _rows_by_label(label: np.ndarray, image: np.ndarray, classes: int) -> list[np.ndarray]:
    """The rows of each class, in their order; those of no class and of no image are nowhere."""
    label = np.where(image < 0, -1, label)
    order = np.argsort(label, kind="stable")
    return np.split(order, np.searchsorted(label[order], np.arange(classes + 1)))[1:-1]


def _pycocotools_data(
    images: int,
    image: np.ndarray,
    boxes_xywh: np.ndarray,
    areas: np.ndarray,
    crowd: np.ndarray,
    scores: np.ndarray | None = None,
) -> COCO:
    """A data set of one class, of objects or of detections; these are numbered from 1 on: 0 is "unmatched" in there."""
    columns = [image, boxes_xywh, areas, crowd, np.zeros(len(image)) if scores is None else scores]
    rows = zip(*(column.tolist() for column in columns), strict=True)
    coco = COCO()
    coco.dataset = {
        "images": [{"id": number} for number in range(1, images + 1)],
        "categories": [{"id": 1, "name": "1"}],
        "annotations": [
            {
                "id": number,
                "image_id": image_id,
                "category_id": 1,
                "bbox": box,
                "area": area,
                "iscrowd": int(hidden),
                "score": score,
            }
            for number, (image_id, box, area, hidden, score) in enumerate(rows, start=1)
        ],
    }
    with contextlib.redirect_stdout(io.StringIO()):
        coco.createIndex()
    return coco
