"""Does anything of the ground truth reach the matching queries? A question to the weights and settings at hand.

The denoising queries are made from the ground truth, so a matching query that saw them would detect without looking at
the image, and fail without them at test time. Here the targets are exchanged and the outputs compared: those of the
matching queries must not change, nor those of a group when another group's queries do.
"""

from dataclasses import replace
from typing import NamedTuple

import torch
from torch import nn

from ..batch import Batch
from ..denoising import NoisedQueries, draw_noise, noised_queries
from ..ops import images_of

TOLERANCE = 1e-4
_BOX_NOISE, _LABEL_NOISE = 0.4, 0.2


class LeakCheck(NamedTuple):
    """Largest change of an output (logits and boxes, all layers), in float32, when what must not matter is changed.

    matching: of the matching queries under other targets; absent: of the same under no denoising at all; groups: of all
    groups but the first under other queries in the first; control: of the first group itself, which must change.
    """

    matching: float
    absent: float
    groups: float
    control: float

    @property
    def passed(self) -> bool:
        """No leak, and a check that can see one."""
        return max(self.matching, self.absent, self.groups) <= TOLERANCE < self.control


@torch.no_grad()
def leak_check(model: nn.Module, batch: Batch, classes: int, groups: int = 5, batch_active: bool = False) -> LeakCheck:
    """Run the model (as in evaluation) with different noised queries beside the same images.

    batch: on the model's device, with objects; groups: 2 or more; batch_active: as for ``noised_queries``.
    """
    if groups < 2 or not batch.targets.counts.any():
        raise ValueError("a leak check needs two denoising groups and a batch with objects")
    training = model.training
    model.eval()
    generator = torch.Generator(batch.pixels.device).manual_seed(0)

    def draw() -> NoisedQueries:
        noise = draw_noise(batch.targets, groups, classes, generator)
        return noised_queries(batch.targets, noise, _LABEL_NOISE, _BOX_NOISE, batch_active)

    first = draw()
    # Other objects altogether: every class another one, every box elsewhere.
    other = replace(first, labels=(first.labels + 1) % classes, boxes=_moved(first.boxes))
    mixed = replace(first, labels=first.labels.clone(), boxes=first.boxes.clone())
    mixed.labels[:, 0], mixed.boxes[:, 0] = other.labels[:, 0], other.boxes[:, 0]
    try:
        plain, changed, partly = (_outputs(model, batch, noised) for noised in (first, other, mixed))
        absent = _outputs(model, batch, None)
    finally:
        model.train(training)
    noised, slots = groups * first.labels.shape[2], first.labels.shape[2]
    live = first.live.repeat(1, groups)[..., None]
    return LeakCheck(
        matching=_largest(plain[:, :, noised:] - changed[:, :, noised:]),
        absent=_largest(plain[:, :, noised:] - absent),
        groups=_largest(((plain - partly)[:, :, :noised] * live)[:, :, slots:]),
        control=_largest(((plain - partly)[:, :, :noised] * live)[:, :, :slots]),
    )


def _moved(boxes: torch.Tensor) -> torch.Tensor:
    centres, sizes = boxes.split(2, dim=-1)
    return torch.cat(((centres + 0.37) % 1, (sizes * 0.5 + 0.2)), dim=-1)


def _outputs(model: nn.Module, batch: Batch, noised: NoisedQueries | None) -> torch.Tensor:
    predictions = model(images_of(batch), batch.sizes, noised)
    return torch.cat((predictions.logits.float(), predictions.boxes.float()), dim=-1)


def _largest(difference: torch.Tensor) -> float:
    return difference.abs().max().item()
