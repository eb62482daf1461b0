"""Sine encodings of anchors, in one kernel each way.

phase = 2 pi coordinate / 10000^(2k / D)        out = sin phase, cos phase in channels 2k and 2k + 1 of D

grad coordinate = sum_k (grad sin cos phase - grad cos sin phase) 2 pi / 10000^(2k / D)
"""

import torch
from torch import Tensor

from . import _backend
from ._sine_encodings import anchor_encoding_reference

torch.library.define("dndetr::anchor_encoding", "(Tensor boxes, int channels) -> Tensor")
torch.library.define("dndetr::anchor_encoding_backward", "(Tensor grad, Tensor boxes) -> Tensor")


@torch.library.impl("dndetr::anchor_encoding", ("cpu", "cuda"))
def _forward(boxes, channels):
    from ..kernels.anchor_encoding import anchor_encoding

    out = _forward_fake(boxes, channels)
    with torch.cuda.device_of(out):
        anchor_encoding(_rows(boxes), channels, out)
    return out


@torch.library.impl("dndetr::anchor_encoding_backward", ("cpu", "cuda"))
def _backward(grad, boxes):
    from ..kernels.anchor_encoding import anchor_encoding_backward

    grad_boxes = _backward_fake(grad, boxes)
    with torch.cuda.device_of(boxes):
        anchor_encoding_backward(grad.contiguous(), _rows(boxes), grad.shape[-1] // boxes.shape[-1], grad_boxes)
    return grad_boxes


def _rows(boxes: Tensor) -> Tensor:
    """[N, 4], a view where numbers of an anchor lie side by side and anchors equally far apart."""
    rows = boxes.reshape(-1, boxes.shape[-1])
    return rows if rows.stride(1) == 1 else rows.contiguous()


@torch.library.register_fake("dndetr::anchor_encoding")
def _forward_fake(boxes, channels):
    return boxes.new_empty((*boxes.shape[:-1], boxes.shape[-1] * channels))


@torch.library.register_fake("dndetr::anchor_encoding_backward")
def _backward_fake(grad, boxes):
    return boxes.new_empty(boxes.shape)


def _setup_context(ctx, inputs, output):
    ctx.save_for_backward(inputs[0])


def _differentiate(ctx, grad):
    return torch.ops.dndetr.anchor_encoding_backward(grad, *ctx.saved_tensors), None


torch.library.register_autograd("dndetr::anchor_encoding", _differentiate, setup_context=_setup_context)
_backend.differentiable_once("anchor_encoding")


def anchor_encoding(boxes: Tensor, channels: int, backend: str | None = None) -> Tensor:
    """Sine encoding of anchors, ``channels`` per coordinate at temperature 10000.

    boxes [..., 4] cxcywh (or [..., 2]) -> [..., 4 * channels] in the order y, x, w, h. The kernel's result can be
    differentiated once.
    """
    takes = boxes.dtype == torch.float32 and boxes.numel() > 0 and channels % 2 == 0
    if not takes or _backend.choose("anchor_encoding", backend, boxes.device.type)[0] == "reference":
        return anchor_encoding_reference(boxes, channels)
    return torch.ops.dndetr.anchor_encoding(boxes, channels)


# name: (shape, channels)
CASES = {
    "one": ((4,), 2),
    "nobody": ((2, 0, 4), 16),
    "queries": ((2, 173, 4), 128),
    "centres": ((2, 30, 2), 64),
    "uneven": ((5, 7, 4), 10),
}


def make_case(name: str, device: str = "cpu", seed: int = 0) -> tuple[Tensor, int]:
    """(boxes, channels) of a case."""
    shape, channels = CASES[name]
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)).to(device), channels


def _self_test(device_type: str) -> float:
    boxes, channels = make_case("queries", device_type)
    exact = boxes.double().requires_grad_()
    with torch.enable_grad():
        result = anchor_encoding_reference(exact, channels)
    weighting = torch.linspace(-1, 1, result.numel(), device=device_type).view(result.shape)
    expected = result.detach(), *torch.autograd.grad(result, exact, weighting.double())
    found = torch.ops.dndetr.anchor_encoding(boxes, channels)
    found = found, torch.ops.dndetr.anchor_encoding_backward(weighting, boxes)
    return _backend.error_beyond_rounding(found, expected)


_backend.register(
    "anchor_encoding",
    _backend.Backend("triton", ("cuda",), _backend.triton_obstacle, _self_test, tolerance=1e-5),
)
