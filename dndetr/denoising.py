"""Query denoising (arXiv 2203.01305): noised ground truth as extra decoder queries, in groups of a fixed size.

Every image's objects are copied into G groups of T slots, T being the targets' bucket, so no shape depends on the
data. Labels are flipped to a random class with probability ``label_noise``; centres move by up to ``box_noise`` times
half the box's size, sizes change by up to ``box_noise`` times themselves. The decoder learns to restore the originals;
which query belongs to which object is known, so this part of the loss needs no matching.

Contrastive denoising (DINO, arXiv 2203.03605) gives every object two slots of a group, 2T in all: slot 2j holds its
positive, whose corners move by up to ``box_noise`` times half the box's size, slot 2j + 1 its negative, whose corners
move by one to two times as much and which the decoder learns to reject. Side by side, the slots that hold something are
the first ones of a group, as in plain denoising.
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from .batch import Targets
from .boxes import cxcywh_to_xyxy, xyxy_to_cxcywh
from .ops import GroupLayout, LossWeights, Matches, set_loss


class Noise(NamedTuple):
    """Random numbers of one step, for S slots of a group: T, or 2T for contrastive denoising.

    flip [B, G, S] uniform in [0, 1); label [B, G, S] int64 in [0, K); box [B, G, S, 4] uniform in [0, 1); float32.
    """

    flip: Tensor
    label: Tensor
    box: Tensor


def noise_seed(seed: int, epoch: int, batch: int) -> int:
    """What the noise of a batch is drawn from, whoever trains on it: the run's seed, epoch, the batch's place in it."""
    return int(np.random.SeedSequence((seed, epoch, batch)).generate_state(1)[0])


def draw_noise(
    targets: Targets, groups: int, classes: int, generator: torch.Generator | None = None, contrastive: bool = False
) -> Noise:
    """Fresh random numbers for every slot, on the targets' device (where the generator must be, too).

    Slots that no image of the batch needs get zeros, so that the noise does not depend on how many of them there are.
    """
    each = 2 if contrastive else 1
    slots = targets.labels.shape[1]
    drawn = slots if targets.needed is None else targets.needed
    shape = (targets.labels.shape[0], groups, each * drawn)
    options = {"device": targets.boxes.device, "generator": generator}
    noise = Noise(
        torch.rand(shape, dtype=torch.float32, **options),
        torch.randint(classes, shape, **options),
        torch.rand(*shape, 4, dtype=torch.float32, **options),
    )
    if drawn == slots:
        return noise
    more = each * (slots - drawn)
    return Noise(F.pad(noise.flip, (0, more)), F.pad(noise.label, (0, more)), F.pad(noise.box, (0, 0, 0, more)))


@dataclass(frozen=True)
class NoisedQueries:
    """What the decoder is fed besides its matching queries, in G groups of S slots.

    labels [B, G, S] int64, boxes [B, G, S, 4] cxcywh, whose sizes are negative where corners have passed each other;
    live [B, S] bool, True where a slot holds a copy of an object; active [B] int32, number of slots per group that
    attention may see; counted [B] int32, number of slots per group that have a class loss.
    """

    labels: Tensor
    boxes: Tensor
    live: Tensor
    active: Tensor
    counted: Tensor

    def layout(self, matching: int) -> GroupLayout:
        """Order of all queries when ``matching`` learned ones follow."""
        return GroupLayout(self.labels.shape[1], self.labels.shape[2], matching)

    def positives(self, targets: Targets) -> tuple[Tensor, Tensor, Tensor]:
        """Labels [B, G, T] and boxes [B, G, T, 4] of the copies that are to be restored, and which there are [B, T]."""
        each = max(1, self.labels.shape[2] // max(1, targets.labels.shape[1]))  # also where there is no room at all
        return self.labels[:, :, ::each], self.boxes[:, :, ::each], self.live[:, ::each]


def noised_queries(
    targets: Targets,
    noise: Noise,
    label_noise: float = 0.2,
    box_noise: float | Tensor = 0.4,
    batch_active: bool = False,
    contrastive: bool = False,
) -> NoisedQueries:
    """Apply the noise to the targets.

    ``box_noise``: a tensor gives every group its own, [1, G, 1, 1].
    ``batch_active``: attention sees the slots up to the batch's largest count in every image, as in the official code,
    instead of each image's own objects; results then depend on who else is in the batch. In contrastive denoising the
    class loss counts them too, as background.
    ``contrastive``: a positive and a negative of every object; ValueError where the noise is not for as many slots.
    """
    each = 2 if contrastive else 1
    slots = each * targets.labels.shape[1]
    if noise.flip.shape[2] != slots:
        raise ValueError(f"noised_queries: noise for {noise.flip.shape[2]} slots of a group, but there are {slots}")
    own, clean, live, counts = targets.labels[:, None], targets.boxes[:, None], targets.valid, targets.counts
    if contrastive:
        own, live = (copied.repeat_interleave(each, -1) for copied in (own, live))
        clean, counts = clean.repeat_interleave(each, -2), counts * each
    labels = torch.where(noise.flip < label_noise, noise.label, own)
    moved = noise.box.to(clean.dtype) * 2 - 1
    if not isinstance(box_noise, Tensor) and box_noise == 0:
        boxes = clean.expand(moved.shape)  # as they are, also where they leave the image
    elif contrastive:
        # Negatives move further by half a box, in the directions that they have.
        further = torch.arange(slots, device=clean.device)[:, None] % 2
        moved = torch.where(moved < 0, moved - further, moved + further) * box_noise
        boxes = _moved_corners(clean, moved)
    else:
        # Half the size for the centre, the whole size for width and height.
        reach = torch.cat((clean[..., 2:] * 0.5, clean[..., 2:]), dim=-1)
        boxes = (clean + moved * reach * box_noise).clamp(0, 1)
    # In memory of its own, as kernels want it: once here, not in every layer.
    active = counts.amax().expand_as(counts).contiguous() if batch_active and len(counts) else counts
    return NoisedQueries(labels, boxes, live, active, active if contrastive else counts)


def _moved_corners(boxes: Tensor, moved: Tensor) -> Tensor:
    """Boxes [..., 4] cxcywh whose corners are moved by so many halves of their sizes, and kept in the image."""
    reach = boxes[..., 2:].repeat(*[1] * (boxes.dim() - 1), 2) * 0.5
    return xyxy_to_cxcywh((cxcywh_to_xyxy(boxes) + moved * reach).clamp(0, 1))


def normalizers(targets: Targets, groups: int, dtype: torch.dtype, objects: Tensor | None = None) -> Tensor:
    """What divides the losses of matching and of denoising queries: objects, and objects times groups -> [2].

    objects: positive scalar tensor, where it is not this batch's own number of objects (or 1 without any); dtype: the
    boxes'; the result is at least float32.
    """
    if objects is None:
        objects = targets.counts.sum().clamp(min=1)
    objects = objects.to(torch.promote_types(dtype, torch.float32))
    return torch.stack((objects, objects * max(groups, 1)))


def denoising_loss(
    logits: Tensor,
    boxes: Tensor,
    targets: Targets,
    groups: int,
    objects: Tensor | None = None,
    weights: LossWeights = LossWeights(),
) -> tuple[Tensor, Tensor]:
    """Loss of the denoising queries alone, for a detector that keeps its own loss for its matching queries.

    logits [Y, B, groups * S, K] and boxes [Y, B, groups * S, 4] cxcywh: the first rows of every decoder layer's output,
    S = T slots, or 2T for contrastive denoising, whose negatives are in the label term only;
    objects: scalar tensor, the number to divide by per group where it is not this batch's own; 1 where it is less
    -> total (scalar, weighted) and parts [Y, 3]: label, l1, giou, unweighted. ValueError for another number of rows.
    """
    layers, batch, rows = logits.shape[:3]
    slots = targets.labels.shape[1]
    if rows not in (groups * slots, 2 * groups * slots):
        raise ValueError(
            f"denoising_loss: {groups} groups of {slots} slots have {groups * slots} queries, or {2 * groups * slots} "
            f"in contrastive denoising, got {rows}"
        )
    nobody = Matches(  # no matching queries, hence no sets to match
        torch.empty(layers, batch, 0, slots, dtype=torch.int32, device=logits.device),
        torch.empty(layers, batch, 0, dtype=torch.int32, device=logits.device),
        torch.ones(layers, batch, dtype=torch.bool, device=logits.device),
    )
    divisors = normalizers(targets, groups, boxes.dtype, None if objects is None else objects.clamp(min=1))
    layout = GroupLayout(groups, rows // max(groups, 1), 0)
    total, parts = set_loss(logits, boxes, nobody, layout, targets, divisors, weights)
    return total, parts[:, 3:]
