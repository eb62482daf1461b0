"""The set loss of all decoder layers at once: focal, L1 and generalised IoU, for matched and denoising queries.

    label = sum over queries and classes of  a_t (1 - p_t)^2 (-ln p_t) / normalizer
    l1    = sum over matched pairs of |box - target|_1 / normalizer
    giou  = sum over matched pairs of (1 - GIoU) / normalizer

with p = sigmoid(logit), p_t = p for the target's class and 1 - p elsewhere, a_t = alpha or 1 - alpha. A matching query
without a partner has no target class. A denoising query's target is the object it was made from, so its part needs no
matching; slots that hold no object weigh nothing. Both parts have normalizers of their own.

In terms of z = logit for the target's class and -logit elsewhere: loss = a_t sigmoid(-z)^2 softplus(-z), which neither
overflows nor loses digits, and d loss / dz = -a_t sigmoid(-z)^2 (2 sigmoid(z) softplus(-z) + sigmoid(-z)).
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..batch import Targets
from ..boxes import cxcywh_to_xyxy, generalized_iou
from .group_attention import GroupLayout


class LossWeights(NamedTuple):
    """Coefficients of the loss terms, and the focal loss's alpha."""

    label: float = 1.0
    l1: float = 5.0
    giou: float = 2.0
    alpha: float = 0.25


PARTS = ("label", "l1", "giou", "dn_label", "dn_l1", "dn_giou")


def focal_loss(logits: Tensor, labels: Tensor, alpha: float) -> Tensor:
    """Focal loss (arXiv 1708.02002, gamma 2) summed over classes.

    logits [..., K], labels [...] int64 in [0, K), or negative for no class -> [...].
    """
    positive = labels[..., None] == torch.arange(logits.shape[-1], device=logits.device)
    away = torch.where(positive, -logits, logits)
    weight = positive.to(logits.dtype) * (2 * alpha - 1) + (1 - alpha)
    return (weight * away.sigmoid().square() * F.softplus(away, threshold=40)).sum(-1)


def _box_losses(boxes: Tensor, target_boxes: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Weighted sums over all but the first dimension of |difference| and 1 - GIoU."""
    l1 = (boxes - target_boxes).abs().sum(-1)
    giou = 1 - generalized_iou(cxcywh_to_xyxy(boxes), cxcywh_to_xyxy(target_boxes))
    return (l1 * weight).flatten(1).sum(1), (giou * weight).flatten(1).sum(1)


def set_loss(
    logits: Tensor,
    boxes: Tensor,
    matches,
    layout: GroupLayout,
    targets: Targets,
    normalizers: Tensor,
    weights: LossWeights,
) -> tuple[Tensor, Tensor]:
    """Loss of every decoder layer over matching and denoising queries.

    logits [Y, B, Q, K], boxes [Y, B, Q, 4] cxcywh, matches from :func:`dndetr.ops.match` on the matching part, targets
    with T = layout.slots where there are groups, normalizers [2] (matching, denoising) -> total (scalar) and
    parts [Y, 6], unweighted, in the order of ``PARTS``. At least float32.
    """
    logits, boxes = (x.float() if x.dtype in (torch.bfloat16, torch.float16) else x for x in (logits, boxes))
    layers, batch = logits.shape[:2]
    noised, slots = layout.denoising, targets.labels.shape[1]
    if layout.groups and slots != layout.slots:
        raise ValueError(f"targets are padded to {slots} per image, but the denoising groups have {layout.slots} slots")
    valid = targets.valid

    # Class targets of all queries: one focal loss covers both parts.
    partner = matches.target.long()
    partner_label = targets.labels.expand(layers, batch, slots).gather(2, partner.clamp(min=0))
    matched_label = partner_label.masked_fill(partner < 0, -1)
    noised_label = targets.labels.repeat(1, layout.groups).expand(layers, batch, noised)
    focal = focal_loss(logits, torch.cat((noised_label, matched_label), dim=2), weights.alpha)
    live = valid.repeat(1, layout.groups).to(focal.dtype)
    label = focal[:, :, noised:].sum((1, 2))
    dn_label = (focal[:, :, :noised] * live).sum((1, 2))

    # Boxes: one entry per (set or group, target), so the work grows with targets, not with queries.
    query = matches.query.long()  # [Y, B, sets, T]
    pairs = query >= 0
    gathered = (query.clamp(min=0) + noised).flatten(2)
    picked = boxes.gather(2, gathered[..., None].expand(-1, -1, -1, 4)).view(*query.shape, 4)
    dtype = boxes.dtype
    target_boxes = targets.boxes.to(dtype)
    l1, giou = _box_losses(picked, target_boxes[:, None], pairs.to(dtype))
    if noised:
        grouped = boxes[:, :, :noised].view(layers, batch, layout.groups, slots, 4)
        dn_l1, dn_giou = _box_losses(grouped, target_boxes[:, None], valid[:, None].to(dtype))
    else:
        dn_l1 = dn_giou = torch.zeros_like(l1)

    parts = torch.stack((label, l1, giou, dn_label, dn_l1, dn_giou), dim=1) / normalizers.repeat_interleave(3)
    coefficients = (weights.label, weights.l1, weights.giou) * 2
    total = sum(coefficient * part for coefficient, part in zip(coefficients, parts.sum(0).unbind(), strict=True))
    return total, parts
