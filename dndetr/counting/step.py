"""A training step as it runs on a GPU, counted on fake tensors: what a captured step holds, from batch to average."""

import contextlib
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import nn

from ..batch import Batch, blank_batch
from ..config import Config
from ..data.collate import target_bucket
from ..models.backbone import FrozenBatchNorm2d
from ..models.build import build_model
from ..training.build import build_step
from ..training.distributed import Processes
from ..training.optim import WeightAverage
from ..training.step import TrainStep
from .backward import plain_backward
from .counter import ELSEWHERE, Counted, Counter
from .fake_gpu import fake_gpu
from .replaced import replaced
from .stages import parts_of, stages

_FORWARD = "rest of the forward pass"
_STEPS_PER_EPOCH = 1000  # of which nothing depends that is counted


def count_step(
    config: Config,
    canvas: tuple[int, int],
    objects: int,
    classes: int,
    arrived: Callable[[nn.Parameter, int], None] | None = None,
) -> tuple[list[Counted], list[str]]:
    """What a step of ``config`` launches -> its operations, the names of stages in order.

    canvas: (height, width) of each of its ``batch_size`` images; objects: of an image, whose bucket decides the slots;
    arrived: if given, the step is that of one of several processes, whose gradients come while backward runs, and it is
    told of each one's parameter and how many operations ran before; what the exchange itself launches is not counted.
    The second step is counted, as the first one makes the optimiser's state. Copies from the host run beside the step
    and are left out. ValueError for recomputed blocks, whose gradients only autograd's own engine can compute, and for
    float32, of which the table of GPUs has no rates.
    """
    if config.model.checkpointing:
        raise ValueError("--model.checkpointing: what is computed again during backward is not counted; leave it out")
    if config.precision == "float32":
        raise ValueError("--precision float32: rates of GPUs are those of bfloat16; leave it out")
    with torch.device("meta"):
        model = build_model(config.model, classes).train()
    if any(side % model.backbone.multiple for side in canvas):
        height, width = (-(-side // model.backbone.multiple) * model.backbone.multiple for side in canvas)
        raise ValueError(
            f"--canvas {canvas[0]}x{canvas[1]}: this backbone needs multiples of {model.backbone.multiple}: give "
            f"--canvas {height}x{width}"
        )
    # Copied here: fake tensors have no memory that could be.
    average = WeightAverage(model, config.optimizer.ema) if config.optimizer.ema else None
    config = replace(config, optimizer=replace(config.optimizer, ema=0.0))
    with fake_gpu():
        _bring_there(model)
        step = build_step(
            config, model, classes, _STEPS_PER_EPOCH, torch.bfloat16, "eager", Processes({}), lambda text: None
        )
        if average is not None:
            _bring_there(average.model)
            step.average = average
        if arrived is not None:
            step._called = model  # several processes lower weights one by one
        _keep_folded(model)
        federated = classes if config.loss.federated else None
        batches = [blank_batch(config.batch_size, canvas, target_bucket(objects), federated)] * config.accumulate
        with replaced(step, "run", lambda tensors, batches: step.compute_arrived(_arrived(tensors), batches)):
            with plain_backward(lambda node: contextlib.nullcontext()), Counter():
                step(*batches)
            counter, names = _counted(step, batches, arrived or (lambda parameter, operations: None))
    return counter.operations, names


def _counted(
    step: TrainStep, batches: list[Batch], arrived: Callable[[nn.Parameter, int], None]
) -> tuple[Counter, list[str]]:
    """A step's operations, those of backward by the part whose gradient they are."""
    counter, parts = Counter(), parts_of(step.model)
    made = _Made()

    @contextlib.contextmanager
    def forward(name: str):
        with counter.stage(_FORWARD if name == "forward" else name), made.by(name):
            yield

    @contextlib.contextmanager
    def backward(node):
        part = made.of(node)
        with counter.stage(f"backward of {part}" if part in parts else "rest of the backward pass"):
            yield
        if hasattr(node, "variable"):
            arrived(node.variable, len(counter.operations))

    names = (*parts, "forward", "matching", "losses", "optimizer")
    with plain_backward(backward), stages(step, forward, names), counter:
        step(*batches)
    order = [*parts, _FORWARD, "matching", "losses", *(f"backward of {part}" for part in reversed(parts))]
    return counter, [*order, "rest of the backward pass", "optimizer", ELSEWHERE]


class _Made:
    """Which part made a node of autograd's graph: they are numbered as they are made."""

    def __init__(self):
        self._spans: list[tuple[int, int, str]] = []

    @contextlib.contextmanager
    def by(self, name: str):
        """Within, nodes are this part's, unless a part within makes them."""
        first = torch._C._autograd._get_sequence_nr()
        yield
        self._spans.append((first, torch._C._autograd._get_sequence_nr(), name))

    def of(self, node) -> str | None:
        """The innermost part that made it; spans within others ended before them."""
        number = node._sequence_nr()
        return next((name for first, end, name in self._spans if first <= number < end), None)


def _arrived(tensors: list[torch.Tensor]) -> list[torch.Tensor]:
    return [torch.empty_like(tensor, device="cuda") for tensor in tensors]


def _bring_there(model: nn.Module) -> None:
    """Parameters and buffers on the fake GPU instead of nowhere, shared ones shared, filters with channels last."""
    made: dict[torch.Tensor, torch.Tensor] = {}

    def on_gpu(tensor: torch.Tensor) -> torch.Tensor:
        layout = torch.channels_last if tensor.dim() == 4 else torch.contiguous_format
        empty = torch.empty(tensor.shape, dtype=tensor.dtype, device="cuda", memory_format=layout)
        return nn.Parameter(empty, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else empty

    for module in model.modules():
        for own in (module._parameters, module._buffers):
            for name, tensor in own.items():
                if tensor is not None:
                    own[name] = made[tensor] = made[tensor] if tensor in made else on_gpu(tensor)


def _keep_folded(model: nn.Module) -> None:
    """Frozen norms keep what they fold, which they do not do while operations are watched."""
    for module in model.modules():
        if isinstance(module, FrozenBatchNorm2d):
            folded = module.scale_shift()
            module.scale_shift = lambda folded=folded: folded
