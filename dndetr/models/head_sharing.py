"""A decoder has a pair of heads for each layer, or one for all: weights of one kind for a model of the other."""

import re
from collections.abc import Iterable

from torch import Tensor

_HEAD = re.compile(r"decoder\.(class|bbox)_embed\.(?:(\d+)\.)?((?:layers\.\d+\.)?(?:weight|bias))")


def fit_heads(weights: dict[str, Tensor], own: Iterable[str]) -> dict[str, Tensor]:
    """Weights under our names, with their decoder heads as a model with the parameters ``own`` has them.

    One head becomes that of every layer. Heads of all layers become one only where they are copies of each other;
    where they differ they stay what they are.
    """
    heads: dict[tuple[str, str], dict[str | None, Tensor]] = {}
    for name, value in weights.items():
        if found := _HEAD.fullmatch(name):
            heads.setdefault((found[1], found[3]), {})[found[2]] = value
    fitted = {name: value for name, value in weights.items() if not _HEAD.fullmatch(name)}
    taken = set()
    for name in own:
        found = _HEAD.fullmatch(name)
        layers = heads.get((found[1], found[3])) if found else None
        if not layers:
            continue
        here = layers.get(found[2], layers.get(None))
        if found[2] is None and here is None:
            first, *others = layers.values()
            here = first if all(first.equal(other) for other in others) else None
        if here is not None:
            fitted[name] = here
            taken.add((found[1], found[3]))
    unfit = {
        n: value for n, value in weights.items() if (found := _HEAD.fullmatch(n)) and found.group(1, 3) not in taken
    }
    return fitted | unfit
