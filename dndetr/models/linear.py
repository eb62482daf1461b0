"""Linear layers whose float32 products on a CPU are oneDNN's.

torch sends a float32 ``linear`` on a CPU to MKL, which on processors of other makers than Intel's reaches half of what
oneDNN does with the same numbers (docs/ops.md), and the products of a detector are most of its step there. Only the
order of summation differs. bfloat16 products are oneDNN's in torch as well; everything else takes torch's own way.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_HAS_ONEDNN = torch.backends.mkldnn.is_available()
_NARROW = 16  # inputs or outputs; below, the product is over before what surrounds it


class Linear(nn.Linear):
    """``nn.Linear`` with :func:`linear`."""

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x [..., K], weight [N, K], bias [N] -> x weight^T + bias [..., N]; differentiable once in float32 on a CPU."""
    onednn = (
        x.dtype == torch.float32
        and x.is_cpu
        and weight.dtype == torch.float32
        and _HAS_ONEDNN
        and x.numel() > 0
        and min(weight.shape) >= _NARROW
        and not torch.is_autocast_enabled("cpu")
        and not torch.compiler.is_compiling()
    )
    if not onednn:
        return F.linear(x, weight, bias)
    return _Linear.apply(x.reshape(-1, x.shape[-1]), weight, bias).view(*x.shape[:-1], len(weight))


def _product(a: Tensor, b: Tensor, bias: Tensor | None = None) -> Tensor:
    """a [M, K], b [N, K] of any strides -> a b^T + bias [M, N]."""
    return torch.ops.mkldnn._linear_pointwise(a, b, bias, "none", [], "")


def _weight_gradient(grad_out: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    """grad_out^T x [N, K], as a 1x1 convolution over a channels-last image has it, which needs no transposed copies."""
    grad_image, image = (rows.contiguous()[None, :, None].permute(0, 3, 1, 2) for rows in (grad_out, x))
    # A dilation that a 1x1 kernel cannot feel: without it torch leaves oneDNN where there is one thread.
    strides, padding, dilation, wanted = [1, 1], [0, 0], [2, 2], [False, True, False]
    _, gradient, _ = torch.ops.aten.convolution_backward(
        grad_image, image, weight[..., None, None], None, strides, padding, dilation, False, [0, 0], 1, wanted
    )
    return gradient.view(weight.shape)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias):
        ctx.save_for_backward(x, weight)
        return _product(x, weight, bias)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_out):
        x, weight = ctx.saved_tensors
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad
        grad_x = _product(grad_out, weight.t()) if needs_x else None
        grad_weight = _weight_gradient(grad_out, x, weight) if needs_weight else None
        return grad_x, grad_weight, grad_out.sum(0) if needs_bias else None
