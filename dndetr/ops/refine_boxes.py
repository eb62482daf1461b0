"""A decoder layer's boxes: what its head corrects, added to the logits of the boxes before.

    out = sigmoid(correction + inverse_sigmoid(boxes))        s = grad out (1 - out) out

    grad correction = s        grad boxes = s / boxes + s / (1 - boxes)

with :func:`~dndetr.boxes.inverse_sigmoid`'s bounds: a term is none where its divisor was raised to eps, and both are
beyond 0 and 1. All in at least float32, gradients rounded once.
"""

import torch
from torch import Tensor

from ..boxes import EPS, inverse_sigmoid
from . import _backend


def refine_boxes_reference(correction: Tensor, boxes: Tensor, eps: float = EPS) -> Tensor:
    """The specification in plain torch; arguments and result as :func:`refine_boxes`."""
    return (correction + inverse_sigmoid(boxes, eps)).sigmoid()


torch.library.define("dndetr::refine_boxes", "(Tensor correction, Tensor boxes, float eps) -> Tensor")
torch.library.define(
    "dndetr::refine_boxes_backward",
    "(Tensor grad, Tensor out, Tensor boxes, float eps, ScalarType? correction, bool needs_boxes) -> (Tensor, Tensor)",
)


@torch.library.impl("dndetr::refine_boxes", ("cpu", "cuda"))
def _forward(correction, boxes, eps):
    from ..kernels.refine_boxes import refine_boxes

    out = _forward_fake(correction, boxes, eps)
    with torch.cuda.device_of(out):
        refine_boxes(correction.contiguous(), boxes.contiguous(), eps, out)
    return out


@torch.library.impl("dndetr::refine_boxes_backward", ("cpu", "cuda"))
def _backward(grad, out, boxes, eps, correction, needs_boxes):
    from ..kernels.refine_boxes import refine_boxes_backward

    grads = grad_correction, grad_boxes = _backward_fake(grad, out, boxes, eps, correction, needs_boxes)
    asked = None if correction is None else grad_correction, grad_boxes if needs_boxes else None
    with torch.cuda.device_of(out):
        refine_boxes_backward(grad.contiguous(), out, boxes.contiguous(), eps, *asked)
    return grads


@torch.library.register_fake("dndetr::refine_boxes")
def _forward_fake(correction, boxes, eps):
    return correction.new_empty(correction.shape, dtype=torch.float32)


@torch.library.register_fake("dndetr::refine_boxes_backward")
def _backward_fake(grad, out, boxes, eps, correction, needs_boxes):
    return (
        grad.new_empty(0) if correction is None else grad.new_empty(grad.shape, dtype=correction),
        boxes.new_empty(boxes.shape if needs_boxes else 0),
    )


def _setup_context(ctx, inputs, output):
    correction, boxes, ctx.eps = inputs
    ctx.correction = correction.dtype
    ctx.save_for_backward(output, boxes)


def _differentiate(ctx, grad):
    needs_correction, needs_boxes, _ = ctx.needs_input_grad
    correction = ctx.correction if needs_correction else None
    grads = torch.ops.dndetr.refine_boxes_backward(grad, *ctx.saved_tensors, ctx.eps, correction, needs_boxes)
    return grads[0] if needs_correction else None, grads[1] if needs_boxes else None, None


torch.library.register_autograd("dndetr::refine_boxes", _differentiate, setup_context=_setup_context)
_backend.differentiable_once("refine_boxes")


def refine_boxes(correction: Tensor, boxes: Tensor, backend: str | None = None, *, eps: float = EPS) -> Tensor:
    """correction [...] of logits, boxes [...] in [0, 1] -> corrected boxes [...] in at least float32.

    eps: as of :func:`~dndetr.boxes.inverse_sigmoid`. The kernel's result can be differentiated once. ValueError for two
    shapes.
    """
    if correction.shape != boxes.shape:
        raise ValueError(f"refine_boxes: boxes must be {list(correction.shape)}, got {list(boxes.shape)}")
    dtypes = (torch.float32, torch.bfloat16, torch.float16)
    takes = correction.dtype in dtypes and boxes.dtype in dtypes and boxes.numel() > 0
    if not takes or _backend.choose("refine_boxes", backend, boxes.device.type)[0] == "reference":
        return refine_boxes_reference(correction, boxes, eps)
    return torch.ops.dndetr.refine_boxes(correction, boxes, eps)


# name: (shape, dtype of corrections, dtype of boxes)
CASES = {
    "one": ((1,), torch.float32, torch.float32),
    "nobody": ((2, 0, 4), torch.bfloat16, torch.float32),
    "mixed": ((2, 173, 4), torch.bfloat16, torch.float32),
    "f32": ((2, 300, 4), torch.float32, torch.float32),
    "half": ((3, 50, 4), torch.float16, torch.float16),
    "bf16": ((3, 50, 4), torch.bfloat16, torch.bfloat16),
    "f64": ((2, 7, 4), torch.float64, torch.float64),
}


def make_case(name: str, device: str = "cpu", seed: int = 0) -> tuple[Tensor, Tensor]:
    """(correction, boxes) of a case; boxes also at both bounds, within eps of them and beyond."""
    shape, *dtypes = CASES[name]
    draw = torch.Generator().manual_seed(seed)
    correction, boxes = torch.randn(shape, generator=draw), torch.rand(shape, generator=draw)
    for first, value in enumerate((0.0, 1.0, 2e-4, 1 - 2e-4, -0.3, 1.4)):
        boxes.view(-1)[7 + first :: 29] = value
    return tuple(x.to(device, dtype) for x, dtype in zip((correction, boxes), dtypes, strict=True))


def _self_test(device_type: str) -> float:
    correction, boxes = make_case("mixed", device_type)
    exact = [each.double().requires_grad_() for each in (correction, boxes)]
    weighting = torch.linspace(-1, 1, boxes.numel(), device=device_type).view(boxes.shape)
    with torch.enable_grad():
        result = refine_boxes_reference(*exact)
    expected = result.detach(), *torch.autograd.grad(result, exact, weighting.double())
    out = torch.ops.dndetr.refine_boxes(correction, boxes, EPS)
    found = out, *torch.ops.dndetr.refine_boxes_backward(weighting, out, boxes, EPS, correction.dtype, True)
    return _backend.error_beyond_rounding(found, expected)


_backend.register(
    "refine_boxes",
    _backend.Backend("triton", ("cuda",), _backend.triton_obstacle, _self_test, tolerance=1e-5),
)
