"""Multi-scale deformable attention (arXiv 2010.04159, section 4.1).

    out[b, q, h] = sum over levels l and points p of
                   weights[b, q, h, l, p] * sample(value_l[b, :, h], locations[b, q, h, l, p])

``sample`` is bilinear on pixel centres: a location x in [0, 1] is the pixel coordinate x * W_l - 0.5, and everything
outside the level is zero. The gradient of a sample is spread to its four corners with the same bilinear weights; the
location's gradient is the difference of neighbouring corners times the level's size, and zero off the image.

The fused form takes what the projections produce: raw offsets and logits. It applies the softmax over levels and points
together, and turns offsets into locations: with 2-d reference points  ref + offset / (W_l, H_l),  with 4-d ones (boxes)
ref_xy + offset / P * ref_wh / 2.

Everything is computed in at least float32 and rounded once, to the dtype of ``value``. The compiled paths
(``_ms_deform_attn.py``, ``csrc/ms_deform_attn``, docs/ops.md) keep nothing for the backward pass but the inputs, where
the reference keeps every sample. On a GPU the sums of grad_value depend on the order of threads, in their last bits;
under ``torch.use_deterministic_algorithms(True)`` they are sums of 64-bit integers, which do not.
"""

import warnings
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from . import _backend, _ms_deform_attn


def ms_deform_attn_reference(
    value: Tensor, spatial_shapes: tuple[tuple[int, int], ...], locations: Tensor, weights: Tensor
) -> Tensor:
    """The specification, sampling with ``grid_sample``; arguments and result as :func:`ms_deform_attn`."""
    batch, _, heads, width = value.shape
    queries, points = locations.shape[1], locations.shape[4]
    precise = torch.promote_types(value.dtype, torch.float32)
    levels = value.to(precise).split([h * w for h, w in spatial_shapes], dim=1)
    grids = (2 * locations.to(precise) - 1).transpose(1, 2).flatten(0, 1)  # [B*H, Q, L, P, 2]
    samples = []
    for level, ((h, w), pixels) in enumerate(zip(spatial_shapes, levels, strict=True)):
        image = pixels.permute(0, 2, 3, 1).reshape(batch * heads, width, h, w)
        grid = grids[:, :, level]
        samples.append(F.grid_sample(image, grid, mode="bilinear", padding_mode="zeros", align_corners=False))
    sampled = torch.cat(samples, dim=-1)  # [B*H, D, Q, L*P]
    weights = weights.to(precise).transpose(1, 2).reshape(batch * heads, 1, queries, len(levels) * points)
    out = (sampled * weights).sum(-1)
    return out.view(batch, heads * width, queries).transpose(1, 2).to(value.dtype)


def ms_deform_attn_fused_reference(
    value: Tensor,
    spatial_shapes: tuple[tuple[int, int], ...],
    reference_points: Tensor,
    offsets: Tensor,
    logits: Tensor,
    valid_sizes: Tensor | None = None,
) -> Tensor:
    """The specification of the fused form; arguments and result as :func:`ms_deform_attn_fused`."""
    precise = torch.promote_types(value.dtype, torch.float32)
    if valid_sizes is not None:
        value = value.masked_fill(~valid_pixels(valid_sizes, spatial_shapes)[:, :, None, None], 0)
    locations = sampling_locations(reference_points.to(precise), offsets.to(precise), spatial_shapes)
    weights = logits.to(precise).softmax(-1).view(offsets.shape[:-1])
    return ms_deform_attn_reference(value, spatial_shapes, locations, weights)


def sampling_locations(reference_points: Tensor, offsets: Tensor, spatial_shapes) -> Tensor:
    """Reference points [B, Q, L, 2 or 4] and offsets [B, Q, H, L, P, 2] -> locations like offsets."""
    reference = reference_points[:, :, None, :, None, :]
    if reference_points.shape[-1] == 2:
        # Filled on the device: a tensor made from a list would be copied there, and waited for.
        sides = (side for h, w in spatial_shapes for side in (w, h))
        pixel = torch.stack([torch.full((), 1 / side, dtype=offsets.dtype, device=offsets.device) for side in sides])
        return reference + offsets * pixel.view(-1, 1, 2)
    return reference[..., :2] + offsets * (reference[..., 2:] * (0.5 / offsets.shape[4]))


def valid_pixels(valid_sizes: Tensor, spatial_shapes) -> Tensor:
    """Valid (height, width) per image and level [B, L, 2] -> [B, S] bool, True where a pixel is inside."""
    return within(*places_and_extents(valid_sizes, spatial_shapes))


def places_and_extents(valid_sizes: Tensor, spatial_shapes) -> tuple[Tensor, Tensor]:
    """(row, column) [S, 2] of every pixel, and the valid (height, width) [B, S, 2] of the level that it is on."""
    line = torch.arange(max(map(max, spatial_shapes)), device=valid_sizes.device)
    grids = [torch.stack((line[:h, None].expand(h, w), line[:w].expand(h, w)), dim=-1) for h, w in spatial_shapes]
    extents = [valid_sizes[:, level, None].expand(-1, h * w, -1) for level, (h, w) in enumerate(spatial_shapes)]
    return torch.cat([grid.flatten(0, 1) for grid in grids]), torch.cat(extents, dim=1)


def within(place: Tensor, extent: Tensor) -> Tensor:
    """Whether both numbers [..., 2] are below the extent's [...]."""
    inside = place < extent
    return inside[..., 0] & inside[..., 1]


def _check(op: str, value: Tensor, spatial_shapes, **others: tuple[Tensor, tuple]) -> None:
    """Raise ValueError where a tensor does not have its dtype, device or shape (None: any size)."""
    if isinstance(spatial_shapes, Tensor) or any(len(shape) != 2 for shape in spatial_shapes):
        raise ValueError(f"{op}: spatial_shapes must be ((h, w), ...) in Python ints, got {spatial_shapes}")
    if any(side < 1 for shape in spatial_shapes for side in shape):
        raise ValueError(f"{op}: spatial_shapes must be positive, got {spatial_shapes}")
    pixels = sum(h * w for h, w in spatial_shapes)
    if value.shape[1] != pixels:
        raise ValueError(
            f"{op}: value must be [B, S, H, D] with the S = {pixels} pixels of spatial_shapes {spatial_shapes}, "
            f"got {list(value.shape)}"
        )
    for name, (tensor, shape) in {"value": (value, (None,) * 4), **others}.items():
        fits = tensor.ndim == len(shape)
        fits = fits and all(size is None or size == given for size, given in zip(shape, tensor.shape, strict=True))
        if not fits:
            expected = ", ".join("any" if size is None else str(size) for size in shape)
            raise ValueError(f"{op}: {name} must be [{expected}], got {list(tensor.shape)}")
        expected = [torch.int64] if name == "valid_sizes" else list(_backend.DTYPES)
        if tensor.dtype not in expected or tensor.device != value.device:
            names = " or ".join(str(dtype) for dtype in expected)
            raise ValueError(f"{op}: {name} must be {names} on {value.device}, got {tensor.dtype} on {tensor.device}")


def _check_dimensions(op: str, **tensors: tuple[Tensor, int]) -> None:
    """Raise ValueError where a tensor does not have its number of dimensions."""
    for name, (tensor, dimensions) in tensors.items():
        if tensor.ndim != dimensions:
            raise ValueError(f"{op}: {name} must have {dimensions} dimensions, got {list(tensor.shape)}")


def _choose(op: str, backend: str | None, value: Tensor, offsets: Tensor, *others: Tensor) -> str:
    """The backend of one call; what CUDA has no kernel for goes to the reference, or is an error on demand."""
    name, reason = _backend.choose("ms_deform_attn", backend, value.device.type)
    if name != "cuda":
        return name
    levels, points = offsets.shape[3:5]
    if value.shape[3] % 4 == 0 and levels <= 8 and 0 < points <= 8:
        if all(x.dtype != torch.float64 for x in (value, offsets, *others)):
            return name
        given = "float64"
    else:
        given = f"width {value.shape[3]}, {levels} levels, {points} points"
    message = f"{op}: CUDA takes widths that are a multiple of 4, up to 8 levels and 8 points, not float64; got {given}"
    if reason.startswith("asked for"):
        raise ValueError(message)
    _warn_once(f"dndetr: {message}; the slow reference runs instead")
    return "reference"


@torch.compiler.assume_constant_result
@cache
def _warn_once(message: str) -> None:
    warnings.warn(message, stacklevel=4)


def ms_deform_attn(
    value: Tensor,
    spatial_shapes: tuple[tuple[int, int], ...],
    locations: Tensor,
    weights: Tensor,
    backend: str | None = None,
) -> Tensor:
    """Weighted sum of bilinear samples from several feature levels.

    value [B, S, H, D] levels after each other; spatial_shapes ((h, w), ...) Python ints; locations [B, Q, H, L, P, 2]
    as (x, y) in [0, 1], zero is sampled outside; weights [B, Q, H, L, P] -> [B, Q, H * D] in the dtype of value.
    The kernels' results can be differentiated once.
    """
    _check_dimensions("ms_deform_attn", value=(value, 4), locations=(locations, 6))
    batch, heads, levels = value.shape[0], value.shape[2], len(spatial_shapes)
    sampled = (batch, locations.shape[1], heads, levels, locations.shape[4])
    _check("ms_deform_attn", value, spatial_shapes, locations=(locations, (*sampled, 2)), weights=(weights, sampled))
    if _choose("ms_deform_attn", backend, value, locations, weights) == "reference":
        return ms_deform_attn_reference(value, spatial_shapes, locations, weights)
    shapes = [side for shape in spatial_shapes for side in shape]
    return torch.ops.dndetr.ms_deform_attn(value, shapes, None, locations, weights, None)


def _check_fused(op, backend, value, spatial_shapes, reference_points, offsets, logits, valid_sizes) -> str:
    """Raise ValueError for what the fused form does not take -> the backend of the call."""
    dimensions = {"value": (value, 4), "reference_points": (reference_points, 4), "offsets": (offsets, 6)}
    _check_dimensions(op, **dimensions)
    batch, heads, levels = value.shape[0], value.shape[2], len(spatial_shapes)
    queries, points = offsets.shape[1], offsets.shape[4]
    checks = {
        "reference_points": (reference_points, (batch, queries, levels, 4 if reference_points.shape[-1] == 4 else 2)),
        "offsets": (offsets, (batch, queries, heads, levels, points, 2)),
        "logits": (logits, (batch, queries, heads, levels * points)),
    }
    if valid_sizes is not None:
        checks["valid_sizes"] = (valid_sizes, (batch, levels, 2))
    _check(op, value, spatial_shapes, **checks)
    return _choose(op, backend, value, offsets, logits, reference_points)


def ms_deform_attn_fused(
    value: Tensor,
    spatial_shapes: tuple[tuple[int, int], ...],
    reference_points: Tensor,
    offsets: Tensor,
    logits: Tensor,
    valid_sizes: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Deformable attention from raw projections: softmax, locations and padding inside.

    value [B, S, H, D]; reference_points [B, Q, L, 2] centres or [B, Q, L, 4] cxcywh, relative to each level's size;
    offsets [B, Q, H, L, P, 2]; logits [B, Q, H, L * P]; valid_sizes [B, L, 2] int64 (height, width): pixels outside
    count as zero (None: all inside) -> [B, Q, H * D] in the dtype of value.
    """
    given = (value, spatial_shapes, reference_points, offsets, logits, valid_sizes)
    if _check_fused("ms_deform_attn_fused", backend, *given) == "reference":
        return ms_deform_attn_fused_reference(*given)
    shapes = [side for shape in spatial_shapes for side in shape]
    return torch.ops.dndetr.ms_deform_attn(value, shapes, *given[2:])


def ms_deform_attn_projected(
    value: Tensor,
    spatial_shapes: tuple[tuple[int, int], ...],
    reference_points: Tensor,
    projected: Tensor,
    valid_sizes: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """:func:`ms_deform_attn_fused` of one projection that makes offsets and logits together.

    projected [B, Q, H * L * P * 3]: all heads' offsets [H, L, P, 2], then all heads' logits [H, L * P]; its gradient is
    one tensor like it, so that nothing has to be put together.
    """
    _check_dimensions("ms_deform_attn_projected", value=(value, 4), projected=(projected, 3))
    heads, levels = value.shape[2], len(spatial_shapes)
    if projected.shape[2] % (3 * heads * levels):
        raise ValueError(
            f"ms_deform_attn_projected: projected must be [B, Q, {heads} heads x {levels} levels x points x 3], got "
            f"{list(projected.shape)}"
        )
    offsets, logits = _ms_deform_attn.parts(projected, heads, levels)
    given = (value, spatial_shapes, reference_points, offsets, logits, valid_sizes)
    if _check_fused("ms_deform_attn_projected", backend, *given) == "reference":
        return ms_deform_attn_fused_reference(*given)
    shapes = [side for shape in spatial_shapes for side in shape]
    return torch.ops.dndetr.ms_deform_attn(value, shapes, reference_points, projected, None, valid_sizes)


# name: (B, Q, H, D, level shapes, P, form of the reference points, padding)
CASES = {
    "tiny": (2, 19, 2, 8, ((6, 5), (3, 4)), 3, 4, True),
    "train-tiny-encoder": (16, 320, 4, 32, ((16, 16), (8, 8)), 4, 2, False),
    "train-tiny-decoder": (16, 70, 4, 32, ((16, 16), (8, 8)), 4, 4, False),
    "train-small-encoder": (4, 1500, 4, 32, ((30, 40), (15, 20)), 4, 2, True),
    "train-small-decoder": (4, 180, 4, 32, ((30, 40), (15, 20)), 4, 4, True),
    "quarter-encoder": (1, 5600, 8, 32, ((50, 84), (25, 42), (13, 21), (7, 11)), 4, 2, True),
    "decoder": (1, 500, 8, 32, ((100, 167), (50, 84), (25, 42), (13, 21)), 4, 4, True),
    "odd-width": (2, 33, 3, 13, ((7, 9), (4, 5), (2, 3)), 2, 2, True),
    "width-32": (1, 21, 2, 32, ((5, 6), (3, 2)), 4, 4, True),
    "width-64": (1, 11, 2, 64, ((5, 6), (3, 2), (1, 1)), 4, 2, True),
    "pixels": (2, 93, 2, 32, ((9, 9), (3, 4)), 4, 2, True),
    "tiles": (2, 540, 2, 32, ((20, 21), (10, 11), (2, 5)), 4, 2, True),
    "many-tiles": (72, 93, 8, 32, ((9, 9), (3, 4)), 4, 2, True),  # enough for any GPU's kernels of many rows
    "few-queries": (2, 5, 2, 32, ((20, 14), (10, 7)), 4, 4, True),
    "wide": (1, 17, 2, 136, ((5, 6),), 8, 4, False),
    "one-point": (3, 5, 1, 16, ((4, 4),), 1, 2, False),
    "one-pixel": (1, 9, 2, 8, ((1, 1), (1, 3)), 2, 4, False),
    "many-levels": (1, 21, 2, 24, tuple((h, 9 - h) for h in range(1, 9)), 8, 2, True),
    "no-queries": (2, 0, 2, 8, ((3, 3),), 2, 4, False),
    "no-images": (0, 5, 2, 8, ((3, 3),), 2, 2, False),
}


def make_case(name: str, dtype: torch.dtype = torch.float32, device: str = "cpu", seed: int = 0) -> tuple:
    """Arguments of :func:`ms_deform_attn_fused` for a case, as :func:`make_inputs` draws them."""
    return make_inputs(CASES[name], dtype, device, seed)


def make_inputs(case: tuple, dtype: torch.dtype = torch.float32, device: str = "cpu", seed: int = 0) -> tuple:
    """Arguments of :func:`ms_deform_attn_fused` for sizes as in ``CASES``; some points off the image, none on a kink.

    As many queries as pixels stand for those pixels, others lie anywhere. dtype is that of value, offsets and logits;
    reference points are in at least float32.
    """
    batch, queries, heads, width, shapes, points, form, padded = case
    draw = torch.Generator().manual_seed(seed)

    def normal(*size):
        return torch.randn(*size, generator=draw, dtype=torch.float64)

    levels, pixels = len(shapes), sum(h * w for h, w in shapes)
    reference = torch.rand(batch, queries, 1, form, generator=draw, dtype=torch.float64)
    if queries == pixels:
        # A little off the centre, where an offset of whole pixels would put the sample on a kink.
        sides = [((torch.arange(h) + 0.51) / h, (torch.arange(w) + 0.51) / w) for h, w in shapes]
        centres = torch.cat([torch.cartesian_prod(y, x).flip(-1) for y, x in sides]).double()
        reference[..., :2] = centres[None, :, None]
    valid = None
    if padded:
        share = 0.5 + 0.5 * torch.rand(batch, 1, 2, generator=draw)
        valid = (torch.tensor(shapes) * share).ceil().long().to(device)
    value = normal(batch, pixels, heads, width)
    reference = reference.expand(-1, -1, levels, -1).contiguous()
    offsets = _off_kinks(reference, 2 * normal(batch, queries, heads, levels, points, 2), shapes)
    precise = torch.promote_types(dtype, torch.float32)
    return (
        value.to(device, dtype),
        shapes,
        reference.to(device, precise),
        offsets.to(device, dtype),
        normal(batch, queries, heads, levels * points).to(device, dtype),
        valid,
    )


def _off_kinks(reference: Tensor, offsets: Tensor, shapes: tuple) -> Tensor:
    """Offsets whose samples keep away from pixels' centres, where derivatives jump and so depend on rounding."""
    sides = torch.tensor([[[w, h]] for h, w in shapes], dtype=offsets.dtype)
    at = sampling_locations(reference, offsets, shapes) * sides - 0.5
    pixels_each = sampling_locations(reference, offsets + 1, shapes) * sides - 0.5 - at
    return torch.where((at - at.round()).abs() < 1e-4, offsets + 0.01 / pixels_each, offsets)


def _self_test(device_type: str) -> float:
    cases = [make_case("tiny", device=device_type)]
    if device_type == "cuda":  # large enough, and of a type, for the kernels that training runs
        cases.append(make_case("many-tiles", torch.bfloat16, device_type))
    return _backend.worst(map(_error, cases))


def _error(case: tuple) -> float:
    """Largest error of a case's output and gradients, beyond rounding and relative to the largest element of each."""
    value, shapes, reference, offsets, logits, valid = case
    inputs = [x.requires_grad_() for x in (value, reference, offsets, logits)]
    flat = [side for shape in shapes for side in shape]
    with torch.enable_grad():
        expected = ms_deform_attn_fused_reference(value, shapes, reference, offsets, logits, valid)
        grad_out = torch.linspace(-1, 1, expected.numel(), device=expected.device).view_as(expected).to(expected.dtype)
        expected_grads = torch.autograd.grad(expected, inputs, grad_out)
    given = (value.detach(), flat, reference.detach(), offsets.detach(), logits.detach(), valid)
    out = torch.ops.dndetr.ms_deform_attn(*given)
    grads = torch.ops.dndetr.ms_deform_attn_backward(grad_out, *given, True)
    rounding = torch.finfo(value.dtype).eps if value.dtype.itemsize == 2 else 0.0
    pairs = zip((out, *grads), (expected.detach(), *expected_grads), strict=True)
    errors = [((a - b).abs().max() / b.abs().max()).double() - 2 * rounding for a, b in pairs]
    return torch.stack(errors).max().clamp_min(0).item()


def _cpp_obstacle(device_type: str) -> str | None:
    return _backend.extension_obstacle("ms_deform_attn") if device_type == "cpu" else "it works on CPU tensors"


def _cuda_obstacle(device_type: str) -> str | None:
    return _backend.cuda_obstacle("ms_deform_attn_cuda") if device_type == "cuda" else "it works on CUDA tensors"


_backend.register(
    "ms_deform_attn",
    _backend.Backend("cuda", ("cuda",), _cuda_obstacle, _self_test, tolerance=1e-4),
    _backend.Backend("cpp", ("cpu",), _cpp_obstacle, _self_test, tolerance=1e-4),
)
