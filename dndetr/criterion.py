"""What a training step minimises: one matching and one loss call for all decoder layers."""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from .batch import Targets
from .models.dn_detr import Predictions
from .ops import CostWeights, LossWeights, Matches, match, set_loss


class Losses(NamedTuple):
    """total: weighted scalar; parts [Y, 6]: unweighted terms per layer, as ``dndetr.ops.PARTS``; the matching."""

    total: Tensor
    parts: Tensor
    matches: Matches


class Criterion(nn.Module):
    """Bipartite matching of every layer's matching queries, then focal, L1 and GIoU losses of all queries."""

    def __init__(self, cost: CostWeights = CostWeights(), weights: LossWeights = LossWeights()):
        super().__init__()
        self.cost, self.weights = cost, weights

    def forward(self, predictions: Predictions, targets: Targets, objects: Tensor | None = None) -> Losses:
        """Loss of one batch.

        objects: positive scalar tensor that normalises the loss, where it is not this batch's own number of objects (or
        1 without any): several processes, accumulated gradients.
        """
        logits, boxes, layout = predictions
        noised = layout.denoising
        with torch.no_grad():
            matches = match(logits[:, :, noised:], boxes[:, :, noised:], targets, self.cost)
            if objects is None:
                objects = targets.counts.sum().clamp(min=1)
            per_group = objects.to(torch.promote_types(boxes.dtype, torch.float32))
            normalizers = torch.stack((per_group, per_group * max(layout.groups, 1)))
        total, parts = set_loss(logits, boxes, matches, layout, targets, normalizers, self.weights)
        return Losses(total, parts, matches)
