"""Gradient of what is the same for all pixels of a feature level: sums over the rows of each.

    sums[l, c] = sum over images b and pixels s of level l of grad[b, s, c]

Levels lie behind each other, as in tokens. One pass over the gradient gives the sums of all levels, added in at least
float32, in an order that the shape decides.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from . import _backend


def level_sums_reference(grad: Tensor, sizes: Sequence[int]) -> Tensor:
    """The specification; arguments and result as :func:`level_sums`."""
    precise = torch.promote_types(grad.dtype, torch.float32)
    return torch.stack([level.sum((0, 1), dtype=precise) for level in grad.split(list(sizes), dim=1)])


torch.library.define("dndetr::level_sums", "(Tensor grad, int[] sizes) -> Tensor")


@torch.library.impl("dndetr::level_sums", ("cpu", "cuda"))
def _level_sums(grad, sizes):
    from ..kernels.level_sums import level_sums

    sums = _level_sums_fake(grad, sizes)
    with torch.cuda.device_of(grad):
        level_sums(grad.contiguous(), tuple(sizes), sums)
    return sums


@torch.library.register_fake("dndetr::level_sums")
def _level_sums_fake(grad, sizes):
    return grad.new_empty((len(sizes), grad.shape[2]), dtype=torch.float32)


def level_sums(grad: Tensor, sizes: Sequence[int], backend: str | None = None) -> Tensor:
    """Sums over each level's rows; not differentiable.

    grad [B, S, C], sizes: pixels of each of L levels, S in all -> [L, C] in float32, or float64. What the kernel does
    not take (float64, no columns) is torch's. ValueError for other shapes.
    """
    if grad.dim() != 3 or not sizes or sum(sizes) != grad.shape[1]:
        wanted = f"[B, {sum(sizes)} pixels of {list(sizes)}, C]"
        raise ValueError(f"level_sums: grad must be {wanted}, got {list(grad.shape)}")
    name, _ = _backend.choose("level_sums", backend, grad.device.type)
    taken = grad.dtype in (torch.float32, torch.bfloat16, torch.float16) and grad.shape[2] > 0
    if name == "reference" or not taken:
        return level_sums_reference(grad, sizes)
    return torch.ops.dndetr.level_sums(grad, list(sizes))


# name: (images, pixels of each level, columns, dtype)
CASES = {
    "one": (1, (1,), 1, torch.float32),
    "no-images": (0, (4, 2), 24, torch.float32),
    "no-pixels": (2, (5, 0, 1), 24, torch.bfloat16),
    "no-columns": (2, (3, 1), 0, torch.float32),
    "levels": (2, (70, 20, 6, 2), 256, torch.bfloat16),
    "half": (3, (33, 9), 36, torch.float16),
    "wide": (2, (19, 5), 600, torch.float32),
    "many-levels": (2, tuple(range(1, 9)), 16, torch.float32),
    "many-pixels": (2, (9000, 300), 64, torch.bfloat16),  # more than a round of programs
}


def make_case(name: str, device: str = "cpu", seed: int = 0) -> tuple[Tensor, tuple[int, ...]]:
    """(grad, sizes) of a case."""
    images, sizes, columns, dtype = CASES[name]
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(images, sum(sizes), columns, generator=draw).to(device, dtype), sizes


def _self_test(device_type: str) -> float:
    grad, sizes = make_case("levels", device_type)
    found = torch.ops.dndetr.level_sums(grad, list(sizes))
    return _backend.error_beyond_rounding([found], [level_sums_reference(grad.double(), sizes)])


_backend.register(
    "level_sums", _backend.Backend("triton", ("cuda",), _backend.triton_obstacle, _self_test, tolerance=1e-5)
)
