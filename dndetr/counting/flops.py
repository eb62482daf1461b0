"""Floating-point operations of products and convolutions; a multiplication and an addition count as two."""

from collections.abc import Callable

import torch
from torch.utils.flop_counter import FlopCounterMode, flop_registry, shape_wrapper

from .. import ops  # noqa: F401  (defines our ops)


def _linear_pointwise(a: torch.Size, b: torch.Size, *_, out_shape=None, **__) -> int:
    """oneDNN's a [..., K] times b [N, K] transposed."""
    return 2 * a.numel() * b[0]


def _addmm(added: torch.Size, a: torch.Size, b: torch.Size, out_shape=None, **__) -> int:
    """a [M, K] times b [K, N]."""
    return 2 * a.numel() * b[1]


def _conv3x3(x: torch.Size, weight: torch.Size, bias, stride: int, out_shape: torch.Size) -> int:
    """weight [K, C, 3, 3], out [B, K, H, W]: as the definition has it, however it is computed."""
    return 2 * weight.numel() * out_shape[0] * out_shape[2] * out_shape[3]


def _conv3x3_backward(grad_out, x, weight, stride: int, needs_x: bool, needs_weight: bool, out_shape=None) -> int:
    return (needs_x + needs_weight) * _conv3x3(x, weight, None, stride, grad_out)


def _weight_gradients(grad_out: torch.Size, x: torch.Size, out_shape=None) -> int:
    """grad_out [M, N], x [M, K]."""
    return 2 * x.numel() * grad_out[1]


def _activated_product(x: torch.Size, weight: torch.Size, *_, out_shape=None) -> int:
    """x [M, K], weight [N, K]."""
    return 2 * x.numel() * weight[0]


def _activated_product_backward(grad: torch.Size, weight: torch.Size, *_, out_shape=None) -> int:
    """grad [M, K], weight [K, N]."""
    return 2 * grad.numel() * weight[1]


# What torch's counter does not know, and what it is counted as.
FORMULAS = {
    torch.ops.aten.addmm_: _addmm,
    torch.ops.dndetr.activated_product: _activated_product,
    torch.ops.dndetr.activated_product_backward: _activated_product_backward,
    torch.ops.dndetr.conv3x3: _conv3x3,
    torch.ops.dndetr.conv3x3_backward: _conv3x3_backward,
    torch.ops.dndetr.weight_gradients: _weight_gradients,
}
if hasattr(torch.ops.mkldnn, "_linear_pointwise"):
    FORMULAS[torch.ops.mkldnn._linear_pointwise] = _linear_pointwise


def operations(function: Callable[[], object]) -> dict[str, int]:
    """Floating-point operations of a call by kind; our other ops, attention too, count as none."""
    with FlopCounterMode(display=False, custom_mapping=FORMULAS) as counter:
        function()
    counted = {"products": 0, "convolutions": 0, "3x3 convolutions": 0}
    for operation, count in counter.get_flop_counts()["Global"].items():
        name = str(operation)
        kind = "3x3 convolutions" if "conv3x3" in name else "convolutions" if "conv" in name else "products"
        counted[kind] += count
    return counted


def flop_of(operation: torch._ops.OpOverload, args: tuple, kwargs: dict, result) -> int | None:
    """Those of a product or convolution that was dispatched, as torch counts them; None for another operation."""
    packet = operation.overloadpacket
    formula = shape_wrapper(FORMULAS[packet]) if packet in FORMULAS else flop_registry.get(packet)
    return None if formula is None else int(formula(*args, **kwargs, out_val=result))
