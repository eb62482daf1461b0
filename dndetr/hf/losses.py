"""The denoising loss of each supported model, in the form of its own loss.

DAB-, Conditional and Deformable DETR have a focal loss. LW-DETR and RF-DETR have that of Align-DETR, whose targets know
how good the box is (ops/class_loss.py). DETR has a softmax over its classes and one more, "no object":

    label = sum over queries of w * (-log softmax(logits)[class]) / sum over queries of w
    l1    = sum over positives of |box - target|_1 / (objects * groups)
    giou  = sum over positives of (1 - GIoU) / (objects * groups)

where w is 1 for a positive, whose class is its object's, and ``eos_coefficient`` for a negative of contrastive
denoising, whose class is "no object". The label term is divided by the weights, and not by objects, since DETR's own
is: both are a mean over queries, so both start near the logarithm of the number of classes, however many objects and
groups there are. Without negatives the two divisors are one, for a process.
"""

import torch
from torch import Tensor

from ..batch import Targets
from ..boxes import cxcywh_to_xyxy, generalized_iou
from ..denoising import denoising_loss
from ..ops import LossWeights


def focal(config, logits: Tensor, boxes: Tensor, targets: Targets, groups: int, objects: Tensor):
    """Focal loss; arguments and result, after config, as of :func:`dndetr.denoising.denoising_loss`."""
    # A negative alpha switches weighting off in transformers, which makes twice the loss of equal weights.
    label, alpha = (1.0, config.focal_alpha) if config.focal_alpha >= 0 else (2.0, 0.5)
    weights = LossWeights(label, config.bbox_loss_coefficient, config.giou_loss_coefficient, alpha)
    total, parts = denoising_loss(logits, boxes, targets, groups, objects, weights)
    return total, torch.cat((label * parts[:, :1], parts[:, 1:]), dim=1)


def quality(config, logits: Tensor, boxes: Tensor, targets: Targets, groups: int, objects: Tensor):
    """Class loss whose targets know the box; arguments and result as :func:`focal`."""
    label, l1, giou = config.class_loss_coefficient, config.bbox_loss_coefficient, config.giou_loss_coefficient
    weights = LossWeights(label, l1, giou, config.focal_alpha, noised="iou")
    return denoising_loss(logits, boxes, targets, groups, objects, weights)


def softmax(config, logits: Tensor, boxes: Tensor, targets: Targets, groups: int, objects: Tensor):
    """Cross-entropy, "no object" being the last of K + 1 classes; arguments and result as :func:`focal`.

    What is not counted, slots without an object and boxes of negatives, gets no gradient, whatever it holds.
    """
    layers, _, rows, classes = logits.shape
    precise = torch.promote_types(torch.promote_types(logits.dtype, boxes.dtype), torch.float32)
    slots = rows // max(1, groups)
    each = max(1, slots // targets.labels.shape[1])  # queries of an object in a group
    slot = torch.arange(rows, device=logits.device) % max(1, slots)
    counted = slot < each * targets.counts[:, None]
    restores = counted & (slot % each == 0)
    label = targets.labels[:, slot // each].masked_fill(~restores, classes - 1)
    truth = targets.boxes[:, slot // each].to(precise)
    logits = logits.to(precise).masked_fill(~counted[..., None], 0)
    boxes = boxes.to(precise).masked_fill(~restores[..., None], 0)

    importance = torch.where(restores, 1.0, config.eos_coefficient).masked_fill(~counted, 0).to(precise)
    surprise = -logits.log_softmax(-1).gather(-1, label.expand(layers, -1, -1)[..., None])[..., 0]
    overlap = generalized_iou(cxcywh_to_xyxy(boxes), cxcywh_to_xyxy(truth))
    divisor = objects.clamp(min=1).to(precise) * max(1, groups)
    parts = torch.stack(
        (
            (importance * surprise).sum((1, 2)) / importance.sum().clamp(min=1),
            (boxes - truth).abs().sum(-1).masked_fill(~restores, 0).sum((1, 2)) / divisor,
            (1 - overlap).masked_fill(~restores, 0).sum((1, 2)) / divisor,
        ),
        dim=1,
    )
    label, l1, giou = parts.sum(0).unbind()
    return label + config.bbox_loss_coefficient * l1 + config.giou_loss_coefficient * giou, parts
