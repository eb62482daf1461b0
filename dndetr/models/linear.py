"""Linear layers whose float32 products on a CPU are oneDNN's, their weights' gradients ours, and ReLUs done in place.

torch sends a float32 ``linear`` on a CPU to MKL, which on processors of other makers than Intel's reaches half of what
oneDNN does with the same numbers (docs/ops.md), and the products of a detector are most of its step there. Only the
order of summation differs. bfloat16 products are oneDNN's in torch as well.

On a GPU in half precision, products are torch's; backward, one short kernel of ours takes the gradient of a ReLU or of
a PReLU with one slope, and adds up those of the bias and the slope. Everything else, and all that torch
compiles, traces or transforms, takes torch's own way.
"""

import warnings

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops._backend import plain_torch_only
from ..ops.column_sums import column_sums, prelu_column_sums, relu_column_sums
from ..ops.prelu import prelu
from ..ops.weight_gradients import weight_gradients
from . import activations

_HAS_ONEDNN = torch.backends.mkldnn.is_available()
_NARROW = 16  # inputs or outputs; below, the product is over before what surrounds it


class Linear(nn.Linear):
    """``nn.Linear`` with :func:`linear`."""

    def forward(self, x: Tensor, relu: bool = False, slope: Tensor | None = None) -> Tensor:
        return linear(x, self.weight, self.bias, relu, slope)

    @property
    def qconfig(self):
        """How torch.ao.quantization would convert the layer, once it has asked."""
        return self._qconfig

    @qconfig.setter
    def qconfig(self, config) -> None:
        # It looks for nn.Linear itself, not for what derives from it, and says nothing of what it passes over.
        warnings.warn(
            "torch.ao.quantization converts no dndetr.models.linear.Linear, which stays as it is: quantise a model of "
            "dndetr.accelerate after undo()",
            stacklevel=2,
        )
        self._qconfig = config

    @qconfig.deleter
    def qconfig(self) -> None:
        del self._qconfig


def linear(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, relu: bool = False, slope: Tensor | None = None
) -> Tensor:
    """x [..., K], weight [N, K], bias [N] -> x weight^T + bias [..., N], its positive part with ``relu``.

    With a ``slope`` [1] instead of ``relu`` what a PReLU makes of it. Differentiable once in float32 on a CPU, and with
    a bias in half precision on a GPU. ValueError for both.
    """
    if relu and slope is not None:
        raise ValueError("linear: a ReLU or a slope may follow, not both")
    if torch.compiler.is_compiling() or plain_torch_only():
        out = F.linear(x, weight, bias)
        return F.prelu(out, slope) if slope is not None else out.relu() if relu else out
    onednn = (
        x.dtype == torch.float32
        and x.is_cpu
        and weight.dtype == torch.float32
        and _HAS_ONEDNN
        and x.numel() > 0
        and min(weight.shape) >= _NARROW
        and type(weight) in (Tensor, nn.Parameter)  # not one that quantisation or sharding put in its place
        and not torch.is_autocast_enabled("cpu")
    )
    half = None if bias is None else half_precision(x, weight)
    if slope is not None and half is None:
        return activations.prelu(linear(x, weight, bias), slope)
    if not onednn and half is None and not relu:
        return F.linear(x, weight, bias)
    # Rows, as a product makes them: what changes a view of it in place costs three copies of the gradient backwards.
    rows = x.reshape(-1, x.shape[-1])
    if onednn:
        out = _Linear.apply(rows, weight, bias, relu)
    elif half is not None:
        out = _HalfLinear.apply(rows.to(half), weight.to(half), bias.to(half), relu, slope)
    else:
        out = F.linear(rows, weight, bias).relu_()
    return out.view(*x.shape[:-1], len(weight))


def linears(x: Tensor, *layers: nn.Module) -> Tensor:
    """x [..., K] through layers beside each other -> their results [..., N of all], by one product where it may be.

    Layers that others have replaced, hooked or wrapped are called one by one.
    """
    if not all(type(layer) is Linear and not _hooked(layer) for layer in layers):
        return torch.cat([layer(x) for layer in layers], dim=-1)
    weight, bias = (torch.cat([getattr(layer, name) for layer in layers]) for name in ("weight", "bias"))
    return linear(x, weight, bias)


def _hooked(layer: nn.Module) -> bool:
    """Whether a call of the layer does more than its forward method."""
    return any(
        (layer._forward_hooks, layer._forward_pre_hooks, layer._backward_hooks, layer._backward_pre_hooks)
    ) or "forward" in vars(layer)


def half_precision(x: Tensor, weight: Tensor) -> torch.dtype | None:
    """The half-precision type in which a GPU multiplies these, itself or under autocast; None for other products."""
    if torch.compiler.is_compiling() or plain_torch_only() or not x.is_cuda or x.numel() == 0:
        return None
    dtypes = {x.dtype, weight.dtype}
    if torch.is_autocast_enabled("cuda") and torch.float64 not in dtypes:
        dtypes = {torch.get_autocast_dtype("cuda")}
    return dtypes.pop() if dtypes in ({torch.bfloat16}, {torch.float16}) else None


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


class _HalfLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, relu, slope):
        out = F.linear(x, weight, bias)
        kept = None
        if relu:
            # Not as the product's epilogue (torch._addmm_activation): it may turn NaN into zero and hide it.
            kept = out.relu_()
        elif slope is not None:
            kept, out = out, prelu(out, slope)
        ctx.save_for_backward(x, weight, kept, slope)
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_out):
        x, weight, kept, slope = ctx.saved_tensors
        needs_x, needs_weight, needs_bias, _, needs_slope = ctx.needs_input_grad
        grad_bias = grad_slope = None
        if slope is not None:
            grad_out, grad_bias, grad_slope = prelu_column_sums(grad_out, kept, slope)
        elif kept is None:
            grad_out = grad_out.contiguous()
            if needs_bias:
                grad_bias = column_sums(grad_out)
        elif needs_bias:
            grad_out, grad_bias = relu_column_sums(grad_out, kept)
        else:
            grad_out = torch.ops.aten.threshold_backward(grad_out, kept, 0)
        grad_x = grad_out @ weight if needs_x else None
        grad_weight = grad_out.t() @ x if needs_weight else None
        return grad_x, grad_weight, grad_bias if needs_bias else None, None, grad_slope if needs_slope else None
