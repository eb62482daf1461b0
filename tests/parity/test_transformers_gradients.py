"""Gradients of every parameter in the detectors of transformers, and in ours with the same weights, in float64."""

import copy
from functools import partial

import pytest
import torch
import transformers_detectors

from dndetr.hf.detector_config import from_transformers
from dndetr.models.build import build_model
from dndetr.models.weights.transformers_detectors import from_detector, of_denoising_alone

CLASSES = transformers_detectors.CLASSES


def weighted(layers):
    """One number of all layers' logits and boxes, each with a weight of its own."""
    total = 0
    for logits, boxes in layers:
        for output in (logits, boxes):
            total = total + (output * torch.linspace(-1, 1, output.numel(), dtype=output.dtype).view_as(output)).sum()
    return total


@pytest.mark.parametrize("name", transformers_detectors.VARIANTS)
def test_gradients(monkeypatch, name):
    theirs = transformers_detectors.VARIANTS[name]().double().requires_grad_(True)
    if name in ("deformable-box-refinement", "deformable-5-levels"):
        # Made anew, these share a class head; files of trained ones have one for each layer.
        theirs.class_embed = torch.nn.ModuleList(map(copy.deepcopy, theirs.class_embed))
        for head in theirs.class_embed:
            torch.nn.init.normal_(head.weight)
    config, _ = from_transformers(theirs.config.to_dict(), {})
    model = build_model(config.model, CLASSES).double().eval().requires_grad_(True)
    state = theirs.state_dict()
    weights = from_detector(state, config.model, CLASSES)
    model.load_state_dict({name: value.double() for name, value in weights.items()})
    # DAB-DETR of transformers makes its queries in the default dtype, whatever its own.
    monkeypatch.setattr(torch, "zeros", partial(torch.zeros, dtype=torch.float64))
    images, sizes, mask = transformers_detectors.pair()
    labels = [{"class_labels": torch.tensor([1]), "boxes": torch.tensor([[0.5, 0.5, 0.3, 0.2]]).double()}] * 2

    found = model(images.double(), sizes)
    ours = [*zip(found.logits[found.proposals :], found.boxes[found.proposals :], strict=True)]
    output = theirs(pixel_values=images.double(), pixel_mask=mask, labels=labels)
    layers = [(layer["logits"], layer["pred_boxes"]) for layer in output.auxiliary_outputs]
    layers.append((output.logits, output.pred_boxes))
    close = 1e-6  # theirs encodes positions in float32
    for mine, its in zip(ours, layers, strict=True):
        torch.testing.assert_close(mine, its, rtol=close, atol=close)
    weighted(ours).backward()
    weighted(layers).backward()

    own = theirs.state_dict(keep_vars=True)  # shared heads have the gradient under each of their names
    grads = {n: torch.zeros_like(value) if value.grad is None else value.grad for n, value in own.items()}
    expected = from_detector(grads, config.model, CLASSES)
    whole = max(float(grad.abs().max()) for grad in expected.values())
    compared = 0
    for name, parameter in model.named_parameters():
        if name in of_denoising_alone([name]):
            continue
        grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        scale = float(expected[name].abs().max())
        # Expected ones come through float32.
        torch.testing.assert_close(grad, expected[name].double(), rtol=1e-5, atol=1e-5 * scale + 1e-7 * whole, msg=name)
        compared += bool(scale)
    assert compared > 0.8 * len([*model.parameters()])
