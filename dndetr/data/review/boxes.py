"""What the boxes of a split show by themselves: there twice, too small to be seen, too many for an image."""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch

from ...boxes import iou_and_union
from ...config import Config
from ..collate import TARGET_BUCKETS
from ..records import Records
from ..transforms import Transform
from .findings import NOTE, WARNING, Finding, Place, counted

_SAME = 0.95  # IoU from which two boxes are taken for one
_SMALLEST = 4  # pixels of the shorter side that a detector may still make something of
_MANY_TINY = 0.01  # share of the boxes
_STRETCHED = 2  # times


class _Boxes(NamedTuple):
    """The objects that training uses: image, label and place in ``Records.objects`` [k], boxes_xyxy [k, 4] pixels."""

    image: np.ndarray
    label: np.ndarray
    place: np.ndarray
    boxes_xyxy: np.ndarray


def box_findings(records: Records, evaluation: Transform, config: Config) -> Iterator[Finding]:
    """Findings on the boxes of a split without problems; evaluation: how that configuration shows images."""
    _, clipped, used = records.clipped()
    objects = records.objects.where(used)
    boxes = _Boxes(objects.image, objects.label, np.flatnonzero(used), clipped[used])
    yield from _doubled(records, boxes)
    yield from _seen(records, boxes, evaluation, config)
    yield from _crowded(records, boxes, config)


def same_boxes(image: np.ndarray, boxes_xyxy: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Pairs of boxes of one image that are nearly equal -> their places, ascending, in two arrays [p].

    image [k] ascending, boxes_xyxy [k, 4]. Sorted by their left sides, such boxes are near each other: a box that
    shares so much with another begins within (1 - IoU) of its width.
    """
    left, width = boxes_xyxy[:, 0], boxes_xyxy[:, 2] - boxes_xyxy[:, 0]
    order = np.lexsort((left, image))
    image, left, until = image[order], left[order], (left + (1 - _SAME) * width)[order]
    pairs = [np.empty((2, 0), np.int64)]
    first = np.arange(len(order))
    for step in range(1, len(order)):
        first = first[first + step < len(order)]
        first = first[(image[first + step] == image[first]) & (left[first + step] <= until[first])]
        if not len(first):
            break
        one, other = order[first], order[first + step]
        iou, _ = iou_and_union(torch.from_numpy(boxes_xyxy[one]), torch.from_numpy(boxes_xyxy[other]))
        equal = iou.numpy() >= _SAME
        pairs.append(np.sort((one[equal], other[equal]), axis=0))
    found = np.concatenate(pairs, axis=1)
    return tuple(found[:, np.lexsort(found[::-1])])


def _doubled(records: Records, boxes: _Boxes) -> Iterator[Finding]:
    one, other = same_boxes(boxes.image, boxes.boxes_xyxy)
    equal = boxes.label[one] == boxes.label[other]
    for kind, chosen, message in (
        ("doubled box", equal, "on another of the same class, where one of two detections is always wrong; keep one"),
        ("box of two classes", ~equal, "on another of a different class; if one object is meant, keep the right class"),
    ):
        # Of three equal boxes two are too many, not three pairs.
        repeats, which = np.unique(other[chosen], return_index=True)
        if not len(repeats):
            continue
        images, firsts = boxes.image[repeats].tolist(), boxes.place[one[chosen][which]].tolist()
        rows = zip(images, firsts, boxes.place[repeats].tolist(), strict=True)
        cases = [(Place(records, image, (first, repeat)),) for image, first, repeat in rows]
        lie = "lies" if len(repeats) == 1 else "lie"
        yield Finding(WARNING, kind, records.name, f"{counted(len(repeats), 'box', 'boxes')} {lie} {message}", cases)


def _seen(records: Records, boxes: _Boxes, evaluation: Transform, config: Config) -> Iterator[Finding]:
    """Boxes that are tiny, and images that are out of shape, once they are resized."""
    sizes, which = np.unique(records.sizes, axis=0, return_inverse=True)
    rng = np.random.default_rng(0)  # mirroring changes no size
    shown = np.array([evaluation.view(tuple(size), rng).size for size in sizes.tolist()]).reshape(-1, 2)
    scale = (shown / sizes)[which.reshape(-1)]  # [n, 2] of height and width
    spans = (boxes.boxes_xyxy[:, 2:] - boxes.boxes_xyxy[:, :2]) * scale[boxes.image][:, ::-1]
    tiny = spans.min(axis=1) < _SMALLEST
    larger = {
        "fixed": "give a larger --images.canvas",
        "official": "give a larger --images.eval-size and --images.max-size",
        "original": "enlarge the images",
    }[config.images.recipe]
    if count := int(tiny.sum()):
        share = count / len(tiny)
        message = (
            f"{counted(count, 'box', 'boxes')} of {len(tiny):,} ({share:.1%}) under {_SMALLEST} pixels wide or high "
            f"with --preset {config.preset}, hardly anything to learn from; {larger}, or cut the images into tiles"
        )
        cases = _by_image(records, boxes.image[tiny], boxes.place[tiny])
        yield Finding(WARNING if share >= _MANY_TINY else NOTE, "tiny box", records.name, message, cases)
    stretch = scale.max(axis=1) / scale.min(axis=1)
    odd = np.flatnonzero(stretch >= _STRETCHED)
    if config.images.recipe == "fixed" and len(odd):
        message = (
            f"{counted(len(odd), 'image')} of {len(records):,} stretched {_STRETCHED} times or more in one direction "
            f"on a canvas of {shown[0][0]}x{shown[0][1]}; give --images.canvas the shape of most images"
        )
        yield Finding(NOTE, "stretched image", records.name, message, [(Place(records, at),) for at in odd.tolist()])


def _crowded(records: Records, boxes: _Boxes, config: Config) -> Iterator[Finding]:
    """Images with more objects than can be found in them, or learnt, or scored."""
    counts = np.bincount(boxes.image, minlength=len(records))
    queries, slots, kept = config.model.queries * max(1, config.model.patterns), TARGET_BUCKETS[-1], config.detections
    limits = [(queries, WARNING, f"--preset {config.preset} has {queries} queries; give more --model.queries")]
    if records.name == "train":
        limits.append((slots, WARNING, f"training keeps the {slots} largest; cut the images into tiles"))
    else:
        limits.append((kept, NOTE, f"evaluation keeps {kept} detections of an image, so not all can be found"))
    for limit, severity, consequence in limits:
        crowded = np.flatnonzero(counts > limit)
        if len(crowded):
            what = f"{counted(len(crowded), 'image')} with more than {limit} objects, up to {counts.max():,}: "
            cases = [(Place(records, at),) for at in crowded[np.argsort(-counts[crowded], kind="stable")].tolist()]
            yield Finding(severity, "crowded image", records.name, what + consequence, cases)


def _by_image(records: Records, image: np.ndarray, place: np.ndarray) -> list[tuple[Place, ...]]:
    """Objects [k] of ascending images, together where they share one."""
    images, starts = np.unique(image, return_index=True)
    parts = np.split(place, starts[1:])
    return [(Place(records, at, tuple(part.tolist())),) for at, part in zip(images.tolist(), parts, strict=True)]
