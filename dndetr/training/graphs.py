"""The training step as CUDA graphs: one per shape of its batches, captured once and replayed from then on."""

import contextlib
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..batch import Batch
from ..data.batch_shapes import MOST_SHAPES, BatchShape
from .criterion import Losses
from .memory import is_out_of_memory
from .rehearsal import Rehearsal
from .step import TrainStep
from .transfer import Layout, layout_of, unpack

_MOST = MOST_SHAPES  # graphs; rarer shapes than these run eagerly
_CLASHES = 4  # dropped graphs cost an eager step and a capture each


class _Captured(NamedTuple):
    graph: torch.cuda.CUDAGraph
    buffer: Tensor
    result: tuple[Losses, Tensor]


class GraphedStep(TrainStep):
    """A training step on a GPU that costs the host three launches: copy in, move into place, replay.

    The first step of a shape runs eagerly, beside the main stream as capturing wants it, and makes whatever is made at
    first use; the second is captured and replayed. All graphs share one pool of memory, and one buffer of inputs that
    grows to the largest batch. A shape that cannot be captured runs eagerly, and if a capture broke, or the very first
    replay is not the step that it was captured from, so do all from then on; ``say`` is told why, once. Too rare for a
    graph is whatever comes when there are as many as there may be, and all but the ``expected`` shapes where those are
    set.
    """

    expected: frozenset[BatchShape] | None = None

    def __init__(self, *arguments, **named):
        super().__init__(*arguments, **named)
        self._stream = torch.cuda.Stream(self.device)
        self._pool = torch.cuda.graph_pool_handle()
        self._captured: dict[Layout, _Captured] = {}
        self._warm: set[Layout] = set()  # ran eagerly, to be captured when they come again
        self._eager: set[Layout] = set()  # will not be captured
        self._rare: set[Layout] = set()  # shapes that get no graph
        self._steps, self._rare_steps, self._said_rare = 0, 0, False
        self._reasons: set[str] = set()  # that were said
        self._given_up = False
        self._trusted = False  # a replay was compared with an eager step
        self._clashes = 0  # captures for which other graphs were dropped
        self._buffer = torch.empty(0, dtype=torch.uint8, device=self.device)

    def run(self, tensors: list[Tensor], batches: Sequence[Batch]) -> tuple[Losses, Tensor]:
        """A step on the device; tensors on the host: the step's numbers, then each batch's and its noise."""
        shape = layout_of(tensors)
        self._steps += 1
        arrived = self._making_room(lambda: self.transfer(tensors))
        rehearsal = None
        if shape in self._warm:
            if not self._trusted:
                # Before there is a graph, which keeps memory that an eager step may need.
                rehearsal = Rehearsal(self.changed(), self._trained, lambda: self._eagerly(arrived, shape, batches))
            self._try_to_capture(shape, arrived, batches)
        if shape in self._captured:
            captured = self._captured[shape]
            captured.buffer.copy_(arrived)
            captured.graph.replay()
            reason = rehearsal and rehearsal.differs(captured.result)
            if reason is None:
                self._trusted = True
                return captured.result
            rehearsal.undo()
            self._give_up(f"the first replay of one is not the step that was captured: {reason}")
        if not self._given_up and shape not in self._eager | self._warm:
            if self._is_expected(batches) and len(self._captured) + len(self._warm) < _MOST:
                self._warm.add(shape)
            else:
                self._rare.add(shape)
                self._rare_steps += 1
        graphs = len(self._captured)
        result = self._eagerly(arrived, shape, batches)
        if len(self._captured) < graphs and shape in self._eager | self._rare:
            # A rare shape may drop the graphs a few times: they are captured anew.
            self._clashes += shape in self._rare
            if shape in self._eager or self._clashes >= _CLASHES:
                self._give_up("beside captured steps there is no memory for others")
        return result

    def epoch_ended(self) -> None:
        """Say once what share of the steps was too rare for a graph."""
        if self._rare and not self._said_rare:
            self._said_rare = True
            shapes = "1 shape" if len(self._rare) == 1 else f"{len(self._rare)} shapes"
            share = self._rare_steps / self._steps
            self.say(f"{share:.1%} of the steps so far ran without a CUDA graph: {shapes} of batches too rare for one")

    def _is_expected(self, batches: Sequence[Batch]) -> bool:
        if self.expected is None:
            return True
        return self.expected.issuperset(BatchShape(*batch.canvas, batch.targets.labels.shape[1]) for batch in batches)

    def _eagerly(self, arrived: Tensor, shape: Layout, batches: Sequence[Batch]) -> tuple[Losses, Tensor]:
        return self._beside(lambda: self._making_room(lambda: self.compute_arrived(unpack(arrived, shape), batches)))

    def _beside(self, work: Callable):
        """``work`` on the stream that captures, before and after which the main one waits."""
        present = torch.cuda.current_stream(self.device)
        self._stream.wait_stream(present)
        with torch.cuda.stream(self._stream):
            result = work()
        present.wait_stream(self._stream)
        return result

    def _making_room(self, work: Callable):
        """``work``, and where memory runs out once more without graphs, whose memory nothing else can use.

        A step may be repeated: weights are as they were, since what the optimiser allocates is there before any graph.
        (Running statistics of batch norm have moved.)
        """
        try:
            return work()
        except RuntimeError as error:
            if not self._captured or not is_out_of_memory(error):
                raise
        # Not within ``except``, where the tensors of what failed live on.
        self._drop_graphs()
        return work()

    def _try_to_capture(self, shape: Layout, arrived: Tensor, batches: Sequence[Batch]) -> None:
        if len(self._buffer) < len(arrived):
            # Graphs captured before keep the one they know.
            self._buffer = self._making_room(lambda: torch.empty_like(arrived))
        buffer = self._buffer[: len(arrived)]
        generator = torch.cuda.default_generators[self.device.index or 0]
        spare = generator.clone_state()
        graph, reason, no_memory, ended = torch.cuda.CUDAGraph(), None, False, False
        # Of errors only the text is kept: with them, the tensors of what failed would live on.
        try:
            # The outer context, as torch's own leaves its stream the current one where a capture cannot be ended.
            with (
                torch.cuda.stream(self._stream),
                torch.cuda.graph(graph, self._pool, self._stream, capture_error_mode="thread_local"),
            ):
                try:
                    result = self.compute_arrived(unpack(buffer, shape), batches)
                except Exception as error:  # what a kernel's compiler raises is no RuntimeError
                    reason, no_memory = _first_line(error), is_out_of_memory(error)
            ended = True
        except RuntimeError as error:
            reason = reason or _first_line(error)
        if reason is None:
            self._warm.remove(shape)
            self._captured[shape] = _Captured(graph, buffer, result)
            return
        del graph
        self.optimizer.zero_grad(set_to_none=True)  # what a broken capture left was never computed
        if not ended:
            # Torch forbids replays from now on, and would go on believing that it captures: into this pool, and
            # whatever random numbers are drawn.
            with contextlib.suppress(RuntimeError):
                torch._C._cuda_endAllocateToPool(self.device.index, self._pool)
                torch._C._cuda_releasePool(self.device.index, self._pool)
            generator.graphsafe_set_state(spare.graphsafe_get_state())
            self._give_up(reason)
        elif no_memory and self._captured:
            self._clashes += 1
            if self._clashes < _CLASHES:
                self._drop_graphs()
            else:
                self._give_up("those of different shapes do not fit in memory beside each other")
        else:
            self._run_eagerly(shape, reason)

    def _run_eagerly(self, shape: Layout, reason: str) -> None:
        self._warm.discard(shape)
        self._eager.add(shape)
        if reason not in self._reasons:
            self._reasons.add(reason)
            self.say(f"batches of {_images(shape)} run without a CUDA graph: {reason}")

    def _give_up(self, reason: str) -> None:
        self._drop_graphs()
        self._warm.clear()
        self._given_up = True
        self.say(f"all batches run without CUDA graphs from here on: {reason}")

    def _drop_graphs(self) -> None:
        """Free all that graphs hold; their shapes are captured anew when they come again."""
        self.optimizer.zero_grad(set_to_none=True)  # and what a step that failed has left
        torch.cuda.synchronize(self.device)
        self._warm |= self._captured.keys()
        self._captured.clear()
        self._pool = torch.cuda.graph_pool_handle()
        torch.cuda.empty_cache()


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0] or type(error).__name__


def _images(shape: Layout) -> str:
    """The size of a step's first tensor after its numbers: the pixels."""
    return "x".join(str(size) for size in shape[1][1])
