"""The captured step: its bookkeeping with a graph made of Python, and the real thing where there is a GPU."""

import contextlib
import functools
import weakref
from dataclasses import replace
from unittest import mock

import detectors
import pytest
import torch

from dndetr.data.batch_shapes import BatchShape
from dndetr.training import graphs
from dndetr.training.graphs import GraphedStep
from dndetr.training.rehearsal import Rehearsal
from dndetr.training.step import TrainStep
from dndetr.training.transfer import layout_of


class Stream:
    """A stream without a device."""

    def __init__(self, device=None):
        pass

    def wait_stream(self, other):
        pass


class Graph:
    """A graph that remembers what to do instead of what was launched."""

    made = 0

    def __init__(self):
        Graph.made += 1
        self.replays = 0

    def replay(self):
        self.replays += 1
        self.work()


class Generator:
    """A generator of random numbers on a GPU: only whether it believes that it is captured."""

    def __init__(self, capturing: bool = False):
        self.capturing = capturing

    def clone_state(self):
        return Generator(self.capturing)

    def graphsafe_get_state(self):
        return self.capturing

    def graphsafe_set_state(self, capturing: bool):
        self.capturing = capturing


WHY = "operation not permitted when stream is capturing"


@pytest.fixture
def python_graphs(monkeypatch):
    """CUDA's calls on the CPU: a capture keeps the call that it saw, undone, and a replay makes it.

    Given: a list of what is to go wrong, "capture" (an op is refused), "end" (the capture cannot be ended either),
    "memory" (an eager step finds none while there are graphs), "room" (a capture finds none while there are graphs), or
    what a replay does wrong: "weights" (they stay), "images" (it sees other colours), "noise" (it draws less).
    """
    Graph.made = 0
    compute = GraphedStep.compute_arrived
    capturing, failing, broken, generator = [], [], [], Generator()
    streams, pools, ended = [Stream()], [], []

    @contextlib.contextmanager
    def stream(entered):
        before = streams[-1]
        streams[-1] = entered
        try:
            yield
        finally:
            streams[-1] = before

    @contextlib.contextmanager
    def graph(captured, pool, on, capture_error_mode):
        assert pool == pools[-1]
        before = streams[-1]
        streams[-1] = on
        capturing.append(captured)
        generator.capturing = True
        yield
        capturing.pop()
        if "end" in failing:  # torch leaves its stream then
            raise RuntimeError("operation failed due to a previous error during capture")
        generator.capturing = False
        streams[-1] = before

    def fail(self, kind, text):
        activations = torch.ones(3)
        broken.append(weakref.ref(activations))
        self._trained[0].grad = torch.ones_like(self._trained[0])  # where backward was
        raise kind(text)

    def compute_arrived(self, arrived, batches):
        if not capturing:
            assert all(tensor() is None for tensor in broken), "a step that failed is still in memory"
            if "memory" in failing and self._captured:
                fail(self, torch.OutOfMemoryError, "out of memory")
            return compute(self, arrived, batches)
        if "room" in failing and self._captured:
            fail(self, torch.OutOfMemoryError, "out of memory")
        if "capture" in failing or "end" in failing:
            fail(self, RuntimeError, f"{WHY}\nsome more")
        result = [None, None]
        batches = [batch.with_tensors([torch.full_like(t, 0) for t in batch.tensors()]) for batch in batches]

        def work():
            if "weights" in failing:
                with mock.patch.object(self.optimizer, "step"):
                    result[:] = compute(self, arrived, batches)
            elif "noise" in failing:
                with mock.patch.object(self, "denoising", replace(self.denoising, box_noise=0.36)):
                    result[:] = compute(self, arrived, batches)
            else:
                more = 0.02 if "images" in failing else 0
                result[:] = compute(self, [x + more if x.shape[1:] == (3, 4) else x for x in arrived], batches)

        capturing[-1].work = work
        return result

    for name, value in {
        "Stream": Stream,
        "CUDAGraph": Graph,
        "graph": graph,
        "graph_pool_handle": lambda: pools.append(len(pools)) or pools[-1],
        "current_stream": lambda device: streams[-1],
        "stream": stream,
        "default_generators": [generator],
        "synchronize": lambda device: None,
        "empty_cache": lambda: None,
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    for name in ("endAllocateToPool", "releasePool"):
        note = functools.partial(lambda name, device, pool: ended.append((name, pool)), name)
        monkeypatch.setattr(torch._C, f"_cuda_{name}", note, raising=False)
    monkeypatch.setattr(GraphedStep, "compute_arrived", compute_arrived)
    # Eager steps pass for a device's, too: learning rates there are float32, on a CPU float64.
    monkeypatch.setattr(TrainStep, "on_device", True)
    main = streams[-1]
    yield failing
    assert streams == [main], "another stream is current than before"
    assert not generator.capturing, "random numbers would still be drawn as for a graph"
    broke = "end" in failing
    assert ended == ([("endAllocateToPool", 0), ("releasePool", 0)] if broke else [])
    if broke or "memory" in failing or "room" in failing:
        assert len(pools) > 1, "a pool was used again after it was given up"


def make(kind: str, said: list, device="cpu"):
    """An eager or a captured step, on the same weights."""
    model = detectors.build("dn-deformable-detr").to(device)
    if kind == "eager":
        return detectors.make_step(model)
    return detectors.make_step(model, kind=GraphedStep, say=said.append)


def steps_on_two_shapes(step, count: int = 20, first: int = 0, federated: bool = False) -> torch.Tensor:
    """Losses and gradient norms of steps on batches that change their content every time and their shape often."""
    found = []
    for number in range(first, count):
        canvas, slots = ((96, 128), 8) if number % 3 else ((64, 96), 16)
        batch = detectors.make_batch([3 + number % 4, 5 - number % 3], slots, canvas=canvas)
        losses, norm = step(detectors.federated(batch) if federated else batch)
        found.append(torch.stack((losses.total, norm)).clone())
    return torch.stack(found)


@functools.cache
def eager_steps() -> torch.Tensor:
    """What captured steps are compared with; to be called where steps pass for a device's."""
    return steps_on_two_shapes(make("eager", []))


@pytest.mark.parametrize("federated", [False, True])
def test_captured_steps_are_the_eager_ones(python_graphs, federated):
    said = []
    step = make("graph", said)
    assert torch.equal(*(steps_on_two_shapes(of, federated=federated) for of in (step, make("eager", []))))
    assert not said and Graph.made == len(step._captured) == 2
    assert sum(captured.graph.replays for captured in step._captured.values()) == 18  # all but the first of each shape


def test_what_cannot_be_captured_runs_eagerly_and_says_why_once(python_graphs):
    said = []
    python_graphs.append("capture")
    assert torch.equal(steps_on_two_shapes(make("graph", said)), eager_steps())
    assert said == [f"batches of 2x96x128x3 run without a CUDA graph: {WHY}"]  # not for the other shape again


def test_after_a_capture_that_broke_all_runs_eagerly(python_graphs):
    said = []
    expected = eager_steps()
    step = make("graph", said)
    found = [steps_on_two_shapes(step, 3)]
    assert len(step._captured) == 1
    python_graphs.append("end")
    found.append(steps_on_two_shapes(step, first=3))
    assert torch.equal(torch.cat(found), expected)
    assert not step._captured and said == [f"all batches run without CUDA graphs from here on: {WHY}"]


@pytest.mark.parametrize(
    ("forgotten", "told"),
    [
        ("weights", "it did not change the weights as the same step computed eagerly"),
        ("images", "it gave a loss of "),
        ("noise", "the same step computed eagerly "),
    ],
)
def test_a_capture_that_is_wrong_is_never_used(python_graphs, forgotten, told):
    said = []
    python_graphs.append(forgotten)
    step = make("graph", said)
    assert torch.equal(steps_on_two_shapes(step, 8), eager_steps()[:8])
    assert not step._captured and len(said) == 1 and told in said[0]
    assert "all batches run without CUDA graphs from here on: the first replay of one is not the step" in said[0]


def test_only_the_first_replay_is_compared(python_graphs):
    step = make("graph", [])
    computed = []
    eagerly = step._eagerly
    step._eagerly = lambda *given: computed.append(None) or eagerly(*given)
    steps_on_two_shapes(step)
    assert len(computed) == 3  # a first step of both shapes, and the rehearsal


def test_a_rehearsal_leaves_nothing_behind(python_graphs):
    step = make("graph", [])
    batch = detectors.make_batch([3, 5], 8)
    step(batch)
    before = [tensor.clone() for tensor in step.changed()]
    tensors = [torch.tensor([1e-3, 1e-4, 0.0]), *batch.tensors(), *step.draw(batch)]
    arrived = step.transfer(tensors)
    rehearsal = Rehearsal(step.changed(), step._trained, lambda: step._eagerly(arrived, layout_of(tensors), [batch]))
    assert all(torch.equal(a, b) for a, b in zip(step.changed(), before, strict=True))
    assert len(before) > 3 * len(step._trained)  # weights, their average, two moments
    result = step._eagerly(arrived, layout_of(tensors), [batch])
    assert rehearsal.differs(result) is None
    assert rehearsal.differs((result[0], 1.1 * result[1])).startswith("it gave a gradient norm of ")


def test_graphs_make_room_for_shapes_that_are_new(python_graphs):
    said = []
    step, eager = make("graph", said), make("eager", said)
    python_graphs.append("memory")
    batch = detectors.make_batch([1, 2], 8, canvas=(64, 64))
    for _ in range(2):
        assert torch.equal(step(batch)[1], eager(batch)[1])
    assert len(step._captured) == 1
    assert torch.equal(steps_on_two_shapes(step, 6), steps_on_two_shapes(eager, 6))
    assert len(step._captured) == 2
    assert torch.equal(step(batch)[1], eager(batch)[1])
    assert len(step._captured) == 3 and not said


def test_graphs_make_room_for_a_capture(python_graphs):
    said = []
    expected = eager_steps()
    python_graphs.append("room")
    step = make("graph", said)
    found = [steps_on_two_shapes(step, 6)]
    assert not said and len(step._captured) == 1
    found.append(steps_on_two_shapes(step, first=6))  # every other shape drops the graph before
    assert torch.equal(torch.cat(found), expected)
    why = "those of different shapes do not fit in memory beside each other"
    assert said == [f"all batches run without CUDA graphs from here on: {why}"] and not step._captured


def test_graphs_give_way_to_a_shape_that_cannot_be_captured(python_graphs):
    said = []
    step, eager = make("graph", said), make("eager", said)
    batch = detectors.make_batch([1, 2], 8, canvas=(64, 64))
    python_graphs.append("capture")
    for _ in range(2):
        assert torch.equal(step(batch)[1], eager(batch)[1])
    python_graphs[:] = ["memory"]
    assert torch.equal(steps_on_two_shapes(step, 6), steps_on_two_shapes(eager, 6))
    assert step._captured
    assert torch.equal(step(batch)[1], eager(batch)[1])
    assert not step._captured
    assert said == [
        f"batches of 2x64x64x3 run without a CUDA graph: {WHY}",
        "all batches run without CUDA graphs from here on: beside captured steps there is no memory for others",
    ]


def test_rare_shapes_may_drop_graphs_a_few_times(python_graphs, monkeypatch):
    monkeypatch.setattr(graphs, "_MOST", 1)
    said = []
    step, eager = make("graph", said), make("eager", said)
    python_graphs.append("memory")
    often, rare = detectors.make_batch([1, 2], 8), detectors.make_batch([1, 2], 8, canvas=(64, 64))
    for _ in range(graphs._CLASHES):
        assert not said
        for batch in (often, often, rare):
            assert torch.equal(step(batch)[1], eager(batch)[1])
    assert said == [
        "all batches run without CUDA graphs from here on: beside captured steps there is no memory for others"
    ]


def test_there_are_only_so_many_graphs(python_graphs, monkeypatch):
    monkeypatch.setattr(graphs, "_MOST", 1)
    said = []
    step = make("graph", said)
    steps_on_two_shapes(step, 9)
    assert len(step._captured) == 1 and not said
    for _ in range(2):
        step.epoch_ended()
    assert said == ["66.7% of the steps so far ran without a CUDA graph: 1 shape of batches too rare for one"]


def test_shapes_that_were_not_chosen_take_no_graph_from_others(python_graphs):
    said = []
    expected = eager_steps()[:9]
    step = make("graph", said)
    step.expected = frozenset({BatchShape(96, 128, 8)})
    assert torch.equal(steps_on_two_shapes(step, 9), expected)
    assert [layout[1][1] for layout in step._captured] == [(2, 96, 128, 3)]
    step.epoch_ended()
    assert len(said) == 1 and said[0].startswith("33.3% of the steps so far ran without a CUDA graph: 1 shape ")
    step.expected = frozenset({BatchShape(64, 96, 8)})  # another number of slots
    assert not step._is_expected([detectors.make_batch([3, 5], 16, canvas=(64, 96))])


def test_nothing_is_said_of_an_epoch_whose_shapes_all_have_graphs(python_graphs):
    said = []
    step = make("graph", said)
    steps_on_two_shapes(step, 9)
    step.epoch_ended()
    assert not said


def test_dropped_graphs_do_not_count_twice(python_graphs, monkeypatch):
    monkeypatch.setattr(graphs, "_MOST", 2)
    said = []
    python_graphs.append("room")
    steps_on_two_shapes(make("graph", said), 6)
    assert not said


def test_a_checkpoint_of_one_mode_continues_in_the_other(python_graphs):
    ends = {}
    for first, second in (("eager", "eager"), ("eager", "graph"), ("graph", "eager"), ("graph", "graph")):
        one = make(first, [])
        steps_on_two_shapes(one, 6)
        state = {"step": one.state(), "model": one.model.state_dict(), "noise": one.noise_generator.get_state()}
        assert all(isinstance(group["lr"], float) for group in state["step"]["optimizer"]["param_groups"])
        other = make(second, [])
        other.model.load_state_dict(state["model"])
        other.restore(state["step"])
        other.noise_generator.set_state(state["noise"])
        ends[first, second] = steps_on_two_shapes(other, 6)
    for found in ends.values():
        assert torch.equal(found, ends["eager", "eager"])


@pytest.mark.gpu
def test_graphs_on_a_gpu_give_the_losses_of_eager_steps():
    said = []
    expected = steps_on_two_shapes(make("eager", said, "cuda"))
    step = make("graph", said, "cuda")
    found = steps_on_two_shapes(step)
    assert not said and len(step._captured) == 2
    # The order of atomic sums differs from run to run; AdamW takes the sign of gradients that are all rounding.
    torch.testing.assert_close(found[:3], expected[:3], rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(found[:, 0], expected[:, 0], rtol=1e-3, atol=1e-4)


@pytest.mark.gpu
def test_a_capture_that_breaks_on_a_gpu_leaves_eager_steps():
    said = []
    expected = steps_on_two_shapes(make("eager", said, "cuda"), 6)
    step = make("graph", said, "cuda")
    compute = step.compute

    def breaking(*given):
        if torch.cuda.is_current_stream_capturing():
            torch.ones(1, device="cuda").item()
        return compute(*given)

    step.compute = breaking
    found = steps_on_two_shapes(step, 6)
    assert not step._captured and len(said) == 1 and "all batches run without CUDA graphs" in said[0]
    assert torch.cuda.current_stream() == torch.cuda.default_stream()
    assert torch.rand(3, device="cuda").isfinite().all() and torch.empty(3).pin_memory().is_pinned()
    torch.testing.assert_close(found[:, 0], expected[:, 0], rtol=1e-3, atol=1e-4)
