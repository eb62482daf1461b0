"""The set loss of federated annotations: as it is made, and written out as a weighted sum over queries and classes."""

from dataclasses import replace

import torch

from dndetr.boxes import cxcywh_to_xyxy, iou_and_union
from dndetr.ops import _set_loss_cases as cases
from dndetr.ops import set_loss
from dndetr.training.federated import counted_logits


def labels_of(case, counted, per_object, proposals):
    """The class of each query [Y, B, Q], -1 for none and -2 where the query does not count, one by one."""
    logits, _, matches, layout, targets, _ = case
    labels = torch.full(logits.shape[:3], -1)
    for layer in range(len(logits)):
        for image, count in enumerate(targets.counts.tolist()):
            own = targets.labels[image].tolist()
            most = count * per_object if counted is None else int(counted[image])
            for query in range(layout.denoising):
                slot = query % layout.slots
                if layer < proposals or slot >= most:
                    labels[layer, image, query] = -2
                elif slot % per_object == 0 and slot // per_object < count:
                    labels[layer, image, query] = own[slot // per_object]
            for query, target in enumerate(matches.target[layer, image].tolist()):
                if target >= 0:
                    labels[layer, image, layout.denoising + query] = own[target]
    return labels


def pairwise_class_loss(logits, positive, overlap, kind, alpha):
    """The formulas of ops/class_loss.py for each query and class [Y, B, N, K], by logarithms."""
    p = logits.sigmoid()
    gone = p.detach()

    def entropy(t):
        return -t * p.log() - (1 - t) * (1 - p).log()

    one, none = torch.ones_like(p), torch.zeros_like(p)
    if kind == "focal":
        return torch.where(positive, alpha * (1 - p) ** 2 * entropy(one), (1 - alpha) * p**2 * entropy(none))
    if kind == "iou":
        aim = (gone**alpha * overlap ** (1 - alpha)).clamp(min=0.01)
        return torch.where(positive, entropy(aim), p**2 * entropy(none))
    if kind == "mal":
        return torch.where(positive, entropy(overlap**1.5), gone**1.5 * entropy(none))
    largest = (overlap**2).amax(2, keepdim=True) if overlap.numel() else overlap
    aim = overlap**2 * (1 / (largest + 1e-8)).clamp(min=1)
    return torch.where(positive, alpha * (aim - p) ** 2 * entropy(aim), (1 - alpha) * p**2 * entropy(none))


def direct(case, weights, options, per_object):
    """Class losses [Y, 2] (matching, denoising) as weighted sums over queries and classes, and their own weights."""
    logits, boxes, matches, layout, targets, normalizers = case
    labels = labels_of(case, options["counted"], per_object, options["proposals"])
    positive = labels[..., None] == torch.arange(logits.shape[3])
    counts = (labels > -2)[..., None] & (positive | ~targets.unverified[:, None])
    partner = torch.full_like(labels, -1)
    partner[:, :, layout.denoising :] = matches.target
    if layout.groups:
        slot = torch.arange(layout.denoising) % layout.slots
        partner[:, :, : layout.denoising] = (slot // per_object).where(labels[:, :, : layout.denoising] >= 0, -1)
    overlap = torch.zeros_like(labels, dtype=torch.float64)
    for place in (labels >= 0).nonzero().tolist():
        truth = targets.boxes[place[1], partner[tuple(place)]].double()
        corners = cxcywh_to_xyxy(boxes[tuple(place)].detach()), cxcywh_to_xyxy(truth)
        overlap[tuple(place)] = iou_and_union(*corners, weights.eps)[0]
    sums = []
    halves = slice(layout.denoising, None), slice(layout.denoising)
    for half, kind in zip(halves, (weights.kind, weights.noised), strict=True):
        of = logits[:, :, half], positive[:, :, half], overlap[:, :, half, None]
        sums.append((pairwise_class_loss(*of, kind, weights.alpha) * counts[:, :, half]).sum((1, 2, 3)))
    return torch.stack(sums, 1) / normalizers.double(), counts


def case_of(name, dtype=torch.float64):
    """A case of the set loss with classes that are not verified, among them some of its objects'."""
    logits, boxes, matches, layout, targets, normalizers = cases.make_case(name)
    draw = torch.Generator().manual_seed(5)
    unverified = torch.rand(len(targets.labels), logits.shape[3], generator=draw) < 0.5
    targets = replace(targets, unverified=unverified)
    precise = torch.promote_types(dtype, torch.float32)
    given = logits.to(dtype).requires_grad_(), boxes.to(precise).requires_grad_()
    return *given, matches, layout, targets, normalizers


def federated_loss(case, weights, backend, options):
    logits, boxes, matches, layout, targets, normalizers = case
    counted = counted_logits(logits, matches, layout, targets)
    return set_loss(counted, boxes, matches, layout, targets, normalizers, weights, backend, **options)
