"""An out-of-memory error as one line: which batch it was, and what to lower."""

import contextlib
from collections.abc import Callable, Iterator, Sequence

import torch

from ..batch import Batch
from ..config import Config

# What torch raises as a plain RuntimeError: the CPU allocator, and CUDA libraries outside torch's own allocator.
_SIGNS = (
    "can't allocate memory",
    "not enough memory",
    "CUDA error: out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_ALLOC_FAILED",
    # oneDNN: what it is asked to make was accepted before, so only memory can be missing.
    "could not create a primitive",
    "could not create a memory object",
)


class OutOfMemory(RuntimeError):
    """There is not enough memory for a batch; the message says what to lower."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out, on the host or on the GPU."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in _SIGNS)


@contextlib.contextmanager
def explain_memory(batches: Sequence[Batch], config: Config, groups_for: Callable[[int], int]) -> Iterator[None]:
    """Within, running out of memory is an OutOfMemory that describes the batches of a training step.

    groups_for: how many denoising groups a batch with so many slots gets.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise OutOfMemory(_advice(batches, config, groups_for)) from error


def _advice(batches: Sequence[Batch], config: Config, groups_for: Callable[[int], int]) -> str:
    largest = max(batches, key=lambda batch: batch.pixels.numel())
    images, height, width, _ = largest.pixels.shape
    slots = max(batch.targets.labels.shape[1] for batch in batches)
    groups = groups_for(slots)
    noised = groups * slots * config.denoising.copies
    wishes = []
    if config.batch_size > 1:
        less = config.batch_size // 2
        more = -(-config.batch_size // less) * config.accumulate
        wishes.append(f"--batch-size {less} --accumulate {more} (the same step)")
    if not config.model.checkpointing:
        wishes.append("--model.checkpointing")
    sizes = {"fixed": "--images.canvas", "official": "--images.sizes and --images.max-size"}
    if config.data != "shapes" and config.images.recipe in sizes:
        wishes.append(f"smaller {sizes[config.images.recipe]}")
    if groups > 0:
        wishes.append(f"--denoising.max-queries below {noised}")
    beside = f"{config.model.queries * max(config.model.patterns, 1)}"
    if config.model.one_to_many:
        wishes.append(f"--model.one-to-many below {config.model.one_to_many}")
        beside += f" and {config.model.one_to_many} one-to-many"
    wishes.append("a smaller model")
    return (
        f"out of memory: {images} images on a canvas of {height}x{width}, room for {slots} objects in each, "
        f"{noised} denoising queries ({groups} groups) beside {beside}; try {', '.join(wishes)}; the last "
        "checkpoint is intact, and --init RUN starts from its weights with other settings"
    )
