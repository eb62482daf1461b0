"""Gradients of the set loss where a box touches its target, by hand: of the reference and of every kernel."""

import pytest
import torch

from dndetr.batch import Targets
from dndetr.ops import PARTS, GroupLayout, Matches, set_loss

# A box, its target, the gradients of |box - target|_1 and of their GIoU with respect to the box. With overlap A,
# union U and hull H:  d GIoU = dA / (U + e) - A dU / (U + e)^2 - (dH - dU) / (H + e) + (H - U) dH / (H + e)^2.
E = 1e-6
QUARTER, HALF, THREE_QUARTERS = 0.25 + E, 0.5 + E, 0.75 + E
TIES = {
    # Every edge: an outward step makes dA = 1/4, dU = 1/4, dH = 1/4.
    "perfect": (
        (0.5, 0.5, 0.5, 0.5),
        (0.5, 0.5, 0.5, 0.5),
        (0, 0, 0, 0),
        (0, 0, 0.25 / QUARTER - 0.0625 / QUARTER**2, 0.25 / QUARTER - 0.0625 / QUARTER**2),
    ),
    # The left edge: dA = 1/4, dU = 1/4, dH = 1/4. The right one: 0, 1/2, 1/2. The others: 1/8, 3/8, 1/4.
    "twice as wide": (
        (0.5, 0.5, 0.5, 0.5),
        (0.375, 0.5, 0.25, 0.5),
        (1, 0, 1, 0),
        (
            -0.25 / QUARTER - 0.03125 / QUARTER**2,
            0,
            (0.25 / QUARTER - 0.09375 / QUARTER**2) / 2,
            0.25 / QUARTER - 0.046875 / QUARTER**2,
        ),
    ),
    # The right edge, where an overlap would begin: dA = 1/4, dU = 1/4, dH = 0. The left one: 0, 1/2, 3/4. The upper
    # one: 0, 1/2, 1. The lower one: 0, 1/2, 0.
    "beside each other": (
        (0.25, 0.25, 0.5, 0.5),
        (0.75, 0.5, 0.5, 0.5),
        (-1, -1, 0, 0),
        (
            0.25 / HALF + 0.5 / THREE_QUARTERS - 0.1875 / THREE_QUARTERS**2,
            1 / THREE_QUARTERS - 0.25 / THREE_QUARTERS**2,
            (0.25 / HALF + 0.1875 / THREE_QUARTERS**2) / 2,
            0.125 / THREE_QUARTERS**2,
        ),
    ),
    # Neither has an area. The left and right edges: dA = 1/4, dU = 1/4, dH = 1/4, over e. The others change nothing.
    "the same line": ((0.5, 0.5, 0, 0.5), (0.5, 0.5, 0, 0.5), (0, 0, 0, 0), (0, 0, 0.25 / E, 0)),
    "the same point": ((0.5, 0.5, 0, 0), (0.5, 0.5, 0, 0), (0, 0, 0, 0), (0, 0, 0, 0)),
}


def check_tie(name, backend, device="cpu"):
    """Gradients where a box touches its target are what is written above."""
    *given, by_l1, by_giou = TIES[name]
    box, truth = (torch.tensor(each, dtype=torch.float64, device=device).view(1, 1, 1, 4) for each in given)
    _, parts = set_loss(
        torch.zeros(1, 1, 1, 1, dtype=torch.float64, device=device),
        box.requires_grad_(),
        Matches(None, torch.zeros(1, 1, 1, dtype=torch.int32, device=device), None),
        GroupLayout(0, 1, 1),
        Targets(*(x.to(device) for x in (torch.zeros(1, 1).long(), truth[0], torch.ones(1, dtype=torch.int32)))),
        torch.ones(2, dtype=torch.float64, device=device),
        backend=backend,
    )
    for part, sign, expected in (("l1", 1, by_l1), ("giou", -1, by_giou)):
        (grad,) = torch.autograd.grad(parts[0, PARTS.index(part)], box, retain_graph=True)
        assert (sign * grad).flatten().tolist() == pytest.approx(expected, rel=1e-9, abs=1e-12), part


@pytest.mark.parametrize("backend", ["reference", "cpp"])
@pytest.mark.parametrize("name", TIES)
def test_gradients_at_ties(extension, name, backend):
    check_tie(name, backend)


INTERPRETED = """
from test_set_loss_at_ties import TIES, check_tie

for name in TIES:
    check_tie(name, "triton")
"""


def test_triton_in_the_interpreter(interpreter):
    interpreter(INTERPRETED)


@pytest.mark.gpu
@pytest.mark.parametrize("name", TIES)
def test_gpu_gradients_at_ties(name):
    check_tie(name, "triton", "cuda")
