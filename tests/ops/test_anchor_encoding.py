"""Encodings of anchors: the kernels in Triton's interpreter against the reference, and compiled for GPUs."""

import importlib
import math
import re

import pytest
import torch
from ahead_of_time import build
from architectures import on_architectures

from dndetr.ops import anchor_encoding

# The package exports the function under the module's name.
op = importlib.import_module("dndetr.ops.anchor_encoding")


def compare(boxes, channels):
    """The encoding and its gradient within a rounding of float64."""
    boxes, exact = boxes.detach().requires_grad_(), boxes.detach().double().requires_grad_()
    found, expected = anchor_encoding(boxes, channels, "triton"), op.anchor_encoding_reference(exact, channels)
    assert found.dtype == torch.float32 and found.shape == expected.shape and found.is_contiguous()
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=2e-6, equal_nan=True)
    weighting = torch.linspace(-1, 1, found.numel(), device=boxes.device).view(found.shape[::-1])
    weighting = weighting.permute(*reversed(range(found.dim())))
    found.backward(weighting)
    expected.backward(weighting.double())
    assert boxes.grad.dtype == torch.float32
    torch.testing.assert_close(boxes.grad.double(), exact.grad, rtol=1e-5, atol=2e-5, equal_nan=True)


def check_awkward(device):
    """Any strides, one level of several, negative sizes, and what is not a number."""
    boxes, channels = op.make_case("queries", device)
    compare(boxes[:, :, None].expand(-1, -1, 3, -1)[:, :, 1], channels)
    compare(torch.stack((boxes, boxes - 1.5), dim=2)[:, :, 1], channels)
    compare(boxes.transpose(0, 1), channels)
    compare(boxes.mT.contiguous().mT, channels)
    boxes[0, 3, 1], boxes[1, 5, 3], boxes[1, 6, 0] = math.nan, math.inf, -math.inf
    compare(boxes, channels)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", op.CASES)
def test_the_reference_is_what_it_says(name, dtype):
    boxes, channels = op.make_case(name)
    found = anchor_encoding(boxes.to(dtype), channels)
    assert found.dtype == dtype and found.shape == (*boxes.shape[:-1], boxes.shape[-1] * channels)
    each = found.unflatten(-1, (boxes.shape[-1], -1, 2)).double()
    order = [1, 0, 2, 3][: boxes.shape[-1]]
    rate = 10000.0 ** (-torch.arange(channels // 2, dtype=torch.float64) * 2 / channels)
    phase = boxes.double()[..., order, None] * math.tau * rate
    precision = 32 * torch.finfo(dtype).eps
    torch.testing.assert_close(each, torch.stack((phase.sin(), phase.cos()), dim=-1), rtol=0, atol=precision)


def test_fake_tensors(fake_cuda):
    boxes = torch.empty(2, 40, 4, 4, device="cuda")[:, :, 0]
    out = torch.ops.dndetr.anchor_encoding(boxes, 128)
    assert out.shape == (2, 40, 512) and out.dtype == torch.float32 and out.is_contiguous()
    grad = torch.ops.dndetr.anchor_encoding_backward(out, boxes)
    assert grad.shape == boxes.shape and grad.is_contiguous()


INTERPRETED = """
from dndetr.kernels import anchor_encoding as kernels
from spoilt_kernels import check_self_test
from test_anchor_encoding import *

for name in op.CASES.keys() - {"queries"}:
    compare(*op.make_case(name))
kernels.NUMBERS = 8192  # few programs: each takes long here
compare(*op.make_case("queries"))
check_awkward("cpu")
check_self_test("anchor_encoding", torch.float32, anchor_encoding=(2,), anchor_encoding_backward=(3,))
boxes, channels = op.make_case("uneven")
torch.library.opcheck(torch.ops.dndetr.anchor_encoding.default, (boxes.requires_grad_(), channels))
"""


def test_triton_in_the_interpreter(interpreter):
    interpreter(INTERPRETED)


@pytest.mark.gpu
@pytest.mark.parametrize("name", op.CASES)
def test_gpu_cases(name):
    compare(*op.make_case(name, "cuda"))


@pytest.mark.gpu
def test_gpu_in_awkward_cases():
    check_awkward("cuda")


@on_architectures(90)
@pytest.mark.parametrize("pairs", [1, 64])
def test_triton_compiles_for_gpus_without_spilling(pairs, arch, tmp_path):
    pytest.importorskip("triton")
    from dndetr.kernels.anchor_encoding import NUMBERS, anchor_encoding_backward_kernel, anchor_encoding_kernel

    types = dict.fromkeys(("boxes", "out", "grad", "grad_boxes"), "*fp32")
    constants = {"PAIRS": pairs, "ROWS": NUMBERS // (2 * pairs)}
    for kernel in (anchor_encoding_kernel, anchor_encoding_backward_kernel):
        _, usage = build(kernel, types, constants, arch, tmp_path, num_warps=4)
        # Older assemblers keep seven words of a sine of large numbers there.
        assert re.search(r"STACK:(0|32)\b", usage) and "LOCAL:0" in usage, usage
