"""The Hungarian matcher of Hugging Face's losses on our batched cost and assignment, and with it the losses we have.

transformers makes matcher and criterion anew in every call of a model's loss function. ``MatchedLoss`` calls that
same function with our matcher under the matcher's name, and where the losses are ours too with our criterion under the
criterion's, so that everything else stays theirs. Costs differ from theirs in the 1e-6 that our generalised IoU adds
to its divisors; a cost that is not finite is the worst in both.
"""

from functools import cache

import torch
from torch import nn

from ..ops import CostWeights, match
from .criterion import covers, fused
from .labels import to_targets
from .rebind import rebind


class Matcher(nn.Module):
    """Matching by focal cost, L1 and generalised IoU; called as the matchers of transformers are."""

    def __init__(self, class_cost: float = 1, bbox_cost: float = 1, giou_cost: float = 1, alpha: float = 0.25):
        super().__init__()
        self.weights = CostWeights(class_cost, bbox_cost, giou_cost, alpha)

    @torch.no_grad()
    def forward(self, outputs: dict, targets: list[dict], group_detr: int = 1) -> list[tuple]:
        """logits [B, N, K], pred_boxes [B, N, 4] -> per image the queries, ascending, and their targets, on the host.

        group_detr: the queries are that many sets of equal size, each matched on its own, and what is left over is not:
        losses in evaluation divide the queries of one group. ValueError where there are fewer queries than sets.
        """
        queries = outputs["logits"].shape[1]
        if queries < group_detr:
            raise ValueError(f"matcher: group_detr={group_detr} sets need as many queries at least, got {queries}")
        whole = queries // group_detr * group_detr
        logits, boxes = outputs["logits"][:, :whole], outputs["pred_boxes"][:, :whole]
        padded = to_targets(targets, logits.device)
        query = match(logits[None], boxes[None], padded, self.weights, group_detr).query[0].cpu().long()
        pairs = []
        for found in query:  # [sets, T]
            target = torch.arange(found.shape[1], device=found.device).expand_as(found)[found >= 0]
            found, order = found[found >= 0].sort()
            pairs.append((found, target[order]))
        return pairs


def _with_our_matcher(criterion: type):
    def make(config):
        made = criterion(config)
        theirs = made.matcher
        if theirs.use_focal_loss and theirs.gamma == 2:
            made.matcher = Matcher(theirs.class_cost, theirs.bbox_cost, theirs.giou_cost, theirs.alpha)
        return made

    return make


# Loss function: the global names under which it finds its matcher and its criterion, and the kind of its class loss.
_FUSED = {
    "DeformableDetrForObjectDetectionLoss": ("DeformableDetrHungarianMatcher", "DeformableDetrImageLoss", "focal"),
    "LwDetrForObjectDetectionLoss": ("LwDetrHungarianMatcher", "LwDetrImageLoss", "iou"),
}
# Loss function: the global name under which it finds its criterion, which makes the matcher.
_CRITERIA = {
    "RTDetrForObjectDetectionLoss": "RTDetrLoss",
    "DFineForObjectDetectionLoss": "DFineLoss",
    "Deimv2ForObjectDetectionLoss": "Deimv2Loss",
}


@cache
def _rebound(loss):
    if names := _FUSED.get(loss.__name__):
        matcher, criterion, kind = names
        return rebind(loss, **{matcher: Matcher, criterion: fused(loss.__globals__[criterion], kind)})
    name = _CRITERIA[loss.__name__]
    return rebind(loss, **{name: _with_our_matcher(loss.__globals__[name])})


class MatchedLoss:
    """A loss function of transformers with our matcher, and with our losses where it has such."""

    def __init__(self, own_loss):
        self.own_loss = own_loss
        _rebound(own_loss)  # fails now rather than in the first step

    def __call__(self, *args, **kwargs):
        return _rebound(self.own_loss)(*args, **kwargs)


def known_matcher(loss) -> str | None:
    """The name of the matcher or criterion that ``MatchedLoss`` replaces in a loss function, None where it cannot."""
    if getattr(loss, "__module__", "").split(".")[0] != "transformers":
        return None
    return _FUSED.get(loss.__name__, (_CRITERIA.get(loss.__name__),))[0]


def fuses(loss, config) -> bool:
    """Whether ``MatchedLoss`` replaces all losses of a loss function with a known matcher, in a model so configured."""
    return loss.__name__ in _FUSED and covers(config.focal_alpha)
