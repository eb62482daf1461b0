"""Gradients of boxes at ties and bounds, which no version of torch decides; recorded values are in tests/parity."""

import pytest
import torch
from per_layer_losses import generalized_iou as usual

from dndetr.boxes import cxcywh_to_xyxy, generalized_iou, inverse_sigmoid, iou_and_union


def test_inverse_sigmoid_passes_gradients_at_its_bounds_and_none_beyond():
    x = torch.tensor([-0.5, 0.0, 0.125, 0.25, 0.5, 0.75, 0.875, 1.0, 1.5], requires_grad=True)
    inverse_sigmoid(x, eps=0.25).sum().backward()
    # ln(x) has slope 1 / x from eps to 1, -ln(1 - x) has 1 / (1 - x) from 0 to 1 - eps.
    expected = [0, 1, 1 / 0.875, 4 + 1 / 0.75, 4, 1 / 0.75 + 4, 1 / 0.875, 1, 0]
    assert x.grad.tolist() == pytest.approx(expected, rel=1e-6)


def test_inverse_sigmoid_of_a_saturated_anchor_and_of_one_that_lies_on_eps():
    eps = torch.tensor(1e-3)
    x = torch.stack((torch.tensor(-200.0).sigmoid(), torch.tensor(200.0).sigmoid(), eps)).requires_grad_()
    y = inverse_sigmoid(x)
    y.sum().backward()
    assert y.tolist() == pytest.approx([-6.907755, 6.907755, -6.906755], rel=1e-6)
    assert x.grad.tolist() == pytest.approx([1, 1, 1e3 + 1 / 0.999], rel=1e-6)


@pytest.mark.parametrize("overlap", [iou_and_union, generalized_iou])
def test_both_boxes_have_half_of_an_edge_that_they_share(overlap):
    a, b = (torch.tensor([0.0, 0.0, 1.0, 1.0], dtype=torch.float64).requires_grad_() for _ in range(2))
    iou = overlap(a, b)
    (iou[0] if isinstance(iou, tuple) else iou).backward()
    # Each grows the overlap by half an edge and the union by the other half: what is left is the 1e-6 in the divisor.
    left = 0.5 / (1 + 1e-6) - 0.5 / (1 + 1e-6) ** 2
    assert a.grad.tolist() == pytest.approx([-left, -left, left, left], rel=1e-6)
    assert b.grad.tolist() == pytest.approx(a.grad.tolist(), rel=1e-6)


def test_boxes_that_only_touch_pull_at_each_other():
    a, b = torch.tensor([0.0, 0.0, 0.5, 1.0], requires_grad=True), torch.tensor([0.5, 0.0, 1.0, 1.0])
    iou_and_union(a, b)[0].backward()
    assert a.grad.tolist() == pytest.approx([0, 0, 1, 0], rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_values_are_those_of_torchs_functions(dtype):
    draw = torch.Generator().manual_seed(0)
    edges = torch.rand(80, 4, generator=draw, dtype=dtype)
    boxes = cxcywh_to_xyxy(torch.cat((edges, (edges * 8).round() / 8)))  # the rounded ones have edges in common
    assert torch.equal(generalized_iou(boxes[:, None], boxes), usual(boxes[:, None], boxes))
    x = torch.cat((edges.flatten(), torch.tensor([-1.0, 0, 1e-3, 1 - 1e-3, 1, 2], dtype=dtype)))
    within = x.clamp(0, 1)
    assert torch.equal(inverse_sigmoid(x), torch.log(within.clamp(min=1e-3) / (1 - within).clamp(min=1e-3)))


@pytest.mark.parametrize("place", range(4))
def test_nan_is_not_hidden(place):
    box = torch.tensor([0.2, 0.2, 0.4, 0.4])
    bad = box.clone()
    bad[place] = float("nan")
    for pair in ((box, bad), (bad, box), (bad, bad)):
        assert generalized_iou(*pair).isnan()
    assert inverse_sigmoid(bad).isnan().nonzero().item() == place
