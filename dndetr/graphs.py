"""The training step as CUDA graphs: one per shape of its batches, captured once and replayed from then on."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .batch import Batch
from .criterion import Losses
from .packing import Layout, layout_of, unpack
from .step import TrainStep

_MOST = 64  # graphs; rarer shapes than these run eagerly


class _Captured(NamedTuple):
    graph: torch.cuda.CUDAGraph
    buffer: Tensor
    result: tuple[Losses, Tensor]


class GraphedStep(TrainStep):
    """A training step on a GPU that costs the host three launches: copy in, move into place, replay.

    The first step of a shape runs eagerly, beside the main stream as capturing wants it, and makes whatever is made at
    first use; the second is captured and replayed. All graphs share one pool of memory, and one buffer of inputs that
    grows to the largest batch. A shape that cannot be captured runs eagerly; ``say`` is told why, once.
    """

    def __init__(self, *arguments, say: Callable[[str], None], **named):
        super().__init__(*arguments, **named)
        self.say = say
        self._stream = torch.cuda.Stream(self.device)
        self._pool = torch.cuda.graph_pool_handle()
        self._captured: dict[Layout, _Captured] = {}
        self._eager: dict[Layout, str | None] = {}  # why, or None where it has just not been captured yet
        self._buffer = torch.empty(0, dtype=torch.uint8, device=self.device)

    def run(self, tensors: list[Tensor], batches: Sequence[Batch]) -> tuple[Losses, Tensor]:
        """A step on the device; tensors on the host: the step's numbers, then those of the batches."""
        shape = layout_of(tensors)
        arrived = self.transfer(tensors)
        if shape not in self._captured and self._eager.get(shape, "") is None:
            self._try_to_capture(shape, arrived, batches)
        if shape in self._captured:
            captured = self._captured[shape]
            captured.buffer.copy_(arrived)
            captured.graph.replay()
            return captured.result
        if shape not in self._eager:
            full = len(self._captured) + len(self._eager) >= _MOST
            self._eager[shape] = f"there are {_MOST} shapes already" if full else None
            if full:
                self._explain(shape)
        return self._beside(lambda: self.compute_arrived(unpack(arrived, shape), batches))

    def _beside(self, work: Callable):
        """``work`` on the stream that captures, before and after which the main one waits."""
        present = torch.cuda.current_stream(self.device)
        self._stream.wait_stream(present)
        with torch.cuda.stream(self._stream):
            result = work()
        present.wait_stream(self._stream)
        return result

    def _try_to_capture(self, shape: Layout, arrived: Tensor, batches: Sequence[Batch]) -> None:
        if len(self._buffer) < len(arrived):
            # Graphs captured before keep the one they know.
            self._buffer = torch.empty_like(arrived)
        buffer = self._buffer[: len(arrived)]
        graph = torch.cuda.CUDAGraph()
        graph.register_generator_state(self.noise_generator)
        try:
            with torch.cuda.graph(graph, self._pool, self._stream, capture_error_mode="thread_local"):
                result = self.compute_arrived(unpack(buffer, shape), batches)
        except RuntimeError as error:
            self._eager[shape] = str(error).strip().split("\n")[0]
            self.optimizer.zero_grad(set_to_none=True)  # what a broken capture left was never computed
            self._explain(shape)
            return
        del self._eager[shape]
        self._captured[shape] = _Captured(graph, buffer, result)

    def _explain(self, shape: Layout) -> None:
        images = "x".join(str(size) for size in shape[1][1])
        self.say(f"batches of {images} run without a CUDA graph: {self._eager[shape]}")
