"""What a training step minimises: one matching and one loss call for all decoder layers."""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..batch import Targets
from ..denoising import normalizers
from ..models.dn_detr import Predictions
from ..ops import CostWeights, LossWeights, Matches, match, set_loss


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
        """Loss of one batch; objects: as of ``normalizers``, for several processes and accumulated gradients."""
        logits, boxes, layout = predictions
        noised = layout.denoising
        with torch.no_grad():
            matches = match(logits[:, :, noised:], boxes[:, :, noised:], targets, self.cost)
            divisors = normalizers(targets, layout.groups, boxes.dtype, objects)
        total, parts = set_loss(logits, boxes, matches, layout, targets, divisors, self.weights)
        return Losses(total, parts, matches)
