"""3x3 convolution with stride 1 or 2 and a border of one zero, in float32 on a CPU with a quarter of the products.

    out[y, x] = bias + sum over i, j of weight[i, j] in[stride y + i - 1, stride x + j - 1]

Winograd's minimal filtering F(4x4, 3x3) (arXiv 1509.09308): a tile of 4x4 results takes 36 products for each input and
output instead of 144. With the matrices B, G and A of the points 0, +-5/8, +-3/2 and infinity, for windows d of 6x6
pixels and kernels g,

    V = B^T d B        U = G g G^T        out = A^T (sum over inputs of U V) A

where U V is taken place by place, so that the sums over channels are 36 matrix products. Backwards:

    grad in      the same convolution of grad out with the kernels turned round, inputs and outputs exchanged
    grad weight  = G^T (sum over tiles of V times A grad_tile A^T) G

With stride 2 the outer two taps of a line only meet every other pixel: a filter F(4, 2) on those, at the five finite
points. The middle tap meets the pixels between, one product for each result. So a line of four results takes 9
products, and a tile 81 instead of 144.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from . import _backend

CHANNELS = 32
"""The kernel takes multiples of so many inputs and outputs."""


def conv3x3_reference(x: Tensor, weight: Tensor, bias: Tensor | None = None, stride: int = 1) -> Tensor:
    """The specification; arguments and result as :func:`conv3x3`."""
    return F.conv2d(x, weight, bias, stride, padding=1)


torch.library.define("dndetr::conv3x3", "(Tensor x, Tensor weight, Tensor? bias, int stride) -> Tensor")
torch.library.define(
    "dndetr::conv3x3_backward",
    "(Tensor grad_out, Tensor x, Tensor weight, int stride, bool needs_x, bool needs_weight) -> (Tensor, Tensor)",
)


@torch.library.impl("dndetr::conv3x3", "cpu")
def _forward(x, weight, bias, stride):
    out, x, weight = _forward_fake(x, weight, bias, stride), _packed(x), _packed(weight)
    bias = None if bias is None else _aligned(bias.contiguous())
    if out.numel():
        module, sizes, threads, needed = _plan(x, weight, stride)
        workspace = x.new_empty(needed[0])
        module.conv3x3(sizes, _backend.addresses(x, weight, bias, out, workspace), threads)
    return out


@torch.library.impl("dndetr::conv3x3_backward", "cpu")
def _backward(grad_out, x, weight, stride, needs_x, needs_weight):
    grads = grad_x, grad_weight = _backward_fake(grad_out, x, weight, stride, needs_x, needs_weight)
    if x.numel() == 0:
        grad_weight.zero_()
        return grads
    grad_out, x, weight = _packed(grad_out), _packed(x), _packed(weight)
    module, sizes, threads, needed = _plan(x, weight, stride)
    if needs_x:
        workspace = x.new_empty(needed[1])
        module.conv3x3_grad_input(sizes, _backend.addresses(grad_out, weight, grad_x, workspace), threads)
    if needs_weight:
        workspace = x.new_empty(needed[2])
        module.conv3x3_grad_weight(sizes, _backend.addresses(x, grad_out, grad_weight, workspace), threads)
    return grads


@torch.library.register_fake("dndetr::conv3x3")
def _forward_fake(x, weight, bias, stride):
    batch, _, height, width = x.shape
    return _empty_map(x, batch, len(weight), (height + stride - 1) // stride, (width + stride - 1) // stride)


@torch.library.register_fake("dndetr::conv3x3_backward")
def _backward_fake(grad_out, x, weight, stride, needs_x, needs_weight):
    nothing = x.new_empty(0)
    return (
        _empty_map(x, *x.shape) if needs_x else nothing,
        _empty_map(weight, *weight.shape) if needs_weight else nothing,
    )


def _setup_context(ctx, inputs, output):
    x, weight, _, ctx.stride = inputs
    ctx.save_for_backward(x, weight)


def _differentiate(ctx, grad_out):
    needs_x, needs_weight, needs_bias, _ = ctx.needs_input_grad
    given = (grad_out, *ctx.saved_tensors, ctx.stride, needs_x, needs_weight)
    grad_x, grad_weight = torch.ops.dndetr.conv3x3_backward(*given)
    grad_bias = grad_out.sum((0, 2, 3)) if needs_bias else None
    return grad_x if needs_x else None, grad_weight if needs_weight else None, grad_bias, None


torch.library.register_autograd("dndetr::conv3x3", _differentiate, setup_context=_setup_context)
_backend.differentiable_once("conv3x3")


def _empty_map(like: Tensor, *shape: int) -> Tensor:
    """Uninitialised [B, C, H, W], channels last."""
    return torch.empty(shape, dtype=like.dtype, device=like.device, memory_format=torch.channels_last)


def _packed(x: Tensor) -> Tensor:
    """The tensor [B, C, H, W], or a copy, with its channels last in memory and as aligned as the kernel reads it."""
    if not x.permute(0, 2, 3, 1).is_contiguous():
        x = _empty_map(x, *x.shape).copy_(x)
    return _aligned(x)


def _aligned(x: Tensor) -> Tensor:
    return x if x.data_ptr() % 64 == 0 else x.clone()


def _plan(x: Tensor, weight: Tensor, stride: int):
    """The compiled module, sizes as it takes them, threads, and the workspaces it needs."""
    module, threads = _backend.compiled(), torch.get_num_threads()
    batch, inputs, height, width = x.shape
    sizes = (batch, height, width, inputs, len(weight), stride)
    return module, sizes, threads, module.conv3x3_workspace(sizes, threads)


def conv3x3(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, stride: int = 1, backend: str | None = None
) -> Tensor:
    """Convolution with 3x3 kernels and a border of one zero.

    x [B, C, H, W], weight [K, C, 3, 3], bias [K], stride 1 or 2 -> [B, K, H / stride, W / stride], rounded up.
    What the C++ kernel does not take (other than float32 on a CPU, autocast, channels no multiples of 32) is torch's.
    The kernel's results can be differentiated once.
    """
    if stride not in (1, 2):
        raise ValueError(f"conv3x3: stride must be 1 or 2, got {stride}")
    fitting = x.dim() == 4 and weight.shape[1:] == (x.shape[1], 3, 3)
    if not fitting or (bias is not None and bias.shape != weight.shape[:1]):
        shapes = f"{list(x.shape)}, {list(weight.shape)}{'' if bias is None else f', {list(bias.shape)}'}"
        raise ValueError(f"conv3x3: x must be [B, C, H, W], weight [K, C, 3, 3], bias [K]; got {shapes}")
    tensors = (x, weight) if bias is None else (x, weight, bias)
    takes = (
        all(tensor.is_cpu and tensor.dtype == torch.float32 for tensor in tensors)
        and weight.numel() > 0
        and x.shape[1] % CHANNELS == len(weight) % CHANNELS == 0
        and not torch.is_autocast_enabled("cpu")
    )
    if not takes or _backend.choose("conv3x3", backend, "cpu")[0] == "reference":
        return conv3x3_reference(x, weight, bias, stride)
    return torch.ops.dndetr.conv3x3(x, weight, bias, stride)


# name: (batch, inputs, outputs, height, width)
CASES = {
    "one-tile": (1, 32, 32, 4, 4),
    "one-pixel": (2, 32, 64, 1, 1),
    "one-row": (1, 64, 32, 1, 9),
    "edges": (3, 32, 96, 7, 13),
    "nobody": (0, 32, 32, 8, 8),
    "many-tiles": (2, 64, 64, 41, 54),
    "wide": (1, 256, 160, 10, 12),
    "more-tiles-than-are-held": (1, 32, 32, 460, 460),
}


def make_case(name: str, dtype: torch.dtype = torch.float32, seed: int = 0):
    """(x, weight, bias) of a case; x as after a ReLU, channels last."""
    batch, inputs, outputs, height, width = CASES[name]
    draw = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, height, width, inputs, generator=draw, dtype=torch.float64).relu().permute(0, 3, 1, 2)
    weight = torch.randn(outputs, 3, 3, inputs, generator=draw, dtype=torch.float64) / (9 * inputs) ** 0.5
    bias = torch.randn(outputs, generator=draw, dtype=torch.float64)
    return x.to(dtype), weight.permute(0, 3, 1, 2).to(dtype), bias.to(dtype)


def _self_test(device_type: str) -> float:
    given = make_case("edges")
    found = [torch.ops.dndetr.conv3x3(*given, stride) for stride in (1, 2)]
    return _backend.largest_error(found, [conv3x3_reference(*given, stride) for stride in (1, 2)])


_backend.register(
    "conv3x3",
    _backend.Backend(
        "cpp",
        ("cpu",),
        lambda device: _backend.extension_obstacle("conv3x3") if device == "cpu" else "it works on CPU tensors",
        _self_test,
        tolerance=1e-4,
    ),
)
