"""PReLU with one slope, in whole vectors on a GPU.

    out = x where x > 0, else x slope

in at least float32, rounded once. Its gradient is taken where that of the bias before it is:
:func:`~dndetr.ops.column_sums.prelu_column_sums`.
"""

import torch
from torch import Tensor

from . import _backend


def prelu_reference(x: Tensor, slope: Tensor) -> Tensor:
    """The specification; arguments and result as :func:`prelu`."""
    precise = x.to(torch.promote_types(x.dtype, torch.float32))
    return torch.where(x > 0, precise, precise * slope.view(())).to(x.dtype)


torch.library.define("dndetr::prelu", "(Tensor x, Tensor slope) -> Tensor")


@torch.library.impl("dndetr::prelu", ("cpu", "cuda"))
def _prelu(x, slope):
    from ..kernels.prelu import prelu

    out = _prelu_fake(x, slope)
    with torch.cuda.device_of(x):
        prelu(x.contiguous(), slope, out)
    return out


@torch.library.register_fake("dndetr::prelu")
def _prelu_fake(x, slope):
    return x.new_empty(x.shape)


def prelu(x: Tensor, slope: Tensor, backend: str | None = None) -> Tensor:
    """x [...], slope [1] of any precision -> x where it is above zero, elsewhere x times slope [...], in x's dtype.

    Not differentiable. ValueError for another slope than one.
    """
    if slope.shape != (1,):
        raise ValueError(f"prelu: slope must be [1], got {list(slope.shape)}")
    takes = x.dtype in (torch.float32, torch.bfloat16, torch.float16) and x.numel() > 0
    if not takes or _backend.choose("prelu", backend, x.device.type)[0] == "reference":
        return prelu_reference(x, slope)
    return torch.ops.dndetr.prelu(x, slope)


# name: (shape, dtype)
CASES = {
    "one": ((1,), torch.float32),
    "scalar": ((), torch.bfloat16),
    "nobody": ((2, 0, 64), torch.bfloat16),
    "hidden": ((2, 33, 256), torch.bfloat16),
    "half": ((3, 1000, 16), torch.float16),
    "full": ((7, 11, 128), torch.float32),
    "uneven": ((5, 9, 91), torch.bfloat16),
}


def make_case(name: str, device: str = "cpu", seed: int = 0) -> tuple[Tensor, Tensor]:
    """(x, slope) of a case; x with zeros."""
    shape, dtype = CASES[name]
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    x.view(-1)[1::7] = 0
    return x.to(device, dtype), torch.full((1,), 0.3, device=device)


def _self_test(device_type: str) -> float:
    # In bfloat16, with a slope in float32 and whole vectors: the kernel that training compiles.
    x, slope = make_case("hidden", device_type)
    found, exact = torch.ops.dndetr.prelu(x, slope), prelu_reference(x.double(), slope.double())
    return _backend.error_beyond_rounding([found], [exact])


_backend.register("prelu", _backend.Backend("triton", ("cuda",), _backend.triton_obstacle, _self_test, tolerance=1e-5))
