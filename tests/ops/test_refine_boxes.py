"""Boxes moved by corrections: the kernels in Triton's interpreter against the reference, and compiled for GPUs."""

import importlib
import math

import pytest
import torch
from ahead_of_time import build
from architectures import on_architectures

from dndetr.boxes import inverse_sigmoid
from dndetr.ops import refine_boxes

# The package exports the function under the module's name.
op = importlib.import_module("dndetr.ops.refine_boxes")

# What a sigmoid near 1 leaves of 1 - out is few digits of it; the interpreter truncates to bfloat16.
ROUNDING = {torch.float32: 2e-4, torch.bfloat16: 8e-3, torch.float16: 1e-3}
FAST = [name for name, (_, *dtypes) in op.CASES.items() if torch.float64 not in dtypes]


def compare(correction, boxes, asked=(True, True), eps=1e-3):
    """The result and each gradient that is asked for within a rounding of float64; no others."""
    given = [x.detach().requires_grad_(ask) for x, ask in zip((correction, boxes), asked, strict=True)]
    exact = [x.detach().double().requires_grad_() for x in given]
    found, expected = refine_boxes(*given, "triton", eps=eps), op.refine_boxes_reference(*exact, eps)
    assert found.dtype == torch.float32 and found.shape == boxes.shape and found.is_contiguous()
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=1e-6, equal_nan=True)
    weighting = (
        torch.linspace(-1, 1, boxes.numel(), device=boxes.device)
        .view(boxes.shape[::-1])
        .permute(*range(boxes.dim())[::-1])
    )
    found.backward(weighting)
    expected.backward(weighting.double())
    for x, its, ask in zip(given, exact, asked, strict=True):
        assert (x.grad is not None) == ask
        if ask:
            assert x.grad.dtype == x.dtype
            rounding = max(ROUNDING[x.dtype], 1e-7 / eps)
            torch.testing.assert_close(x.grad.double(), its.grad, rtol=rounding, atol=1e-6, equal_nan=True)


def check_awkward(device):
    """Any strides, one of two gradients, bounds, and what is not a number."""
    correction, boxes = op.make_case("f32", device)
    compare(correction.permute(2, 0, 1), boxes[:, :, [3, 1, 0, 2]].permute(2, 0, 1))
    compare(correction[:, ::2], boxes[:1, ::2].expand(2, -1, -1))
    compare(correction, boxes, (True, False))
    compare(correction, boxes, (False, True))
    compare(correction, boxes, eps=1e-5)
    inf, nan = math.inf, math.nan
    ends = torch.tensor([nan, 0.0, -0.0, 1.0, 1e-3, 1 - 1e-3, 5e-4, -0.5, 1.5, inf, -inf, 0.5], device=device)
    for value in (0.0, 3.0, -200.0, 200.0, inf, -inf, nan):
        given = [torch.full_like(ends, value).requires_grad_(), ends.clone().requires_grad_()]
        found = [r := refine_boxes(*given, "triton"), *torch.autograd.grad(r.sum(), given)]
        expected = [r := op.refine_boxes_reference(*given), *torch.autograd.grad(r.sum(), given)]
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6, equal_nan=True)


@pytest.mark.parametrize("name", op.CASES)
def test_the_reference_is_what_it_says(name):
    correction, boxes = op.make_case(name)
    found = refine_boxes(correction, boxes, "reference")
    assert torch.equal(found, (correction + inverse_sigmoid(boxes)).sigmoid())
    assert found.dtype == torch.promote_types(torch.float32, torch.promote_types(correction.dtype, boxes.dtype))
    closer = refine_boxes(correction, boxes, "reference", eps=1e-5)
    assert torch.equal(closer, (correction + inverse_sigmoid(boxes, 1e-5)).sigmoid())
    assert correction.numel() < 29 or not torch.equal(closer, found)


def test_the_formulas_of_gradients():
    correction, boxes = (x.requires_grad_() for x in op.make_case("f64"))
    out = refine_boxes(correction, boxes)
    slope = out.detach() * (1 - out.detach())
    found = torch.autograd.grad(out.sum(), (correction, boxes))
    x = boxes.detach()
    own = torch.where(x < 1e-3, 0, 1 / x) + torch.where(1 - x < 1e-3, 0, 1 / (1 - x))
    torch.testing.assert_close(found[0], slope)
    torch.testing.assert_close(found[1], torch.where((x < 0) | (x > 1), 0, slope * own))


def test_wrong_input_is_an_error():
    with pytest.raises(ValueError, match=r"refine_boxes: boxes must be \[2, 4\], got \[1, 4\]"):
        refine_boxes(torch.ones(2, 4), torch.ones(1, 4))


def test_fake_tensors(fake_cuda):
    correction = torch.empty(4, 40, 2, dtype=torch.bfloat16, device="cuda").transpose(0, 2)
    boxes = torch.empty(2, 40, 4, device="cuda")
    out = torch.ops.dndetr.refine_boxes(correction, boxes, 1e-3)
    assert out.shape == boxes.shape and out.dtype == torch.float32 and out.is_contiguous()
    grads = torch.ops.dndetr.refine_boxes_backward(out, out, boxes, 1e-3, torch.bfloat16, False)
    assert grads[0].dtype == torch.bfloat16 and [grad.shape for grad in grads] == [boxes.shape, (0,)]
    assert grads[0].is_contiguous()


INTERPRETED = """
from spoilt_kernels import check_self_test
from test_refine_boxes import *

for name in FAST:
    compare(*op.make_case(name))
check_awkward("cpu")
check_self_test("refine_boxes", torch.float32, refine_boxes=(3,), refine_boxes_backward=(5,))
check_self_test("refine_boxes", refine_boxes_backward=(4,))
correction, boxes = (x.requires_grad_() for x in op.make_case("mixed"))
torch.library.opcheck(torch.ops.dndetr.refine_boxes.default, (correction, boxes, 1e-3))
"""


def test_triton_in_the_interpreter(interpreter):
    interpreter(INTERPRETED)


@pytest.mark.gpu
@pytest.mark.parametrize("name", FAST)
def test_gpu_cases(name):
    compare(*op.make_case(name, "cuda"))


@pytest.mark.gpu
def test_gpu_in_awkward_cases():
    check_awkward("cuda")


@on_architectures(90)
@pytest.mark.parametrize("dtype", ["*bf16", "*fp16", "*fp32"])
def test_triton_compiles_for_gpus_without_spilling(dtype, arch, tmp_path):
    pytest.importorskip("triton")
    from dndetr.kernels.refine_boxes import BLOCK, refine_backward_kernel, refine_kernel

    types = {"correction": dtype, "boxes": "*fp32", "out": "*fp32", "eps": "fp32"}
    types |= {"grad": "*fp32", "grad_correction": dtype, "grad_boxes": "*fp32"}
    constants = {"BLOCK": BLOCK, "CORRECTION": True, "BOXES": True}
    for kernel in (refine_kernel, refine_backward_kernel):
        compiled, usage = build(kernel, types, constants, arch, tmp_path, num_warps=4)
        assert compiled.metadata.shared == 0
        assert "STACK:0" in usage and "LOCAL:0" in usage, usage
