"""AdamW with the official parameter groups, learning-rate schedules, and the moving average of the weights."""

import copy
import math
from bisect import bisect_right
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn


def build_optimizer(
    model: nn.Module,
    lr: float,
    backbone_scale: float = 0.1,
    weight_decay: float = 1e-4,
    betas: tuple[float, float] = (0.9, 0.999),
) -> torch.optim.AdamW:
    """AdamW over two groups: the backbone at ``lr * backbone_scale`` and the rest at ``lr``; everything decays.

    Frozen parameters belong to no group. A pyramid on the backbone belongs to the rest, since it is never pretrained.
    """
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    backbone = [p for name, p in named if _is_pretrained(name)]
    rest = [p for name, p in named if not _is_pretrained(name)]
    groups = [{"params": rest, "lr": lr}]
    if backbone:
        groups.append({"params": backbone, "lr": lr * backbone_scale})
    capturable = rest[0].is_cuda
    return torch.optim.AdamW(groups, lr=lr, betas=betas, weight_decay=weight_decay, fused=True, capturable=capturable)


def _is_pretrained(name: str) -> bool:
    return name.startswith("backbone.") and not name.startswith("backbone.pyramid.")


def schedule_factor(
    kind: str, total_steps: int, warmup_steps: int, drop_steps: tuple[int, ...], gamma: float, floor: float
) -> Callable[[float], float]:
    """The factor on the learning rate as a function of the step, or of a place between two.

    Linear warm-up, then "constant"; "step" and "multistep": times ``gamma`` at each of ``drop_steps``; "cosine": from
    1 to ``floor`` at the last step.
    """

    def factor(step: float) -> float:
        if step < warmup_steps:
            return (step + 1) / (warmup_steps + 1)
        if kind == "cosine":
            progress = (step - warmup_steps) / max(1, total_steps - warmup_steps)
            return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * min(progress, 1)))
        if kind == "constant":
            return 1.0
        return gamma ** bisect_right(drop_steps, step)

    return factor


class Schedule:
    """The learning rates of an optimiser's groups: those it was made with, times a factor of the steps done.

    A run that must end sooner moves through the same factors at another ``pace`` than 1, its steps being so many each.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, factor: Callable[[float], float]):
        self.optimizer, self.factor, self.done, self.pace = optimizer, factor, 0, 1
        self._base = [group["lr"] for group in optimizer.param_groups]

    def rates(self) -> list[float]:
        """Of the step that comes next, one per group."""
        return [base * self.factor(self.done) for base in self._base]

    def advance(self) -> None:
        """One more step is done."""
        self.done += self.pace

    def set(self, rates: Sequence[float | Tensor]) -> None:
        """What the optimiser uses; tensors on the device are read there at each step."""
        for group, rate in zip(self.optimizer.param_groups, rates, strict=True):
            group["lr"] = rate


class WeightAverage:
    """Exponential moving average of a model's parameters and floating-point buffers, without host synchronisation.

    The decay ramps up as (1 + n) / (10 + n) over the first updates n, so that the start is forgotten quickly.
    """

    def __init__(self, model: nn.Module, decay: float):
        self.model = copy.deepcopy(model).eval().requires_grad_(False)
        self.decay, self.updates = decay, 0

    def weight(self) -> float:
        """Share of the model's weights in the update that comes next."""
        return 1 - min(self.decay, (2 + self.updates) / (11 + self.updates))

    @torch.no_grad()
    def update(self, model: nn.Module, weight: float | Tensor) -> None:
        """Move the average towards ``model``'s present weights by that share; counted by whoever calls.

        weight: a number, or a scalar on the device for an update that will be replayed with other shares.
        """
        mine, theirs = [], []
        for average, current in zip(_tensors(self.model), _tensors(model), strict=True):
            if average.is_floating_point():
                mine.append(average)
                theirs.append(current)
            else:
                average.copy_(current)
        if isinstance(weight, Tensor):
            # There is no fused form of lerp whose share lies on the device.
            difference = torch._foreach_sub(theirs, mine)
            torch._foreach_mul_(difference, weight)
            torch._foreach_add_(mine, difference)
        else:
            torch._foreach_lerp_(mine, theirs, weight)


def _tensors(model: nn.Module):
    yield from model.parameters()
    yield from model.buffers()
