"""Training steps of Hugging Face detectors, and whether two of them are equal."""

import torch
from hf_models import labels, pixels


def look_far(model):
    """The model, with weights that make deformable attention look far away, and never exactly at a pixel's centre."""
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "sampling_offsets" in key or "attention_weights" in key:
                parameter += 0.3 * torch.randn_like(parameter)
    return model


def step(model, counts=(4, 0, 2)) -> tuple[dict, dict]:
    """Outputs and gradients of a step with padding in one image."""
    model.zero_grad()
    torch.manual_seed(1)
    mask = torch.ones(len(counts), 64, 96, dtype=torch.int64)
    mask[0, 48:] = 0
    output = model(pixels(len(counts)), pixel_mask=mask, labels=labels(*counts))
    output.loss.backward()
    results = {"loss": output.loss.detach(), "logits": output.logits.detach(), "boxes": output.pred_boxes.detach()}
    results |= {key: value.detach() for key, value in output.loss_dict.items() if isinstance(value, torch.Tensor)}
    return results, {key: p.grad.clone() for key, p in model.named_parameters() if p.grad is not None}


def assert_equal_steps(first, second):
    """Equal to 1e-4; gradients also to 1e-5 of the largest, for some are rounding noise around zero."""
    (outputs, gradients), (new_outputs, new_gradients) = first, second
    assert outputs.keys() == new_outputs.keys() and gradients.keys() == new_gradients.keys()
    for key, value in outputs.items():
        torch.testing.assert_close(new_outputs[key], value, rtol=1e-4, atol=1e-4, msg=key)
    largest = max(float(value.abs().max()) for value in gradients.values())
    for key, value in gradients.items():
        torch.testing.assert_close(new_gradients[key], value, rtol=1e-4, atol=1e-5 * largest, msg=key)
