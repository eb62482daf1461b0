"""PReLU with one slope: against torch's own, the kernel in Triton's interpreter and compiled for GPUs."""

import importlib
import math

import pytest
import torch
import torch.nn.functional as F
from ahead_of_time import build
from architectures import on_architectures

from dndetr.ops import prelu

# The package exports the function under the module's name.
op = importlib.import_module("dndetr.ops.prelu")

SLOPES = (0.3, 0.0, -0.5, 3.0)
ROUNDING = {torch.float32: 1e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}  # the interpreter truncates to bfloat16


def compare(x, slope):
    """Within a rounding of float64, and what is above zero as it was."""
    found = prelu(x, slope, "triton")
    exact = F.prelu(x.double(), slope.double())
    assert found.dtype == x.dtype and found.shape == x.shape and found.is_contiguous()
    torch.testing.assert_close(found.double(), exact, rtol=ROUNDING[x.dtype], atol=1e-7)
    assert torch.equal(found[x > 0], x[x > 0])


def check_awkward(device):
    """Any strides, slopes of any size and precision, what is not a number, and exact zeros."""
    x, slope = op.make_case("full", device)
    for layout in (x.permute(2, 0, 1), x[::2, 1:, ::3], x[:1].expand(7, 11, 128)):
        for value in SLOPES:
            compare(layout, torch.full_like(slope, value))
    compare(x.bfloat16(), slope.bfloat16())
    inf, nan = math.inf, math.nan
    x = torch.tensor([nan, 0.0, -0.0, 1.0, -1.0, inf, -inf], device=device)
    for value in (*SLOPES, inf, nan):
        slope = torch.full((1,), value, device=device)
        found, expected = prelu(x, slope, "triton"), F.prelu(x, slope)
        torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)
        assert torch.equal(found.signbit() & ~found.isnan(), expected.signbit() & ~expected.isnan())


@pytest.mark.parametrize("name", op.CASES)
def test_the_reference_is_torchs(name):
    x, slope = op.make_case(name)
    found = op.prelu_reference(x, slope.to(x.dtype))
    torch.testing.assert_close(found, F.prelu(x, slope.to(x.dtype)), rtol=0, atol=0)
    assert torch.equal(prelu(x.double(), slope.double()), F.prelu(x.double(), slope.double()))


def test_wrong_input_is_an_error():
    with pytest.raises(ValueError, match=r"prelu: slope must be \[1\], got \[3\]"):
        prelu(torch.ones(2, 3), torch.ones(3))


def test_fake_tensors(fake_cuda):
    x = torch.empty(5, 40, 91, dtype=torch.bfloat16, device="cuda").transpose(0, 2)
    out = torch.ops.dndetr.prelu(x, torch.empty(1, device="cuda"))
    assert out.shape == x.shape and out.dtype == x.dtype and out.is_contiguous()


INTERPRETED = """
from spoilt_kernels import check_self_test
from test_prelu import *

for name in op.CASES:
    compare(*op.make_case(name))
check_awkward("cpu")
check_self_test("prelu", prelu=(2,))
torch.library.opcheck(torch.ops.dndetr.prelu.default, op.make_case("uneven"))
"""


def test_triton_in_the_interpreter(interpreter):
    interpreter(INTERPRETED)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", [(2100, 2048), (16_800, 256), (4097, 3)], ids=str)
def test_gpu_is_as_precise_as_the_reference(size, dtype):
    torch.manual_seed(0)
    compare(torch.randn(size, device="cuda").to(dtype), torch.full((1,), 0.3, device="cuda"))


@pytest.mark.gpu
@pytest.mark.parametrize("name", op.CASES)
def test_gpu_cases(name):
    compare(*op.make_case(name, "cuda"))


@pytest.mark.gpu
def test_gpu_in_awkward_cases():
    check_awkward("cuda")


@on_architectures(90)
@pytest.mark.parametrize(("dtype", "numbers"), [("*bf16", "i32"), ("*fp16", "i32"), ("*fp32", "i32"), ("*bf16", "i64")])
def test_triton_compiles_for_gpus_without_spilling(dtype, numbers, arch, tmp_path):
    pytest.importorskip("triton")
    from dndetr.kernels.prelu import BLOCK, prelu_kernel

    signature = {"x": dtype, "slope": "*fp32", "out": dtype, "numbers": numbers, "BLOCK": "constexpr"}
    assert list(signature) == prelu_kernel.arg_names
    known = ("x", "slope", "out", "numbers")
    compiled, usage = build(prelu_kernel, signature, {"BLOCK": BLOCK}, arch, tmp_path, divisible=known, num_warps=4)
    assert compiled.metadata.shared == 0
    for access in ("ld.global.v4.b32", "st.global.v4.b32"):
        assert access in compiled.asm["ptx"], access
    assert "STACK:0" in usage and "LOCAL:0" in usage, usage
