"""Which Swin some tensors are of, and what to type for a model with it."""

from collections.abc import Mapping
from itertools import count, takewhile
from typing import NamedTuple

import torch

_STAGE = "model.swin.encoder.layers."
_TABLE = "attention.relative_position_bias.relative_position_bias_table"
# Width and depths of those that are published, and the names of theirs by the size of their windows.
_PUBLISHED = {
    "Swin-T": (96, (2, 2, 6, 2), {7: "swin-tiny"}),
    "Swin-S": (96, (2, 2, 18, 2), {7: "swin-small"}),
    "Swin-B": (128, (2, 2, 18, 2), {7: "swin-base", 12: "microsoft/swin-base-patch4-window12-384-in22k"}),
    "Swin-L": (192, (2, 2, 18, 2), {7: "microsoft/swin-large-patch4-window7-224-in22k", 12: "swin-large"}),
}


class SwinKind(NamedTuple):
    """Width of the first stage, and blocks and heads of all that are there; side of a window."""

    width: int
    depths: tuple[int, ...]
    heads: tuple[int, ...]
    window: int

    @property
    def letter(self) -> str | None:
        """The published size that begins like this, if any does."""
        if self.heads[0] * 32 != self.width:
            return None
        alike = (
            name
            for name, (width, depths, _) in _PUBLISHED.items()
            if (width, depths[: len(self.depths)]) == (self.width, self.depths)
        )
        return next(alike, None)

    @property
    def flag(self) -> str:
        """What chooses this one among the backbones of transformers."""
        names = {} if self.letter is None else _PUBLISHED[self.letter][2]
        return f"--model.backbone.name {names.get(self.window, 'FOLDER (one with its config.json and weights)')}"

    def begins_like(self, other: "SwinKind") -> bool:
        """Whether the other's stages, as far as they go, are these."""
        stages = len(other.depths)
        return (self.width, self.depths[:stages], self.heads[:stages], self.window) == other

    def __str__(self) -> str:
        size = self.letter
        if size is None:
            depths, heads = (" ".join(map(str, counts)) for counts in (self.depths, self.heads))
            size = f"Swin of width {self.width}, {depths} blocks and {heads} heads"
        return f"{size} with windows of {self.window}"


def swin_kind(shapes: Mapping[str, torch.Size]) -> SwinKind | None:
    """The Swin of a backbone's tensors under our names; None for anything else.

    shapes: of the tensors, by name within the backbone.
    """
    tables: list[list[torch.Size]] = []
    for stage in count():
        found = (shapes.get(f"{_STAGE}{stage}.blocks.{n}.{_TABLE}", ()) for n in count())
        tables.append(list(takewhile(lambda shape: len(shape) == 2, found)))
        if not tables[-1]:
            break
    embedding = shapes.get("model.swin.embeddings.patch_embeddings.projection.weight")
    if not embedding or not tables[0]:
        return None
    places, _ = tables[0][0]  # of all pairs in a window
    heads = tuple(stage[0][1] for stage in tables[:-1])
    return SwinKind(embedding[0], tuple(map(len, tables[:-1])), heads, (round(places**0.5) + 1) // 2)
