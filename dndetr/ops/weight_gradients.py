"""Gradients of a linear layer's weight and bias in float32 on a CPU: one pass over the rows for both.

The C++ kernel lays both factors out in panels of two registers of columns, so that products need neither transposed
copies nor strides; torch's own product of two transposed factors copies them, or falls to a slower library.
"""

import torch
from torch import Tensor

from . import _backend


def weight_gradients_reference(grad_out: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """The specification; arguments and result as :func:`weight_gradients`."""
    return grad_out.t() @ x, grad_out.sum(0)


torch.library.define("dndetr::weight_gradients", "(Tensor grad_out, Tensor x) -> (Tensor, Tensor)")


@torch.library.impl("dndetr::weight_gradients", "cpu")
def _weight_gradients(grad_out, x):
    grads = _weight_gradients_fake(grad_out, x)
    grad_out, x = grad_out.contiguous(), x.contiguous()
    module, threads = _backend.compiled(), torch.get_num_threads()
    sizes = (len(x), x.shape[1], grad_out.shape[1])
    workspace = x.new_empty(module.weight_gradients_workspace(sizes, threads))
    module.weight_gradients(sizes, _backend.addresses(grad_out, x, *grads, workspace), threads)
    return grads


@torch.library.register_fake("dndetr::weight_gradients")
def _weight_gradients_fake(grad_out, x):
    return x.new_empty(grad_out.shape[1], x.shape[1]), x.new_empty(grad_out.shape[1])


def weight_gradients(grad_out: Tensor, x: Tensor, backend: str | None = None) -> tuple[Tensor, Tensor]:
    """What ``x @ weight.T + bias`` hands on to weight and bias; not differentiable.

    grad_out [M, N], x [M, K] -> grad_weight [N, K], grad_bias [N]. What the C++ kernel does not take (other than
    float32 on a CPU, nothing at all) is torch's. ValueError for other shapes.
    """
    if grad_out.dim() != 2 or x.dim() != 2 or len(grad_out) != len(x):
        shapes = f"{list(grad_out.shape)}, {list(x.shape)}"
        raise ValueError(f"weight_gradients: grad_out must be [M, N], x [M, K]; got {shapes}")
    takes = all(tensor.is_cpu and tensor.dtype == torch.float32 and tensor.numel() for tensor in (grad_out, x))
    if not takes or _backend.choose("weight_gradients", backend, "cpu")[0] == "reference":
        return weight_gradients_reference(grad_out, x)
    return torch.ops.dndetr.weight_gradients(grad_out, x)


# name: (rows, inputs, outputs)
CASES = {
    "one": (1, 1, 1),
    "nobody": (0, 24, 40),
    "few-columns": (70, 3, 5),
    "whole-panels": (48, 64, 96),
    "cut-panels": (33, 91, 70),
    "queries": (760, 256, 91),
    "two-parts": (769, 40, 33),
    "many-parts": (2500, 32, 48),
}


def make_case(name: str, dtype: torch.dtype = torch.float32, seed: int = 0) -> tuple[Tensor, Tensor]:
    """(grad_out, x) of a case."""
    rows, inputs, outputs = CASES[name]
    draw = torch.Generator().manual_seed(seed)
    given = (torch.randn(rows, columns, generator=draw, dtype=torch.float64) for columns in (outputs, inputs))
    return tuple(tensor.to(dtype) for tensor in given)


def _self_test(device_type: str) -> float:
    given = make_case("cut-panels")
    return _backend.largest_error(torch.ops.dndetr.weight_gradients(*given), weight_gradients_reference(*given))


def _obstacle(device_type: str) -> str | None:
    return _backend.extension_obstacle("weight_gradients") if device_type == "cpu" else "it works on CPU tensors"


_backend.register("weight_gradients", _backend.Backend("cpp", ("cpu",), _obstacle, _self_test, tolerance=1e-4))
