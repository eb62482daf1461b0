"""Kernels, operations and bytes of small functions, counted by hand."""

import contextlib

import pytest
import torch
import torch.nn.functional as F

from dndetr.counting.backward import plain_backward
from dndetr.counting.counter import Counter
from dndetr.counting.fake_gpu import fake_gpu
from dndetr.counting.gpus import GAP, GPUS, LEAST, LEAST_PRODUCT
from dndetr.counting.kernels import multi_tensor_launches
from dndetr.counting.own_ops import OWN
from dndetr.kernels.column_sums import plan
from dndetr.ops import _backend
from dndetr.ops.column_sums import column_sums
from dndetr.ops.level_sums import level_sums
from dndetr.ops.ms_deform_attn import ms_deform_attn_fused

HALF, FULL = torch.bfloat16, torch.float32


@pytest.fixture
def gpu():
    with fake_gpu():
        yield


def made(*shape, dtype=FULL):
    return torch.empty(shape, dtype=dtype, device="cuda")


def indices(*shape):
    return torch.empty(shape, dtype=torch.int64, device="cuda")


def counted(function) -> list[tuple[str, int, int]]:
    """Name, kernels and bytes of all that runs."""
    with Counter() as counter:
        function()
    return [(each.name, each.kernels, each.bytes) for each in counter.operations]


def one(function) -> tuple[int, int]:
    """Kernels and bytes of the only operation."""
    ((_, kernels, moved),) = counted(function)
    return kernels, moved


@pytest.mark.parametrize(
    ("name", "function", "kernels", "moved"),
    [
        ("add", lambda: made(8, 16) + made(8, 16), 1, 3 * 512),
        ("twice the same", lambda x: x + x, 1, 2 * 512),
        ("broadcast", lambda: made(8, 16) + made(16), 1, 512 + 64 + 512),
        ("expanded", lambda: made(8, 16) + made(1, 16).expand(8, 16), 1, 512 + 64 + 512),
        ("cast", lambda: made(8, 16).to(HALF), 1, 512 + 256),
        ("cast of a part", lambda: made(8, 16)[:2].to(HALF), 1, 128 + 64),
        ("in place", lambda: made(8, 16, dtype=HALF).relu_(), 1, 256 + 256),
        ("in place with another", lambda: made(8, 16).add_(made(8, 16)), 1, 3 * 512),
        ("copy", lambda: made(8, 16).copy_(made(8, 16, dtype=HALF)), 1, 512 + 256),
        ("copy into a part", lambda: made(8, 16)[0].copy_(made(16)), 1, 64 + 64),
        ("fill", lambda: made(8, 16).fill_(3), 1, 512),
        ("zeros", lambda: torch.zeros(8, 16, device="cuda"), 1, 512),
        ("zeros of another kind", lambda: torch.zeros_like(made(8, 16), dtype=HALF), 1, 256),
        ("gather", lambda: made(1000, 16)[indices(4)], 1, 2 * 256 + 32),
        ("embedding", lambda: F.embedding(indices(4), made(91, 16)), 1, 544),
        ("scatter", lambda: made(99, 4).scatter_(0, indices(5, 4), made(5, 4)), 1, 160 + 80 + 80),
        ("scattered sums", lambda: made(99, 4).scatter_add_(0, indices(5, 4), made(5, 4)), 1, 160 + 80 + 2 * 80),
        ("sum", lambda: made(8, 16).sum(0), 1, 512 + 64),
        (
            "masked",
            lambda: made(8, 16).masked_fill(torch.empty(8, 1, dtype=torch.bool, device="cuda"), 0),
            2,
            3 * 512 + 8,
        ),
        ("concatenated", lambda: torch.cat([made(8, 16)[:3], made(5, 16)]), 1, 2 * 512),
        ("many concatenated", lambda: torch.cat([made(1, 16) for _ in range(129)]), 2, 2 * 129 * 64),
        ("layer norm", lambda: F.layer_norm(made(8, 16), (16,)), 1, 512 + 512 + 2 * 32),
    ],
)
def test_bytes_and_kernels(gpu, name, function, kernels, moved):
    if name == "twice the same":
        x = made(8, 16)
        assert one(lambda: function(x)) == (kernels, moved)
    else:
        assert one(function) == (kernels, moved)


def test_views_and_memory_are_nothing(gpu):
    def views():
        x = made(8, 16).view(4, 32).t()[1:, None].expand(31, 5, 4).transpose(0, 1)
        return x.detach(), x.unbind(0), x.split(2), torch.empty_like(x), x.movedim(0, 1).squeeze()

    assert counted(views) == []


def test_what_runs_on_the_host_is_nothing(gpu):
    assert counted(lambda: torch.ones(3) + torch.zeros(3)) == []


def test_a_linear_layer_is_one_product(gpu):
    """The bias is added by it."""
    x, weight, bias = made(10, 16, dtype=HALF), made(32, 16, dtype=HALF), made(32, dtype=HALF)
    with Counter() as counter:
        F.linear(x, weight, bias)
    (product,) = counter.operations
    assert (product.kernels, product.flop, product.beside) == (1, 2 * 10 * 16 * 32, 0)
    assert product.bytes == 2 * (10 * 16 + 32 * 16 + 32 + 10 * 32)


@pytest.mark.parametrize("bias", [False, True])
def test_a_convolutions_bias_is_a_kernel_of_its_own(gpu, bias):
    x = made(2, 8, 6, 6, dtype=HALF).contiguous(memory_format=torch.channels_last)
    weight = made(4, 8, 3, 3, dtype=HALF).requires_grad_()
    with Counter() as counter:
        y = F.conv2d(x, weight, made(4, dtype=HALF) if bias else None, padding=1)
    (convolution,) = counter.operations
    assert (convolution.kernels, convolution.flop) == (1 + bias, 2 * 2 * 36 * 4 * 8 * 9)
    assert y.is_contiguous(memory_format=torch.channels_last)


def test_autocast_is_a_gpus(gpu):
    """Products take half precision, softmax and layer norm float32: the lists of a CPU are others."""
    x, weight = made(8, 16), made(16, 16)
    with torch.autocast("cuda", HALF):
        assert [name for name, *_ in counted(lambda: x @ weight)] == ["_to_copy", "_to_copy", "mm"]
        assert F.layer_norm(x.to(HALF), (16,)).dtype == x.to(HALF).softmax(-1).dtype == FULL


def test_lists_go_in_chunks(gpu):
    small = [made(16) for _ in range(100)]
    copies = [made(16, dtype=HALF) for _ in range(100)]
    # 64 pairs fit into a launch.
    assert one(lambda: torch._foreach_copy_(copies, small)) == (2, 100 * (64 + 32))
    assert one(lambda: torch._foreach_mul_(small, 2.0)) == (1, 100 * 128)
    # Sums of each tensor, and one kernel that joins them.
    assert one(lambda: torch._foreach_norm(small)) == (2, 100 * (64 + 4))


@pytest.mark.parametrize(
    ("sizes", "depth", "launches"),
    [
        ([], 1, 0),
        ([0, 5], 1, 1),
        ([1] * 110, 1, 1),
        ([1] * 111, 1, 2),
        ([1] * 37, 4, 2),
        ([320 * 65536], 1, 1),
        ([320 * 65536 + 1], 1, 2),
        ([319 * 65536, 65537, 1], 1, 2),
        ([640 * 65536, 1], 4, 3),
    ],
)
def test_launches_of_lists(gpu, sizes, depth, launches):
    assert multi_tensor_launches([made(size) for size in sizes], depth) == launches


def test_a_gradient_of_a_part_is_zeros_and_a_copy(gpu):
    x = made(8, 16).requires_grad_()
    total = x[2:4].sum()
    with plain_backward(lambda node: contextlib.nullcontext()):
        found = counted(total.backward)
    assert ("slice_backward", 2, 512 + 2 * 4) in found


def test_a_result_in_a_given_tensor_is_written_alone(gpu):
    x, y, out = made(8, 16), made(8, 16), made(8, 16, dtype=HALF)
    assert one(lambda: torch.add(x, y, out=out)) == (1, 8 * 16 * (4 + 4 + 2))


@pytest.mark.parametrize("rows", [4096, 4097])
def test_sums_of_columns_are_those_that_the_kernel_plans(gpu, rows):
    kernels, moved = one(lambda: column_sums(made(rows, 64, dtype=HALF)))
    rows_per_share = plan(rows, 64, masks=False)[-1]
    assert kernels == (1 if rows_per_share >= rows else 2)
    assert moved >= rows * 128 + 128


@pytest.mark.parametrize("rows, kernels", [(8, 1), (900, 2)])
def test_sums_of_levels_are_added_up_by_a_second_kernel(gpu, rows, kernels):
    found, moved = one(lambda: level_sums(made(2, rows + 3, 256, dtype=HALF), (rows, 3)))
    shares = -(-2 * rows // 16)
    assert found == kernels
    assert moved == 2 * 2 * (rows + 3) * 256 + 4 * 2 * 256 + (kernels - 1) * 2 * 4 * 2 * shares * 256


def test_deformable_attention_sums_in_float32(gpu):
    value = made(2, 80, 4, 32, dtype=HALF)
    points, offsets, logits = made(2, 7, 1, 4), made(2, 7, 4, 1, 4, 2, dtype=HALF), made(2, 7, 4, 4, dtype=HALF)
    out = ms_deform_attn_fused(value, ((8, 10),), points, offsets, logits)
    kernels, moved = one(
        lambda: torch.ops.dndetr.ms_deform_attn_backward(out, value, [8, 10], points, offsets, logits, None, False)
    )
    numbers = value.numel()
    given = 2 * (out.numel() + numbers + offsets.numel() + logits.numel()) + 4 * points.numel()
    results = 2 * (numbers + offsets.numel() + logits.numel())
    assert kernels == 3  # zeros, the kernel, what rounds the sums
    assert moved == given + results + 3 * 4 * numbers  # zeros written, sums read and rounded


def test_every_op_of_ours_that_a_gpu_has_can_be_counted():
    on_gpu = {op for op in _backend.operations() if any("cuda" in b.devices for b in _backend._backends[op])}
    # Those are parts of a match, for callers of their own.
    assert on_gpu - {"assign", "match_cost"} <= set(OWN)
    differentiable = {name.removesuffix("_backward") for name in OWN if name.endswith("_backward")}
    assert all(hasattr(torch.ops.dndetr, name) for name in OWN) and differentiable <= set(OWN)


def test_ops_take_a_gpus_backend_and_what_the_environment_asks_for(monkeypatch):
    monkeypatch.setenv("DNDETR_BACKEND_ADD_NORM", "reference")
    before = dict(_backend._decisions)
    with fake_gpu():
        assert _backend.choose("match", None, "cuda")[0] == "cuda"
        assert _backend.choose("frozen_norm", None, "cuda")[0] == "triton"
        assert _backend.choose("add_norm", None, "cuda")[0] == "reference"
    assert _backend._decisions == before


def test_time_is_the_longest_of_all(gpu):
    with Counter() as counter:
        made(1) + made(1)
        made(1 << 28) + 1
        made(8, 8, dtype=HALF) @ made(8, 8, dtype=HALF)
        made(8192, 8192, dtype=HALF) @ made(8192, 8192, dtype=HALF)
    h200 = GPUS["h200"]
    expected = [LEAST, (1 << 31) / h200.bandwidth, LEAST_PRODUCT, 2 * 8192**3 / h200.products]
    assert [each.on(h200) for each in counter.operations] == pytest.approx([GAP + seconds for seconds in expected])
    assert all(each.on(h200) <= each.on(GPUS["a100"]) for each in counter.operations)
