"""Images as they travel, in bytes, to images as models take them: one pass that maps colours, casts and pads.

    y = r m0 + g m1 + b m2 + m3        for each of the three rows m of the image's map, zero beyond the image's size

The map holds the normalisation, and whatever else is linear in a pixel's colours. All kernels compute in float32
(float64 for a float64 result) in the order in which the formula stands, round every product and every sum, fuse none,
and then round to the result's dtype: the same bits on every device, which are the reference's.
"""

import torch
from torch import Tensor

from ..batch import Batch
from . import _backend


def normalise_reference(pixels: Tensor, colours: Tensor, sizes: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """The specification in plain torch; arguments and result as :func:`normalise`."""
    precise = torch.promote_types(dtype, torch.float32)
    r, g, b = pixels.to(precise)[:, None].unbind(-1)
    m0, m1, m2, m3 = colours.to(precise)[..., None, None].unbind(2)
    height, width = sizes[:, None, None, None].unbind(-1)
    rows, columns = (torch.arange(size, device=pixels.device) for size in pixels.shape[1:3])
    valid = (rows[:, None] < height) & (columns < width)
    images = torch.where(valid, r * m0 + g * m1 + b * m2 + m3, 0).to(dtype)
    return images.contiguous(memory_format=torch.channels_last)


torch.library.define(
    "dndetr::normalise", "(Tensor pixels, Tensor colours, Tensor sizes, ScalarType dtype, str backend) -> Tensor"
)


@torch.library.impl("dndetr::normalise", ("cpu", "cuda"))
def _normalise(pixels, colours, sizes, dtype, backend):
    images = _fake(pixels, colours, sizes, dtype, backend)
    pixels, sizes = pixels.contiguous(), sizes.contiguous()
    colours = colours.double().contiguous() if backend == "cpp" else colours.contiguous()
    if images.numel() == 0:
        return images
    if backend == "triton":
        from ..kernels.normalise import normalise

        with torch.cuda.device_of(pixels):
            normalise(pixels, colours, sizes, images)
    else:
        arrays = _backend.addresses(pixels, colours, sizes)
        given = tuple(pixels.shape[:3]), arrays, _backend.pointer(images)
        _backend.compiled().normalise(*given, torch.get_num_threads())
    return images


@torch.library.register_fake("dndetr::normalise")
def _fake(pixels, colours, sizes, dtype, backend):
    batch, height, width, _ = pixels.shape
    return torch.empty((batch, 3, height, width), dtype=dtype, device=pixels.device, memory_format=torch.channels_last)


def normalise(
    pixels: Tensor,
    colours: Tensor,
    sizes: Tensor,
    dtype: torch.dtype = torch.float32,
    backend: str | None = None,
) -> Tensor:
    """Images whose colours are mapped, and which are zero beyond their sizes whatever the pixels hold there.

    pixels [B, H, W, 3] uint8, colours [B, 3, 4] float32 or float64, the last column what is added, sizes [B, 2] int64
    valid (height, width) -> [B, 3, H, W] of ``dtype`` with channels last in memory. ValueError for other shapes or
    types. Not differentiable.
    """
    if pixels.dtype != torch.uint8 or pixels.dim() != 4 or pixels.shape[3] != 3:
        raise ValueError(f"normalise: pixels must be uint8 [B, H, W, 3]; got {pixels.dtype} {list(pixels.shape)}")
    batch = len(pixels)
    if colours.dtype not in (torch.float32, torch.float64) or colours.shape != (batch, 3, 4):
        given = f"{colours.dtype} {list(colours.shape)}"
        raise ValueError(f"normalise: colours must be float32 or float64 [{batch}, 3, 4]; got {given}")
    if sizes.dtype != torch.int64 or sizes.shape != (batch, 2):
        raise ValueError(f"normalise: sizes must be int64 [{batch}, 2]; got {sizes.dtype} {list(sizes.shape)}")
    if dtype not in _backend.DTYPES:
        raise ValueError(f"normalise: images are float32, float64, bfloat16 or float16, not {dtype}")
    name, _ = _backend.choose("normalise", backend, pixels.device.type)
    if name == "reference":
        return normalise_reference(pixels, colours, sizes, dtype)
    return torch.ops.dndetr.normalise(pixels, colours, sizes, dtype, name)


def images_of(batch: Batch) -> Tensor:
    """What a model is shown of a batch: images [B, 3, H, W] of the colours' dtype, zero where padded.

    Under autocast they come in its half precision, to which a model's first product would round them.
    """
    device, dtype = batch.pixels.device.type, batch.colours.dtype
    if dtype == torch.float32 and torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
    return normalise(batch.pixels, batch.colours, batch.sizes, dtype)


# name: (H, W, valid sizes, dtype of the images)
CASES = {
    "f32": (7, 21, ((7, 21), (5, 13)), torch.float32),
    "f64": (6, 19, ((6, 18), (4, 19)), torch.float64),
    "bf16": (8, 33, ((8, 31), (3, 33)), torch.bfloat16),
    "f16": (8, 33, ((8, 31), (3, 33)), torch.float16),
    "nothing-valid": (5, 17, ((0, 17), (5, 0), (0, 0), (5, 17)), torch.float32),
    "one-pixel": (1, 1, ((1, 1),), torch.float32),
    "one-row": (1, 50, ((1, 47),), torch.bfloat16),
    "one-column": (9, 1, ((8, 1), (9, 1)), torch.float32),
    "no-images": (4, 4, (), torch.float32),
    "no-pixels": (0, 4, ((0, 4),), torch.float32),
    "long-rows": (3, 1066, ((3, 1066), (2, 1023), (3, 257)), torch.float32),
    "many-rows": (333, 310, ((333, 310), (301, 299)), torch.float32),
}


def make_case(name: str, device: str = "cpu", seed: int = 0) -> tuple[Tensor, Tensor, Tensor, torch.dtype]:
    """(pixels, colours, sizes, dtype) of a case; bytes beyond the sizes are as any others."""
    height, width, valid, dtype = CASES[name]
    draw = torch.Generator().manual_seed(seed)
    pixels = torch.randint(256, (len(valid), height, width, 3), dtype=torch.uint8, generator=draw)
    colours = torch.randn(len(valid), 3, 4, generator=draw) * torch.tensor([0.02, 0.02, 0.02, 1.0])
    sizes = torch.tensor(valid, dtype=torch.int64).view(-1, 2)
    return pixels.to(device), colours.to(device), sizes.to(device), dtype


def _self_test(backend: str):
    def test(device_type: str) -> float:
        errors = []
        for name in ("f32", "bf16"):
            *given, dtype = make_case(name, device_type)
            exact = normalise_reference(*given, torch.float64)
            images = torch.ops.dndetr.normalise(*given, dtype, backend)
            errors.append(_backend.error_beyond_rounding([images], [exact]))
        return _backend.worst(errors)

    return test


def _cpp_obstacle(device_type: str) -> str | None:
    return _backend.extension_obstacle("normalise") if device_type == "cpu" else "it works on CPU tensors"


_backend.register(
    "normalise",
    _backend.Backend("cpp", ("cpu",), _cpp_obstacle, _self_test("cpp"), tolerance=1e-6),
    _backend.Backend("triton", ("cuda",), _backend.triton_obstacle, _self_test("triton"), tolerance=1e-6),
)
