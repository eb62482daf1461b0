"""From backbone maps to the tokens that encoder and decoder work on."""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..ops.level_sums import level_sums
from ..ops.ms_deform_attn import places_and_extents, valid_pixels, within
from ..ops.pixel_encoding import pixel_encoding
from .backbone import group_count


class Features(NamedTuple):
    """Flattened feature levels, finest first.

    tokens, position [B, S, C], no position where nothing asks for it; shapes ((h, w), ...) Python ints; valid_sizes
    [B, L, 2] int64 valid (height, width) per level; valid [B, S] bool, True inside. Of several scales also centres
    [B, S, 2] (x, y) of tokens, relative to the valid part of their level; ratios [B, L, 2] (x, y): valid part of each
    level's width and height. level_embed [L, C]: what of the position is learned, if anything is; values [B, S, C]:
    tokens as the next deformable attention projects them, where that is done.
    """

    tokens: Tensor
    position: Tensor | None
    shapes: tuple[tuple[int, int], ...]
    valid_sizes: Tensor
    valid: Tensor
    centres: Tensor | None = None
    ratios: Tensor | None = None
    level_embed: Tensor | None = None
    values: Tensor | None = None

    def valid_ratios(self, dtype: torch.dtype) -> Tensor:
        """``ratios`` in this dtype."""
        return self.ratios.to(dtype)


def token_centres(features: Features, dtype: torch.dtype) -> Tensor:
    """``features.centres`` in this dtype."""
    return features.centres.to(dtype)


def sides_on_device(shapes, device: torch.device) -> Tensor:
    """((h, w), ...) -> [L, 2] int64.

    Filled on the device, both numbers by one kernel: a tensor made from a list would be copied there, and waited for.
    """
    return torch.stack([torch.linspace(h, w, 2, dtype=torch.int64, device=device) for h, w in shapes])


def level_valid_sizes(sizes: Tensor, canvas: Tensor, sides: Tensor) -> Tensor:
    """Valid (height, width) [B, 2] on the canvas [2] -> [B, L, 2] on levels with these sides [L, 2].

    A level's pixel counts as valid when the canvas pixel that nearest-neighbour resizing would pick for it is.
    """
    return (sizes[:, None] * sides + (canvas - 1)) // canvas


def places_of_tokens(valid_sizes: Tensor, shapes, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Valid sizes [B, L, 2] -> ``Features.valid`` and ``Features.centres``."""
    place, extent = places_and_extents(valid_sizes, shapes)
    return within(place, extent), ((place.to(dtype) + 0.5) / extent.to(dtype)).flip(-1)


class PositionGradient(torch.autograd.Function):
    """What has a position in it, [B, S, C], as it is: its gradient is also that of the level embedding, summed.

    Where the position itself had a gradient it would be as large as the tokens, and in float32.
    """

    @staticmethod
    def forward(ctx, positioned, level_embed, shapes):
        ctx.sizes, ctx.dtype = [h * w for h, w in shapes], level_embed.dtype
        return positioned.view_as(positioned)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        return grad, level_sums(grad, ctx.sizes).to(ctx.dtype) if ctx.needs_input_grad[1] else None, None


class GroupNorm(nn.GroupNorm):
    """``nn.GroupNorm`` in its parameters' precision, under autocast too, as torch has it on GPUs.

    On a CPU its bfloat16 kernel for channels-last maps takes three times as long, and its float32 one loses digits of
    a variance far below the squared mean, as on maps that are mostly padding: there it is given contiguous ones.
    """

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.to(self.weight.dtype, memory_format=torch.contiguous_format))


class InputProjection(nn.Module):
    """Brings backbone maps to the model's width and flattens them into tokens with position encodings.

    ``levels`` beyond the backbone's maps are made by 3x3 convolutions of stride 2, the first on the raw last map. With
    ``norm`` (the multi-scale models) each projection ends in a GroupNorm; ``level_embedding`` adds a learned vector per
    level to the position. temperature (y, x), or None for tokens without positions, and shift as in
    :func:`pixel_encoding`.
    """

    def __init__(
        self,
        widths: list[int],
        width: int,
        levels: int,
        norm: bool,
        level_embedding: bool,
        temperature: tuple[float, float] | None,
        shift: float,
    ):
        super().__init__()
        self.width, self.temperature, self.shift, self.multi_scale = width, temperature, shift, norm
        if levels < len(widths):
            raise ValueError(f"{levels} levels, but the backbone gives {len(widths)} maps; lower backbone outputs")
        sources = list(widths) + [widths[-1]] + [width] * levels
        self.projections = nn.ModuleList()
        for level in range(levels):
            extra = level >= len(widths)
            conv = nn.Conv2d(sources[level], width, *((3, 2, 1) if extra else (1,)))
            self.projections.append(nn.Sequential(conv, GroupNorm(group_count(width), width)) if norm else conv)
            if norm:
                nn.init.xavier_uniform_(conv.weight)
                nn.init.zeros_(conv.bias)
        self.level_embed = nn.Parameter(torch.randn(levels, width)) if level_embedding else None

    def forward(self, maps: list[Tensor], sizes: Tensor, canvas: tuple[int, int]) -> Features:
        """maps [B, C_l, h, w] finest first, sizes [B, 2] valid (height, width) on the canvas (H, W) -> Features."""
        projected = []
        for level, projection in enumerate(self.projections):
            # The first extra level is made from the raw last map, further ones from the level before.
            sources = maps if level <= len(maps) else projected
            projected.append(projection(sources[min(level, len(sources) - 1)]))
        shapes = tuple(tuple(x.shape[-2:]) for x in projected)
        canvas, sides = sides_on_device((canvas, *shapes), sizes.device).split((1, len(shapes)))
        valid_sizes = level_valid_sizes(sizes, canvas, sides)
        tokens = torch.cat([x.flatten(2).transpose(1, 2) for x in projected], dim=1)
        position = None if self.temperature is None else self._position(valid_sizes, shapes, sides)
        learned = None if position is None else self.level_embed
        if not self.multi_scale:
            valid = valid_pixels(valid_sizes, shapes)
            return Features(tokens, position, shapes, valid_sizes, valid, level_embed=learned)
        dtype = torch.promote_types(tokens.dtype, torch.float32)
        valid, centres = places_of_tokens(valid_sizes, shapes, dtype)
        ratios = (valid_sizes.to(dtype) / sides.to(dtype)).flip(-1)
        return Features(tokens, position, shapes, valid_sizes, valid, centres, ratios, learned)

    def _position(self, valid_sizes: Tensor, shapes, sides: Tensor) -> Tensor:
        # Under autocast the weights may be in half precision (training/lowered.py), which is too coarse for a position.
        own = self.projections[0].weight if self.level_embed is None else self.level_embed
        dtype = torch.promote_types(own.dtype, torch.float32)
        position = pixel_encoding(valid_sizes, shapes, sides, self.width, self.temperature, self.shift, dtype)
        if self.level_embed is None:
            return position
        levels = position.split([h * w for h, w in shapes], dim=1)
        return torch.cat([each + self.level_embed[level] for level, each in enumerate(levels)], dim=1)
