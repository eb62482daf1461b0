"""Matching and losses the way DETR-like detectors usually compute them: layer by layer, image by image, on the host.

What the whole criterion of this package is compared with, in numbers of operations and in time.
"""

import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from dndetr.batch import Targets
from dndetr.boxes import cxcywh_to_xyxy
from dndetr.models.dn_detr import Predictions
from dndetr.ops import CostWeights, GroupLayout, LossWeights


def generalized_iou(a_xyxy: Tensor, b_xyxy: Tensor) -> Tensor:
    """As in :mod:`dndetr.boxes`, which says more about gradients than torch's functions do, and takes longer for it."""
    area_a = (a_xyxy[..., 2] - a_xyxy[..., 0]) * (a_xyxy[..., 3] - a_xyxy[..., 1])
    area_b = (b_xyxy[..., 2] - b_xyxy[..., 0]) * (b_xyxy[..., 3] - b_xyxy[..., 1])
    overlap = torch.minimum(a_xyxy[..., 2:], b_xyxy[..., 2:]) - torch.maximum(a_xyxy[..., :2], b_xyxy[..., :2])
    extent = torch.maximum(a_xyxy[..., 2:], b_xyxy[..., 2:]) - torch.minimum(a_xyxy[..., :2], b_xyxy[..., :2])
    intersection, hull = (size[..., 0] * size[..., 1] for size in (overlap.clamp(min=0), extent.clamp(min=0)))
    union = area_a + area_b - intersection
    return intersection / (union + 1e-6) - (hull - union) / (hull + 1e-6)


def matched(logits: Tensor, boxes: Tensor, labels: list[Tensor], truths: list[Tensor], weights: CostWeights):
    """logits [B, N, K], boxes [B, N, 4] of one layer, ground truth per image -> pairs (queries, targets) per image."""
    p, flat = logits.flatten(0, 1).sigmoid(), boxes.flatten(0, 1)
    label, truth = torch.cat(labels), torch.cat(truths)
    negative = (1 - weights.alpha) * p**2 * -(1 - p + 1e-8).log()
    positive = weights.alpha * (1 - p) ** 2 * -(p + 1e-8).log()
    cost = weights.label * (positive[:, label] - negative[:, label]) + weights.l1 * torch.cdist(flat, truth, p=1)
    cost = cost - weights.giou * generalized_iou(cxcywh_to_xyxy(flat)[:, None], cxcywh_to_xyxy(truth)[None])
    cost = cost.view(*boxes.shape[:2], -1).cpu()
    parts = cost.split([len(boxes) for boxes in truths], -1)
    pairs = [linear_sum_assignment(part[image]) for image, part in enumerate(parts)]
    return [(torch.as_tensor(queries), torch.as_tensor(found)) for queries, found in pairs]


def focal(logits: Tensor, onehot: Tensor, objects: float, alpha: float) -> Tensor:
    """Sigmoid focal loss of one layer."""
    p = logits.sigmoid()
    entropy = F.binary_cross_entropy_with_logits(logits, onehot, reduction="none")
    seen = p * onehot + (1 - p) * (1 - onehot)
    loss = entropy * (1 - seen) ** 2
    loss = (alpha * onehot + (1 - alpha) * (1 - onehot)) * loss
    return loss.mean(1).sum() / objects * logits.shape[1]


def paired_losses(boxes: Tensor, truth: Tensor, objects: float) -> tuple[Tensor, Tensor]:
    """L1 and GIoU losses of paired boxes."""
    l1 = F.l1_loss(boxes, truth, reduction="none").sum() / objects
    overlap = torch.diag(generalized_iou(cxcywh_to_xyxy(boxes)[:, None], cxcywh_to_xyxy(truth)[None]))
    return l1, (1 - overlap).sum() / objects


def denoising_rows(layout: GroupLayout, counts: list[int], counted: list[int], per_object: int) -> list[Tensor]:
    """Image, query and object of the denoising queries that count, object -1 where they restore none."""
    image, query, restored = [], [], []
    for number, (count, slots) in enumerate(zip(counts, counted, strict=True)):
        slot = torch.arange(slots)
        owner = slot.div(per_object, rounding_mode="floor")
        owner[(slot % per_object > 0) | (owner >= count)] = -1
        image.append(torch.full((slots * layout.groups,), number))
        query += [slot + layout.slots * group for group in range(layout.groups)]
        restored += [owner] * layout.groups
    return [torch.cat(rows) for rows in (image, query, restored)]


def per_layer_losses(
    predictions: Predictions,
    targets: Targets,
    cost: CostWeights,
    weights: LossWeights,
    counted: Tensor | None = None,
    proposals: int = 0,
) -> tuple[Tensor, Tensor]:
    """Total loss and parts [Y, 6], as :func:`dndetr.ops.set_loss` gives them."""
    logits, boxes, layout, *_ = predictions
    device = logits.device
    counts = targets.counts.tolist()
    labels = [row[:count] for row, count in zip(targets.labels, counts, strict=True)]
    truths = [row[:count] for row, count in zip(targets.boxes, counts, strict=True)]
    objects = torch.as_tensor([sum(counts)], dtype=torch.float).clamp(min=1).item()
    noised = None
    if layout.groups:
        per_object = layout.slots // max(targets.labels.shape[1], 1)
        seen = [count * per_object for count in counts] if counted is None else counted.tolist()
        noised = [x.to(device) for x in denoising_rows(layout, counts, seen, per_object)]
    rows = []
    for layer, (layer_logits, layer_boxes) in enumerate(zip(logits, boxes, strict=True)):
        noised_logits, own_logits = layer_logits.split([layout.denoising, layout.matching], 1)
        noised_boxes, own_boxes = layer_boxes.split([layout.denoising, layout.matching], 1)
        with torch.no_grad():
            pairs = matched(own_logits.detach(), own_boxes.detach(), labels, truths, cost)
        batch = torch.cat([torch.full_like(queries, b) for b, (queries, _) in enumerate(pairs)])
        queries = torch.cat([queries for queries, _ in pairs])
        classes = torch.full(own_logits.shape[:2], own_logits.shape[2], device=device)
        classes[batch, queries] = torch.cat([label[found] for label, (_, found) in zip(labels, pairs, strict=True)])
        onehot = torch.zeros(*own_logits.shape[:2], own_logits.shape[2] + 1, dtype=own_logits.dtype, device=device)
        onehot = onehot.scatter_(2, classes[..., None], 1)[..., :-1]
        label_loss = focal(own_logits, onehot, objects, weights.alpha)
        truth = torch.cat([boxes[found] for boxes, (_, found) in zip(truths, pairs, strict=True)])
        l1, giou = paired_losses(own_boxes[batch, queries], truth, objects)
        if noised is not None and len(noised[0]) and layer >= proposals:
            image, query, restored = noised
            picked = noised_logits[image, query]
            positive = restored >= 0
            image, query, restored = image[positive], query[positive], restored[positive]
            known = torch.full((len(picked),), picked.shape[1], device=device)
            known[positive] = targets.labels[image, restored]
            onehot = torch.zeros(len(known), picked.shape[1] + 1, dtype=picked.dtype, device=device)
            onehot = onehot.scatter_(1, known[:, None], 1)[None, :, :-1]
            noised_objects = objects * layout.groups
            dn_label = focal(picked[None], onehot, noised_objects, weights.alpha)
            truth = targets.boxes[image, restored]
            dn_l1, dn_giou = paired_losses(noised_boxes[image, query], truth, noised_objects)
        else:
            dn_label = dn_l1 = dn_giou = torch.as_tensor(0.0, device=device)
        rows.append(torch.stack((label_loss, l1, giou, dn_label, dn_l1, dn_giou)))
    parts = torch.stack(rows)
    coefficients = torch.tensor((weights.label, weights.l1, weights.giou) * 2, device=device)
    return (parts * coefficients).sum(), parts
