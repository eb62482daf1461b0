"""``--batch-size auto``: the largest batch whose step fits into memory, found by taking such steps.

Images of a step stay the recipe's: what does not fit at once is accumulated. Trial steps are those of training, of a
model that is thrown away, on black images of the largest canvas with the most denoising queries that the data and the
configuration can give. They draw no number that the run would draw.
"""

import gc
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from .._process import give_back
from ..batch import blank_batch
from ..config import Config
from ..data.batch_shapes import BatchShape
from ..data.training import TrainingData
from ..device import make_current, pick_device, pick_mode, pick_precision
from ..models.build import build_model
from ..presets import preset_named
from .build import build_step
from .canvas import demand_canvas
from .distributed import Processes
from .memory import is_out_of_memory
from .overfit import overfitting

_SHARE = 0.9  # of the free memory: the rest is for what splits it up, graphs of other shapes and libraries
_GIB = 2**30


def with_fitting_batch(config: Config, processes: Processes) -> tuple[Config, str]:
    """The configuration with numbers in place of "auto", those of all processes, and a line that says which and why.

    Raises whatever ``TrainingData`` does, and ValueError where not even one image fits or an epoch has no whole step.
    """
    recipe = preset_named(config.preset)
    recipe = overfitting(recipe, config.overfit) if config.overfit else recipe
    images = recipe.batch_size * recipe.accumulate
    config = replace(config, batch_size=1, accumulate=images)
    data = TrainingData(config, processes.rank, processes.world, processes.neighbours)
    device = pick_device(config.device, processes.local_rank)
    make_current(device)
    if data.steps_per_epoch < images:
        raise ValueError(
            f"--batch-size auto: the preset's step of {images} images needs more than there are in an epoch "
            f"({data.steps_per_epoch} for each process): give a number that they make a batch of"
        )
    shape, classes = data.largest_shape(), len(data.classes)
    sizes = [n for n in range(1, images + 1) if images % n == 0]
    fixed, shared = _fixed_bytes(config, classes, processes.world)

    def measure(size: int) -> int | None:
        try:
            return _peak(device, lambda: _try_out(config, size, shape, classes, device, processes)) + shared
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            return None

    free = _free_on_gpu(device) if device.type == "cuda" else _free_on_host() // processes.neighbours
    needed = largest_that_fits(sizes, measure, _SHARE * free, fixed)
    size, gib, free = min(
        processes.gather((max(needed, default=0), max(needed.values(), default=0) / _GIB, free / _GIB))
    )
    about = f"on a canvas of {shape.height}x{shape.width} with room for {shape.slots} objects"
    if size == 0:
        raise ValueError(
            f"--batch-size auto: a step of one image {about} does not fit into {free:.1f} GiB: try "
            "--model.checkpointing, smaller images or a smaller model (docs/memory.md)"
        )
    chosen = replace(config, batch_size=size, accumulate=images // size)
    return chosen, (
        f"--batch-size auto: --batch-size {size} --accumulate {images // size}, {gib:.1f} of {free:.1f} GiB that are "
        f"free, in trial steps {about}"
    )


def largest_that_fits(
    sizes: Sequence[int], measure: Callable[[int], int | None], room: float, fixed: int
) -> dict[int, int]:
    """Bytes of a step by its number of images, for all sizes that fit, ascending as ``sizes`` are.

    measure: images -> bytes that a step takes, None where memory ran out; fixed: bytes that do not grow with images. A
    size that by the one before will not fit is not tried: a machine without room swaps, or ends processes.
    """
    found: dict[int, int] = {}
    expected = fixed
    for size in sizes:
        if found:
            before, bytes_before = next(reversed(found.items()))
            expected = fixed + max(bytes_before - fixed, 0) * size / before
        if expected > room or (taken := measure(size)) is None or taken > room:
            break
        found[size] = taken
    return found


def _try_out(
    config: Config, size: int, shape: BatchShape, classes: int, device: torch.device, processes: Processes
) -> None:
    """What a run has in memory at most: steps on batches of so many images, and predictions beside what steps keep."""
    with torch.random.fork_rng(devices=[]):
        model = build_model(config.model, classes).to(device, memory_format=torch.channels_last).train()
    precision, mode = pick_precision(config.precision, device), pick_mode(config.mode, device, processes.world)
    step = build_step(config, model, classes, 1, precision, mode, Processes({}), say=lambda text: None)
    batch = blank_batch(size, shape[:2], shape.slots, classes if config.loss.federated else None)
    # Gradients of the first batch are there in the second; a step is captured when its shape comes again.
    for _ in range(3 if mode == "graph" else 2):
        step(*[batch] * min(2, config.accumulate // size))
    model.eval().infer(batch, precision)


def _fixed_bytes(config: Config, classes: int, world: int) -> tuple[int, int]:
    """Bytes of weights, gradients, AdamW's moments and the average; and of copies that trial steps do not make."""
    with torch.device("meta"):
        model = build_model(config.model, classes)
    demand_canvas(config, model.backbone.multiple)
    weights = list(model.parameters())
    every = 4 * sum(weight.numel() for weight in weights)
    trained = 4 * sum(weight.numel() for weight in weights if weight.requires_grad)
    shared = trained if world > 1 else 0  # gradients on their way between processes
    return every * (2 if config.optimizer.ema else 1) + 3 * trained + shared, shared


def _peak(device: torch.device, work: Callable[[], None]) -> int:
    """Bytes that the work takes at most: of a GPU by torch, of the host by the whole process."""
    gc.collect()
    if device.type != "cuda":
        give_back()
        before = _resident()
        _forget_peak()
        work()
        return _status("VmHWM") - before
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    try:
        work()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_reserved(device)
    finally:
        gc.collect()
        torch.cuda.empty_cache()


def _free_on_gpu(device: torch.device) -> int:
    return torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)


def _free_on_host() -> int:
    """Bytes that this machine, or container, has left without swapping."""
    free = int(re.search(r"MemAvailable:\s+(\d+)", Path("/proc/meminfo").read_text())[1]) * 1024
    for limit in ("memory.max", "memory/memory.limit_in_bytes"):
        file = Path("/sys/fs/cgroup") / limit
        if file.exists() and (text := file.read_text().strip()) != "max":
            free = min(free, int(text) - _resident())
    return free


def _resident() -> int:
    return _status("VmRSS")


def _status(name: str) -> int:
    """A number of this process's memory, in bytes."""
    return int(re.search(rf"{name}:\s+(\d+)", Path("/proc/self/status").read_text())[1]) * 1024


def _forget_peak() -> None:
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError as error:
        raise ValueError(f"--batch-size auto: memory cannot be measured here ({error}): give a number") from None
