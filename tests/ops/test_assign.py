import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linear_sum_assignment

from dndetr.ops import assign
from dndetr.ops.assign import CASES, assign_reference, make_case

SIMD = ("plain", "avx2", "avx512")


def solve(extension, cost, counts, simd="", threads=1):
    """The C++ solver on one instruction set (narrower ones exist on every machine)."""
    query = torch.full((cost.shape[0], cost.shape[2]), -7, dtype=torch.int32)
    extension.assign(
        cost.data_ptr(), cost.dtype == torch.float64, tuple(cost.shape), cost.stride(), counts.data_ptr(),
        query.data_ptr(), threads, simd,
    )  # fmt: skip
    return query


def check(cost, counts, query):
    """``query`` is a valid matching of every problem, as cheap as scipy's."""
    for matrix, count, found in zip(cost.double().numpy(), counts.tolist(), query.numpy(), strict=True):
        real = matrix[:, :count]
        assert (found[count:] == -1).all()
        targets = np.flatnonzero(found[:count] >= 0)
        queries = found[targets]
        assert len(targets) == min(real.shape) and len(set(queries)) == len(queries)
        assert ((queries >= 0) & (queries < real.shape[0])).all()
        best = real[linear_sum_assignment(real)].sum()
        assert real[queries, targets].sum() == pytest.approx(best, rel=1e-9, abs=1e-9)


@pytest.mark.parametrize("simd", SIMD)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", CASES)
def test_cases_equal_scipy(extension, name, dtype, simd):
    cost, counts = make_case(name)
    cost = cost.to(dtype)
    assert torch.equal(solve(extension, cost, counts, simd), assign_reference(cost, counts))


@pytest.mark.parametrize("simd", SIMD)
@settings(max_examples=150, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    queries=st.integers(0, 21),
    slots=st.integers(0, 21),
    kind=st.sampled_from(["random", "ties", "equal", "collapsed", "sorted"]),
)
def test_optimal_and_valid(extension, simd, seed, queries, slots, kind):
    draw = torch.Generator().manual_seed(seed)
    cost = torch.randn(3, queries, slots, generator=draw)
    if kind == "ties":
        cost = (cost * 2).round()
    elif kind == "equal":
        cost = torch.ones_like(cost)
    elif kind == "collapsed":
        cost = torch.randn(3, 1, slots, generator=draw) + 1e-6 * cost
    elif kind == "sorted":  # every target prefers the same queries: the longest searches
        cost = torch.arange(1, queries + 1)[:, None] * torch.arange(1, slots + 1).float() + torch.zeros_like(cost)
    counts = torch.randint(slots + 1, (3,), generator=draw, dtype=torch.int32)
    query = solve(extension, cost, counts, simd)
    check(cost, counts, query)
    assert torch.equal(query, solve(extension, cost, counts, simd))
    if kind == "random":
        assert torch.equal(query, assign_reference(cost, counts))


@pytest.mark.parametrize("simd", SIMD)
def test_same_answer_on_every_instruction_set(extension, simd):
    cost = torch.randint(4, (20, 30, 12), generator=torch.Generator().manual_seed(1)).float()
    counts = torch.full((20,), 12, dtype=torch.int32)
    assert torch.equal(solve(extension, cost, counts, simd), solve(extension, cost, counts, "plain"))


def test_tie_goes_to_the_lowest_query(extension):
    query = solve(extension, torch.zeros(1, 6, 4), torch.tensor([3], dtype=torch.int32))
    assert query.tolist() == [[0, 1, 2, -1]]


@pytest.mark.parametrize("backend", ["cpp", "reference"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf"), 1e200], ids=str)
@pytest.mark.parametrize("queries", [6, 3])
def test_not_finite_is_the_worst_choice(extension, backend, bad, queries):
    cost = torch.randn(2, queries, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    cost[0, 1, :] = bad
    cost[0, 2, 3] = bad
    cost[1] = bad
    counts = torch.tensor([4, 4], dtype=torch.int32)
    query = assign(cost, counts, backend=backend)
    assert torch.equal(query[0], assign_reference(cost, counts)[0])
    if queries == 6:
        assert 1 not in query[0]
    used = query[1][query[1] >= 0].tolist()
    assert len(used) == len(set(used)) == min(queries, 4) and max(used) < queries


def test_huge_float32_costs(extension):
    cost = torch.tensor([[[3e38, -3e38], [-3e38, 3e38], [0.0, 0.0]]])
    counts = torch.tensor([2], dtype=torch.int32)
    assert assign(cost, counts).tolist() == [[1, 0]]


def test_strides_and_layouts(extension):
    cost, counts = make_case("small")
    expected = assign(cost, counts, backend="cpp")
    assert torch.equal(assign(cost.transpose(1, 2).contiguous().transpose(1, 2), counts, backend="cpp"), expected)
    wide = torch.randn(48, 30, 20)
    wide[:, :, 4:12] = cost
    assert torch.equal(assign(wide[:, :, 4:12], counts, backend="cpp"), expected)
    assert torch.equal(assign(cost.flip(0), counts.flip(0), backend="cpp"), expected.flip(0))
    two = torch.stack((counts, counts), 1)[:, 0]
    assert not two.is_contiguous() and torch.equal(assign(cost, two, backend="cpp"), expected)


def test_values_under_padding_do_not_matter(extension):
    cost, counts = make_case("small")
    padded = torch.arange(8) >= counts[:, None]
    other = cost.masked_fill(padded[:, None, :], float("nan"))
    assert torch.equal(assign(cost, counts, backend="cpp"), assign(other, counts, backend="cpp"))


def test_counts_out_of_range_are_clamped(extension):
    cost, _ = make_case("tiny")
    high = assign(cost, torch.tensor([99, -5, 4], dtype=torch.int32), backend="cpp")
    exact = assign(cost, torch.tensor([4, 0, 4], dtype=torch.int32), backend="cpp")
    assert torch.equal(high, exact)


def full(cost):
    """Counts that make every target real."""
    return torch.full(cost.shape[:1], cost.shape[2], dtype=torch.int32)


def drawn(seed, queries, slots):
    """Random costs, whose optimum is unique; in eighths, so that sums of them are exact."""
    cost = torch.randint(2**22, (4, queries, slots), generator=torch.Generator().manual_seed(seed)).double() / 8
    return cost, assign(cost, full(cost), backend="cpp")


SIZES = {"seed": st.integers(0, 2**31), "queries": st.integers(1, 24), "slots": st.integers(1, 24)}


@settings(max_examples=60, deadline=None)
@given(**SIZES)
def test_order_does_not_matter(extension, seed, queries, slots):
    cost, query = drawn(seed, queries, slots)
    draw = torch.Generator().manual_seed(seed)
    order = torch.randperm(slots, generator=draw)
    assert torch.equal(assign(cost[:, :, order], full(cost), backend="cpp"), query[:, order])
    order = torch.randperm(queries, generator=draw)
    turned = assign(cost[:, order], full(cost), backend="cpp")
    assert torch.equal(torch.where(turned < 0, -1, order[turned.long()].int()), query)


@settings(max_examples=60, deadline=None)
@given(**SIZES)
def test_a_constant_on_a_fully_matched_side_does_not_matter(extension, seed, queries, slots):
    cost, query = drawn(seed, queries, slots)
    constant = (
        torch.randint(2**22, (4, max(queries, slots)), generator=torch.Generator().manual_seed(seed)).double() / 8
    )
    if slots <= queries:
        assert torch.equal(assign(cost + constant[:, None, :slots], full(cost), backend="cpp"), query)
    if queries <= slots:
        assert torch.equal(assign(cost + constant[:, :queries, None], full(cost), backend="cpp"), query)


@settings(max_examples=60, deadline=None)
@given(**SIZES)
def test_transposition_inverts(extension, seed, queries, slots):
    cost, query = drawn(seed, queries, slots)
    target = assign(cost.mT, full(cost.mT), backend="cpp")
    pairs = {(m, q, t) for (m, t), q in np.ndenumerate(query.numpy()) if q >= 0}
    assert pairs == {(m, q, t) for (m, q), t in np.ndenumerate(target.numpy()) if t >= 0}


@settings(max_examples=60, deadline=None)
@given(**SIZES, more=st.integers(1, 40))
def test_padding_does_not_matter_to_ties(extension, seed, queries, slots, more):
    cost = torch.randint(3, (4, queries, slots), generator=torch.Generator().manual_seed(seed)).float()
    wide = torch.nn.functional.pad(cost, (0, more), value=float("nan"))
    query = assign(cost, full(cost), backend="cpp")
    assert torch.equal(assign(wide, full(cost), backend="cpp")[:, :slots], query)
    assert torch.equal(assign(cost.flip(0), full(cost), backend="cpp"), query.flip(0))


@pytest.mark.parametrize("size", [(200, 200), (300, 120), (120, 300)], ids=str)
def test_adversarial(extension, size):
    """Row minima all at one column, and every search passes through all that are matched already."""
    rows, columns = (torch.arange(1, n + 1, dtype=torch.float64) for n in size)
    cost = (rows[:, None] * columns)[None].expand(2, -1, -1)
    check(cost, full(cost), assign(cost, full(cost), backend="cpp"))


def test_threads_do_not_change_the_answer(extension):
    # 96 problems of 300 x 128 pass the size from which a team of threads is woken.
    cost = torch.randn(96, 300, 128, generator=torch.Generator().manual_seed(2))
    counts = torch.full((96,), 128, dtype=torch.int32)
    assert torch.equal(solve(extension, cost, counts), solve(extension, cost, counts, threads=2))


@pytest.mark.parametrize(
    ("cost", "counts"),
    [
        (torch.zeros(3, 4), torch.zeros(3, dtype=torch.int32)),
        (torch.zeros(2, 3, 4, dtype=torch.bfloat16), torch.zeros(2, dtype=torch.int32)),
        (torch.zeros(2, 3, 4), torch.zeros(2, dtype=torch.int64)),
        (torch.zeros(2, 3, 4), torch.zeros(3, dtype=torch.int32)),
    ],
    ids=["2-d", "bfloat16", "int64 counts", "wrong batch"],
)
def test_wrong_input_is_an_error(cost, counts):
    with pytest.raises(ValueError, match="assign: c"):
        assign(cost, counts)


def test_opcheck(extension):
    for name in ("tiny", "more-targets", "no-queries"):
        cost, counts = make_case(name)
        torch.library.opcheck(torch.ops.dndetr.assign.default, (cost, counts, "cpp", True))


def test_compiles_without_a_graph_break():
    cost, counts = make_case("tiny")
    compiled = torch.compile(assign, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(cost, counts), assign(cost, counts))


def test_fake_tensors(fake_cuda):
    query = assign(torch.empty(4, 30, 8, device="cuda"), torch.empty(4, dtype=torch.int32, device="cuda"))
    assert query.shape == (4, 8) and query.dtype == torch.int32 and query.device.type == "cuda"
