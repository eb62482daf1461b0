"""The compiled attention kernels on a GPU: against float64, captured as a graph, and without compiling again."""

import importlib

import pytest
import torch
from gradients import DTYPES, compare

from dndetr.ops import GroupLayout, conditional_attention, group_attention, packed_attention

group = importlib.import_module("dndetr.ops.group_attention")
conditional = importlib.import_module("dndetr.ops.conditional_attention")
PARTS = ("q_content", "q_position", "k_content", "k_position", "v")
CANCELLED = 1e-6  # gradients that are exactly zero come out as the rounding of their terms

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU"),
]


def on_gpu(case):
    return [x.cuda() if isinstance(x, torch.Tensor) else x for x in case]


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize("name", group.CASES)
def test_group_attention(name, dtype):
    q, k, v, layout, active = on_gpu(group.make_case(name, dtype))
    compare(group_attention, group.group_attention_reference, (q, k, v), "qkv", dtype, layout, active, least=CANCELLED)


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize("name", conditional.CASES)
def test_conditional_attention(name, dtype):
    *inputs, valid = on_gpu(conditional.make_case(name, dtype))
    reference = conditional.conditional_attention_reference
    compare(conditional_attention, reference, inputs, PARTS, dtype, valid, least=CANCELLED)


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize("name", conditional.CASES)
def test_packed_conditional_attention(name, dtype):
    both, v, valid = on_gpu(conditional.make_packed_case(name, dtype))
    reference = conditional.packed_attention_reference
    compare(packed_attention, reference, (both, v), ("both", "v"), dtype, valid, least=CANCELLED)


def test_live_slots_in_a_view():
    q, k, v, layout, _ = on_gpu(group.make_case("tiny"))
    active = torch.tensor([3, 0, 7], dtype=torch.int32, device="cuda")[:1].expand(2)
    compare(group_attention, group.group_attention_reference, (q, k, v), "qkv", torch.float32, layout, active)


def test_another_layout_compiles_nothing():
    kernels = importlib.import_module("dndetr.kernels.group_attention")
    packed = torch.randn(2, 900, 3, 4, 32, device="cuda", dtype=torch.bfloat16)
    built = []
    for layout in (GroupLayout(5, 10, 300), GroupLayout(3, 7, 301), GroupLayout(1, 1, 16), GroupLayout(16, 8, 128)):
        q, k, v = packed[:, : layout.queries].permute(2, 0, 3, 1, 4)
        group_attention(q, k, v, layout, torch.tensor([1, layout.slots], dtype=torch.int32, device="cuda"))
        cache = kernels.group_attention_forward_kernel.device_caches[torch.cuda.current_device()][0]
        built.append(len(cache))
    assert len(set(built)) == 1


def test_graph_capture():
    q, k, v, layout, active = on_gpu(group.make_case("demo", torch.bfloat16))
    expected = group_attention(q, k, v, layout, active)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = group_attention(q, k, v, layout, active)
    graph.replay()
    assert torch.equal(out, expected)
    active.fill_(1)
    graph.replay()
    assert torch.equal(out, group_attention(q, k, v, layout, active))
