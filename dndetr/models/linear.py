"""Linear layers whose float32 products on a CPU are oneDNN's, their weights' gradients ours, and ReLUs done in place.

torch sends a float32 ``linear`` on a CPU to MKL, which on processors of other makers than Intel's reaches half of what
oneDNN does with the same numbers (docs/ops.md), and the products of a detector are most of its step there. Only the
order of summation differs. bfloat16 products are oneDNN's in torch as well; everything else takes torch's own way.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops.weight_gradients import weight_gradients

_HAS_ONEDNN = torch.backends.mkldnn.is_available()
_NARROW = 16  # inputs or outputs; below, the product is over before what surrounds it


class Linear(nn.Linear):
    """``nn.Linear`` with :func:`linear`."""

    def forward(self, x: Tensor, relu: bool = False) -> Tensor:
        return linear(x, self.weight, self.bias, relu)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, relu: bool = False) -> Tensor:
    """x [..., K], weight [N, K], bias [N] -> x weight^T + bias [..., N], its positive part with ``relu``.

    Differentiable once in float32 on a CPU.
    """
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
    if not onednn and not relu:
        return F.linear(x, weight, bias)
    # Rows, as a product makes them: what changes a view of it in place costs three copies of the gradient backwards.
    rows = x.reshape(-1, x.shape[-1])
    out = _Linear.apply(rows, weight, bias, relu) if onednn else F.linear(rows, weight, bias).relu_()
    return out.view(*x.shape[:-1], len(weight))


def _product(a: Tensor, b: Tensor, bias: Tensor | None = None) -> Tensor:
    """a [M, K], b [N, K] of any strides -> a b^T + bias [M, N]."""
    return torch.ops.mkldnn._linear_pointwise(a, b, bias, "none", [], "")


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, relu):
        out = _product(x, weight, bias)
        if relu:
            out.relu_()
        ctx.save_for_backward(x, weight, out if relu else None)
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_out):
        x, weight, out = ctx.saved_tensors
        needs_x, needs_weight, needs_bias, _ = ctx.needs_input_grad
        if out is not None:
            grad_out = torch.ops.aten.threshold_backward(grad_out, out, 0)
        grad_x = _product(grad_out, weight.t()) if needs_x else None
        if needs_weight:
            grad_weight, grad_bias = weight_gradients(grad_out, x)
        else:
            grad_weight, grad_bias = None, grad_out.sum(0) if needs_bias else None
        return grad_x, grad_weight, grad_bias if needs_bias else None, None
