"""The training step as CUDA graphs: one per shape of its batches, captured once and replayed from then on."""

import contextlib
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
    grows to the largest batch. A shape that cannot be captured runs eagerly, and if a capture broke, so do all from
    then on; ``say`` is told why, once.
    """

    def __init__(self, *arguments, say: Callable[[str], None], **named):
        super().__init__(*arguments, **named)
        self.say = say
        self._stream = torch.cuda.Stream(self.device)
        self._pool = torch.cuda.graph_pool_handle()
        self._captured: dict[Layout, _Captured] = {}
        self._warm: set[Layout] = set()  # ran eagerly, to be captured when they come again
        self._eager: set[Layout] = set()  # will not be captured
        self._given_up = False
        self._buffer = torch.empty(0, dtype=torch.uint8, device=self.device)

    def run(self, tensors: list[Tensor], batches: Sequence[Batch]) -> tuple[Losses, Tensor]:
        """A step on the device; tensors on the host: the step's numbers, then each batch's and its noise."""
        shape = layout_of(tensors)
        arrived = self.transfer(tensors)
        if shape in self._warm:
            self._try_to_capture(shape, arrived, batches)
        if shape in self._captured:
            captured = self._captured[shape]
            captured.buffer.copy_(arrived)
            captured.graph.replay()
            return captured.result
        if not self._given_up and shape not in self._eager:
            if len(self._captured) + len(self._warm) < _MOST:
                self._warm.add(shape)
            else:
                self._run_eagerly(shape, f"there are {_MOST} shapes already")
        return self._beside(lambda: self._eager_step(shape, arrived, batches))

    def _beside(self, work: Callable):
        """``work`` on the stream that captures, before and after which the main one waits."""
        present = torch.cuda.current_stream(self.device)
        self._stream.wait_stream(present)
        with torch.cuda.stream(self._stream):
            result = work()
        present.wait_stream(self._stream)
        return result

    def _eager_step(self, shape: Layout, arrived: Tensor, batches: Sequence[Batch]) -> tuple[Losses, Tensor]:
        try:
            return self.compute_arrived(unpack(arrived, shape), batches)
        except torch.OutOfMemoryError:
            if not self._captured:
                raise
        # Graphs keep a whole step's memory that nothing else can use. Weights are as they were: what a step of the
        # optimiser needs was there before the first graph. (Within ``except`` the failed step's tensors would live on.)
        self._forget_gradients()
        if shape in self._eager:
            self._give_up("beside captured steps there is no memory for others")
        self._drop_graphs()
        return self.compute_arrived(unpack(arrived, shape), batches)

    def _try_to_capture(self, shape: Layout, arrived: Tensor, batches: Sequence[Batch]) -> None:
        if len(self._buffer) < len(arrived):
            # Graphs captured before keep the one they know.
            self._buffer = torch.empty_like(arrived)
        buffer = self._buffer[: len(arrived)]
        graph, cause = torch.cuda.CUDAGraph(), None
        try:
            # The outer context, as torch's own leaves its stream the current one where a capture cannot be ended.
            with (
                torch.cuda.stream(self._stream),
                torch.cuda.graph(graph, self._pool, self._stream, capture_error_mode="thread_local"),
            ):
                try:
                    result = self.compute_arrived(unpack(buffer, shape), batches)
                except RuntimeError as error:
                    cause = error
                    raise
        except RuntimeError as error:
            reason = str(cause or error).strip().split("\n")[0]
            self._forget_gradients()
            if error is cause:
                self._run_eagerly(shape, reason)
            else:
                # It could not even be ended. Torch now forbids replays, and goes on believing that it captures.
                with contextlib.suppress(RuntimeError):
                    torch._C._cuda_endAllocateToPool(self.device.index, self._pool)
                self._give_up(reason)
        else:
            self._warm.remove(shape)
            self._captured[shape] = _Captured(graph, buffer, result)

    def _run_eagerly(self, shape: Layout, reason: str) -> None:
        self._warm.discard(shape)
        self._eager.add(shape)
        self.say(f"batches of {_images(shape)} run without a CUDA graph: {reason}")

    def _give_up(self, reason: str) -> None:
        self._drop_graphs()
        self._warm.clear()
        self._given_up = True
        self.say(f"all batches run without CUDA graphs from here on: {reason}")

    def _drop_graphs(self) -> None:
        """Free all that graphs hold; their shapes are captured anew when they come again."""
        torch.cuda.synchronize(self.device)
        self._warm |= self._captured.keys()
        self._captured.clear()
        self._pool = torch.cuda.graph_pool_handle()
        torch.cuda.empty_cache()


    def _forget_gradients(self) -> None:
        """What a broken step left was never computed."""
        self.optimizer.zero_grad(set_to_none=True)


def _images(shape: Layout) -> str:
    """The size of a step's first tensor after its numbers: the images."""
    return "x".join(str(size) for size in shape[1][1])
