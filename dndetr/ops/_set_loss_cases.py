"""Cases of the set loss: for its tests, benchmarks and self-test."""

import torch

from ..batch import Targets
from .group_attention import GroupLayout
from .match import Matches, invert

# name: (Y, B, (groups, slots, matching), K, counts per image, dtype)
CASES = {
    "tiny": (2, 2, (2, 3, 5), 3, (2, 0), torch.float32),
    "f64": (3, 2, (2, 4, 7), 5, (4, 1), torch.float64),
    "uneven": (3, 3, (5, 8, 37), 11, (8, 1, 5), torch.float32),
    "no-groups": (2, 2, (0, 8, 9), 4, (3, 8), torch.float32),
    "no-targets": (2, 2, (2, 8, 9), 4, (0, 0), torch.float32),
    "no-slots": (2, 2, (0, 0, 9), 4, (0, 0), torch.float32),
    "one-class": (2, 1, (1, 4, 6), 1, (3,), torch.float32),
    "more-targets": (1, 2, (1, 16, 4), 3, (16, 9), torch.float32),
    "no-images": (2, 0, (2, 4, 5), 3, (), torch.float32),
    "many-classes": (1, 1, (1, 4, 6), 1203, (4,), torch.float32),
    "bf16": (2, 2, (2, 8, 20), 7, (3, 7), torch.bfloat16),
    "f16": (2, 2, (2, 8, 20), 7, (3, 7), torch.float16),
    "coco": (6, 2, (5, 32, 300), 91, (7, 20), torch.float32),
    "contrastive": (3, 2, (2, 12, 9), 5, (5, 2), torch.float32),
    "contrastive-f64": (3, 2, (2, 8, 7), 3, (3, 1), torch.float64),
    "contrastive-bf16": (2, 2, (2, 16, 20), 7, (3, 7), torch.bfloat16),
    "contrastive-f16": (2, 2, (2, 16, 20), 7, (3, 7), torch.float16),
    "contrastive-many-classes": (2, 1, (1, 8, 6), 1203, (3,), torch.float32),
    "contrastive-no-targets": (2, 2, (2, 8, 9), 4, (0, 0), torch.float32),
    "contrastive-no-slots": (2, 2, (2, 0, 9), 4, (0, 0), torch.float32),
    "contrastive-no-images": (2, 0, (2, 8, 5), 3, (), torch.float32),
    "three-slots": (2, 2, (3, 12, 5), 4, (3, 1), torch.float32),
    "counted": (2, 3, (2, 5, 6), 4, (2, 4, 5), torch.float32),
    "proposals": (2, 2, (2, 4, 6), 4, (2, 4), torch.float32),
    "iou": (2, 3, (2, 8, 20), 7, (3, 8, 0), torch.float32),
    "iou-f64": (3, 2, (2, 8, 7), 3, (3, 1), torch.float64),
    "iou-f16": (2, 2, (2, 16, 20), 7, (3, 7), torch.float16),
    "mal": (3, 2, (2, 12, 9), 5, (5, 2), torch.float32),
    "mal-f64": (3, 2, (2, 4, 7), 5, (4, 1), torch.float64),
    "mal-bf16": (2, 2, (2, 16, 20), 7, (3, 7), torch.bfloat16),
    "mal-many-classes": (2, 1, (1, 8, 6), 1203, (3,), torch.float32),
    "position": (3, 2, (5, 8, 37), 11, (8, 1), torch.float32),
    "position-f64": (3, 2, (2, 8, 7), 3, (3, 1), torch.float64),
    "position-bf16": (2, 2, (2, 8, 20), 7, (3, 7), torch.bfloat16),
    "position-no-targets": (2, 2, (0, 0, 9), 4, (0, 0), torch.float32),
    "position-no-images": (2, 0, (2, 4, 5), 3, (), torch.float32),
    "position-and-focal": (3, 2, (2, 12, 9), 5, (5, 2), torch.float32),
    "focal-and-mal": (2, 2, (2, 8, 20), 7, (3, 7), torch.float16),
}
# name: (slots of an object, slots that count in each image, layers of proposals), where that is not (1, None, 0)
DENOISING = {
    "contrastive": (2, (12, 3), 1),
    "contrastive-f64": (2, (8, 1), 1),
    "contrastive-bf16": (2, None, 0),
    "contrastive-f16": (2, (5, 16), 1),
    "contrastive-many-classes": (2, (7,), 1),
    "contrastive-no-targets": (2, (8, 0), 0),
    "contrastive-no-slots": (2, (0, 0), 1),
    "contrastive-no-images": (2, (), 1),
    "three-slots": (3, (12, 2), 0),
    "counted": (1, (4, 1, 0), 0),
    "proposals": (1, None, 2),
    "iou-f64": (2, (8, 1), 1),
    "iou-f16": (2, (5, 16), 1),
    "mal": (2, (12, 3), 1),
    "mal-bf16": (2, None, 0),
    "mal-many-classes": (2, (7,), 1),
    "position-f64": (2, (8, 1), 1),
    "position-and-focal": (2, (12, 3), 1),
}
# name: weights of its own, where it has any; kind is that of matching queries, noised that of denoising ones
WEIGHTS = {
    **{name: {"kind": kind, "noised": kind} for kind in ("iou", "mal", "position") for name in CASES if kind in name},
    "iou": {"kind": "iou", "noised": "iou", "eps": 0.0},
    "position-and-focal": {"kind": "position", "eps": 1e-3},
    "focal-and-mal": {"noised": "mal"},
}


def make_options(name: str, device: str = "cpu") -> dict:
    """Further arguments of :func:`set_loss` for a case."""
    _, counted, proposals = DENOISING.get(name, (1, None, 0))
    counted = None if counted is None else torch.tensor(counted, dtype=torch.int32, device=device)
    return {"counted": counted, "proposals": proposals}


def make_case(name: str, device: str = "cpu", seed: int = 0) -> tuple:
    """Arguments of :func:`set_loss` for a case, all up to the weights; the matching is random."""
    layers, batch, layout, classes, counts, dtype = CASES[name]
    layout = GroupLayout(*layout)
    padded = layout.slots // DENOISING.get(name, (1,))[0]
    draw = torch.Generator().manual_seed(seed)
    precise = torch.promote_types(dtype, torch.float32)

    def boxes(*size):
        return torch.rand(*size, 4, generator=draw, dtype=precise) * 0.6 + 0.2

    logits = 3 * torch.randn(layers, batch, layout.queries, classes, generator=draw, dtype=precise) - 1
    labels = torch.randint(classes, (batch, padded), generator=draw)
    targets = Targets(labels, boxes(batch, padded), torch.tensor(counts, dtype=torch.int32))
    targets = Targets(labels * targets.valid, targets.boxes * targets.valid[..., None], targets.counts)
    query = torch.full((layers, batch, 1, padded), -1, dtype=torch.int32)
    for image, count in enumerate(counts):
        for layer in range(layers):
            found = torch.randperm(layout.matching, generator=draw)[:count]
            query[layer, image, 0, : len(found)] = found
    matches = Matches(query, invert(query, layout.matching), torch.ones(layers, batch, dtype=torch.bool))
    objects = torch.tensor([sum(counts), sum(counts) * layout.groups], dtype=precise).clamp(min=1)
    given = logits.to(device, dtype), boxes(layers, batch, layout.queries).to(device)
    return *given, Matches(*(x.to(device) for x in matches)), layout, targets.to(device), objects.to(device)
