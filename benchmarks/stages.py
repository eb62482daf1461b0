"""The stages of a training step, marked while it runs."""

import contextlib
from collections.abc import Callable, Iterator
from unittest import mock

import torch

import dndetr.training.criterion
from dndetr.training.step import TrainStep

STAGES = ("forward", "matching", "losses", "backward", "optimizer")


@contextlib.contextmanager
def stages(step: TrainStep, around: Callable[[str], contextlib.AbstractContextManager]) -> Iterator[None]:
    """Within, each stage of an eager step runs in ``around(name)``."""
    places = (
        (step.model, "forward"),
        (dndetr.training.criterion, "match"),
        (dndetr.training.criterion, "set_loss"),
        (torch.Tensor, "backward"),
        (step.optimizer, "step"),
    )
    with contextlib.ExitStack() as stack:
        for name, (target, attribute) in zip(STAGES, places, strict=True):
            marked = _marked(name, getattr(target, attribute), around)
            stack.enter_context(mock.patch.object(target, attribute, marked))
        yield


def _marked(name: str, function: Callable, around: Callable[[str], contextlib.AbstractContextManager]) -> Callable:
    def marked(*args, **kwargs):
        with around(name):
            return function(*args, **kwargs)

    return marked
