"""From backbone maps to the tokens that encoder and decoder work on."""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..ops.level_sums import level_sums
from ..ops.ms_deform_attn import valid_pixels
from .backbone import group_count
from .position import pixel_encoding


class Features(NamedTuple):
    """Flattened feature levels, finest first.

    tokens, position [B, S, C], no position where nothing asks for it; shapes ((h, w), ...) Python ints; valid_sizes
    [B, L, 2] int64 valid (height, width) per level; valid [B, S] bool, True inside; level_embed [L, C]: what of the
    position is learned, if anything is; values [B, S, C]: tokens as the next deformable attention projects them, where
    that is done.
    """

    tokens: Tensor
    position: Tensor | None
    shapes: tuple[tuple[int, int], ...]
    valid_sizes: Tensor
    valid: Tensor
    level_embed: Tensor | None = None
    values: Tensor | None = None

    def valid_ratios(self, dtype: torch.dtype) -> Tensor:
        """[B, L, 2] (x, y): valid part of each level's width and height."""
        sizes = self.valid_sizes.to(dtype)
        ratios = [
            torch.stack((sizes[:, level, 1] / w, sizes[:, level, 0] / h), dim=-1)
            for level, (h, w) in enumerate(self.shapes)
        ]
        return torch.stack(ratios, dim=1)


def token_centres(features: Features, dtype: torch.dtype) -> Tensor:
    """Centre of every token, relative to the valid part of its level: [B, S, 2] (x, y)."""
    centres = []
    for level, (h, w) in enumerate(features.shapes):
        size = features.valid_sizes[:, level].to(dtype)
        row = torch.arange(h, device=size.device, dtype=dtype) + 0.5
        column = torch.arange(w, device=size.device, dtype=dtype) + 0.5
        y = (row / size[:, :1])[:, :, None].expand(-1, h, w)
        x = (column / size[:, 1:])[:, None, :].expand(-1, h, w)
        centres.append(torch.stack((x, y), dim=-1).flatten(1, 2))
    return torch.cat(centres, dim=1)


def level_valid_sizes(sizes: Tensor, canvas: tuple[int, int], shapes) -> Tensor:
    """Valid (height, width) [B, 2] on the canvas -> [B, L, 2] on the levels.

    A level's pixel counts as valid when the canvas pixel that nearest-neighbour resizing would pick for it is.
    """
    height, width = canvas
    levels = [
        torch.stack(((sizes[:, 0] * h + height - 1) // height, (sizes[:, 1] * w + width - 1) // width), dim=-1)
        for h, w in shapes
    ]
    return torch.stack(levels, dim=1)


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
        self.width, self.temperature, self.shift = width, temperature, shift
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
        valid_sizes = level_valid_sizes(sizes, canvas, shapes)
        tokens = torch.cat([x.flatten(2).transpose(1, 2) for x in projected], dim=1)
        position = None if self.temperature is None else self._position(valid_sizes, shapes)
        learned = None if position is None else self.level_embed
        return Features(tokens, position, shapes, valid_sizes, valid_pixels(valid_sizes, shapes), learned)

    def _position(self, valid_sizes: Tensor, shapes) -> Tensor:
        # Under autocast the weights may be in half precision (training/lowered.py), which is too coarse for a position.
        own = self.projections[0].weight if self.level_embed is None else self.level_embed
        dtype = torch.promote_types(own.dtype, torch.float32)
        positions = []
        for level, shape in enumerate(shapes):
            size = valid_sizes[:, level]
            position = pixel_encoding(size, shape, self.width, self.temperature, self.shift, dtype)
            positions.append(position if self.level_embed is None else position + self.level_embed[level])
        return torch.cat(positions, dim=1)
