"""What a training step minimises: one matching and one loss call for all decoder layers of a set of queries."""

from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..batch import Targets
from ..denoising import normalizers
from ..models.dn_detr import Predictions
from ..ops import CostWeights, GroupLayout, LossWeights, Matches, match, set_loss
from ..ops.match import MOST
from .federated import counted_logits


class Losses(NamedTuple):
    """total: weighted scalar; parts [Y, 6]: unweighted terms per layer, as ``dndetr.ops.PARTS``; the matching.

    Of a model with two stages, the encoder's proposals are one more layer, the first. Layers of one-to-many queries
    come last, as matching ones. (Of these and of proposals of all tokens, the matching has ``finite`` alone.)
    """

    total: Tensor
    parts: Tensor
    matches: Matches


class Criterion(nn.Module):
    """Bipartite matching of every layer's matching queries, then class, L1 and GIoU losses of all queries.

    one_to_many: weight of the loss of such queries, which are matched on their own with ``repeats`` copies of every
    target (arXiv 2207.13080).
    """

    def __init__(
        self,
        cost: CostWeights = CostWeights(),
        weights: LossWeights = LossWeights(),
        one_to_many: float = 1.0,
        repeats: int = 6,
    ):
        super().__init__()
        self.cost, self.weights, self.one_to_many, self.repeats = cost, weights, one_to_many, repeats

    def forward(self, predictions: Predictions, targets: Targets, objects: Tensor | None = None) -> Losses:
        """Loss of one batch; objects: as of ``normalizers``, for several processes and accumulated gradients."""
        logits, boxes, layout = predictions.logits, predictions.boxes, predictions.layout
        noised = layout.denoising
        with torch.no_grad():
            matches = match(logits[:, :, noised:], boxes[:, :, noised:], targets, self.cost)
            divisors = normalizers(targets, layout.groups, boxes.dtype, objects)
        total, parts = set_loss(
            counted_logits(logits, matches, layout, targets),
            boxes,
            matches,
            layout,
            targets,
            divisors,
            self.weights,
            counted=predictions.counted,
            proposals=predictions.proposals,
        )
        finite = matches.finite
        if predictions.tokens is not None:
            # Proposals of all tokens are to be an object at all, which is their first class, and verified everywhere.
            objects_alone = replace(targets, labels=torch.zeros_like(targets.labels), unverified=None)
            tokens = self._of_one_set(*predictions.tokens, objects_alone, divisors)
            total, parts = tokens.total + total, torch.cat((tokens.parts, parts))
            finite = torch.cat((tokens.matches.finite, finite))
        if predictions.one_to_many is not None:
            # Of a crowded batch's targets there are fewer copies, by the room for them: no shape depends on how many.
            repeats = min(self.repeats, max(1, MOST // max(1, targets.labels.shape[1])))
            many = self._of_one_set(*predictions.one_to_many, repeated(targets, repeats), divisors * repeats)
            total, parts = total + self.one_to_many * many.total, torch.cat((parts, many.parts))
            finite = torch.cat((finite, many.matches.finite))
        return Losses(total, parts, matches._replace(finite=finite))

    def _of_one_set(self, logits: Tensor, boxes: Tensor, targets: Targets, divisors: Tensor) -> Losses:
        """Loss of queries that are all matched with targets of their own."""
        matches = match(logits, boxes, targets, self.cost)
        layout = GroupLayout(0, 0, logits.shape[2])
        counted = counted_logits(logits, matches, layout, targets)
        return Losses(*set_loss(counted, boxes, matches, layout, targets, divisors, self.weights), matches)


def repeated(targets: Targets, times: int) -> Targets:
    """Every target so many times, its copies next to each other, so that objects come before what is padded."""
    labels, boxes = (x.repeat_interleave(times, dim=1) for x in (targets.labels, targets.boxes))
    return Targets(labels, boxes, targets.counts * times, unverified=targets.unverified)
