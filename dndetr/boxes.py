"""Boxes: conversions, IoU and generalised IoU with the official small constants, inverse sigmoid.

Gradients at ties and bounds are the official code's, and stated here, since torch's own change from version to version:
a bound passes the gradient on, and equal numbers share that of their maximum or minimum, half each. NaN fails every
comparison and comes through.
"""

import torch
from torch import Tensor

EPS = 1e-3  # DAB-DETR's, of inverse_sigmoid


def cxcywh_to_xyxy(boxes: Tensor) -> Tensor:
    """[..., 4] centre and size -> [..., 4] corners."""
    centre, half = boxes[..., :2], boxes[..., 2:] * 0.5
    return torch.cat((centre - half, centre + half), dim=-1)


def xyxy_to_cxcywh(boxes_xyxy: Tensor) -> Tensor:
    """[..., 4] corners -> [..., 4] centre and size."""
    low, high = boxes_xyxy[..., :2], boxes_xyxy[..., 2:]
    return torch.cat(((low + high) * 0.5, high - low), dim=-1)


def iou_and_union(a_xyxy: Tensor, b_xyxy: Tensor, eps: float = 1e-6) -> tuple[Tensor, Tensor]:
    """Intersection over union of boxes that broadcast against each other, and the union's area.

    a_xyxy, b_xyxy [..., 4] -> two tensors [...]. The division adds ``eps`` to the union, as the official code does.
    """
    area_a = (a_xyxy[..., 2] - a_xyxy[..., 0]) * (a_xyxy[..., 3] - a_xyxy[..., 1])
    area_b = (b_xyxy[..., 2] - b_xyxy[..., 0]) * (b_xyxy[..., 3] - b_xyxy[..., 1])
    low = _larger(a_xyxy[..., :2], b_xyxy[..., :2])
    high = _smaller(a_xyxy[..., 2:], b_xyxy[..., 2:])
    overlap = _at_least(high - low, 0)
    intersection = overlap[..., 0] * overlap[..., 1]
    union = area_a + area_b - intersection
    return intersection / (union + eps), union


def generalized_iou(a_xyxy: Tensor, b_xyxy: Tensor, eps: float = 1e-6) -> Tensor:
    """Generalised IoU (arXiv 1902.09630) of boxes that broadcast against each other, ``eps`` in both divisions.

    a_xyxy, b_xyxy [..., 4] -> [...], in [-1, 1].
    """
    iou, union = iou_and_union(a_xyxy, b_xyxy, eps)
    low = _smaller(a_xyxy[..., :2], b_xyxy[..., :2])
    high = _larger(a_xyxy[..., 2:], b_xyxy[..., 2:])
    extent = _at_least(high - low, 0)
    hull = extent[..., 0] * extent[..., 1]
    return iou - (hull - union) / (hull + eps)


def inverse_sigmoid(x: Tensor, eps: float = EPS) -> Tensor:
    """Logit of x clamped to [0, 1], both ends kept ``eps`` away from zero.

    x [...] -> [...] in at least float32.
    """
    if x.dtype in (torch.bfloat16, torch.float16):
        x = x.float()
    x = _at_most(_at_least(x, 0), 1)
    return torch.log(_at_least(x, eps) / _at_least(1 - x, eps))


def _at_least(x: Tensor, bound: float) -> Tensor:
    """``x.clamp(min=bound)``, with slope 1 at the bound."""
    return x.masked_fill(x < bound, bound)


def _at_most(x: Tensor, bound: float) -> Tensor:
    """``x.clamp(max=bound)``, with slope 1 at the bound."""
    return x.masked_fill(x > bound, bound)


def _larger(a: Tensor, b: Tensor) -> Tensor:
    """``torch.maximum``, whose gradient equal numbers share."""
    return torch.where(a > b, a, torch.where(a < b, b, 0.5 * a + 0.5 * b))


def _smaller(a: Tensor, b: Tensor) -> Tensor:
    """``torch.minimum``, whose gradient equal numbers share."""
    return torch.where(a < b, a, torch.where(a > b, b, 0.5 * a + 0.5 * b))
