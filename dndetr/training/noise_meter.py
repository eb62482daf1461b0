"""What the noise did to the ground truth, as opposed to what was asked for: flips that hit, boxes cut at the border."""

import torch
from torch import Tensor

from ..batch import Targets
from ..boxes import cxcywh_to_xyxy
from ..denoising import NoisedQueries


def noise_sums(noised: NoisedQueries, targets: Targets) -> Tensor:
    """Sums over all copies that are to be restored: flipped labels, shift, and their number -> [3] float64.

    The shift is the mean distance of centre, width and height from the original's, in the units of ``box_noise``: half
    the box's size for the centre, the whole size for width and height; in contrastive denoising that of the corners, in
    halves of the size. Its expectation is half of ``box_noise``.
    """
    labels, boxes, valid = noised.positives(targets)
    live, clean = valid[:, None], targets.boxes[:, None]
    flipped = (labels != targets.labels[:, None]) & live
    half = clean[..., 2:] * 0.5
    if labels.shape == noised.labels.shape:
        reach = torch.cat((half, clean[..., 2:]), dim=-1)
    else:
        boxes, clean, reach = cxcywh_to_xyxy(boxes), cxcywh_to_xyxy(clean), torch.cat((half, half), dim=-1)
    shift = ((boxes - clean).abs() / reach.clamp(min=1e-6)).mean(-1) * live
    flips, shifts, objects = (each.sum(dtype=torch.float64) for each in (flipped, shift, valid))
    return torch.stack((flips, shifts, objects * labels.shape[1]))


class NoiseMeter:
    """Sums of the noise over many steps, in place on the device; asked once in a while."""

    def __init__(self, device: torch.device | str = "cpu"):
        self.sums = torch.zeros(3, dtype=torch.float64, device=device)

    def add(self, noised: NoisedQueries, targets: Targets) -> None:
        """One more step."""
        self.sums += noise_sums(noised, targets)

    def read(self) -> dict:
        """dn_flip_rate, dn_box_shift since the last reading (nothing if there was no noise); starts anew."""
        flips, shift, slots = self.sums.tolist()
        self.sums.zero_()
        if slots == 0:
            return {}
        values = {"dn_flip_rate": flips, "dn_box_shift": shift}
        return {name: round(value / slots, 5) for name, value in values.items()}
