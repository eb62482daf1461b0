"""Whether scores mean what they say: of detections scored 0.7, seven in ten should be right."""

from collections.abc import Iterable

import numpy as np
from pycocotools import mask

from ..data.records import Records
from .ids import places_in, shared_keys
from .results import Results
from .truth import Truth

_BINS = 10


def calibration_error(
    ground_truth: Records | Truth | dict, results: Iterable[dict], threshold: float = 0.05, iou: float = 0.5
) -> float | None:
    """Expected calibration error of detections scored ``threshold`` or more; None where there is none.

    ground_truth, results: as of ``coco_evaluate``. The mean distance of score and precision over ten equal bins of
    scores, weighted by their detections. A detection is right where it is matched as COCO matches at that IoU: best
    score first, with the free object of its class that it overlaps most; in a crowd region it counts for nothing.
    """
    truth, found = Truth.of(ground_truth), Results.of(results)
    found = found.where(found.scores >= threshold)
    images, categories = np.unique(truth.image_ids), np.unique(truth.category_ids)
    image, category = places_in(images, found.image_ids), places_in(categories, found.category_ids)
    key = np.where((image < 0) | (category < 0), -1, image * len(categories) + category)
    order = np.lexsort((-found.scores, key))
    object_key = places_in(images, truth.image_ids) * len(categories) + places_in(categories, truth.category_ids)
    object_order = np.argsort(object_key, kind="stable")
    right, hidden = np.zeros(len(found), bool), np.zeros(len(found), bool)
    for its, mine in shared_keys(key[order], object_key[object_order]):
        detected, true = order[its], object_order[mine]
        crowd = truth.crowd[true]
        overlap = mask.iou(found.boxes_xywh[detected], truth.boxes_xywh[true], crowd)
        right[detected] = matched = _matched(overlap[:, ~crowd], iou)
        hidden[detected] = (overlap[:, crowd] >= iou).any(axis=1) & ~matched
    scores, right = found.scores[~hidden], right[~hidden]
    if not len(scores):
        return None
    bins = np.minimum((scores * _BINS).astype(int), _BINS - 1)
    apart = np.bincount(bins, right - scores, _BINS)
    return float(np.abs(apart).sum() / len(scores))


def _matched(overlap: np.ndarray, iou: float) -> np.ndarray:
    """overlap [detections, best first, objects] -> bool [detections]."""
    matched = np.zeros(len(overlap), bool)
    if overlap.size == 0:
        return matched
    free = np.ones(overlap.shape[1], bool)
    for row, values in enumerate(overlap):
        best = int(np.where(free, values, -1).argmax())
        if free[best] and values[best] >= iou:
            matched[row], free[best] = True, False
    return matched
