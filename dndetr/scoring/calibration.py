"""Whether scores mean what they say: of detections scored 0.7, seven in ten should be right."""

from collections import defaultdict

import numpy as np

from .confusion import overlap_matrix

_BINS = 10


def calibration_error(
    ground_truth: dict, results: list[dict], threshold: float = 0.05, iou: float = 0.5
) -> float | None:
    """Expected calibration error of detections scored ``threshold`` or more; None where there is none.

    ground_truth: COCO dict; results: COCO results. The mean distance of score and precision over ten equal bins of
    scores, weighted by their detections. A detection is right where it is matched as COCO matches at that IoU: best
    score first, with the free object of its class that it overlaps most; in a crowd region it counts for nothing.
    """
    objects, crowds, found = defaultdict(list), defaultdict(list), defaultdict(list)
    for entry in ground_truth["annotations"]:
        (crowds if entry.get("iscrowd") else objects)[entry["image_id"], entry["category_id"]].append(entry)
    for entry in results:
        if entry["score"] >= threshold:
            found[entry["image_id"], entry["category_id"]].append(entry)
    scores, right = [], []
    for place, detected in found.items():
        detected.sort(key=lambda entry: -entry["score"])
        matched = _matched(overlap_matrix(detected, objects[place]), iou)
        hidden = (overlap_matrix(detected, crowds[place], crowd=True) >= iou).any(axis=1) & ~matched
        scores += [entry["score"] for entry, gone in zip(detected, hidden, strict=True) if not gone]
        right += matched[~hidden].tolist()
    if not scores:
        return None
    scores, right = np.array(scores), np.array(right)
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
