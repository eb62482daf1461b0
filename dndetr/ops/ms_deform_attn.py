"""Multi-scale deformable attention (arXiv 2010.04159, section 4.1).

    out[b, q, h] = sum over levels l and points p of
                   weights[b, q, h, l, p] * sample(value_l[b, :, h], locations[b, q, h, l, p])

``sample`` is bilinear on pixel centres: a location x in [0, 1] is the pixel coordinate x * W_l - 0.5, and everything
outside the level is zero. The gradient of a sample is spread to its four corners with the same bilinear weights; the
location's gradient is the difference of neighbouring corners times the level's size.

The fused form takes what the projections produce: raw offsets and logits. It applies the softmax over levels and points
together, and turns offsets into locations: with 2-d reference points  ref + offset / (W_l, H_l),  with 4-d ones (boxes)
ref_xy + offset / P * ref_wh / 2.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def ms_deform_attn_reference(
    value: Tensor, spatial_shapes: tuple[tuple[int, int], ...], locations: Tensor, weights: Tensor
) -> Tensor:
    """The specification, sampling with ``grid_sample``; arguments and result as :func:`ms_deform_attn`."""
    batch, _, heads, width = value.shape
    queries, points = locations.shape[1], locations.shape[4]
    levels = value.split([h * w for h, w in spatial_shapes], dim=1)
    grids = (2 * locations - 1).transpose(1, 2).flatten(0, 1)  # [B*H, Q, L, P, 2]
    samples = []
    for level, ((h, w), pixels) in enumerate(zip(spatial_shapes, levels, strict=True)):
        image = pixels.permute(0, 2, 3, 1).reshape(batch * heads, width, h, w)
        grid = grids[:, :, level].to(image.dtype)
        samples.append(F.grid_sample(image, grid, mode="bilinear", padding_mode="zeros", align_corners=False))
    sampled = torch.cat(samples, dim=-1)  # [B*H, D, Q, L*P]
    weights = weights.transpose(1, 2).reshape(batch * heads, 1, queries, len(levels) * points)
    out = (sampled * weights).sum(-1)
    return out.view(batch, heads * width, queries).transpose(1, 2)


def sampling_locations(reference_points: Tensor, offsets: Tensor, spatial_shapes) -> Tensor:
    """Reference points [B, Q, L, 2 or 4] and offsets [B, Q, H, L, P, 2] -> locations like offsets, at least float32."""
    if offsets.dtype in (torch.bfloat16, torch.float16):
        offsets = offsets.float()
    reference = reference_points[:, :, None, :, None, :]
    if reference_points.shape[-1] == 2:
        # Filled on the device: a tensor made from a list would be copied there, and waited for.
        sides = (side for h, w in spatial_shapes for side in (w, h))
        pixel = torch.stack([torch.full((), 1 / side, dtype=offsets.dtype, device=offsets.device) for side in sides])
        return reference + offsets * pixel.view(-1, 1, 2)
    return reference[..., :2] + offsets * (reference[..., 2:] * (0.5 / offsets.shape[4]))


def valid_pixels(valid_sizes: Tensor, spatial_shapes) -> Tensor:
    """Valid (height, width) per image and level [B, L, 2] -> [B, S] bool, True where a pixel is inside."""
    parts = []
    for level, (h, w) in enumerate(spatial_shapes):
        rows = torch.arange(h, device=valid_sizes.device) < valid_sizes[:, level, :1]
        columns = torch.arange(w, device=valid_sizes.device) < valid_sizes[:, level, 1:]
        parts.append((rows[:, :, None] & columns[:, None, :]).flatten(1))
    return torch.cat(parts, dim=1)


def _check(value: Tensor, spatial_shapes, points: Tensor) -> None:
    pixels = sum(h * w for h, w in spatial_shapes)
    if value.shape[1] != pixels:
        raise ValueError(f"value has {value.shape[1]} pixels, but spatial_shapes {spatial_shapes} describe {pixels}")
    if points.shape[3] != len(spatial_shapes):
        raise ValueError(f"locations or offsets have {points.shape[3]} levels, spatial_shapes {len(spatial_shapes)}")


def ms_deform_attn(
    value: Tensor, spatial_shapes: tuple[tuple[int, int], ...], locations: Tensor, weights: Tensor
) -> Tensor:
    """Weighted sum of bilinear samples from several feature levels.

    value [B, S, H, D] levels after each other; spatial_shapes ((h, w), ...) Python ints; locations [B, Q, H, L, P, 2]
    as (x, y) in [0, 1], zero is sampled outside; weights [B, Q, H, L, P] -> [B, Q, H * D].
    """
    _check(value, spatial_shapes, locations)
    return ms_deform_attn_reference(value, spatial_shapes, locations, weights)


def ms_deform_attn_fused(
    value: Tensor,
    spatial_shapes: tuple[tuple[int, int], ...],
    reference_points: Tensor,
    offsets: Tensor,
    logits: Tensor,
    valid_sizes: Tensor | None = None,
) -> Tensor:
    """Deformable attention from raw projections: softmax, locations and padding inside.

    value [B, S, H, D]; reference_points [B, Q, L, 2] centres or [B, Q, L, 4] cxcywh, relative to each level's size;
    offsets [B, Q, H, L, P, 2]; logits [B, Q, H, L * P]; valid_sizes [B, L, 2] (height, width): pixels outside count as
    zero (None: all inside) -> [B, Q, H * D].
    """
    _check(value, spatial_shapes, offsets)
    if valid_sizes is not None:
        value = value.masked_fill(~valid_pixels(valid_sizes, spatial_shapes)[:, :, None, None], 0)
    locations = sampling_locations(reference_points, offsets, spatial_shapes)
    weights = logits.softmax(-1).view(offsets.shape[:-1])
    return ms_deform_attn_reference(value, spatial_shapes, locations, weights)
