"""A linear layer and the ReLU or PReLU behind it in one kernel on a GPU in half precision, and likewise its gradient.

    before = x weight^T + bias,  out = before where before > 0, else 0 (ReLU) or before slope (PReLU)

A PReLU's zero and NaN take its slope, and a ReLU passes NaN on. With h the gradient of ``out``, which is the product of
the next layer, h = grad weight:

    ReLU:    masked = h where not out <= 0, else 0
    PReLU:   masked = h where before > 0, else h slope;  grad_slope = sum over all that is not above zero of h before

``masked`` is the gradient of ``before``, and its sums over rows are that of the bias. Products are rounded to the
inputs' dtype before the activation or its gradient sees them, sums and products with the slope are float32 until they
are rounded once: as in the two steps, product and pass, that the references are.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from . import _backend
from .column_sums import (
    prelu_column_sums,
    prelu_column_sums_reference,
    relu_column_sums,
    relu_column_sums_reference,
)
from .prelu import prelu, prelu_reference

_MOST_TERMS = 512  # of a product; with more, the library's own gains more than a pass costs (docs/ops.md)
_HALF = (torch.bfloat16, torch.float16)


def activated_product_reference(
    x: Tensor, weight: Tensor, bias: Tensor, slope: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The specification, in two steps; arguments and results as :func:`activated_product`."""
    before = F.linear(x, weight, bias)
    if slope is not None:
        return prelu(before, slope), before
    # Not as the product's epilogue (torch._addmm_activation): it may turn NaN into zero and hide it.
    out = before.relu_()
    return out, out


def activated_product_backward_reference(
    grad: Tensor, weight: Tensor, kept: Tensor, slope: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The specification, in two steps; arguments and results as :func:`activated_product_backward`."""
    hidden = grad @ weight
    if slope is not None:
        return prelu_column_sums(hidden, kept, slope)
    return *relu_column_sums(hidden, kept), None


torch.library.define(
    "dndetr::activated_product",
    "(Tensor x, Tensor weight, Tensor bias, Tensor? slope, bool keep) -> (Tensor, Tensor)",
)
torch.library.define(
    "dndetr::activated_product_backward",
    "(Tensor grad, Tensor weight, Tensor kept, Tensor? slope) -> (Tensor, Tensor, Tensor)",
)


@torch.library.impl("dndetr::activated_product", ("cpu", "cuda"))
def _forward(x, weight, bias, slope, keep):
    from ..kernels.activated_product import activated_product

    out, before = results = _forward_fake(x, weight, bias, slope, keep)
    with torch.cuda.device_of(x):
        activated_product(x.contiguous(), weight, bias.contiguous(), slope, out, before if before.numel() else None)
    return results


@torch.library.impl("dndetr::activated_product_backward", ("cpu", "cuda"))
def _backward(grad, weight, kept, slope):
    from ..kernels.activated_product import activated_product_backward

    results = _backward_fake(grad, weight, kept, slope)
    with torch.cuda.device_of(grad):
        activated_product_backward(grad.contiguous(), weight, kept.contiguous(), slope, *results)
    return results


@torch.library.register_fake("dndetr::activated_product")
def _forward_fake(x, weight, bias, slope, keep):
    size = len(x), len(weight)
    return x.new_empty(size), x.new_empty(size if keep and slope is not None else 0)


@torch.library.register_fake("dndetr::activated_product_backward")
def _backward_fake(grad, weight, kept, slope):
    grad_slope = grad.new_empty(0) if slope is None else slope.new_empty(1)
    return grad.new_empty(kept.shape), grad.new_empty(kept.shape[1]), grad_slope


def activated_product(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    slope: Tensor | None = None,
    keep: bool = True,
    backend: str | None = None,
) -> tuple[Tensor, Tensor | None]:
    """A linear layer and the ReLU, or with a slope the PReLU, behind it; not differentiable.

    x [M, K], weight [N, K] at any strides and bias [N] of one dtype, slope [1] of any precision -> the result [M, N],
    and what :func:`activated_product_backward` takes of it, [M, N], both in x's dtype; without ``keep`` None for a
    PReLU. The kernel multiplies in half precision, by itself up to 512 terms K. ValueError for other shapes or dtypes.
    """
    if x.dim() != 2 or weight.dim() != 2 or x.shape[1] != weight.shape[1] or bias.shape != weight.shape[:1]:
        given = ", ".join(str(list(each.shape)) for each in (x, weight, bias))
        raise ValueError(f"activated_product: must be x [M, K], weight [N, K] and bias [N], got {given}")
    _check("activated_product: x, weight and bias", slope, x, weight, bias)
    if not _is_taken(x, weight, backend):
        out, kept = activated_product_reference(x, weight, bias, slope)
        return out, kept if keep or slope is None else None
    out, before = torch.ops.dndetr.activated_product(x, weight, bias, slope, keep)
    return out, out if slope is None else before if keep else None


def activated_product_backward(
    grad: Tensor, weight: Tensor, kept: Tensor, slope: Tensor | None = None, backend: str | None = None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The gradient of what an activation was given, behind which is another linear layer; not differentiable.

    grad [M, K] of that layer's result, its weight [K, N] at any strides and what was ``kept`` of the activation
    [M, N], of one dtype, slope [1] of a PReLU -> the gradient [M, N] and its sums over rows [N], in grad's dtype, and
    the slope's gradient [1] in its own, None for a ReLU. The kernel as above. ValueError for other shapes or dtypes.
    """
    sizes = [list(each.shape) for each in (grad, weight, kept)]
    if (
        [len(size) for size in sizes] != [2, 2, 2]
        or sizes[2] != [len(grad), weight.shape[1]]
        or sizes[0][1] != len(weight)
    ):
        given = ", ".join(map(str, sizes))
        raise ValueError(f"activated_product_backward: must be grad [M, K], weight [K, N] and kept [M, N], got {given}")
    _check("activated_product_backward: grad, weight and kept", slope, grad, weight, kept)
    if not _is_taken(grad, weight, backend):
        return activated_product_backward_reference(grad, weight, kept, slope)
    masked, sums, grad_slope = torch.ops.dndetr.activated_product_backward(grad, weight, kept, slope)
    return masked, sums, None if slope is None else grad_slope


def _check(names: str, slope: Tensor | None, *tensors: Tensor) -> None:
    if len({each.dtype for each in tensors}) > 1:
        raise ValueError(f"{names} must be of one dtype, got {', '.join(str(each.dtype) for each in tensors)}")
    if slope is not None and slope.shape != (1,):
        raise ValueError(f"{names.partition(':')[0]}: slope must be [1], got {list(slope.shape)}")


def _is_taken(a: Tensor, weight: Tensor, backend: str | None) -> bool:
    """Whether the kernel runs for the product of ``a`` and weight: for what it takes, where it can and pays."""
    name, reason = _backend.choose("activated_product", backend, a.device.type)
    takes = name == "triton" and a.dtype in _HALF and a.numel() > 0 and weight.numel() > 0
    return takes and (a.shape[1] <= _MOST_TERMS or reason.startswith("asked for"))


# name: (M, K, N, dtype)
CASES = {
    "one": (1, 1, 1, torch.float16),
    "nobody": (0, 16, 24, torch.bfloat16),
    "one-row": (1, 256, 64, torch.bfloat16),
    "boxes": (300, 4, 256, torch.float16),
    "uneven": (67, 91, 45, torch.float16),
    "queries": (70, 64, 128, torch.bfloat16),
    "many-tiles": (300, 100, 200, torch.float16),
    "many-rows": (5000, 64, 1024, torch.bfloat16),  # enough for any GPU's tiles of many rows
}


def make_case(name: str, device: str = "cpu", seed: int = 0) -> tuple[Tensor, ...]:
    """(x [M, K], weight [N, K], bias [N], slope [1], grad [M, K], and the next layer's weight [K, N]) of a case.

    Numbers are so short that sums of products are exact in float32, in any order. Some results are zero.
    """
    rows, terms, columns, dtype = CASES[name]
    draw = torch.Generator().manual_seed(seed)

    def short(*size: int) -> Tensor:
        return ((8 * torch.randn(size, generator=draw)).round() / 8).to(device, dtype)

    x, weight, bias, grad, after = (
        short(*size) for size in ((rows, terms), (columns, terms), (columns,), (rows, terms), (terms, columns))
    )
    weight[1::5], bias[1::5] = 0, 0
    return x, weight / 4, bias, torch.full((1,), 0.25, device=device), grad, after / 4


def _self_test(device_type: str) -> float:
    # In bfloat16, of which the interpreter has no products, and of whole tiles: the kernels that training compiles.
    found, exact = [], []
    for name in ("queries", "many-rows") if device_type == "cuda" else ("queries",):
        case = make_case(name, device_type)
        dtype, slope = torch.bfloat16 if device_type == "cuda" else torch.float16, case[3]
        x, weight, bias, _, grad, after = (each.to(dtype) for each in case)
        x64, weight64, bias64, slope64, grad64, after64 = (each.double() for each in case)
        before = F.linear(x64, weight64, bias64).to(dtype).double()
        hidden = (grad64 @ after64).to(dtype).double()
        out, _ = torch.ops.dndetr.activated_product(x, weight, bias, None, True)
        sloped, kept = torch.ops.dndetr.activated_product(x, weight, bias, slope, True)
        masked, sums, _ = torch.ops.dndetr.activated_product_backward(grad, after, out, None)
        found += [out, masked, sums, sloped, kept]
        found += torch.ops.dndetr.activated_product_backward(grad, after, kept, slope)
        exact += [before.relu(), *relu_column_sums_reference(hidden, before), prelu_reference(before, slope64), before]
        exact += prelu_column_sums_reference(hidden, before, slope64)
    return _backend.error_beyond_rounding(found, exact)


def _obstacle(device_type: str) -> str | None:
    """Why the kernels cannot run there, or None."""
    if obstacle := _backend.triton_obstacle(device_type):
        return obstacle
    if device_type == "cuda" and not torch.version.hip and torch.cuda.get_device_capability() < (8, 0):
        return "Triton multiplies without tensor cores on a GPU below compute capability 8.0"
    return None


_backend.register("activated_product", _backend.Backend("triton", ("cuda",), _obstacle, _self_test, tolerance=1e-5))
