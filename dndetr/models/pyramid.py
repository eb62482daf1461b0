"""Maps of several strides from the one map of a plain vision transformer (simple feature pyramid, arXiv 2203.16527)."""

from torch import Tensor, nn

from .backbone import group_count
from .features import GroupNorm

_OWN = 3  # the stage whose stride a transformer's patches have, or nearly


class Pyramid(nn.Module):
    """One map [B, C, h, w] -> a map for each of ``outputs`` (stages 1 to 4, ascending), finest first.

    Stage 3 is the map itself, 2 and 1 are made of it by transposed convolutions, each with twice the height and width
    and half of the channels, and 4 by max-pooling.
    """

    def __init__(self, width: int, outputs: tuple[int, ...]):
        super().__init__()
        self.widths = [width // max(1, 2 ** (_OWN - stage)) for stage in outputs]
        self._outputs = outputs
        self.levels = nn.ModuleList(_level(width, stage) for stage in outputs)

    def strides(self, own: int) -> list[int]:
        """Pixels from one place of each map to the next, where the given map has ``own``."""
        return [own * 2 ** (stage - _OWN) if stage > _OWN else own // 2 ** (_OWN - stage) for stage in self._outputs]

    def forward(self, x: Tensor) -> list[Tensor]:
        return [level(x) for level in self.levels]


def _level(width: int, stage: int) -> nn.Module:
    if stage == _OWN:
        return nn.Identity()
    if stage > _OWN:
        return nn.MaxPool2d(2)
    layers: list[nn.Module] = []
    for _ in range(_OWN - stage):
        if layers:
            layers.append(nn.GELU())
        layers += [nn.ConvTranspose2d(width, width // 2, 2, 2), GroupNorm(group_count(width // 2), width // 2)]
        width //= 2
    return nn.Sequential(*layers)
