"""Sums over the pixels of each level: the reference against indices, the kernel interpreted and compiled for GPUs."""

import math

import pytest
import torch
from ahead_of_time import build
from architectures import on_architectures

from dndetr.ops import level_sums
from dndetr.ops.level_sums import CASES, level_sums_reference, make_case


def compare(grad, sizes, backend="triton"):
    """Against float64: float32 sums, the same twice."""
    found, again = (level_sums(grad, sizes, backend) for _ in range(2))
    exact, size = (level_sums_reference(each.double(), sizes) for each in (grad, grad.abs()))
    assert found.dtype == torch.float32 and found.shape == exact.shape and torch.equal(found, again)
    assert ((found - exact).abs() <= 2e-6 * size).all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", CASES)
def test_the_reference_adds_up_where_a_level_is(name, dtype):
    grad, sizes = make_case(name)
    grad = grad.to(dtype)
    level = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
    expected = torch.zeros(len(sizes), grad.shape[2], dtype=torch.float64).index_add(0, level, grad.double().sum(0))
    found = level_sums(grad, sizes)
    assert found.dtype == torch.promote_types(dtype, torch.float32)
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-3)


def test_wrong_input_is_an_error():
    with pytest.raises(ValueError, match=r"level_sums: grad must be \[B, 5 pixels of \[3, 2\], C\], got \[2, 6, 4\]"):
        level_sums(torch.ones(2, 6, 4), (3, 2))
    with pytest.raises(ValueError, match=r"got \[5, 4\]"):
        level_sums(torch.ones(5, 4), (3, 2))


def test_fake_tensors(fake_cuda):
    grad = torch.empty(2, 5, 7, dtype=torch.bfloat16, device="cuda")
    sums = torch.ops.dndetr.level_sums(grad, [3, 2])
    assert sums.shape == (2, 7) and sums.dtype == torch.float32 and sums.device.type == "cuda"


def check_awkward(device):
    """Gradients of any strides, and what is not a number."""
    grad, sizes = make_case("levels", device)
    compare(grad[:1, :1].expand_as(grad), sizes)
    compare(grad.transpose(0, 2).contiguous().transpose(0, 2), sizes)
    compare(grad[:, :, 1::2], sizes)
    grad[1, 71, 3] = math.nan
    broken = level_sums(grad, sizes, "triton").isnan()
    assert broken.nonzero().tolist() == [[1, 3]]


AS_TRAINED = """
from dndetr.ops.level_sums import make_case
from spoilt_kernels import check_self_test
from test_level_sums import compare
import torch

compare(*make_case("levels"))
check_self_test("level_sums", torch.float32, level_sums=(2,))
"""

INTERPRETED = """
from dndetr.kernels import level_sums as kernels
from dndetr.ops.level_sums import CASES, make_case
from test_level_sums import check_awkward, compare

for name in CASES:
    compare(*make_case(name))
check_awkward("cpu")
kernels._SHARES = 2  # several rounds
compare(*make_case("levels"))
"""


@pytest.mark.parametrize(
    "program",
    [pytest.param(AS_TRAINED, id="as-trained"), pytest.param(INTERPRETED, id="all", marks=pytest.mark.slow)],
)
def test_triton_in_the_interpreter(interpreter, program):
    interpreter(program)


@pytest.mark.gpu
@pytest.mark.parametrize("name", CASES)
def test_gpu_cases(name):
    compare(*make_case(name, "cuda"))


@pytest.mark.gpu
def test_gpu_in_awkward_cases():
    check_awkward("cuda")


@on_architectures(90)
@pytest.mark.parametrize("of_sums", [False, True])
def test_triton_compiles_for_gpus_without_spilling(of_sums, arch, tmp_path):
    pytest.importorskip("triton")
    from dndetr.kernels import level_sums as kernels

    rows, block = kernels._tile(256, of_sums)
    types = {"grad": "*fp32" if of_sums else "*bf16", "sums": "*fp32", "sizes": ("i32",) * 4, "images": "i32"}
    constants = {"LEVELS": 4, "COLUMNS": 256, "BLOCK_ROWS": rows, "BLOCK_C": block}
    known, kernel = ("grad", "sums"), kernels.level_sums_kernel
    compiled, usage = build(kernel, types, constants, arch, tmp_path, divisible=known, num_warps=4)
    assert compiled.metadata.shared <= 48 * 1024
    assert "ld.global.v4" in compiled.asm["ptx"]
    assert "STACK:0" in usage and "LOCAL:0" in usage, usage
