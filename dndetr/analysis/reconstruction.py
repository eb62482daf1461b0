"""How well a detector restores noised ground truth, by noise level: the task that denoising trains, looked at directly.

Every level is one denoising group. Groups do not see each other, so one forward pass measures all levels.
"""

from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from ..batch import Batch
from ..boxes import cxcywh_to_xyxy, iou_and_union
from ..denoising import NoisedQueries, draw_noise, noised_queries
from ..models.dn_detr import Predictions
from ..ops import images_of

LEVELS = (0.0, 0.1, 0.2, 0.3, 0.4, 0.6, 0.8, 1.0)
IMAGES = 100
_EXAMPLES = 4


class Example(NamedTuple):
    """One image to draw.

    image [3, H, W] normalised; size (height, width) valid; boxes [n, 4], labels [n] ground truth; noised_boxes
    [levels, n, 4], noised_labels [levels, n]; restored_boxes [Y, levels, n, 4], restored_labels [levels, n]; all on the
    CPU.
    """

    image: Tensor
    size: tuple[int, int]
    boxes: Tensor
    labels: Tensor
    noised_boxes: Tensor
    noised_labels: Tensor
    restored_boxes: Tensor
    restored_labels: Tensor


class Reconstruction(NamedTuple):
    """``report``, plain values for JSON: ``levels`` of box noise, and for each

    ``noised_error`` 1 - IoU of the noised box with the original; ``error`` the same of the restored box, one list per
    decoder layer; ``flipped_corrected``, ``kept_correct`` share of right classes where the label was, and was not,
    flipped (null where there were none). ``label_noise``, ``objects`` and ``images`` say what was measured.
    """

    report: dict
    examples: list[Example]


@torch.no_grad()
def measure_reconstruction(
    infer: Callable[[Batch, NoisedQueries], Predictions],
    batches: Iterable[Batch],
    classes: int,
    label_noise: float,
    device: torch.device | str = "cpu",
    levels: tuple[float, ...] = LEVELS,
    images: int = IMAGES,
    seed: int = 0,
) -> Reconstruction | None:
    """Noise the ground truth of the first images at every level and let the model restore it.

    infer: batch and noised queries, both on the device -> predictions; label_noise: flips, at every level; images:
    whole batches are read until there are so many -> Reconstruction, or None where these have no objects. The noise is
    that of ``seed``: the same for every model on one kind of device.
    """
    generator = torch.Generator(device).manual_seed(seed)
    box_noise = torch.tensor(levels, dtype=torch.float32, device=device).view(1, -1, 1, 1)
    sums, errors, examples, seen = 0, 0, [], 0
    for batch in batches:
        batch = batch.to(device)
        targets = batch.targets
        noise = draw_noise(targets, len(levels), classes, generator)
        noised = noised_queries(targets, noise, label_noise, box_noise)
        predictions = infer(batch, noised)
        logits, boxes, layout = predictions.logits, predictions.boxes[predictions.proposals :], predictions.layout
        shape = (len(boxes), *noised.labels.shape)
        restored = boxes[:, :, : layout.denoising].float().reshape(*shape, 4)
        named = logits[-1, :, : layout.denoising].argmax(-1).view(shape[1:])
        live = noised.live[:, None].expand(shape[1:])
        flipped = noised.labels != targets.labels[:, None]
        right = named == targets.labels[:, None]
        counted = (live, live & flipped, live & flipped & right, live & ~flipped, live & ~flipped & right)
        noised_error = _error(noised.boxes, targets.boxes[:, None])
        restored_error = _error(restored, targets.boxes[:, None])
        parts = ((noised_error * live).sum((0, 2)), *(mask.sum((0, 2)) for mask in counted))
        sums += torch.stack([part.double() for part in parts])
        errors += (restored_error * live).sum((1, 3), dtype=torch.float64)
        examples += _examples(batch, noised, restored, named, _EXAMPLES - len(examples))
        seen += len(batch.ids)
        if seen >= images:
            break
    if seen == 0 or not sums[1].any():
        return None
    noised_error, live, flips, corrected, kept, correct = sums
    report = {
        "levels": list(levels),
        "noised_error": _shares(noised_error, live),
        "error": [_shares(layer, live) for layer in errors],
        "flipped_corrected": _shares(corrected, flips),
        "kept_correct": _shares(correct, kept),
        "label_noise": label_noise,
        "objects": int(live[0]),
        "images": seen,
    }
    return Reconstruction(report, examples)


def _error(boxes: Tensor, original: Tensor) -> Tensor:
    """1 - IoU; boxes and original broadcast [..., 4] -> [...]."""
    boxes, original = torch.broadcast_tensors(boxes.float(), original.float())
    return 1 - iou_and_union(cxcywh_to_xyxy(boxes), cxcywh_to_xyxy(original))[0]


def _shares(part: Tensor, whole: Tensor) -> list[float | None]:
    return [round(a / b, 4) if b else None for a, b in zip(part.tolist(), whole.tolist(), strict=True)]


def _examples(batch: Batch, noised: NoisedQueries, restored: Tensor, named: Tensor, wanted: int) -> list[Example]:
    """The first images with objects, without the slots that hold none."""
    found = []
    if wanted <= 0:
        return found
    images = images_of(batch)
    for row, count in enumerate(batch.targets.counts.tolist()):
        if len(found) >= wanted:
            break
        if count:
            height, width = batch.sizes[row].tolist()
            found.append(
                Example(
                    images[row].cpu(),
                    (height, width),
                    batch.targets.boxes[row, :count].cpu(),
                    batch.targets.labels[row, :count].cpu(),
                    noised.boxes[row, :, :count].cpu(),
                    noised.labels[row, :, :count].cpu(),
                    restored[:, row, :, :count].cpu(),
                    named[row, :, :count].cpu(),
                )
            )
    return found
