"""Sums over rows, with and without a ReLU before them: the kernel in Triton's interpreter and compiled for GPUs."""

import os
import subprocess
import sys

import pytest
import torch
from architectures import on_architectures

from dndetr.ops import column_sums, relu_column_sums
from dndetr.ops.column_sums import CASES, column_sums_reference, make_case, relu_column_sums_reference

NAMES = ("sums", "masked", "masked sums")


def run(grad, out, backend):
    return dict(zip(NAMES, (column_sums(grad, backend), *relu_column_sums(grad, out, backend)), strict=True))


def compare(grad, out, backend="triton"):
    """Against float64: within twice what torch is off in the same precision; what a ReLU masks is exact."""
    found, again = run(grad, out, backend), run(grad, out, backend)
    exact, plain = run(grad.double(), out.double(), "reference"), run(grad, out, "reference")
    rounding = {torch.float32: 1e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}[grad.dtype]
    summed = grad.double().abs().sum(0)
    for name in NAMES:
        assert found[name].dtype == grad.dtype and found[name].shape == exact[name].shape
        assert torch.equal(found[name], again[name]), f"{name} differ from run to run"
        error, torchs = ((x[name].double() - exact[name]).abs() for x in (found, plain))
        # The interpreter truncates to bfloat16.
        allowed = 2 * torchs + rounding * exact[name].abs() + 1e-6 * summed
        assert (error <= allowed).all(), name
    assert torch.equal(found["masked"], plain["masked"])


@pytest.mark.parametrize("name", CASES)
def test_the_reference_is_what_autograd_gives(name):
    grad, out = (x.double() for x in make_case(name))
    bias = torch.zeros(grad.shape[1], dtype=torch.float64, requires_grad=True)
    before = torch.where(out > 0, out, -1.0).requires_grad_()
    wanted = torch.autograd.grad((before + bias).relu(), (before, bias), grad)
    for found, value in zip(relu_column_sums_reference(grad, out), wanted, strict=True):
        torch.testing.assert_close(found, value, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(column_sums_reference(grad), grad.sum(0))


def test_nan_passes_a_relu_that_it_came_out_of():
    grad, out = torch.ones(3, 2), torch.tensor([[float("nan"), 1.0], [0.0, float("nan")], [1.0, 0.0]])
    masked, _ = relu_column_sums(grad, out, "reference")
    assert torch.equal(masked, torch.ops.aten.threshold_backward(grad, out, 0))


def test_wrong_input_is_an_error():
    with pytest.raises(ValueError, match=r"column_sums: grad must be \[M, N\], got \[3\]"):
        column_sums(torch.ones(3))
    with pytest.raises(ValueError, match=r"must be \[M, N\] of one dtype, got torch.float32 \[3, 2\], .* \[3, 1\]"):
        relu_column_sums(torch.ones(3, 2), torch.ones(3, 1))


def test_fake_tensors(fake_cuda):
    grad = torch.empty(40, 91, dtype=torch.bfloat16, device="cuda").t()
    sums = torch.ops.dndetr.column_sums(grad)
    masked, masked_sums = torch.ops.dndetr.relu_column_sums(grad, grad)
    assert sums.shape == masked_sums.shape == (40,) and sums.dtype == torch.bfloat16
    assert masked.shape == (91, 40) and masked.is_contiguous()


AS_TRAINED = """
import torch
from dndetr.kernels import column_sums as kernels
from dndetr.ops.column_sums import CASES, make_case
from spoilt_kernels import check_self_test
from test_column_sums import compare

# Fewer rows than the self-test has, which take long here, but also in one pass and in two.
kernels._FEW = 150
CASES |= {"queries": (150, 64, torch.bfloat16), "pixels": (300, 128, torch.bfloat16)}
for name in ("queries", "pixels"):
    compare(*make_case(name))
check_self_test("column_sums", column_sums=(2, 3))
"""

INTERPRETED = """
import math
import torch
from dndetr.kernels import column_sums as kernels
from dndetr.ops import column_sums
from dndetr.ops.column_sums import CASES, make_case
from test_column_sums import compare, run

for name in CASES:
    compare(*make_case(name))

grad, out = make_case("boxes")
compare(grad[:1].expand(300, 4), out)
compare(*(x.t().contiguous().t() for x in (grad, out)))
compare(*(x[::2, 1:] for x in (grad, out)))
grad[7, 1], out[7, 2], out[8, 3] = math.nan, math.nan, 0
found, wanted = (run(grad, out, backend) for backend in ("triton", "reference"))
for name in found:
    assert torch.equal(found[name].isnan(), wanted[name].isnan()), name
assert torch.equal(found["masked"].nan_to_num(), wanted["masked"].nan_to_num())

kernels._PROGRAMS = 4  # two shares of each of two blocks, many tiles long
assert kernels.plan(4100, 130)[0] < kernels.plan(4100, 130)[3] < 4100
assert (column_sums(torch.ones(4100, 130), "triton") == 4100).all()
"""


@pytest.mark.parametrize(
    "program",
    [pytest.param(AS_TRAINED, id="as-trained"), pytest.param(INTERPRETED, id="all", marks=pytest.mark.slow)],
)
def test_triton_in_the_interpreter(interpreter, program):
    done = subprocess.run([sys.executable, "-c", program], env=interpreter, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


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


@on_architectures(80, 90)
@pytest.mark.parametrize(
    ("size", "grad", "relu"),
    [((2100, 256), "*bf16", True), ((26_600, 256), "*bf16", True), ((2100, 256), "*fp32", False)],
    ids=["few-rows", "many-rows", "second-pass"],
)
def test_triton_compiles_for_gpus_without_spilling(size, grad, relu, arch, tmp_path, monkeypatch):
    triton = pytest.importorskip("triton")
    from triton.backends.compiler import GPUTarget
    from triton.backends.nvidia import driver
    from triton.compiler import ASTSource

    from dndetr.kernels.column_sums import column_sums_kernel, plan

    monkeypatch.setattr(triton.knobs.cache, "dir", str(tmp_path))
    block_m, block_n, warps, _ = plan(*size)
    constants = {"BLOCK_M": block_m, "BLOCK_N": block_n} | ({} if relu else {"out": None, "masked": None})
    types = dict.fromkeys(("grad", "out", "masked"), grad) | {"sums": "*fp32"}
    names = column_sums_kernel.arg_names
    signature = {name: "constexpr" if name in constants else types.get(name, "i32") for name in names}
    # As at a call: what 16 divides is known, and loads are as wide as that allows.
    known = {(names.index(name),): [["tt.divisibility", 16]] for name in (*types, "columns") if name not in constants}
    source = ASTSource(column_sums_kernel, signature, constants, known)
    compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options={"num_warps": warps})
    assert compiled.metadata.shared <= 48 * 1024
    assert "ld.global.v4" in compiled.asm["ptx"]
    (tmp_path / "kernel.cubin").write_bytes(compiled.asm["cubin"])
    inspector = os.path.join(os.path.dirname(driver.__file__), "bin", "cuobjdump")
    command = [inspector, "-res-usage", str(tmp_path / "kernel.cubin")]
    usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert "STACK:0" in usage and "LOCAL:0" in usage, usage
