"""Sums over rows, with and without an activation before them: the kernel, interpreted and compiled for GPUs."""

import math

import pytest
import torch
import torch.nn.functional as F
from ahead_of_time import build
from architectures import on_architectures

from dndetr.ops import column_sums, prelu_column_sums, relu_column_sums
from dndetr.ops.column_sums import (
    CASES,
    column_sums_reference,
    make_case,
    prelu_column_sums_reference,
    relu_column_sums_reference,
)

NAMES = ("sums", "masked", "masked sums", "prelu's grad", "prelu's sums", "grad slope")
ROUNDING = {torch.float32: 1e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}


def run(grad, x, backend, slope=0.3):
    slope = torch.full((1,), slope, dtype=torch.promote_types(grad.dtype, torch.float32), device=grad.device)
    results = column_sums(grad, backend), *relu_column_sums(grad, x, backend)
    return dict(zip(NAMES, (*results, *prelu_column_sums(grad, x, slope, backend)), strict=True))


def compare(grad, x, backend="triton", slope=0.3):
    """Against float64: within twice what torch is off in the same precision; what a ReLU masks is exact."""
    found, again = (run(grad, x, backend, slope) for _ in range(2))
    exact, plain = run(grad.double(), x.double(), "reference", slope), run(grad, x, "reference", slope)
    size = grad.double().abs() * max(1, abs(slope))
    summed = dict.fromkeys(NAMES, size.sum(0)) | {"grad slope": (grad.double() * x.double()).abs().sum()}
    summed["prelu's grad"] = size
    for name in NAMES:
        dtype = torch.float32 if name == "grad slope" else grad.dtype
        assert found[name].dtype == dtype and found[name].shape == exact[name].shape
        assert torch.equal(found[name], again[name]), f"{name} differ from run to run"
        error, torchs = ((x[name].double() - exact[name]).abs() for x in (found, plain))
        # The interpreter truncates to bfloat16.
        allowed = 2 * torchs + ROUNDING[dtype] * exact[name].abs() + 1e-6 * summed[name]
        assert (error <= allowed).all(), name
    assert torch.equal(found["masked"], plain["masked"])
    above = x > 0
    assert torch.equal(found["prelu's grad"][above], grad[above])


@pytest.mark.parametrize("name", CASES)
def test_the_reference_is_what_autograd_gives(name):
    grad, out = (x.double() for x in make_case(name))
    bias = torch.zeros(grad.shape[1], dtype=torch.float64, requires_grad=True)
    before = torch.where(out > 0, out, -1.0).requires_grad_()
    wanted = torch.autograd.grad((before + bias).relu(), (before, bias), grad)
    for found, value in zip(relu_column_sums_reference(grad, out), wanted, strict=True):
        torch.testing.assert_close(found, value, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(column_sums_reference(grad), grad.sum(0))


@pytest.mark.parametrize("slope", [0.3, 0.0, -0.5, 3.0])
@pytest.mark.parametrize("name", CASES)
def test_the_reference_is_what_autograd_gives_of_a_prelu(name, slope):
    grad, x = (each.double() for each in make_case(name))
    if grad.numel():
        x[-1, -1] = float("nan")
    bias = torch.zeros(grad.shape[1], dtype=torch.float64, requires_grad=True)
    slope = torch.tensor([slope], dtype=torch.float64, requires_grad=True)
    wanted = torch.autograd.grad(F.prelu(x.requires_grad_() + bias, slope), (x, bias, slope), grad)
    found = prelu_column_sums_reference(grad, x.detach(), slope.detach())
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12, equal_nan=True)


def test_nan_passes_a_relu_that_it_came_out_of():
    grad, out = torch.ones(3, 2), torch.tensor([[float("nan"), 1.0], [0.0, float("nan")], [1.0, 0.0]])
    masked, _ = relu_column_sums(grad, out, "reference")
    assert torch.equal(masked, torch.ops.aten.threshold_backward(grad, out, 0))


def check_zero(backend, device="cpu"):
    """At zero a ReLU has slope zero, and a PReLU its own."""
    grad, out = torch.ones(3, 2, device=device), torch.tensor([[0.0, -0.0], [1.0, 0.0], [-0.0, 1.0]], device=device)
    masked, sums = relu_column_sums(grad, out, backend)
    assert masked.tolist() == [[0, 0], [1, 0], [0, 1]] and sums.tolist() == [1, 1]
    masked, sums, grad_slope = prelu_column_sums(grad, out, torch.full((1,), 0.25, device=device), backend)
    assert masked.tolist() == [[0.25, 0.25], [1, 0.25], [0.25, 1]]
    assert sums.tolist() == [1.5, 1.5] and grad_slope.tolist() == [0]


def test_what_passes_at_zero():
    check_zero("reference")


def test_wrong_input_is_an_error():
    with pytest.raises(ValueError, match=r"column_sums: grad must be \[M, N\], got \[3\]"):
        column_sums(torch.ones(3))
    with pytest.raises(ValueError, match=r"must be \[M, N\] of one dtype, got torch.float32 \[3, 2\], .* \[3, 1\]"):
        relu_column_sums(torch.ones(3, 2), torch.ones(3, 1))
    with pytest.raises(ValueError, match=r"prelu_column_sums: grad and x must be \[M, N\] of one dtype, got .*float64"):
        prelu_column_sums(torch.ones(3, 2), torch.ones(3, 2, dtype=torch.float64), torch.ones(1))
    with pytest.raises(ValueError, match=r"prelu_column_sums: slope must be \[1\], got \[2\]"):
        prelu_column_sums(torch.ones(3, 2), torch.ones(3, 2), torch.ones(2))


def test_fake_tensors(fake_cuda):
    grad = torch.empty(40, 91, dtype=torch.bfloat16, device="cuda").t()
    sums = torch.ops.dndetr.column_sums(grad)
    masked, masked_sums = torch.ops.dndetr.relu_column_sums(grad, grad)
    assert sums.shape == masked_sums.shape == (40,) and sums.dtype == torch.bfloat16
    assert masked.shape == (91, 40) and masked.is_contiguous()
    slope = torch.empty(1, device="cuda")
    masked, masked_sums, grad_slope = torch.ops.dndetr.prelu_column_sums(grad.t(), grad.t(), slope)
    assert masked.shape == (40, 91) and masked.dtype == masked_sums.dtype == torch.bfloat16
    assert masked_sums.shape == (91,) and grad_slope.shape == (1,) and grad_slope.dtype == torch.float32


def check_awkward(device):
    """Gradients of any strides, slopes of any size, exact zeros, and what is not a number."""
    check_zero("triton", device)
    grad, x = make_case("boxes", device)
    compare(grad[:1].expand(300, 4), x)
    compare(*(each.t().contiguous().t() for each in (grad, x)))
    compare(*(each[::2, 1:] for each in (grad, x)))
    for slope in (0.0, -0.5, 3.0):
        compare(grad, x, slope=slope)
    grad[7, 1], x[7, 2], x[8, 3] = math.nan, math.nan, 0
    # An infinite slope leaves columns alone that are all above zero.
    x[:, 0] = 1
    for slope in (0.3, 0.0, math.inf, math.nan):
        found, wanted = (run(grad, x, backend, slope) for backend in ("triton", "reference"))
        for name in found:
            assert torch.equal(found[name].isnan(), wanted[name].isnan()), name
        assert torch.equal(found["masked"].nan_to_num(), wanted["masked"].nan_to_num())
        assert found["prelu's sums"][0].isfinite()
    slope = torch.full((1,), 0.3, device=device)
    for dtype in (torch.bfloat16, torch.float16):
        grad_slope = prelu_column_sums(grad, x, slope.to(dtype), "triton")[2]
        assert grad_slope.dtype == dtype and grad_slope.shape == (1,)


AS_TRAINED = """
import torch
from dndetr.kernels import column_sums as kernels
from dndetr.ops.column_sums import CASES, make_case
from spoilt_kernels import check_self_test
from test_column_sums import check_zero, compare

check_zero("triton")
# Fewer rows than the self-test has, which take long here, but also in one pass and in two.
kernels._FEW = 150
CASES |= {"queries": (150, 64, torch.bfloat16), "pixels": (300, 128, torch.bfloat16)}
for name in ("queries", "pixels"):
    compare(*make_case(name))
check_self_test("column_sums", column_sums=(3, 4))
check_self_test("column_sums", torch.float32, column_sums=(5,))
"""

INTERPRETED = """
import torch
from dndetr.kernels import column_sums as kernels
from dndetr.ops import column_sums
from dndetr.ops.column_sums import CASES, make_case
from test_column_sums import check_awkward, compare

for name in CASES:
    compare(*make_case(name))

check_awkward("cpu")

kernels._PROGRAMS = 6  # two shares of each of three blocks, many tiles long
assert kernels.plan(4100, 130, False)[0] < kernels.plan(4100, 130, False)[3] < 4100
assert (column_sums(torch.ones(4100, 130), "triton") == 4100).all()
"""


@pytest.mark.parametrize(
    "program",
    [pytest.param(AS_TRAINED, id="as-trained"), pytest.param(INTERPRETED, id="all", marks=pytest.mark.slow)],
)
def test_triton_in_the_interpreter(interpreter, program):
    interpreter(program)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", [(2100, 256), (1000, 2048), (4097, 4), (26_600, 1024), (400_000, 91)], ids=str)
def test_gpu_is_as_precise_as_the_reference(size, dtype):
    torch.manual_seed(0)
    compare(*(torch.randn(size, device="cuda").to(dtype) for _ in range(2)))


@pytest.mark.gpu
@pytest.mark.parametrize("name", CASES)
def test_gpu_cases(name):
    compare(*make_case(name, "cuda"))


@pytest.mark.gpu
def test_gpu_in_awkward_cases():
    check_awkward("cuda")


@on_architectures(90)
@pytest.mark.parametrize(
    ("size", "grad", "absent"),
    [
        ((2100, 256), "*bf16", ("slope", "slope_sums")),
        ((26_600, 256), "*bf16", ("slope", "slope_sums")),
        ((26_600, 256), "*bf16", ("x", "slope", "masked", "slope_sums")),
        ((2100, 2048), "*bf16", ()),
        ((16_800, 2048), "*bf16", ()),
        ((2100, 256), "*fp32", ("x", "slope", "masked", "slope_sums")),
    ],
    ids=["few-rows", "many-rows", "nothing-masked", "prelu-few-rows", "prelu-many-rows", "second-pass"],
)
def test_triton_compiles_for_gpus_without_spilling(size, grad, absent, arch, tmp_path):
    pytest.importorskip("triton")
    from dndetr.kernels.column_sums import column_sums_kernel, plan

    block_m, block_n, warps, _ = plan(*size, "x" not in absent, "slope" not in absent)
    constants = {"BLOCK_M": block_m, "BLOCK_N": block_n} | dict.fromkeys(absent)
    types = dict.fromkeys(("grad", "x", "masked"), grad) | dict.fromkeys(("slope", "sums", "slope_sums"), "*fp32")
    # As at a call: what 16 divides is known, and loads are as wide as that allows.
    known = (*types, "columns")
    compiled, usage = build(column_sums_kernel, types, constants, arch, tmp_path, divisible=known, num_warps=warps)
    assert compiled.metadata.shared <= 48 * 1024
    assert "ld.global.v4" in compiled.asm["ptx"]
    assert "x" in absent or "st.global.v4" in compiled.asm["ptx"]
    assert "STACK:0" in usage and "LOCAL:0" in usage, usage
