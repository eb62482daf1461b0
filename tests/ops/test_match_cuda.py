"""The CUDA code of matching: run thread by thread on the host everywhere, and on a GPU where there is one."""

import ctypes
import importlib
import itertools
import random
import shutil
import subprocess

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from scipy.optimize import linear_sum_assignment

from dndetr.batch import Targets
from dndetr.ops import CostWeights, _backend, assign, match
from dndetr.ops.match import match_reference
from dndetr.ops.match_cost import CASES, make_case

assign_op, match_op = (importlib.import_module(f"dndetr.ops.{name}") for name in ("assign", "match"))

# warps of a block, and whether all of them search (or one)
BLOCKS = {"one": (1, 0), "one-of-two": (2, 0), "two": (2, 1), "four": (4, 1)}
ALL_SHARED, LITTLE_SHARED = 1 << 18, 1 << 13  # bytes: with little, larger problems keep their costs in the workspace


class Emulated:
    """The compiled module's CUDA part, run on the host: block, order of turns and shared memory are settable."""

    block, descending, shared = BLOCKS["two"], 0, ALL_SHARED

    def __init__(self, library):
        self.library = library

    def MatchInputs(self, *arguments):
        return arguments

    def match_workspace(self, queries, slots, is_double, stream):
        return queries * slots

    def assign_cuda(self, cost, is_double, shape, strides, counts, query, exact, workspace, stream):
        last = sum((n - 1) * step for n, step in zip(shape, strides, strict=True)) + 1
        read = ctypes.c_int64(last * (8 if is_double else 4) if min(shape) else 0)
        self._check(
            self.library.emulate_assign(
                self._block(), ctypes.c_void_p(cost), read, is_double, exact,
                (ctypes.c_int * 3)(*shape), (ctypes.c_int64 * 3)(*strides), ctypes.c_void_p(counts),
                ctypes.c_void_p(query), ctypes.c_int64(self.shared),
            )
        )  # fmt: skip

    def match_cuda(self, inputs, sets, outputs, exact, workspace, stream):
        shape, logits, logits_strides, boxes, boxes_strides, labels, target_boxes, counts, weights = inputs
        layers, batch, queries, classes, slots = shape
        sizes = {0: 4, 1: 8, 2: 2, 3: 2}

        def extent(strides, width):
            return sum((n - 1) * s for n, s in zip((layers, batch, queries), strides, strict=True)) + width

        read = (
            extent(logits_strides, classes) * sizes[logits[1]],
            extent(boxes_strides, 4) * sizes[boxes[1]],
            batch * slots * 4 * sizes[target_boxes[1]],
        )
        assert boxes[1] == target_boxes[1] == (1 if logits[1] == 1 else 0)  # of the type of the costs
        self._check(
            self.library.emulate_match(
                self._block(), (ctypes.c_int * 6)(*shape, sets),
                (ctypes.c_void_p * 3)(logits[0], boxes[0], target_boxes[0]), (ctypes.c_int64 * 3)(*read), logits[1],
                (ctypes.c_int64 * 6)(*logits_strides, *boxes_strides), ctypes.c_void_p(labels), ctypes.c_void_p(counts),
                (ctypes.c_double * 5)(*weights), *map(ctypes.c_void_p, outputs), ctypes.c_int64(self.shared),
            )
        )  # fmt: skip

    def _block(self):
        return (ctypes.c_int * 3)(*self.block, self.descending)

    @staticmethod
    def _check(problem):
        assert not problem, problem.decode()


def compiled(root, source, target, *flags):
    """A library of a file that includes the emulator."""
    if not shutil.which("g++"):
        pytest.skip("no C++ compiler")
    emulator = root / "tests" / "ops" / "emulator"
    flags = [
        "-O1",
        "-std=c++17",
        "-fPIC",
        "-shared",
        "-ffp-contract=off",
        f"-I{root / 'csrc'}",
        f"-I{emulator}",
        *flags,
    ]
    subprocess.run(["g++", *flags, str(emulator / source), "-o", str(target)], check=True)
    library = ctypes.CDLL(str(target))
    if source == "match.cpp":
        library.emulate_assign.restype = library.emulate_match.restype = ctypes.c_char_p
    return library


@pytest.fixture(scope="module")
def library(root, tmp_path_factory):
    return compiled(root, "match.cpp", tmp_path_factory.mktemp("emulator") / "match.so")


@pytest.fixture
def emulated(library, monkeypatch):
    """The ops' CUDA code on CPU tensors."""
    return emulate(library, monkeypatch)


def emulate(library, monkeypatch):
    module = Emulated(library)
    module.real = _backend.compiled
    monkeypatch.setattr(assign_op._backend, "compiled", lambda: module)
    monkeypatch.setattr(_backend, "cuda_stream", lambda tensor: (0, 0))
    return module


def assign_there(cost, counts, exact=True):
    return assign_op._assign(cost, counts, "cuda", exact)


def assign_here(emulated, cost, counts):
    """The C++ solver: same rule for ties, so the same answer whatever the costs."""
    module, query = emulated.real(), torch.full((cost.shape[0], cost.shape[2]), -7, dtype=torch.int32)
    is_double = cost.dtype == torch.float64
    module.assign(
        cost.data_ptr(), is_double, tuple(cost.shape), cost.stride(), counts.data_ptr(), query.data_ptr(), 1
    )  # fmt: skip
    return query


def match_there(logits, boxes, targets, sets=1, weights=CostWeights()):
    inputs = (logits, boxes, targets.labels, targets.boxes, targets.counts, list(weights))
    return match_op._match_cuda(*inputs, sets, True)


def costs(kind, problems, queries, slots, seed):
    draw = torch.Generator().manual_seed(seed)
    cost = torch.randn(problems, queries, slots, generator=draw)
    if kind == "ties":
        cost = (cost * 2).round()
    elif kind == "equal":
        cost = torch.ones_like(cost)
    elif kind == "collapsed":
        cost = torch.randn(problems, 1, slots, generator=draw) + 1e-6 * cost
    elif kind == "sorted":  # every target prefers the same queries: the longest searches
        cost = torch.arange(1, queries + 1)[:, None] * torch.arange(1, slots + 1).float() + torch.zeros_like(cost)
    elif kind == "zeros":  # of both signs, which are equal
        cost = torch.where(cost > 0, 0.0, -0.0)
    counts = torch.randint(slots + 1, (problems,), generator=draw, dtype=torch.int32)
    return cost, counts


KINDS = ["random", "ties", "equal", "collapsed", "sorted", "zeros"]


@pytest.mark.parametrize("block", BLOCKS)
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    seed=st.integers(0, 2**31), queries=st.integers(0, 40), slots=st.integers(1, 40),
    kind=st.sampled_from(KINDS), double=st.booleans(), descending=st.booleans(),
)  # fmt: skip
def test_emulated_solver_answers_as_the_one_in_cpp(
    extension, emulated, block, seed, queries, slots, kind, double, descending
):
    emulated.block, emulated.descending = BLOCKS[block], descending
    cost, counts = costs(kind, 2, queries, slots, seed)
    cost = cost.double() if double else cost
    assert torch.equal(assign_there(cost, counts), assign_here(emulated, cost, counts))


@pytest.mark.parametrize("flags", [[], ["-DWITHOUT_REDUX"]], ids=["one-instruction", "shuffles"])
def test_emulated_minimum_of_a_warp(root, tmp_path, flags):
    library = compiled(root, "minimum.cpp", tmp_path / "minimum.so", *flags)
    draw = random.Random(0)
    for most in (1, 40, 2**32 - 1):
        words, found = ([draw.randint(0, most) for _ in range(32)], (ctypes.c_uint * 32)())
        library.minima((ctypes.c_uint * 32)(*words), found)
        assert set(found) == {min(words)}


@pytest.mark.slow
def test_emulated_solver_with_minima_by_shuffles(extension, root, tmp_path, monkeypatch):
    """As compiled for sm_75, which has no instruction for the minimum of a warp."""
    emulated = emulate(compiled(root, "match.cpp", tmp_path / "match.so", "-DWITHOUT_REDUX"), monkeypatch)
    for kind, dtype, block in itertools.product(KINDS, (torch.float32, torch.float64), BLOCKS.values()):
        emulated.block = block
        cost, counts = costs(kind, 2, 37, 23, 5)
        cost = cost.to(dtype)
        assert torch.equal(assign_there(cost, counts), assign_here(emulated, cost, counts)), (kind, dtype, block)


@pytest.mark.parametrize("kind", KINDS)
def test_emulated_solver_in_float32(emulated, kind):
    cost, counts = costs(kind, 4, 40, 24, 3)
    for matrix, count, query in zip(
        cost.double(), counts.tolist(), assign_there(cost, counts, exact=False), strict=True
    ):
        real = matrix[:, :count].numpy()
        assert len(set(query[:count].tolist())) == count and (query[count:] == -1).all()
        best = real[linear_sum_assignment(real)].sum()
        exact = kind in ("ties", "equal", "sorted", "zeros")
        given = real[query[:count].numpy(), range(count)].sum()
        assert given == best if exact else given == pytest.approx(best, rel=1e-5)


@pytest.mark.parametrize("block", ["one-of-two", "four"])
@pytest.mark.parametrize("size", [(96, 64), (20, 90), (90, 90)], ids=str)
def test_emulated_costs_in_the_workspace(extension, emulated, block, size):
    emulated.block = BLOCKS[block]
    cost, counts = costs("random", 2, *size, 5)
    counts[0] = size[1]
    in_shared = assign_there(cost, counts)
    emulated.shared = LITTLE_SHARED
    assert torch.equal(assign_there(cost, counts), in_shared)
    assert torch.equal(in_shared, assign_here(emulated, cost, counts))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("queries", [6, 3])
def test_emulated_solver_meets_what_is_not_finite(extension, emulated, bad, dtype, queries):
    cost = torch.randn(3, queries, 4, generator=torch.Generator().manual_seed(0)).to(dtype)
    cost[0, 1, :] = cost[0, 2, 3] = bad
    cost[1] = bad
    cost[2, 0] = 3e38
    counts = torch.tensor([4, 4, 4], dtype=torch.int32)
    assert torch.equal(assign_there(cost, counts), assign_here(emulated, cost, counts))
    for query in assign_there(cost.float(), counts, exact=False):
        used = query[query >= 0].tolist()
        assert len(used) == len(set(used)) == min(queries, 4) and max(used) < queries


def test_emulated_solver_at_any_stride(extension, emulated):
    cost, counts = costs("random", 3, 30, 9, 1)
    expected = assign_there(cost, counts)
    wide = torch.randn(3, 30, 20)
    wide[:, :, 4:13] = cost
    for same in (cost.mT.contiguous().mT, wide[:, :, 4:13]):
        assert torch.equal(assign_there(same, counts), expected)
    assert torch.equal(assign_there(cost, counts + 99), assign_there(cost, torch.full_like(counts, 9)))


@pytest.mark.parametrize("shared", [ALL_SHARED, LITTLE_SHARED], ids=["shared", "workspace"])
@pytest.mark.parametrize("sets", [1, 2])
@pytest.mark.parametrize("name", [name for name in CASES if name != "coco"])
def test_emulated_match_equals_the_reference(emulated, name, sets, shared):
    emulated.shared = shared
    logits, boxes, targets = make_case(name)
    queries = logits.shape[2] // sets * sets
    logits, boxes = logits[:, :, :queries], boxes[:, :, :queries]
    for position in (0.0, 0.5, 0.3):
        weights = CostWeights(position=position)
        query, target, finite = match_there(logits, boxes, targets, sets, weights)
        expected = match_reference(logits, boxes, targets, weights, sets, "reference")
        assert torch.equal(query, expected.query) and torch.equal(target, expected.target)
        assert finite.shape == (*expected.finite.shape, sets) and finite.all()


def test_emulated_match_with_more_targets_than_queries(emulated):
    logits, boxes, targets = make_case("bf16")
    logits, boxes = logits[:, :, :4], boxes[:, :, :4].bfloat16()
    query, target, _ = match_there(logits, boxes, targets)
    expected = match_reference(logits, boxes, targets, CostWeights(), 1, "reference")
    assert torch.equal(query, expected.query) and torch.equal(target, expected.target)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")], ids=str)
def test_emulated_match_flags_what_is_not_finite(emulated, bad):
    logits, boxes, targets = make_case("uneven")
    boxes[1, 0, 5] = logits[2, 2, 7] = bad
    targets.labels[1, 0] = 11  # a label that does not exist
    for position in (0.0, 0.5, 0.3):
        query, target, finite = match_there(logits, boxes, targets, weights=CostWeights(position=position))
        assert finite.squeeze(2).logical_not().nonzero().tolist() == [[0, 1], [1, 0], [1, 1], [2, 1], [2, 2]]
        assert target[1, 0, 5] == -1 and target[2, 2, 7] == -1
        assert ((query >= 0) == targets.valid[None, :, None]).all()


@pytest.fixture
def without_sync():
    torch.cuda.set_sync_debug_mode("error")
    yield
    torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
def test_gpu_solver_answers_as_the_one_in_cpp():
    for kind in KINDS:
        for size in ((300, 20), (300, 100), (300, 300), (900, 100), (2048, 64), (40, 300), (900, 400)):
            cost, counts = costs(kind, 16, *size, 7)
            there = assign(cost.cuda(), counts.cuda(), backend="cuda").cpu()
            assert torch.equal(there, assign(cost, counts, backend="cpp")), (kind, size)


@pytest.mark.gpu
@pytest.mark.parametrize("name", CASES)
def test_gpu_matches_as_the_cpu_does(name):
    logits, boxes, targets = make_case(name)
    for position in (0.0, 0.5, 0.3):
        weights = CostWeights(position=position)
        there = match(logits.cuda(), boxes.cuda(), targets.to("cuda"), weights, backend="cuda")
        for found, expected in zip(there, match(logits, boxes, targets, weights), strict=True):
            assert torch.equal(found.cpu(), expected)


@pytest.mark.gpu
@pytest.mark.parametrize("queries", [2049, 5000, 22223])
def test_gpu_matches_all_tokens(queries):
    draw = torch.Generator().manual_seed(1)
    logits, boxes = torch.randn(1, 2, queries, 1, generator=draw), torch.rand(1, 2, queries, 4, generator=draw)
    targets = make_case("coco")[2]
    targets = Targets(torch.zeros_like(targets.labels), targets.boxes, targets.counts)
    expected = match(logits, boxes, targets)
    for there, here in zip(match(logits.cuda(), boxes.cuda(), targets.to("cuda")), expected, strict=True):
        assert torch.equal(there.cpu(), here)


@pytest.mark.gpu
def test_gpu_ten_thousand_problems():
    cost, counts = costs("random", 10_000, 100, 20, 11)
    assert torch.equal(assign(cost.cuda(), counts.cuda()).cpu(), assign(cost, counts, backend="reference"))


@pytest.mark.gpu
@pytest.mark.parametrize("name", CASES)
def test_gpu_match_in_a_graph_without_waiting(name, without_sync):
    torch.cuda.set_sync_debug_mode("default")
    logits, boxes, targets = make_case(name, "cuda")
    expected = match(*(x.cpu() for x in (logits, boxes)), targets.to("cpu"))
    match(logits, boxes, targets)
    torch.cuda.set_sync_debug_mode("error")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        matches = match(logits, boxes, targets)
    graph.replay()
    torch.cuda.set_sync_debug_mode("default")
    for there, here in zip(matches, expected, strict=True):
        assert torch.equal(there.cpu(), here)


@pytest.mark.gpu
def test_gpu_refuses_what_does_not_fit():
    cost = torch.zeros(1, 2049, 2, device="cuda")
    with pytest.raises(ValueError, match="at most 2048 queries"):
        assign(cost, torch.ones(1, dtype=torch.int32, device="cuda"), backend="cuda")


def test_fake_gpu_matches_without_a_copy(fake_cuda):
    targets = Targets(
        torch.empty(2, 8, dtype=torch.int64, device="cuda"),
        torch.empty(2, 8, 4, device="cuda"),
        torch.empty(2, dtype=torch.int32, device="cuda"),
    )
    inputs = (torch.empty(3, 2, 30, 5, device="cuda"), torch.empty(3, 2, 30, 4, device="cuda"))
    given = torch.ops.dndetr.match(*inputs, targets.labels, targets.boxes, targets.counts, list(CostWeights()), 3, True)
    assert [tuple(x.shape) for x in given] == [(3, 2, 3, 8), (3, 2, 30), (3, 2, 3)]
    assert all(x.device.type == "cuda" for x in given)
