"""The processes that train one model together, as torchrun starts them; a single one has nobody to wait for."""

import gc
import hashlib
import os
import secrets
import time
from collections.abc import Iterable, Mapping
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..orphans import end_with_parent

_PATIENCE = timedelta(minutes=30)  # with others that start later

_ALONE = "unset {} to train in one process, or start several with torchrun, which sets all (docs/several-gpus.md)"


class Processes:
    """This process among all: ``rank`` of ``world``, and what they tell each other.

    Numbers on a GPU travel by NCCL without a wait of the host; what is said in Python's objects travels by gloo, and
    waits for everybody, so all processes must say it at the same step. Use as a context manager.

    ValueError, in one line, for variables that are no such number or, on entering, missing.
    """

    def __init__(self, environment: Mapping[str, str] = os.environ):
        self._environment = environment
        self.world = self._number("WORLD_SIZE", 1, 1)
        self.rank = self._number("RANK", 0, 0, self.world - 1)
        local_rank = self._number("LOCAL_RANK", 0, 0, self.world - 1)
        self.local_rank = local_rank if self.world > 1 else None
        self.neighbours = self._number("LOCAL_WORLD_SIZE", 1, 1, self.world) if self.world > 1 else 1

    @property
    def first(self) -> bool:
        """Whether this is the process that prints and writes."""
        return self.rank == 0

    def __enter__(self) -> "Processes":
        if "TORCHELASTIC_RUN_ID" in self._environment:
            end_with_parent()
        if self.world > 1:
            self._demand_whole()
            try:
                self._meet()
            except RuntimeError as error:
                place = ":".join(self._environment[name] for name in ("MASTER_ADDR", "MASTER_PORT"))
                reason = str(error).splitlines()[0]
                raise RuntimeError(
                    f"MASTER_ADDR:MASTER_PORT {place}: the {self.world} processes did not meet there ({reason}): "
                    f"{_ALONE.format('WORLD_SIZE')}"
                ) from error
        return self

    def __exit__(self, kind, *_) -> None:
        # A process that failed must end, not wait for the others to say goodbye; torchrun then ends those.
        if self.world > 1 and kind is None:
            # gloo's threads end with the group's last reference; the wrapped model holds one, and may be in cycles.
            # A thread that lives on may ask for the interpreter's lock while it shuts down, which aborts the process.
            gc.collect()
            dist.destroy_process_group()

    def _meet(self) -> None:
        """Set up the group of all processes, by what those of this start alone write into the store."""
        store, _, _ = next(dist.rendezvous("env://", timeout=_PATIENCE))
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        own = dist.PrefixStore(self._agreed_name(store), store)
        dist.init_process_group(backend, store=own, rank=self.rank, world_size=self.world)

    def _agreed_name(self, store: dist.Store) -> str:
        """A name that these processes alone have for this start.

        torchrun keeps one store over all its restarts. Whoever looks up where the others are may find where one was
        that died, and wait there for half an hour. So each takes a new name, and they go on when everyone has told the
        same hash of all names: one that holds a dead process's name is told by none that has replaced it.
        """
        everyone = range(self.world)
        names, told = [f"name/{rank}" for rank in everyone], [f"told/{rank}" for rank in everyone]
        store.set(names[self.rank], secrets.token_hex(16))
        until = time.monotonic() + _PATIENCE.total_seconds()
        while True:
            store.wait(names, _PATIENCE)
            mine = hashlib.blake2b(b"".join(store.multi_get(names)), digest_size=16).hexdigest()
            store.set(told[self.rank], mine)
            store.wait(told, _PATIENCE)
            if set(store.multi_get(told)) == {mine.encode()}:
                return mine
            if time.monotonic() > until:
                raise RuntimeError(f"not all came within {_PATIENCE.total_seconds() / 60:.0f} minutes")
            time.sleep(0.05)

    def _number(self, name: str, default: int, least: int, most: int | None = None) -> int:
        text = self._environment.get(name) or str(default)
        if text.isdecimal() and least <= int(text) and (most is None or int(text) <= most):
            return int(text)
        wanted = f"{least} or more" if most is None else f"a number from {least} to {most}"
        world = self._environment.get("WORLD_SIZE") or "not set"
        beside = "" if name == "WORLD_SIZE" else f" (WORLD_SIZE is {world})"
        raise ValueError(f"{name}={text} is not {wanted}{beside}: {_ALONE.format(name)}")

    def _demand_whole(self) -> None:
        """ValueError where processes could not find each other by what the variables say."""
        for name in ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
            if not self._environment.get(name):
                raise ValueError(f"WORLD_SIZE={self.world} but {name} is not set: {_ALONE.format('WORLD_SIZE')}")
        self._number("MASTER_PORT", 0, 1, 65535)

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

    def align(self, tensors: Iterable[Tensor]) -> None:
        """Give everybody the first process's values, in place."""
        if self.world > 1:
            for tensor in tensors:
                dist.broadcast(tensor, 0)

    def join(self, rows: Tensor) -> Tensor | None:
        """Everybody's rows [n, ...] on the CPU, one after the other by rank, on the first process; None on the others.

        The numbers of rows may differ; dtype and the rest of the shape do not.
        """
        if self.world == 1:
            return rows
        counts = self.stack(torch.tensor(len(rows))).tolist()
        if not self.first:
            if len(rows):
                dist.send(rows.contiguous(), 0)
            return None
        joined = rows.new_empty(sum(counts), *rows.shape[1:])
        for rank, part in enumerate(joined.split(counts)):
            if rank == 0:
                part.copy_(rows)
            elif len(part):
                dist.recv(part, rank)
        return joined

    def from_first(self, value: Any) -> Any:
        """The first process's value."""
        if self.world == 1:
            return value
        values = [value]
        dist.broadcast_object_list(values)
        return values[0]
