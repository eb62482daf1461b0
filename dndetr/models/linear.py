"""Linear layers whose float32 products on a CPU are the fastest there are, and ReLUs done in place.

torch sends a float32 ``linear`` on a CPU to MKL, which on processors of other makers than Intel's reaches half of what
oneDNN does with the same numbers (docs/ops.md), and the products of a detector are most of its step there. So they are
oneDNN's there, their weights' gradients ours; only the order of summation differs. On Intel's, MKL is ahead of both.
bfloat16 products are oneDNN's in torch as well.

On a GPU in half precision, products with a ReLU or a PReLU with one slope behind them are ours, and so are those that
give the gradient of what such an activation was given; the others are torch's. One short kernel of ours adds up the
gradient of a bias. Everything else, and all that torch compiles, traces or transforms, takes torch's own way.
"""

import functools
import platform
import warnings
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops._backend import plain_torch_only
from ..ops.activated_product import activated_product, activated_product_backward
from ..ops.column_sums import column_sums, prelu_column_sums, relu_column_sums
from ..ops.weight_gradients import weight_gradients
from . import activations

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


@functools.cache
def onednn_is_faster() -> bool:
    """Whether oneDNN is there and multiplies float32 numbers faster than torch's own choice, MKL, on this processor."""
    about = Path("/proc/cpuinfo")
    maker = about.read_text().partition("\n\n")[0] if about.is_file() else platform.processor()
    mkl_is_fast = torch.backends.mkl.is_available() and "GenuineIntel" in maker
    return torch.backends.mkldnn.is_available() and not mkl_is_fast


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
        and onednn_is_faster()
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
        out = _half_layers(rows.to(half), relu or slope is not None, slope, weight.to(half), bias.to(half))
    else:
        out = F.linear(rows, weight, bias).relu_()
    return out.view(*x.shape[:-1], len(weight))


def linear_layers(x: Tensor, layers: Sequence[Linear], slope: Tensor | None = None) -> Tensor:
    """x [..., K] through the layers, with a ReLU, or with a ``slope`` [1] a PReLU, between each two -> [..., N].

    In half precision on a GPU all of them are one step of the gradient, unless a layer has hooks or no bias.
    Differentiable as :func:`linear`.
    """
    half = shared_half_precision(x, layers)
    if half is not None:
        parameters = [each.to(half) for layer in layers for each in (layer.weight, layer.bias)]
        rows = x.reshape(-1, x.shape[-1]).to(half)
        return _half_layers(rows, len(layers) - 1, slope, *parameters).view(*x.shape[:-1], -1)
    *hidden, last = layers
    for layer in hidden:
        x = layer(x, relu=slope is None, slope=slope)
    return last(x)


def parallel_linear(x: Tensor, *layers: nn.Module) -> Tensor:
    """x [..., K] through layers beside each other -> their results [..., N of all], by one product where it may be.

    In half precision on a GPU, that is. Layers that others have replaced, hooked or wrapped are called one by one.
    """
    if shared_half_precision(x, layers) is None:
        return torch.cat([layer(x) for layer in layers], dim=-1)
    weight, bias = (torch.cat([getattr(layer, name) for layer in layers]) for name in ("weight", "bias"))
    return linear(x, weight, bias)


def linear_each(x: Tensor, layers: Sequence[nn.Module]) -> list[Tensor]:
    """x [..., K] through each of the layers -> their results [..., N], one each.

    In half precision on a GPU all of them are one step of the gradient, unless a layer has hooks or no bias: their
    gradients of x are added within products. It begins when all results have theirs. Differentiable as :func:`linear`.
    """
    half = shared_half_precision(x, layers) if torch.is_grad_enabled() else None
    if half is None:
        return [layer(x) for layer in layers]
    parameters = [each.to(half) for layer in layers for each in (layer.weight, layer.bias)]
    results = _HalfEach.apply(x.reshape(-1, x.shape[-1]).to(half), *parameters)
    return [result.view(*x.shape[:-1], -1) for result in results]


def _is_bare(layer: nn.Module) -> bool:
    """Whether calling the layer is nothing but its product and its bias."""
    return type(layer) is Linear and layer.bias is not None and not is_watched(layer)


def is_watched(module: nn.Module) -> bool:
    """Whether hooks, or a forward of its own, see what goes into the module and comes out."""
    hooks = module._forward_pre_hooks, module._forward_hooks, module._backward_pre_hooks, module._backward_hooks
    return any(hooks) or "forward" in vars(module) or nn.modules.module._has_any_global_hook()


def shared_half_precision(x: Tensor, layers: Sequence[nn.Module]) -> torch.dtype | None:
    """The half-precision type in which a GPU multiplies x with all these layers, of which nobody else sees anything."""
    if not all(map(_is_bare, layers)):  # first, as what others put in a layer's place need not have a weight
        return None
    found = {half_precision(x, layer.weight) for layer in layers}
    return found.pop() if len(found) == 1 else None


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


def _half_layers(x: Tensor, activated: int, slope: Tensor | None, *parameters: Tensor) -> Tensor:
    """x [M, K] through layers of ``parameters`` weight, bias, ...; an activation follows the first ``activated``."""
    if torch.is_grad_enabled():
        return _HalfLayers.apply(x, activated, slope, *parameters)
    return _through(x, activated, slope, parameters, keep=False)[0]


def _through(x, activated, slope, parameters, keep):
    """Result, inputs of all layers, and what the activations' gradients take; the lists are empty without ``keep``."""
    inputs, kept = [], []
    for index, (weight, bias) in enumerate(zip(parameters[::2], parameters[1::2], strict=True)):
        inputs += [x] * keep
        if index < activated:
            x, of_activation = activated_product(x, weight, bias, slope, keep)
            kept += [of_activation] * keep
        else:
            x = F.linear(x, weight, bias)
    return x, inputs, kept


class _HalfLayers(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, activated, slope, *parameters):
        out, inputs, kept = _through(x, activated, slope, parameters, keep=True)
        ctx.layers = len(inputs)
        ctx.save_for_backward(slope, *inputs, *parameters[::2], *kept)
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        slope, *saved = ctx.saved_tensors
        layers = ctx.layers
        inputs, weights, kept = saved[:layers], saved[layers : 2 * layers], saved[2 * layers :]
        needs_x, _, needs_slope, *needs = ctx.needs_input_grad
        grads, of_slopes, grad_x, sums = [None] * len(needs), [], None, None
        if len(kept) < layers:
            grad = grad.contiguous()
            sums = column_sums(grad) if needs[-1] else None
        elif slope is None:
            grad, sums = relu_column_sums(grad, kept[-1])
        else:
            grad, sums, of_slope = prelu_column_sums(grad, kept[-1], slope)
            of_slopes.append(of_slope)
        for index in reversed(range(layers)):
            grads[2 * index + 1] = sums if needs[2 * index + 1] else None
            if needs[2 * index]:
                grads[2 * index] = grad.t() @ inputs[index]
            if not (needs_x or any(needs[: 2 * index]) or (needs_slope and index > 0)):
                break
            if index == 0:
                grad_x = grad @ weights[0]
            else:
                grad, sums, of_slope = activated_product_backward(grad, weights[index], kept[index - 1], slope)
                of_slopes.append(of_slope)
        grad_slope = functools.reduce(torch.add, of_slopes) if needs_slope and of_slopes else None
        return grad_x, None, grad_slope, *grads


class _HalfEach(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, *parameters):
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, *parameters[::2])
        return tuple(F.linear(x, *each) for each in zip(parameters[::2], parameters[1::2], strict=True))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, *grads):
        x, *weights = ctx.saved_tensors
        needs_x, *needs = ctx.needs_input_grad
        grad_x, of_parameters = None, [None] * len(needs)
        for index, (grad, weight) in enumerate(zip(grads, weights, strict=True)):
            if grad is None:
                continue
            grad = grad.contiguous()
            if needs_x:
                grad_x = grad @ weight if grad_x is None else grad_x.addmm_(grad, weight)
            if needs[2 * index]:
                of_parameters[2 * index] = grad.t() @ x
            if needs[2 * index + 1]:
                of_parameters[2 * index + 1] = column_sums(grad)
        return grad_x, *of_parameters
