"""A simulation of training by many processes, event by event: who waits for whom, and how much of a step that is.

A step of ``dndetr.training`` has these events. A process takes its batches, which its workers made ahead. The first
collectives (the number of objects, and buffers that DistributedDataParallel sends around) wait for everybody. Then run
forward and backward; a bucket of gradients travels when every process has it whole and the bucket before has arrived.
Then each process updates its weights. Now and then the first one saves, while the others wait in their next step.

All events of a kind are computed at once, for all processes, in the order in which they depend on each other. Times are
in seconds. Nothing here is measured: what is assumed is a field with a default.
"""

from typing import NamedTuple

import numpy as np
from all_reduce import H100S, Links, all_reduce

_COUNT = 4  # bytes of the number of objects


class Work(NamedTuple):
    """What a process does in a step by itself, without others.

    ready: seconds from the step's beginning until each bucket is whole [buckets]; whole: of all of the step; update:
    what comes after the last bucket; buckets: bytes of each; buffers: bytes sent around; batches of so many images.
    """

    ready: np.ndarray
    whole: float
    update: float
    buckets: tuple[float, ...]
    buffers: float
    batches: int
    images: int


class Loader(NamedTuple):
    """Workers of a process, each of which makes whole batches, ``ahead`` of them beforehand (dndetr/data/workers.py).

    An image takes a worker ``median`` seconds (docs/ops.md: 2.5 to 2.8 ms measured), times the exponential of a normal
    number with deviation ``spread``, which is assumed.
    """

    workers: int = 10
    ahead: int = 2
    median: float = 2.8e-3
    spread: float = 0.5


class Stragglers(NamedTuple):
    """Assumed: a process's work is multiplied by the exponential of a normal number; ``rare`` steps have a pause."""

    spread: float = 0.02
    rare: float = 1e-4
    pause: float = 20e-3


class Saving(NamedTuple):
    """The first process takes so many seconds after every so many steps."""

    seconds: float = 0.0
    every: int = 1


LOADER, STRAGGLERS, NEVER = Loader(), Stragglers(), Saving()


class Simulated(NamedTuple):
    """Mean seconds of a step, and what they are the sum of: a process's own work, and what is added to it."""

    step: float
    work: float
    communication: float
    stragglers: float
    data: float
    saving: float


def opening(work: Work, processes: int, links: Links) -> float:
    """Seconds of the collectives that begin a step: buffers cost at most what their all-reduce does."""
    return all_reduce(_COUNT, processes, links) + all_reduce(work.buffers, processes, links) * (work.buffers > 0)


def exchanged(ready: np.ndarray, work: Work, processes: int, links: Links) -> np.ndarray:
    """When the last bucket has arrived everywhere [...]; ready: when everybody has each one whole [..., buckets]."""
    arrived = np.zeros(ready.shape[:-1])
    for place, size in enumerate(work.buckets):
        arrived = np.maximum(arrived, ready[..., place]) + all_reduce(size, processes, links)
    return arrived


def undisturbed(work: Work, processes: int, links: Links) -> float:
    """Seconds of a step without stragglers, waits for data and saving."""
    arrived = float(exchanged(work.ready, work, processes, links))
    return opening(work, processes, links) + max(arrived + work.update, work.whole)


def simulate(
    work: Work,
    processes: int,
    links: Links = H100S,
    stragglers: Stragglers = STRAGGLERS,
    loader: Loader = LOADER,
    saving: Saving = NEVER,
    steps: int = 230,
    warm: int = 20,
    seed: int = 0,
) -> Simulated:
    """Means over ``steps`` steps that follow ``warm`` others; the same for the same arguments."""
    draw = np.random.default_rng(seed)
    total = warm + steps
    slower = np.exp(stragglers.spread * draw.standard_normal((total, processes)))
    paused = stragglers.pause * (draw.random((total, processes)) < stragglers.rare)
    spread = draw.standard_normal((total, work.batches, processes, work.images))
    making = loader.median * np.exp(loader.spread * spread).sum(axis=-1)

    ready = (paused[..., None] + slower[..., None] * work.ready).max(axis=1)
    arrived = exchanged(ready, work, processes, links)
    ends = np.maximum(arrived[:, None] + slower * work.update, paused + slower * work.whole)
    ends += opening(work, processes, links)

    waiting, saved = np.zeros(total), np.zeros(total)
    made = np.zeros((loader.workers, processes))  # when each worker's last batch was
    taken = np.zeros((loader.workers * loader.ahead, processes))  # when its place was free again
    free, batch = np.zeros(processes), 0
    for step in range(total):
        before = free.max()
        for seconds in making[step]:
            worker, place = batch % len(made), batch % len(taken)
            made[worker] = np.maximum(made[worker], taken[place]) + seconds
            taken[place] = free = np.maximum(free, made[worker])
            batch += 1
        begin = free.max()
        waiting[step] = begin - before
        free = begin + ends[step]
        if (step + 1 - warm) % saving.every == 0:
            end = free.max()
            free[0] += saving.seconds
            saved[step] = free.max() - end
    usual = undisturbed(work, processes, links)
    parts = (
        work.whole,
        usual - work.whole,
        float((ends[warm:].max(axis=1) - usual).mean()),
        float(waiting[warm:].mean()),
        float(saved[warm:].mean()),
    )
    return Simulated(sum(parts), *parts)
