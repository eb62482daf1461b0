"""Federated annotations (LVIS, arXiv 1908.03195) in the class loss: what nobody looked for is no negative.

Each image is annotated for some of the classes. Of all others, and of those whose instances are not all annotated, only
the queries that are matched with an instance, or made of one, say anything. The losses of ``ops/class_loss.py`` and
their gradients are exactly zero at a negative's logit of minus infinity, and at any at which a sigmoid is zero. So such
a logit in place of what does not count leaves it out, whatever computes the loss.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from ..batch import Targets
from ..ops import GroupLayout, Matches

_NEVER = -1e4  # its sigmoid is zero in every dtype, and every dtype has it


def counted_logits(logits: Tensor, matches: Matches, layout: GroupLayout, targets: Targets) -> Tensor:
    """Logits [Y, B, Q, K] for ``ops.set_loss``, in which classes count for nothing where they are not verified.

    matches: of the matching queries; layout: of all; targets with unverified [B, K], without which the logits are
    returned as they are. What does not count gets no gradient.
    """
    if targets.unverified is None:
        return logits
    own = _labels(matches, layout, targets)[..., None] == torch.arange(logits.shape[3], device=logits.device)
    return logits.masked_fill(targets.unverified[:, None] & ~own, _NEVER)


def _labels(matches: Matches, layout: GroupLayout, targets: Targets) -> Tensor:
    """The class [Y, B, Q] that each query is to have, -1 for none."""
    layers, objects = len(matches.target), targets.labels.shape[1]
    present = targets.labels.masked_fill(~targets.valid, -1)
    # A group has an object's slots beside each other, of which the first restores it and others are to reject theirs.
    others = layout.slots // objects - 1 if layout.groups and objects else 0
    noised = F.pad(present[..., None], (0, others), value=-1).flatten(1).repeat(1, layout.groups)
    # One more column, of no class, for queries without a partner.
    partner = matches.target.long().where(matches.target >= 0, objects)
    matched = F.pad(present, (0, 1), value=-1).expand(layers, -1, -1).gather(2, partner)
    return torch.cat((noised.expand(layers, -1, -1), matched), dim=2)
