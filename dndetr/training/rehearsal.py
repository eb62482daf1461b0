"""One step computed eagerly and undone: what the first replay of a captured one must repeat, or it is not trusted.

A captured step is right only if everything that it depends on was captured as well. What forgets that, here or in a new
version of torch, gives no error, only a worse detector; so the losses, the gradient's norm and the change of the
weights are compared once, from the same weights, batch and noise.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from .criterion import Losses

# What may differ between two computations of one step, whose sums a GPU adds in any order and rounds: relative, and the
# cosine of the angle between two changes of the weights.
_LOSS, _NORM, _SIZE, _ANGLE = 1e-3, 2e-2, 2e-2, 0.98


class _Outcome(NamedTuple):
    """On the host: total loss, gradient norm, and what was added to each trained weight."""

    loss: float
    norm: float
    moved: list[Tensor]


class Rehearsal:
    """A step that was computed and undone; tensors: all that a step changes; trained: the weights among them."""

    def __init__(self, tensors: list[Tensor], trained: list[Tensor], work: Callable[[], tuple[Losses, Tensor]]):
        self._tensors, self._trained = tensors, trained
        # On the host: a GPU may have no room for a second copy.
        self._before = [tensor.detach().cpu().clone() for tensor in tensors]
        self._weights = [weight.detach().cpu().clone() for weight in trained]
        self._expected = self._outcome(work())
        self.undo()

    @torch.no_grad()
    def undo(self) -> None:
        """Bring everything that a step changed back to where it was."""
        for tensor, before in zip(self._tensors, self._before, strict=True):
            # What is as it was is left alone: others may have noted that nothing ever wrote there.
            if not torch.equal(tensor.detach().cpu(), before):
                tensor.copy_(before)

    def differs(self, result: tuple[Losses, Tensor]) -> str | None:
        """What a step from the same state did otherwise, in words; None if nothing that matters."""
        found, expected = self._outcome(result), self._expected
        for name, tolerance in (("loss", _LOSS), ("norm", _NORM)):
            given, wanted = getattr(found, name), getattr(expected, name)
            if not math.isclose(given, wanted, rel_tol=tolerance) and not (math.isnan(given) and math.isnan(wanted)):
                what = "a loss" if name == "loss" else "a gradient norm"
                return f"it gave {what} of {given:.6g}, the same step computed eagerly {wanted:.6g}"
        a, b = found.moved, expected.moved
        product, mine, theirs = _product(a, b), _product(a, a), _product(b, b)
        if mine == theirs == 0 or (math.isnan(mine) and math.isnan(theirs)):
            return None
        if not math.isclose(mine, theirs, rel_tol=_SIZE) or not product >= _ANGLE * math.sqrt(mine * theirs):
            return "it did not change the weights as the same step computed eagerly"
        return None

    def _outcome(self, result: tuple[Losses, Tensor]) -> _Outcome:
        losses, norm = result
        after = (weight.detach().cpu() for weight in self._trained)
        moved = [weight - before for weight, before in zip(after, self._weights, strict=True)]
        return _Outcome(losses.total.item(), norm.item(), moved)


def _product(a: list[Tensor], b: list[Tensor]) -> float:
    """The scalar product of all numbers of two lists."""
    return sum(torch.sum(x.double() * y.double()).item() for x, y in zip(a, b, strict=True))
