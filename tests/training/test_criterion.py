"""Matching and losses together: equal to the layer-by-layer way, in a tenth of its operations."""

import importlib
from unittest import mock

import detectors
import pytest
import torch
from operations import Operations
from per_layer_losses import per_layer_losses

from dndetr.models.dn_detr import Predictions
from dndetr.ops import _backend, images_of
from dndetr.training.criterion import Criterion

op = importlib.import_module("dndetr.ops.set_loss")


def predictions_of(name):
    logits, boxes, _, layout, targets, _ = op.make_case(name)
    return Predictions(logits.requires_grad_(), boxes.requires_grad_(), layout), targets


def ours(predictions, targets, criterion):
    losses = criterion(predictions, targets)
    return losses.total, losses.parts


def layer_by_layer(predictions, targets, criterion):
    return per_layer_losses(predictions, targets, criterion.cost, criterion.weights)


@pytest.mark.parametrize("name", ["uneven", "no-groups", "coco"])
def test_equal_to_layer_by_layer(name):
    predictions, targets = predictions_of(name)
    results = []
    for function in (ours, layer_by_layer):
        total, parts = function(predictions, targets, Criterion())
        results.append((total, parts, *torch.autograd.grad(total, predictions[:2])))
    torch.testing.assert_close(*results, rtol=2e-5, atol=1e-6)


def test_a_tenth_of_the_operations(extension):
    predictions, targets = predictions_of("coco")
    counts = []
    for function in (ours, layer_by_layer):
        function(predictions, targets, Criterion())  # the first call of an op tests it
        with Operations() as operations:
            function(predictions, targets, Criterion())[0].backward()
        counts.append(operations.count)
    print(f"operations of the criterion, forward and backward: {counts[0]}, layer by layer {counts[1]}")
    assert counts[0] * 10 <= counts[1]


@pytest.mark.parametrize("name", detectors.CONFIGS)
def test_no_gradient_depends_on_what_torch_does_at_a_tie(name, monkeypatch):
    """Of torch's functions with a kink only ReLU is asked for its gradient, which has been none at zero in every
    version; formulas say themselves what clamps, extremes and absolute values do (dndetr/boxes.py, ops/set_loss.py)."""
    monkeypatch.setenv("DNDETR_BACKEND", "reference")
    with mock.patch.dict(_backend._decisions, clear=True):
        step, batch = detectors.make_step(detectors.build(name)), detectors.make_batch([3, 1], 8)
        noised = step.noised(batch, step.draw(batch))
        total = step.criterion(step.model(images_of(batch), batch.sizes, noised), batch.targets).total
    seen, ahead = set(), [total.grad_fn]
    while ahead:
        node = ahead.pop()
        if node is not None and node not in seen:
            seen.add(node)
            ahead += [before for before, _ in node.next_functions]
    assert len(seen) > 100
    kinked = ("Clamp", "Clip", "Max", "Min", "Amax", "Amin", "Abs", "Hardtanh", "Threshold", "L1Loss", "SmoothL1")
    assert not [node.name() for node in seen if node.name().startswith(kinked)]
