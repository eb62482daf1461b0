"""Classification losses of queries whose target is known: focal, and three whose targets know how good the box is.

With p = sigmoid(logit) and BCE(t) = -t ln p - (1 - t) ln(1 - p), at the target's class and elsewhere:

    focal     a (1 - p)^2 BCE(1),     (1 - a) p^2 BCE(0)       arXiv 1708.02002, gamma 2
    iou       BCE(t),                 p^2 BCE(0)               t = max(0.01, p^a u^(1 - a))
    mal       BCE(t),                 [p^1.5] BCE(0)           t = u^1.5
    position  a |t - p|^2 BCE(t),     (1 - a) p^2 BCE(0)       t = u^2 max(1, 1 / (largest u^2 of the image + 1e-8))

where u is the IoU of the query's box and its target's, a = ``alpha``, and t and [...] pass no gradient. iou is the loss
of Align-DETR (arXiv 2304.07527) and LW-DETR (arXiv 2406.03459), mal that of DEIM (arXiv 2412.04234), position that of
Stable-DINO (arXiv 2304.04742), each as its authors' code has it.

BCE(t) = softplus(x) - t x with x = logit, which neither overflows nor loses digits; its slope is p - t.
"""

from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

Kind = Literal["focal", "iou", "mal", "position"]
KINDS: tuple[Kind, ...] = get_args(Kind)


def class_loss(logits: Tensor, labels: Tensor, overlap: Tensor, kind: Kind, alpha: float) -> Tensor:
    """Loss summed over classes.

    logits [..., N, K], labels [..., N] int64 in [0, K), or negative for no class, overlap [..., N]: the IoU with the
    target's box, 0 without one; N queries of one image -> [..., N].
    """
    if kind == "focal":
        return focal_loss(logits, labels, alpha)
    positive = _positive(logits, labels)
    p = logits.sigmoid()
    target = _target(p.detach(), overlap.detach()[..., None], kind, alpha)
    target = torch.where(positive, target, 0)  # of an overlap that is not a number other classes have no NaN
    softplus = _softplus(logits)
    hit = softplus - target * logits
    miss = softplus * (p.detach().pow(1.5) if kind == "mal" else p.square())
    if kind == "position":
        hit, miss = alpha * (target - p).square() * hit, (1 - alpha) * miss
    return torch.where(positive, hit, miss).sum(-1)


def focal_loss(logits: Tensor, labels: Tensor, alpha: float) -> Tensor:
    """Focal loss (gamma 2) summed over classes; arguments and result as :func:`class_loss`."""
    positive = _positive(logits, labels)
    away = torch.where(positive, -logits, logits)
    weight = positive.to(logits.dtype) * (2 * alpha - 1) + (1 - alpha)
    return (weight * away.sigmoid().square() * _softplus(away)).sum(-1)


def _positive(logits: Tensor, labels: Tensor) -> Tensor:
    return labels[..., None] == torch.arange(logits.shape[-1], device=logits.device)


def _target(p: Tensor, overlap: Tensor, kind: Kind, alpha: float) -> Tensor:
    """What p should be at the target's class."""
    if kind == "iou":
        return (p.pow(alpha) * overlap.pow(1 - alpha)).clamp(min=0.01)
    if kind == "mal":
        return overlap.pow(1.5)
    if not overlap.numel():
        return overlap
    squared = overlap.square()
    return squared * (1 / (squared.amax(-2, keepdim=True) + 1e-8)).clamp(min=1)


def _softplus(x: Tensor) -> Tensor:
    return F.softplus(x, threshold=40)
