"""What a training step minimises: one matching and one loss call for all decoder layers."""

from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..batch import Targets
from ..denoising import normalizers
from ..models.dn_detr import Predictions
from ..ops import CostWeights, GroupLayout, LossWeights, Matches, match, set_loss


class Losses(NamedTuple):
    """total: weighted scalar; parts [Y, 6]: unweighted terms per layer, as ``dndetr.ops.PARTS``; the matching.

    Of a model with two stages, the encoder's proposals are one more layer, the first (where they are all tokens, the
    matching has it in ``finite`` alone).
    """

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
        logits, boxes, layout = predictions.logits, predictions.boxes, predictions.layout
        noised = layout.denoising
        with torch.no_grad():
            matches = match(logits[:, :, noised:], boxes[:, :, noised:], targets, self.cost)
            divisors = normalizers(targets, layout.groups, boxes.dtype, objects)
        total, parts = set_loss(
            logits,
            boxes,
            matches,
            layout,
            targets,
            divisors,
            self.weights,
            counted=predictions.counted,
            proposals=predictions.proposals,
        )
        if predictions.tokens is None:
            return Losses(total, parts, matches)
        tokens = self._of_tokens(*predictions.tokens, targets, divisors)
        finite = torch.cat((tokens.matches.finite, matches.finite))
        return Losses(tokens.total + total, torch.cat((tokens.parts, parts)), matches._replace(finite=finite))

    def _of_tokens(self, logits: Tensor, boxes: Tensor, targets: Targets, divisors: Tensor) -> Losses:
        """Loss of the proposals of all tokens, for being an object at all, which is their first class."""
        targets = replace(targets, labels=torch.zeros_like(targets.labels))
        matches = match(logits, boxes, targets, self.cost)
        layout = GroupLayout(0, 0, logits.shape[2])
        return Losses(*set_loss(logits, boxes, matches, layout, targets, divisors, self.weights), matches)
