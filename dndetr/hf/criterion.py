"""The losses of a Hugging Face detector in one call of our ops: all layers, and all groups of queries, at once.

A criterion of transformers matches and adds up layer by layer. A fused one keeps its forward pass, and with that the
names, their order, and the number of objects that sums are divided by, over groups and processes. What the forward pass
asks for in each layer comes from one ``match`` and one ``set_loss`` of all layers, the encoder's among them where it
has a loss. IoU and GIoU are without the small numbers that we add to their divisors, as they are there.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from ..ops import CostWeights, GroupLayout, LossWeights, match, set_loss
from ..ops.class_loss import Kind
from .labels import check_labels, to_targets

_NAMES = {"labels": ("loss_ce",), "boxes": ("loss_bbox", "loss_giou"), "cardinality": ("cardinality_error",)}


def covers(focal_alpha: float) -> bool:
    """Whether a fused criterion is for this alpha: a negative one switches weighting off in transformers."""
    return 0 <= focal_alpha <= 1


def fused(plain: type, kind: Kind):
    """``plain``, a criterion of transformers whose class loss is of this kind, with fused losses; made as that is.

    Its matcher must be ours. It is the plain one, with that matcher, where fused losses do not cover its alpha.
    """
    criterion = type(f"Fused{plain.__name__}", (_Fused, plain), {"kind": kind})

    def make(*, matcher, focal_alpha, **others):
        if not covers(focal_alpha):
            return plain(matcher=matcher, focal_alpha=focal_alpha, **others)
        made = criterion(matcher=_groups, focal_alpha=focal_alpha, **others)
        made.costs = matcher.weights
        return made

    return make


def _groups(outputs: dict, targets: list[dict], group_detr: int = 1) -> int:
    # Called as a matcher is. Its answer is handed on to get_loss, which needs no more than this of a single layer.
    return group_detr


class _Fused:
    """Comes before a criterion of transformers."""

    kind: Kind
    costs: CostWeights

    def forward(self, outputs: dict, targets: list[dict]) -> dict[str, Tensor]:
        """logits [B, N, K] and pred_boxes [B, N, 4] of every layer, labels of every image -> losses by name."""
        encoder = [outputs["enc_outputs"]] if "enc_outputs" in outputs else []
        self.layers = [outputs, *outputs.get("auxiliary_outputs", ()), *encoder]
        self.losses_of_layers = None
        return super().forward(outputs, targets)

    def get_loss(self, loss: str, outputs: dict, targets: list[dict], groups: int, num_boxes: float) -> dict:
        if self.losses_of_layers is None:
            self.losses_of_layers = self._all_layers(targets, groups, num_boxes)
        layer = next(number for number, each in enumerate(self.layers) if each is outputs)
        return {name: self.losses_of_layers[name][layer] for name in _NAMES[loss]}

    def _all_layers(self, targets: list[dict], groups: int, num_boxes: float) -> dict[str, tuple[Tensor, ...]]:
        logits, boxes = (torch.stack([layer[key] for layer in self.layers]) for key in ("logits", "pred_boxes"))
        precise = torch.promote_types(torch.promote_types(logits.dtype, boxes.dtype), torch.float32)
        padded = to_targets(targets, logits.device, dtype=precise)
        queries, classes = logits.shape[2:]
        check_labels(padded, classes)
        grouped = queries // groups * groups
        matches = match(logits[:, :, :grouped], boxes[:, :, :grouped], padded, self.costs, groups)
        matches = matches._replace(target=F.pad(matches.target, (0, queries - grouped), value=-1))
        layout = GroupLayout(0, padded.labels.shape[1], queries)
        normalizers = torch.full((2,), num_boxes, dtype=precise, device=logits.device)
        weights = LossWeights(alpha=self.focal_alpha, kind=self.kind, eps=0.0)
        _, parts = set_loss(logits, boxes, matches, layout, padded, normalizers, weights)
        found = (logits.detach().amax(-1).sigmoid() > 0.5).sum(-1)
        label, l1, giou = parts[:, :3].unbind(1)
        every = (label, l1, giou, (found - padded.counts).abs().float().mean(1))
        names = [name for names in _NAMES.values() for name in names]
        return {name: values.unbind() for name, values in zip(names, every, strict=True)}
