"""The C++ attention against both references: instruction sets, widths, memory layouts, NaN, threads, registration."""

from functools import partial

import pytest
import torch
from goldens import unit
from gradients import compare, outputs

from dndetr.ops import GroupLayout, conditional_attention, group_attention
from dndetr.ops.conditional_attention import CASES as CONDITIONAL
from dndetr.ops.conditional_attention import conditional_attention_reference
from dndetr.ops.conditional_attention import make_case as conditional_case
from dndetr.ops.group_attention import CASES as GROUPS
from dndetr.ops.group_attention import group_attention_reference
from dndetr.ops.group_attention import make_case as group_case

PARTS = ("q_content", "q_position", "k_content", "k_position", "v")
NAN = float("nan")


def groups(q, k, v, layout, active=None, scale=None):
    return group_attention(q, k, v, layout, active, scale, backend="cpp")


def crossed(*inputs):
    return conditional_attention(*inputs, backend="cpp")


def near(given, expected, relative):
    """Outputs and gradients by name, to a share of each one's largest number."""
    for name, truth in expected.items():
        assert (given[name] - truth).abs().max() <= relative * truth.abs().max(), name


def packed(batch, heads, length, *widths, dtype=torch.float32):
    """Arrays [batch, heads, length, width], parts of one projection."""
    x = torch.randn(batch, length, heads, sum(widths), dtype=torch.float64).to(dtype)
    return [part.transpose(1, 2) for part in x.split(widths, dim=-1)]


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", GROUPS)
def test_groups(simd, name, dtype):
    q, k, v, layout, active = group_case(name, dtype)
    compare(groups, group_attention_reference, (q, k, v), "qkv", dtype, layout, active)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", CONDITIONAL)
def test_conditional(simd, name, dtype):
    *inputs, valid = conditional_case(name, dtype)
    compare(crossed, conditional_attention_reference, inputs, PARTS, dtype, valid)


# Around whole registers and tiles of every instruction set, and past a chunk of panels.
@pytest.mark.parametrize("layout", [(1, 1, 1), (3, 13, 33), (2, 31, 63), (5, 24, 300), (2, 64, 0), (0, 0, 12)], ids=str)
def test_layouts(simd, layout):
    layout = GroupLayout(*layout)
    active = torch.tensor([layout.slots, layout.slots // 2], dtype=torch.int32)
    inputs = packed(2, 1, layout.queries, 8, 8, 8)
    compare(groups, group_attention_reference, inputs, "qkv", torch.float32, layout, active)


@pytest.mark.parametrize(
    "widths", [(1, 1, 1), (8, 3, 20), (20, 20, 8), (24, 40, 33), (32, 32, 32), (64, 1, 64), (128, 128, 128)], ids=str
)
def test_widths(simd, widths):
    content, position, width = widths
    q_content, k_content, v = packed(2, 2, 19, content, content, width)
    q_position, k_position = packed(2, 2, 19, position, position)
    inputs = (q_content[:, :, :7], q_position[:, :, :7], k_content, k_position, v)
    valid = torch.arange(19) % 3 < torch.tensor([[1], [2]])
    compare(crossed, conditional_attention_reference, inputs, PARTS, torch.float32, valid)
    layout, active = GroupLayout(2, 5, 9), torch.tensor([5, 2])
    inputs = (q_content, k_content, v)
    compare(groups, group_attention_reference, inputs, "qkv", torch.float32, layout, active)
    inputs = [x.double() for x in inputs]
    given, expected = (outputs(attend, inputs, "qkv", layout, active) for attend in (groups, group_attention_reference))
    near(given, expected, 1e-13)


def test_without_a_position_part(simd):
    """Plain attention past valid keys: one part of queries and keys, the other of width 0."""
    q, k, v = packed(2, 2, 19, 16, 16, 16)
    none, valid = q.new_empty(2, 2, 19, 0), torch.arange(19) < torch.tensor([[19], [11]])

    def attend(attention, q, k, v):
        return attention(q, none.to(q.dtype), k, none.to(k.dtype), v, valid)

    fast, reference = (partial(attend, attention) for attention in (crossed, conditional_attention_reference))
    compare(fast, reference, (q, k, v), "qkv", torch.float32)


def test_a_thousand_keys(simd):
    """Scores that rise from chunk to chunk, so that what was summed before must be scaled down."""
    *inputs, _ = conditional_case("all-valid")
    k_content, k_position, v = packed(2, 2, 1000, 8, 8, 8)
    k_content = k_content * torch.linspace(0, 4, 1000).view(-1, 1)
    inputs = (*inputs[:2], k_content, k_position, v)
    for valid in (None, (torch.arange(1000) % 7 != 3).expand(2, -1)):
        given = outputs(crossed, inputs, PARTS, valid, 0.5)
        exact = outputs(conditional_attention_reference, [x.double() for x in inputs], PARTS, valid, 0.5)
        near(given, exact, 1e-5)


def test_strides(extension):
    """Head-major, column-major, reversed order of dimensions; a gradient that is one number; flags of any strides."""
    layout, active = GroupLayout(2, 4, 6), torch.tensor([[3, 9], [1, 9]])[:, 0]
    q, k, v = packed(2, 2, 14, 16, 16, 16)
    leaves = [q.contiguous(), k.mT.contiguous().mT, v.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0)]
    results = []
    for attend in (groups, group_attention_reference):
        inputs = [x.detach().requires_grad_() for x in leaves]
        out = attend(*inputs, layout, active)
        results.append((out, *torch.autograd.grad(out.sum(), inputs)))
    for ours, expected in zip(*results, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)
    *inputs, valid = conditional_case("c5")
    compare(crossed, conditional_attention_reference, inputs, PARTS, torch.float32, valid.t().contiguous().t())


@pytest.mark.parametrize("batch", [0, 2])
def test_nothing_there(extension, batch):
    layout = GroupLayout(0, 0, 0)
    found = outputs(groups, packed(batch, 2, 0, 8, 8, 8), "qkv", layout)
    assert found["out"].shape == (batch, 2, 0, 8)
    q = torch.randn(batch, 2, 3, 8)
    keys = torch.randn(batch, 2, 0, 8)
    found = outputs(crossed, (q, q, keys, keys, keys), PARTS, torch.ones(batch, 0, dtype=torch.bool))
    assert found["out"].shape == (batch, 2, 3, 8) and not any(x.any() for x in found.values())


def test_what_is_hidden_is_never_read(simd):
    """NaN in slots that are not live and in keys that are not valid reaches nothing."""
    q, k, v, layout, active = group_case("demo")
    dead = ~torch.nn.functional.pad(layout.slot_alive(active), (0, layout.matching), value=True)[:, None, :, None]
    clean = outputs(groups, (q, k, v), "qkv", layout, active)
    dirty = outputs(groups, [x.masked_fill(dead, NAN) for x in (q, k, v)], "qkv", layout, active)
    for name in clean:
        assert torch.equal(clean[name], dirty[name]), name
    *inputs, valid = conditional_case("c5")
    clean = outputs(crossed, inputs, PARTS, valid)
    inputs[2:] = [x.masked_fill(~valid[:, None, :, None], NAN) for x in inputs[2:]]
    dirty = outputs(crossed, inputs, PARTS, valid)
    for name in clean:
        assert torch.equal(clean[name], dirty[name]), name


def test_nan_goes_no_further_than_in_the_reference(simd):
    layout = GroupLayout(2, 5, 14)
    for name, place in (("q", 3), ("q", 17), ("k", 3), ("k", 17), ("v", 3), ("v", 17)):
        inputs = dict(zip("qkv", packed(1, 1, layout.queries, 8, 8, 8), strict=True))
        inputs[name] = inputs[name].clone()
        inputs[name][0, 0, place, 2] = NAN
        given, expected = (
            outputs(attend, inputs.values(), "qkv", layout) for attend in (groups, group_attention_reference)
        )
        for part in given:
            assert not (given[part].isnan() & ~expected[part].isnan()).any(), (name, place, part)
        seen = ~layout.blocked()[:, place] if name != "q" else torch.arange(layout.queries) == place
        rows = given["out"].isnan().any(-1)[0, 0]
        assert torch.equal(rows, seen), (name, place)


def test_scores_without_end_are_as_in_the_reference(simd):
    """All of a chunk's scores at -inf, then ordinary ones; and a row that has nothing but -inf."""
    q, k, v = torch.ones(1, 1, 2, 4), torch.ones(1, 1, 600, 4), torch.randn(1, 1, 600, 4)
    k[:, :, :512] = -float("inf")
    expected = conditional_attention_reference(q, q, k, k, v)
    torch.testing.assert_close(crossed(q, q, k, k, v), expected, rtol=1e-5, atol=1e-6)
    k[:] = -float("inf")
    assert crossed(q, q, k, k, v).isnan().all() and conditional_attention_reference(q, q, k, k, v).isnan().all()


def test_recorded_masks(extension):
    """Attention with each recorded mask, written out densely, against the kernel that only knows three numbers."""
    seen = set()
    for case in unit("dn_attn_masks.pt")["cases"]:
        layout = GroupLayout(case["scalar"], case["single_pad"], case["num_queries"] * max(1, case["num_patterns"]))
        if layout in seen:
            continue
        seen.add(layout)
        q, k, v = packed(1, 1, layout.queries, 16, 16, 16)
        masked = (q @ k.mT * 0.25).masked_fill(case["attn_mask"], float("-inf"))
        torch.testing.assert_close(groups(q, k, v, layout), masked.softmax(-1) @ v, rtol=1e-5, atol=1e-5)
    assert len(seen) > 20


@pytest.mark.parametrize("batch", [1, 3])
def test_threads_do_not_change_a_bit(extension, batch):
    """One head's queries are shared out where there are fewer heads than threads; enough of them to wake a team."""
    layout = GroupLayout(5, 24, 700)
    inputs = packed(batch, 2, layout.queries, 32, 32, 32)
    active = torch.arange(20, 20 + batch)
    threads, found = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3, 8):
            torch.set_num_threads(count)
            found.append(outputs(groups, inputs, "qkv", layout, active))
    finally:
        torch.set_num_threads(threads)
    for other in found[1:]:
        for name, expected in found[0].items():
            assert torch.equal(other[name], expected), name


def test_second_order_checks(extension):
    q, k, v, layout, active = group_case("tiny", torch.float64)
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    assert torch.autograd.gradcheck(lambda *qkv: groups(*qkv, layout, active), leaves)
    *inputs, valid = conditional_case("nothing-valid", torch.float64)
    leaves = [x.detach().requires_grad_() for x in inputs]
    assert torch.autograd.gradcheck(lambda *parts: crossed(*parts, valid), leaves)


def test_registration(extension):
    q, k, v, layout, active = group_case("tiny")
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    for live in (active, None):
        arguments = (*leaves, live, *layout, 0.3, "torch", "cpp")
        torch.library.opcheck(torch.ops.dndetr.group_attention.default, arguments)
    *inputs, valid = conditional_case("tiny")
    leaves = [x.detach().requires_grad_() for x in inputs]
    torch.library.opcheck(torch.ops.dndetr.conditional_attention.default, (*leaves, valid, 0.3, "torch", "cpp"))


def test_compile(extension):
    q, k, v, layout, active = group_case("tiny")
    *inputs, valid = conditional_case("tiny")
    for attend, given, names, rest in (
        (groups, (q, k, v), "qkv", (layout, active)),
        (crossed, inputs, PARTS, (valid,)),
    ):
        compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")
        found, expected = outputs(compiled, given, names, *rest), outputs(attend, given, names, *rest)
        for name in expected:
            assert torch.equal(found[name], expected[name]), name
