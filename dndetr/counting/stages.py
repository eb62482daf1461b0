"""The stages of a training step, or its model's parts, marked while it runs."""

import contextlib
from collections.abc import Callable, Iterator, Sequence

import torch

from ..training import criterion
from ..training.step import TrainStep
from .replaced import replaced

STAGES = ("forward", "matching", "losses", "backward", "optimizer")
# With the forward pass by the model's parts, of a model with two stages.
PARTS = ("backbone", "projection", "encoder", "proposals", "queries", "decoder", *STAGES[1:])


def parts_of(model: torch.nn.Module) -> tuple[str, ...]:
    """The parts that a model has, in the order of ``PARTS``."""
    return tuple(name for name in PARTS if isinstance(getattr(model, name, None), torch.nn.Module))


@contextlib.contextmanager
def stages(
    step: TrainStep, around: Callable[[str], contextlib.AbstractContextManager], names: Sequence[str] = STAGES
) -> Iterator[None]:
    """Within, each of the named stages and parts of an eager step runs in ``around(name)``."""
    places = {
        "forward": (step.model, "forward"),
        "matching": (criterion, "match"),
        "losses": (criterion, "set_loss"),
        "backward": (torch.Tensor, "backward"),
        "optimizer": (step.optimizer, "step"),
    }
    with contextlib.ExitStack() as stack:
        for name in names:
            target, attribute = places[name] if name in places else (getattr(step.model, name), "forward")
            marked = _marked(name, getattr(target, attribute), around)
            stack.enter_context(replaced(target, attribute, marked))
        yield


def _marked(name: str, function: Callable, around: Callable[[str], contextlib.AbstractContextManager]) -> Callable:
    def marked(*args, **kwargs):
        with around(name):
            return function(*args, **kwargs)

    return marked
