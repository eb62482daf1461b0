"""From counts to steps: what a process of many does in one, and which share of it is lost to what."""

import json
from functools import cache
from itertools import accumulate, pairwise
from pathlib import Path

import numpy as np
from all_reduce import Links, all_reduce
from scale_simulator import Saving, Simulated, Work, simulate

from dndetr.counting.gpus import GAP, GPUS, LEAST

COUNTS = json.loads(Path(__file__).with_name("scale_counts.json").read_text())
AT_ONCE = 16  # images, as the presets have them; more are accumulated
COCO = 118_287  # training images
SLOWER = 1.2  # measured over counted on an H200: 1.12 to 1.28 (docs/gpu.md)
LAUNCH = 40e-6  # seconds of the host for a kernel of an eager step: 37 to 78 us were measured (docs/gpu.md)
DISK = 1e9  # bytes per second of a checkpoint, assumed
EAGER, CAPTURED = LAUNCH, 0.0
CAUSES = ("small batches", "sharing", "launches", "communication", "stragglers", "data", "saving")
_STEPS = 230  # simulated: two epochs of 1,024 images a step


def work_of(
    model: str, images: int, launch: float, half: bool = False, view: bool = False, buffers: bool = True
) -> Work:
    """A process's step on so many images; launch: seconds of a kernel on the host.

    half: gradients travel in half precision; view: they are views of their buckets, which nothing copies them out of;
    buffers: they are sent around. ValueError for images that do not divide into batches that were counted.
    """
    counts, batches = COUNTS[model], -(-images // AT_ONCE)
    if images % batches or str(images // batches) not in counts["steps"]:
        raise ValueError(
            f"{images} images a process: give one of {', '.join(counts['steps'])}, or a multiple of {AT_ONCE}"
        )
    step = counts["steps"][str(images // batches)]
    (forward, first), whole, after = step["forward"], step["whole"], step["after"]
    casts = [(_cast(size, 10, 2), _cast(size, 6, 1)) if half else (0.0, 0.0) for size in counts["buckets"]]
    copied = list(accumulate(copy + there for copy, (there, _) in zip(counts["copying"], casts, strict=True)))
    out = sum(back for _, back in casts) + (0.0 if view else sum(counts["copying"]))
    marks = [
        (forward + seconds + copy, first + kernels) for (seconds, kernels), copy in zip(whole, copied, strict=True)
    ]
    # Of batches that are only added up nothing is sent, nor copied.
    added = [(forward + whole[-1][0], first + whole[-1][1])] * (batches - 1)
    shared = [(b[0] - a[0], b[1] - a[1]) for a, b in pairwise([(0.0, 0), *marks])]
    ends, device, host = [], 0.0, 0.0
    for seconds, kernels in [*added, *shared, (after[0] + out, after[1])]:
        host += kernels * launch
        device = max(device + seconds * SLOWER, host)
        ends.append(device)
    return Work(
        ready=np.array(ends[len(added) : -1]),
        whole=ends[-1],
        update=(after[0] + out) * SLOWER,
        buckets=tuple(size / 2 if half else size for size in counts["buckets"]),
        buffers=counts["buffers"] * buffers,
        batches=batches,
        images=images // batches,
    )


def _cast(size: int, moved: int, kernels: int) -> float:
    """Seconds of what DDP's hooks for half precision do with a bucket: bytes moved for each number, kernels."""
    return kernels * (GAP + LEAST) + moved * size / 4 / GPUS["h100"].bandwidth


def all_at_the_end(model: str, images: int, processes: int, links: Links) -> float:
    """Seconds of another step than ours: captured as of one process alone, then one exchange of all gradients.

    Nothing is hidden behind backward, but weights are lowered at once, and gradients copied in one pass and back.
    """
    alone, size = COUNTS[model]["alone"][str(images)], sum(COUNTS[model]["buckets"])
    copies = 2 * 2 * size / GPUS["h100"].bandwidth
    return (alone + copies) * SLOWER + all_reduce(4, processes, links) + all_reduce(size, processes, links)


def best(model: str) -> float:
    """Seconds of an image in a captured step of one GPU alone, 16 at once: what all efficiencies compare with."""
    return COUNTS[model]["alone"][str(AT_ONCE)] * SLOWER / AT_ONCE


@cache
def trained(model: str, images: int, gpus: int, launch: float) -> tuple[Simulated, dict[str, float]]:
    """A step of so many images in all, and the shares of it that are lost, by cause; what is left is efficiency."""
    each, epoch = images // gpus, COCO // images
    work = work_of(model, each, launch)
    # Of an epoch longer than what is simulated, one save with its part of the time.
    weights, every = COUNTS[model]["parameters"] + 2 * COUNTS[model]["trained"], min(epoch, _STEPS)
    found = simulate(work, gpus, saving=Saving(4 * weights / DISK * every / epoch, every), steps=_STEPS)
    alone = COUNTS[model]["alone"][str(work.images)] * SLOWER * work.batches
    captured = work_of(model, each, CAPTURED).whole
    lost = (alone - best(model) * each, captured - alone, work.whole - captured, *found[2:])
    return found, {name: seconds / found.step for name, seconds in zip(CAUSES, lost, strict=True)}


def efficiency(lost: dict[str, float]) -> float:
    """Images per second and GPU, over those of one GPU alone."""
    return 1 - sum(lost.values())
