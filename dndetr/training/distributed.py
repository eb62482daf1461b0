"""The processes that train one model together, as torchrun starts them; a single one has nobody to wait for."""

import gc
import os
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


class Processes:
    """This process among all: ``rank`` of ``world``, and what they tell each other.

    Numbers on a GPU travel by NCCL without a wait of the host; what is said in Python's objects travels by gloo, and
    waits for everybody, so all processes must say it at the same step. Use as a context manager.
    """

    def __init__(self, environment: Mapping[str, str] = os.environ):
        self.world = int(environment.get("WORLD_SIZE", 1))
        self.rank = int(environment.get("RANK", 0)) if self.world > 1 else 0
        self.local_rank = int(environment.get("LOCAL_RANK", 0)) if self.world > 1 else None

    @property
    def first(self) -> bool:
        """Whether this is the process that prints and writes."""
        return self.rank == 0

    def __enter__(self) -> "Processes":
        if self.world > 1:
            dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
        return self

    def __exit__(self, kind, *_) -> None:
        # A process that failed must end, not wait for the others to say goodbye; torchrun then ends those.
        if self.world > 1 and kind is None:
            # gloo's threads end with the group's last reference; the wrapped model holds one, and may be in cycles.
            # A thread that lives on may ask for the interpreter's lock while it shuts down, which aborts the process.
            gc.collect()
            dist.destroy_process_group()

    def sum(self, values: Tensor) -> Tensor:
        """The sum over all processes, in place."""
        if self.world > 1:
            dist.all_reduce(values)
        return values

    def stack(self, values: Tensor) -> Tensor:
        """Everybody's values of one shape: [world, ...]."""
        if self.world == 1:
            return values[None]
        parts = [torch.empty_like(values) for _ in range(self.world)]
        dist.all_gather(parts, values.contiguous())
        return torch.stack(parts)

    def gather(self, value: Any) -> list[Any]:
        """Everybody's value, by rank."""
        if self.world == 1:
            return [value]
        values = [None] * self.world
        dist.all_gather_object(values, value)
        return values

    def from_first(self, value: Any) -> Any:
        """The first process's value."""
        if self.world == 1:
            return value
        values = [value]
        dist.broadcast_object_list(values)
        return values[0]
