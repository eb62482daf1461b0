"""A decoder has a pair of heads for each layer, or one for all: weights of one kind for a model of the other."""

import re
from collections.abc import Iterable

from torch import Tensor

_HEAD = re.compile(r"decoder\.(class|bbox)_embed\.(?:(\d+)\.)?((?:layers\.\d+\.)?(?:weight|bias))")
_Head = dict[str, Tensor]  # its parts


def fit_heads(weights: dict[str, Tensor], own: Iterable[str]) -> dict[str, Tensor]:
    """Weights under our names, with their decoder heads as a model with the parameters ``own`` has them.

    One head, or copies of one, become that of every layer, or of all. Heads that differ stay those of their layers.
    """
    heads: dict[str, dict[str | None, _Head]] = {}
    fitted = {}
    for name, value in weights.items():
        if found := _HEAD.fullmatch(name):
            kind, layer, part = found.groups()
            heads.setdefault(kind, {}).setdefault(layer, {})[part] = value
        else:
            fitted[name] = value
    wanted = dict.fromkeys(found.group(1, 2) for name in own if (found := _HEAD.fullmatch(name)))
    for kind, layers in heads.items():
        first, *others = layers.values()
        if all(_equal(first, other) for other in others):
            layers = {layer: first for of, layer in wanted if of == kind}
        for layer, head in layers.items():
            place = f"decoder.{kind}_embed." if layer is None else f"decoder.{kind}_embed.{layer}."
            fitted |= {place + part: value for part, value in head.items()}
    return fitted


def _equal(head: _Head, other: _Head) -> bool:
    return head.keys() == other.keys() and all(value.equal(other[part]) for part, value in head.items())
