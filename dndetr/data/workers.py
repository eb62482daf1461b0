"""Processes that prepare batches: room for what they hand over, and one plain error for whatever is lost with them.

A batch travels in shared memory, which a container may have little of (docker's default is 64 MB). So its need is known
before they start. What goes wrong in a worker is told in its batch's place; a worker that dies tells nothing and is
looked for while its batch is awaited, every five seconds.
"""

import contextlib
import errno
import os
import signal
import threading
import traceback
from collections.abc import Iterator, Sequence
from multiprocessing.queues import Queue
from typing import Any, Protocol

import torch
from torch.utils.data import DataLoader

from ..orphans import end_with_parent
from .errors import DataError

SHARED_MEMORY = "/dev/shm"
_AHEAD = 2  # batches of each worker, being made or waiting
_MORE = "more shared memory (docker run --shm-size 2g or more)"


class Reader(Protocol):
    """Makes the batch of a key."""

    def __getitem__(self, key: Any) -> Any: ...


class WorkerLost(RuntimeError):
    """A worker could not hand over its batch; the message says why and what to type."""


class Workers:
    """``count`` processes that read batches, in the order of their keys; they start with the first and stay."""

    def __init__(self, reader: Reader, count: int):
        self._plan = _Plan()
        self._loader = DataLoader(
            _Telling(reader),
            batch_size=None,
            sampler=self._plan,
            num_workers=count,
            prefetch_factor=_AHEAD,
            collate_fn=_unchanged,
            worker_init_fn=_begin,
            persistent_workers=True,
            generator=torch.Generator(),  # of seeds that nobody uses; torch's own is the model's
        )

    def read(self, keys: Sequence[Any]) -> Iterator[Any]:
        """The keys' batches; DataError as the reader raised it, WorkerLost for whatever else keeps one away."""
        self._plan.keys = keys
        with self._looking_after(), _no_error_out_of_the_blue():
            batches = iter(self._loader)
        while True:
            with self._looking_after():
                found = next(batches, None)
            if found is None:
                return
            if isinstance(found, Exception):
                # A new one: a frame that holds the error it raises is a cycle, which would keep the workers alive.
                raise type(found)(*found.args)
            yield found

    @contextlib.contextmanager
    def _looking_after(self) -> Iterator[None]:
        """Whatever torch raises while a batch is awaited is about the worker that should have made it."""
        try:
            yield
        except Exception as error:
            processes = getattr(getattr(self._loader, "_iterator", None), "_workers", [])
            ended = [process.exitcode for process in processes if process.exitcode is not None]
            raise WorkerLost(_how_it_died(ended[0]) if ended else _in_words(error)) from None


def demand_room(workers: int, batch: int, batches: int, held: int, processes: int) -> None:
    """ValueError where shared memory has no room for the batches that are in it at once.

    batch: bytes of the largest; batches: in an epoch; held: that the training has in its hands; processes: with
    workers of their own on this machine.
    """
    try:
        status = os.statvfs(SHARED_MEMORY)
    except OSError:  # a system without such a limit
        return
    free = status.f_bavail * status.f_frsize
    count = min(workers * _AHEAD + held, batches)
    needed = processes * count * batch
    if needed <= free:
        return
    fewer = max(0, (free // (processes * batch) - held) // _AHEAD)
    each = f" for each of {processes} processes" if processes > 1 else ""
    raise ValueError(
        f"--workers {workers}: shared memory ({SHARED_MEMORY}) has {_megabytes(free)} free, and needed are "
        f"{_megabytes(needed)}, {count} batches of {_megabytes(batch)}{each}: use --workers {fewer}, or give it more "
        f"(docker run --shm-size {-(-needed // 2**30)}g)"
    )


def _megabytes(count: int) -> str:
    return f"{count / 1e6:,.1f} MB"


class _Telling:
    """A reader whose errors take the place of the batch; across processes they would be lost or a whole traceback."""

    def __init__(self, reader: Reader):
        self._reader = reader

    def __getitem__(self, key: Any) -> Any:
        try:
            return self._reader[key]
        except DataError as error:
            return DataError(str(error))
        except Exception as error:
            return WorkerLost(_in_words(error))


def _begin(worker: int) -> None:
    """In a worker that starts: it ends with its parent, and what cannot be sent is told in its place.

    Python would only print a traceback.
    """

    def told(queue: Queue, error: Exception, lost: tuple[int, Any]) -> None:
        queue.put((lost[0], WorkerLost(_in_words(error))))

    end_with_parent()
    Queue._on_queue_feeder_error = told
    signal.signal(signal.SIGBUS, signal.SIG_DFL)  # torch would print a line of its own


@contextlib.contextmanager
def _no_error_out_of_the_blue() -> Iterator[None]:
    """Without torch's handler, which raises in the middle of anything, such as a checkpoint, when a worker dies."""
    before = signal.getsignal(signal.SIGCHLD)
    yield
    if threading.current_thread() is threading.main_thread() and before is not None:
        signal.signal(signal.SIGCHLD, before)


def _in_words(error: Exception) -> str:
    """One line of what went wrong in a worker, or on the way from it."""
    text = " ".join(str(error).split())
    number = getattr(error, "errno", None)
    if number == errno.EMFILE or "Too many open files" in text:  # torch says so of shared memory, too
        return f"a data worker may open no more files ({text}): use fewer --workers, or first type ulimit -n 65536"
    if isinstance(error, EOFError):  # it was about to send the batch's files
        return (
            "a data worker did not hand over its batch, since it was ended, or may open no more files: use fewer "
            "--workers, or first type ulimit -n 65536"
        )
    if "shared memory" in text or number == errno.ENOSPC:
        return f"a data worker found no room in shared memory ({text}): use fewer --workers (0: none), or {_MORE}"
    if isinstance(error, MemoryError) or "allocate memory" in text or number == errno.ENOMEM:
        return f"memory ran out in a data worker ({text}): use fewer --workers (0: none)"
    frames = traceback.extract_tb(error.__traceback__)
    place = f" in {frames[-1].filename}:{frames[-1].lineno}" if frames else ""
    return f"a data worker failed ({type(error).__name__}: {text}{place}); --workers 0 does without"


def _how_it_died(code: int) -> str:
    """One line of a worker that ended with this exit code (below 0: by a signal)."""
    if code == -signal.SIGBUS:
        return f"a data worker was ended by SIGBUS, as by full shared memory: use fewer --workers (0: none), or {_MORE}"
    if code == -signal.SIGKILL:
        return (
            "a data worker was killed (SIGKILL), as the system does when memory runs out: use fewer --workers (0: none)"
        )
    how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended by itself with status {code}"
    return f"a data worker {how}; --workers 0 does without"


class _Plan:
    """The keys that the workers are handed next."""

    def __init__(self):
        self.keys: Sequence[Any] = []

    def __iter__(self) -> Iterator[Any]:
        return iter(self.keys)

    def __len__(self) -> int:
        return len(self.keys)


def _unchanged(batch: Any) -> Any:
    return batch
