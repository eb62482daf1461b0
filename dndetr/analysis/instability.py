"""Matching instability (arXiv 2203.01305, section 3.2): how often queries change their object from epoch to epoch.

    IS(image) = number of matching queries whose matched target (or "none") is not that of the epoch before

averaged over a fixed probe set, here the first validation images, for every decoder layer. It is at most twice the
number of objects. The evaluation's own forward pass gives the predictions; what is added is one matching.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from ..batch import Batch
from ..models.dn_detr import Predictions
from ..ops import CostWeights, match

PROBED = 1000  # images; more would change the mean little and the checkpoint's size a lot


def instability(previous: Tensor, current: Tensor) -> list[float]:
    """Mean number of queries that changed their target, per decoder layer.

    previous, current [images, Y, N]: target of each query, -1 for none, of the same images -> Y numbers.
    """
    return (previous != current).sum(-1, dtype=torch.float64).mean(0).tolist()


class MatchingProbe:
    """Remembers the matches of one evaluation, to count in the next what has changed.

    cost: the weights of the training's own matching; images: how many of the first ones are watched. ``fresh`` has, by
    image id, the target of each query [Y, N] in the evaluation that is going on; several processes put theirs together.
    """

    def __init__(self, cost: CostWeights, images: int = PROBED):
        self._cost, self._images = cost, images
        self._epoch: int | None = None
        self._matched: dict[int, Tensor] = {}
        self.fresh: dict[int, Tensor] = {}

    def watch(self, infer: Callable[[Batch], Predictions]) -> Callable[[Batch], tuple[Tensor, Tensor]]:
        """``infer`` for ``scoring.coco.detect``: only the last layer's logits and boxes, all layers' matches noted."""
        self.fresh = {}

        def predict(batch: Batch) -> tuple[Tensor, Tensor]:
            predictions = infer(batch)
            if len(self.fresh) < self._images:
                self._note(predictions, batch)
            return predictions.logits[-1], predictions.boxes[-1]

        return predict

    def _note(self, predictions: Predictions, batch: Batch) -> None:
        targets = batch.targets.to(predictions.boxes.device)
        logits, boxes = (layers[predictions.proposals :] for layers in (predictions.logits, predictions.boxes))
        matches = match(logits, boxes, targets, self._cost)
        rows = matches.target.transpose(0, 1).to("cpu", torch.int16)
        for image_id, row in zip(batch.ids.tolist(), rows, strict=True):
            if len(self.fresh) < self._images:
                self.fresh.setdefault(image_id, row)

    def finish(self, epoch: int) -> dict:
        """End of an evaluation -> IS of the last layer, IS_layers, and IS_since, the epoch compared with.

        All None where there is nothing to compare with: the first evaluation, or other images than before.
        """
        fresh, before, since = self.fresh, self._matched, self._epoch
        self._matched, self._epoch, self.fresh = fresh, epoch, {}
        if since is None or not fresh or fresh.keys() != before.keys():
            return {"IS": None, "IS_layers": None, "IS_since": None}
        layers = instability(torch.stack([before[image] for image in fresh]), torch.stack([*fresh.values()]))
        layers = [round(value, 4) for value in layers]
        return {"IS": layers[-1], "IS_layers": layers, "IS_since": since}

    def state(self) -> dict:
        """What a resumed run needs to go on counting."""
        matched = torch.stack([*self._matched.values()]) if self._matched else None
        return {"epoch": self._epoch, "ids": list(self._matched), "matched": matched}

    def restore(self, state: dict) -> None:
        """The inverse of ``state``."""
        self._epoch = state["epoch"]
        rows = () if state["matched"] is None else state["matched"].unbind()
        self._matched = dict(zip(state["ids"], rows, strict=True))
