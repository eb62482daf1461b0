"""Counts what is dispatched: kernels, operations of products, bytes beside products, and the time that they predict."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from .flops import flop_of
from .gpus import GAP, LEAST, LEAST_PRODUCT, Gpu
from .kernels import is_nothing, launches, name_of
from .own_ops import own_cost
from .traffic import tensors_in, touched, traffic

ELSEWHERE = "everything else"
_UNDESCRIBED = ("_fused_adamw_",)  # of which torch does not describe every form; it changes what it is given

_ADAMW = 1.85e12  # bytes per second on an H200 of its kernels, which read four lists of tensors and write three


@dataclass(frozen=True)
class Counted:
    """One operation.

    shapes: of its largest inputs; flop: of a product or convolution, None for others; seconds: that an H200 was
    measured to take beside what the rest predicts.
    """

    name: str
    stage: str
    shapes: str
    kernels: int
    flop: int | None
    bytes: int
    seconds: float = 0.0

    @property
    def beside(self) -> int:
        """Bytes, unless it is a product or convolution."""
        return self.bytes if self.flop is None else 0

    def on(self, gpu: Gpu) -> float:
        """Seconds on this card: gaps, and the longest of moving, multiplying, launching and what was measured."""
        least = self.kernels * (LEAST if self.flop is None else LEAST_PRODUCT)
        multiplying = (self.flop or 0) / gpu.products
        moving = self.bytes / gpu.bandwidth
        return self.kernels * GAP + max(least, moving, multiplying, self.seconds / gpu.pace)


class Counter(TorchDispatchMode):
    """operations: what was dispatched within and runs on the GPU, in order, with the stage that it belongs to."""

    def __init__(self):
        super().__init__()
        self.operations: list[Counted] = []
        self._stage = ELSEWHERE

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Within, operations belong to this stage, or to the one within it."""
        before, self._stage = self._stage, name
        try:
            yield
        finally:
            self._stage = before

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = name_of(operation)
        result = None if name in _UNDESCRIBED else operation(*args, **kwargs)
        if name in ("convolution", "convolution_backward"):
            result = _as_convolved(args, result)
        if not is_nothing(operation) and self._runs_there(args, kwargs, result):
            self.operations.append(self._counted(operation, name, args, kwargs, result))
        return result

    def _counted(self, operation, name: str, args: tuple, kwargs: dict, result) -> Counted:
        shapes, flop = _shapes(args), flop_of(operation, args, kwargs, result)
        if operation.namespace == "dndetr":
            own, moved = own_cost(name, args, kwargs, result)
            return Counted(name, self._stage, shapes, own.kernels, flop, moved + own.scratch, own.seconds)
        moved = traffic(operation, args, kwargs, result)
        seconds = moved / _ADAMW if name == "_fused_adamw_" else 0.0
        return Counted(name, self._stage, shapes, launches(operation, args, kwargs), flop, moved, seconds)

    @staticmethod
    def _runs_there(args: tuple, kwargs: dict, result) -> bool:
        return any(tensor.is_cuda for tensor in tensors_in([*args, *kwargs.values(), result]))


def _as_convolved(args: tuple, result):
    """The result in the layout that a GPU's libraries give it, which torch describes for those of this machine."""
    if isinstance(result, (list, tuple)):
        return tuple(_as_convolved(args, each) for each in result)
    last = any(x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last) for x in tensors_in(args))
    if not last or result is None or result.dim() != 4:
        return result
    return result.contiguous(memory_format=torch.channels_last)


def _shapes(args: tuple) -> str:
    """Of the two largest inputs, as [2, 256, 100, 167] bfloat16."""
    found = sorted(tensors_in(args), key=touched, reverse=True)[:2]
    return " ".join(f"{list(x.shape)} {str(x.dtype).removeprefix('torch.')}" for x in found)
