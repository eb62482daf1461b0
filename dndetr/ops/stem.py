"""The stem of a ResNet that gets no gradient: 7x7 convolution, frozen norm, ReLU and max-pool of images.

    y = max over 3 x 3, stride 2, of relu(conv(x) scale + shift)        conv: 7 x 7, stride 2, padding 3

With three colours going in, libraries' convolutions take tens of times what their operations need, and their max-pool
writes indices that nobody reads. Here images are read in the layout and precision that they come in, and rounded for
the product; what follows on its sums is float32, and rounded once.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from . import _backend
from .frozen_norm import frozen_norm_reference

_HALF = (torch.bfloat16, torch.float16)


def stem_reference(images: Tensor, weight: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """The specification in plain torch; arguments and result as :func:`stem`."""
    x = F.conv2d(images.to(weight.dtype), weight, stride=2, padding=3)
    return F.max_pool2d(frozen_norm_reference(x, scale, shift, relu=True), 3, 2, 1)


torch.library.define("dndetr::stem", "(Tensor images, Tensor weight, Tensor scale, Tensor shift) -> Tensor")


@torch.library.impl("dndetr::stem", ("cpu", "cuda"))
def _stem(images, weight, scale, shift):
    from ..kernels import stem as kernels

    y = _fake(images, weight, scale, shift)
    if y.numel() == 0:
        return y
    batch, channels = y.shape[:2]
    height, width = (_halved(size) for size in images.shape[2:])
    with torch.cuda.device_of(images):
        squares = weight.new_empty(batch, height + kernels.MARGIN, width + kernels.MARGIN, kernels.DEPTH)
        kernels.lay_out(images, squares)
        x = weight.new_empty(batch, height, width, channels)
        kernels.convolve(squares, kernels.packed(weight), scale.contiguous(), shift.contiguous(), x)
        kernels.pool(x, y.permute(0, 2, 3, 1))
    return y


def _halved(size: int) -> int:
    return (size + 1) // 2


@torch.library.register_fake("dndetr::stem")
def _fake(images, weight, scale, shift):
    height, width = (_halved(_halved(size)) for size in images.shape[2:])
    shape = images.shape[0], weight.shape[0], height, width
    return torch.empty(shape, dtype=weight.dtype, device=weight.device, memory_format=torch.channels_last)


def stem(images: Tensor, weight: Tensor, scale: Tensor, shift: Tensor, backend: str | None = None) -> Tensor:
    """The pooled map of images; not differentiable.

    images [B, 3, H, W] of any floating dtype, weight [N, 3, 7, 7], scale, shift [N] -> [B, N, ceil(H/4), ceil(W/4)] of
    weight's dtype, in which images are multiplied. The kernels take weights in half precision and give a map with its
    channels last in memory. ValueError for other shapes.
    """
    if images.dim() != 4 or images.shape[1] != 3 or weight.shape[1:] != (3, 7, 7):
        given = f"{list(images.shape)}, {list(weight.shape)}"
        raise ValueError(f"stem: images must be [B, 3, H, W] and weight [N, 3, 7, 7]; got {given}")
    if not scale.shape == shift.shape == weight.shape[:1]:
        given = f"{list(scale.shape)}, {list(shift.shape)}"
        raise ValueError(f"stem: scale and shift must be [{len(weight)}]; got {given}")
    name, _ = _backend.choose("stem", backend, images.device.type)
    if name == "reference" or weight.dtype not in _HALF:
        return stem_reference(images, weight, scale, shift)
    return torch.ops.dndetr.stem(images, weight, scale, shift)


# name: (B, H, W, N, dtype of the weights)
CASES = {
    "one": (1, 1, 1, 1, torch.float16),
    "no-images": (0, 16, 16, 8, torch.bfloat16),
    "even": (2, 32, 48, 64, torch.bfloat16),
    "odd": (2, 31, 45, 64, torch.float16),
    "narrow": (1, 3, 70, 20, torch.bfloat16),
    "many-pixels": (3, 66, 90, 64, torch.bfloat16),
}


def make_case(name: str, device: str = "cpu", seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(images, weight, scale, shift) of a case."""
    batch, height, width, channels, dtype = CASES[name]
    draw = torch.Generator().manual_seed(seed)
    images = torch.randn(batch, 3, height, width, generator=draw)
    weight = torch.randn(channels, 3, 7, 7, generator=draw) / 12
    scale, shift = (torch.randn(channels, generator=draw) for _ in range(2))
    return images.to(device), weight.to(device, dtype), scale.to(device), shift.to(device)


def _self_test(device_type: str) -> float:
    # Of 64 channels and in bfloat16, of which the interpreter has no products: the kernels that training compiles.
    images, weight, scale, shift = make_case("even", device_type)
    weight = weight if device_type == "cuda" else weight.half()
    images = images.to(weight.dtype).float()  # as the product takes them, so that only sums differ
    exact = stem_reference(images.double(), weight.double(), scale.double(), shift.double())
    return _backend.error_beyond_rounding([torch.ops.dndetr.stem(images, weight, scale, shift)], [exact])


def _obstacle(device_type: str) -> str | None:
    """Why the kernels cannot run there, or None."""
    if obstacle := _backend.triton_obstacle(device_type):
        return obstacle
    if device_type == "cuda" and not torch.version.hip and torch.cuda.get_device_capability() < (8, 0):
        return "Triton multiplies without tensor cores on a GPU below compute capability 8.0"
    return None


_backend.register("stem", _backend.Backend("triton", ("cuda",), _obstacle, _self_test, tolerance=1e-5))
