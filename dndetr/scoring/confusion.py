"""Which classes a detector takes for which, at one score threshold and one IoU."""

from collections.abc import Iterable, Sequence

import numpy as np
from pycocotools import mask

from ..data.records import Records
from .ids import id_array, places_in, shared_keys
from .results import Results
from .truth import Truth


def confusion_matrix(
    ground_truth: Records | Truth | dict,
    results: Iterable[dict],
    category_ids: Sequence[int],
    threshold: float = 0.5,
    iou: float = 0.5,
) -> np.ndarray:
    """Detections scored ``threshold`` or more, paired with objects whatever their classes.

    ground_truth, results: as of ``coco_evaluate``; category_ids: the K classes -> counts [K + 1, K + 1] int64, row the
    true class, column the detected one; last row: detections of nothing, last column: objects missed. Pairs need an IoU
    of ``iou``; those of one class are made first, and the largest IoU first among them and among the others. What lies
    in a crowd region counts for nothing.
    """
    truth, found = Truth.of(ground_truth), Results.of(results)
    classes, images = len(category_ids), np.unique(truth.image_ids)
    label, image = _labels(category_ids, found.category_ids), places_in(images, found.image_ids)
    chosen = np.flatnonzero((found.scores >= threshold) & (label < classes))
    chosen = chosen[np.argsort(image[chosen], kind="stable")]
    label, boxes = label[chosen], found.boxes_xywh[chosen]

    true_label, true_image = _labels(category_ids, truth.category_ids), places_in(images, truth.image_ids)
    objects = np.flatnonzero(true_label < classes)
    objects = objects[np.argsort(true_image[objects], kind="stable")]
    true_label, true_boxes, crowd = true_label[objects], truth.boxes_xywh[objects], truth.crowd[objects]

    # The label of what each is paired with; the last is nobody's.
    taken_for, taken_from = np.full(len(objects), classes), np.full(len(chosen), classes)
    hidden = np.zeros(len(chosen), bool)
    for its, mine in shared_keys(image[chosen], true_image[objects]):
        overlap = mask.iou(boxes[its], true_boxes[mine], crowd[mine])
        alone = ~crowd[mine]
        singles = np.flatnonzero(alone) + mine.start
        rows, columns = _pairs(overlap[:, alone], label[its], true_label[singles], iou)
        rows, columns = rows + its.start, singles[columns]
        taken_for[columns], taken_from[rows] = label[rows], true_label[columns]
        hidden[its] = (overlap[:, ~alone] >= iou).any(axis=1)
    counts = np.zeros((classes + 1, classes + 1), np.int64)
    np.add.at(counts, (true_label[~crowd], taken_for[~crowd]), 1)
    nothing = (taken_from == classes) & ~hidden
    np.add.at(counts, (classes, label[nothing]), 1)
    return counts


def _labels(category_ids: Sequence[int], ids: np.ndarray) -> np.ndarray:
    """The place of each id among the classes, their number for those that are not among them."""
    known = id_array(category_ids)
    order = np.argsort(known)
    place = places_in(known[order], ids)
    return np.append(order, len(known))[place]


def _pairs(overlap: np.ndarray, label: np.ndarray, true_label: np.ndarray, iou: float) -> tuple[np.ndarray, np.ndarray]:
    """overlap [n, m], labels of detections [n] and of objects [m] -> places of those that are paired, each once."""
    rows, columns = np.nonzero(overlap >= iou)
    pairs: dict[int, int] = {}
    taken = set()
    for place in np.lexsort((-overlap[rows, columns], label[rows] != true_label[columns])):
        row, column = int(rows[place]), int(columns[place])
        if row not in pairs and column not in taken:
            pairs[row] = column
            taken.add(column)
    return np.array([*pairs], int), np.array([*pairs.values()], int)
