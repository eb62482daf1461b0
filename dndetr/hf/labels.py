"""Labels as Hugging Face detectors take them, padded into our Targets."""

import torch

from ..batch import Targets


def to_targets(
    labels: list[dict], device: torch.device, slots: int | None = None, dtype: torch.dtype = torch.float32
) -> Targets:
    """One dict per image, ``class_labels`` [n] and ``boxes`` [n, 4] cxcywh in [0, 1] -> Targets on ``device``.

    slots: T, by default the largest n, at least 1; dtype: of the boxes. Only shapes are looked at, so nothing waits
    for the device.
    """
    counts = [len(image["class_labels"]) for image in labels]
    slots = max(1, *counts) if slots is None else slots
    padded_labels = torch.zeros(len(labels), slots, dtype=torch.int64, device=device)
    padded_boxes = torch.zeros(len(labels), slots, 4, dtype=dtype, device=device)
    for row, (image, count) in enumerate(zip(labels, counts, strict=True)):
        if image["boxes"].shape != (count, 4):
            raise ValueError(
                f"labels[{row}]: boxes must be [{count}, 4] cxcywh for {count} class_labels, "
                f"got {list(image['boxes'].shape)}"
            )
        padded_labels[row, :count] = image["class_labels"]
        padded_boxes[row, :count] = image["boxes"]
    counts = torch.tensor(counts, dtype=torch.int32, device="cpu").to(device, non_blocking=True)
    return Targets(padded_labels, padded_boxes, counts)


def check_labels(targets: Targets, classes: int) -> None:
    """Raise ValueError where a label is of no class; waits for the device, once."""
    labels = targets.labels  # [B, T]
    lowest, highest = torch.stack(labels.aminmax()).tolist() if labels.numel() else (0, 0)
    if not 0 <= lowest <= highest < classes:
        raise ValueError(f"labels: class_labels must be at least 0 and below {classes}, the model's classes")
