"""Activations of feed-forward blocks."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops._backend import plain_torch_only


class PReLU(nn.PReLU):
    """``nn.PReLU`` with one slope, whose gradients on a CPU are whole-tensor operations.

    torch's own kernel takes many times as long for them as for the output there.
    """

    def forward(self, x: Tensor) -> Tensor:
        return prelu(x, self.weight)


def prelu(x: Tensor, slope: Tensor) -> Tensor:
    """x [...], slope [1] or one for each channel -> as ``F.prelu``; :class:`PReLU` as a function."""
    if torch.compiler.is_compiling() or plain_torch_only():
        return F.prelu(x, slope)
    ours = (
        x.is_cpu
        and x.dtype == slope.dtype == torch.float32
        and x.dim() > 0
        and slope.numel() == 1
        and not torch.is_autocast_enabled("cpu")
    )
    return _PReLU.apply(x, slope) if ours else F.prelu(x, slope)


class _PReLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, slope):
        ctx.save_for_backward(x, slope)
        return F.prelu(x, slope)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_out):
        x, slope = ctx.saved_tensors
        above = torch.ops.aten.threshold_backward(grad_out, x, 0)
        grad_slope = torch.dot(grad_out.reshape(-1), x.clamp(max=0).reshape(-1)).view(1)
        return above.lerp_(grad_out, slope), grad_slope


def activation(name: str) -> nn.Module:
    """ "prelu" (one learned slope, the official default for DAB) or "gelu"; "relu" is part of a linear layer."""
    choices = {"prelu": PReLU, "gelu": nn.GELU}
    if name not in choices:
        raise ValueError(f"unknown activation {name!r}: choose one of relu, {', '.join(choices)}")
    return choices[name]()
