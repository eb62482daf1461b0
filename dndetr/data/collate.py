"""From samples to a batch of static shape: a canvas from a small set, and targets padded to a bucket."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..batch import Batch, Targets
from ..boxes import xyxy_to_cxcywh
from .sample import Sample

TARGET_BUCKETS = (8, 16, 32, 64, 128, 256, 512)


def target_bucket(count: int) -> int:
    """The smallest bucket that holds ``count`` targets, or the largest bucket."""
    return next((bucket for bucket in TARGET_BUCKETS if bucket >= count), TARGET_BUCKETS[-1])


def canvas_bucket(sizes: Sequence[tuple[int, int]], multiple: int) -> tuple[int, int]:
    """The smallest (height, width) in whole multiples that holds images of all these sizes."""
    height, width = (max(side) for side in zip(*sizes, strict=True))
    return -(-height // multiple) * multiple, -(-width // multiple) * multiple


def largest_objects(boxes_xyxy: Tensor, keep: int) -> Tensor:
    """Numbers, ascending, of the ``keep`` boxes [n, 4] with the largest area."""
    area = (boxes_xyxy[:, 2:] - boxes_xyxy[:, :2]).prod(dim=1)
    return area.argsort(descending=True, stable=True)[:keep].sort().values


def collate(
    samples: Sequence[Sample],
    multiple: int = 64,
    canvas: tuple[int, int] | None = None,
    slots: int | None = None,
    exact: bool = False,
) -> Batch:
    """Puts samples on one canvas, top left, zero elsewhere.

    canvas (height, width), by default the smallest in multiples of ``multiple``; slots T, by default the bucket of the
    largest count, or with ``exact`` that count (at least 1). Of an image with more objects than slots the largest
    objects are kept.
    """
    sizes = [sample.size for sample in samples]
    if canvas is None:
        canvas = canvas_bucket(sizes, multiple)
    largest = max(len(sample.labels) for sample in samples)
    needed = min(max(largest, 1), TARGET_BUCKETS[-1]) if exact else target_bucket(largest)
    slots = needed if slots is None else slots

    pixels = torch.empty(len(samples), *canvas, 3, dtype=torch.uint8)
    for place, sample, (height, width) in zip(pixels.numpy(), samples, sizes, strict=True):
        place[:height, :width] = sample.pixels
        place[:height, width:] = 0
        place[height:] = 0
    labels = torch.zeros(len(samples), slots, dtype=torch.int64)
    boxes = torch.zeros(len(samples), slots, 4, dtype=torch.float32)
    counts = torch.zeros(len(samples), dtype=torch.int32)
    for row, sample in enumerate(samples):
        own_boxes, own_labels = sample.boxes_xyxy, sample.labels
        if len(own_labels) > slots:
            kept = largest_objects(own_boxes, slots)
            own_boxes, own_labels = own_boxes[kept], own_labels[kept]
        count = len(own_labels)
        counts[row] = count
        labels[row, :count] = own_labels
        boxes[row, :count] = own_boxes
    sizes = torch.tensor(sizes)
    boxes = xyxy_to_cxcywh(boxes / sizes.flip(1).repeat(1, 2)[:, None])
    rows = [sample.unverified for sample in samples]
    unverified = None if rows[0] is None else torch.stack(rows)
    return Batch(
        pixels=pixels,
        colours=torch.stack([sample.colours for sample in samples]),
        sizes=sizes,
        targets=Targets(labels, boxes, counts, min(needed, slots), unverified),
        original_sizes=torch.tensor([sample.original_size for sample in samples]),
        ids=torch.tensor([sample.image_id for sample in samples]),
    )
