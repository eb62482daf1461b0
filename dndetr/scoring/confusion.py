"""Which classes a detector takes for which, at one score threshold and one IoU."""

from collections import defaultdict

import numpy as np
from pycocotools import mask


def confusion_matrix(
    ground_truth: dict, results: list[dict], category_ids: list[int], threshold: float = 0.5, iou: float = 0.5
) -> np.ndarray:
    """Detections scored ``threshold`` or more, paired with objects whatever their classes.

    ground_truth: COCO dict; results: COCO results; category_ids: the K classes -> counts [K + 1, K + 1] int64, row the
    true class, column the detected one; last row: detections of nothing, last column: objects missed. Pairs need an IoU
    of ``iou``; those of one class are made first, and the largest IoU first among them and among the others. What lies
    in a crowd region counts for nothing.
    """
    label = {category_id: place for place, category_id in enumerate(category_ids)}
    objects, crowds, found = defaultdict(list), defaultdict(list), defaultdict(list)
    for entry in ground_truth["annotations"]:
        if entry["category_id"] in label:
            (crowds if entry.get("iscrowd") else objects)[entry["image_id"]].append(entry)
    for entry in results:
        if entry["score"] >= threshold and entry["category_id"] in label:
            found[entry["image_id"]].append(entry)
    counts = np.zeros((len(label) + 1, len(label) + 1), np.int64)
    for image_id in objects.keys() | found.keys():
        detected, true = found[image_id], objects[image_id]
        pairs = _pairs(detected, true, iou)
        for detection, object_ in pairs.items():
            counts[label[true[object_]["category_id"]], label[detected[detection]["category_id"]]] += 1
        for place in set(range(len(true))) - set(pairs.values()):
            counts[label[true[place]["category_id"]], -1] += 1
        rest = [entry for place, entry in enumerate(detected) if place not in pairs]
        in_crowd = (overlap_matrix(rest, crowds[image_id], crowd=True) >= iou).any(axis=1)
        for entry, hidden in zip(rest, in_crowd, strict=True):
            if not hidden:
                counts[-1, label[entry["category_id"]]] += 1
    return counts


def _pairs(detected: list[dict], true: list[dict], iou: float) -> dict[int, int]:
    """Place of a detection -> place of its object, each at most once."""
    overlaps = overlap_matrix(detected, true)
    rows, columns = np.nonzero(overlaps >= iou)
    same = np.array([detected[r]["category_id"] == true[c]["category_id"] for r, c in zip(rows, columns, strict=True)])
    pairs: dict[int, int] = {}
    taken = set()
    for place in np.lexsort((-overlaps[rows, columns], ~same.astype(bool))):
        row, column = int(rows[place]), int(columns[place])
        if row not in pairs and column not in taken:
            pairs[row] = column
            taken.add(column)
    return pairs


def overlap_matrix(detected: list[dict], true: list[dict], crowd: bool = False) -> np.ndarray:
    """IoU of every detection with every object; with a crowd, the share of the detection that lies in it."""
    if not detected or not true:
        return np.zeros((len(detected), len(true)))
    boxes = [np.array([entry["bbox"] for entry in entries], np.float64) for entries in (detected, true)]
    return mask.iou(*boxes, [int(crowd)] * len(true))
