"""Encodings of pixels: the kernel in Triton's interpreter against the reference, and compiled for GPUs."""

import importlib
import math
import re

import pytest
import torch
from ahead_of_time import build
from architectures import on_architectures

from dndetr.ops import pixel_encoding
from dndetr.ops.ms_deform_attn import valid_pixels

# The package exports the function under the module's name.
op = importlib.import_module("dndetr.ops.pixel_encoding")


def compare(valid_sizes, shapes, sides, channels, temperature, shift):
    """Within what float32 leaves of an angle: outside the valid part it may be in the millions, and nothing is left."""
    given = channels, temperature, shift
    found = pixel_encoding(valid_sizes, shapes, sides, *given, backend="triton")
    exact = op.pixel_encoding_reference(valid_sizes, shapes, *given, torch.float64)
    assert found.dtype == torch.float32 and found.shape == exact.shape and found.is_contiguous()
    assert (found.unflatten(-1, (-1, 2)).norm(dim=-1) - 1).abs().max() < 1e-6
    valid = valid_pixels(valid_sizes, shapes)
    error = (found - exact).abs()
    assert (error[valid] < 2e-6).all()
    pair = torch.arange(channels // 4, device=sides.device).repeat_interleave(2)
    rates = torch.cat([each ** (-4 * pair / channels) for each in temperature])
    assert (error <= 2e-6 + 1e-6 * math.tau * (1 + shift / 1e-6) * rates).all()


def check_awkward(device):
    """Sizes in any memory, and images without a pixel of their own on a level."""
    valid_sizes, *given = op.make_case("four", device)
    compare(valid_sizes.transpose(0, 1).contiguous().transpose(0, 1), *given)
    compare(valid_sizes[:1].expand(3, -1, -1), *given)
    compare(torch.zeros_like(valid_sizes), *given)


@pytest.mark.parametrize("name", op.CASES)
def test_levels_are_independent(name):
    valid_sizes, shapes, sides, *given = op.make_case(name)
    found = pixel_encoding(valid_sizes, shapes, sides, *given, torch.float64, "reference")
    levels = [
        pixel_encoding(valid_sizes[:, level, None], (shape,), sides[level, None], *given, torch.float64)
        for level, shape in enumerate(shapes)
    ]
    assert torch.equal(found, torch.cat(levels, dim=1)) and found.dtype == torch.float64


def test_no_images():
    _, shapes, sides, *given = op.make_case("four")
    found = pixel_encoding(torch.zeros(0, 4, 2, dtype=torch.int64), shapes, sides, *given)
    assert found.shape == (0, 12 * 21 + 66 + 18 + 6, 256)


def test_wrong_input_is_an_error():
    valid_sizes, shapes, sides, *given = op.make_case("four")
    wanted = r"pixel_encoding: valid_sizes must be \[B, 4, 2\] and sides \[4, 2\], got \[2, 3, 2\] and \[4, 2\]"
    with pytest.raises(ValueError, match=wanted):
        pixel_encoding(valid_sizes[:, 1:], shapes, sides, *given)


def test_fake_tensors(fake_cuda):
    sides = torch.empty(4, 2, dtype=torch.int64, device="cuda")
    out = torch.ops.dndetr.pixel_encoding(sides.expand(2, 4, 2), sides, 342, 256, (20.0, 20.0), 0.0)
    assert out.shape == (2, 342, 256) and out.dtype == torch.float32 and out.is_contiguous()


INTERPRETED = """
from dndetr.kernels import pixel_encoding as kernels
from spoilt_kernels import check_self_test
from test_pixel_encoding import *

for name in op.CASES.keys() - {"four"}:
    compare(*op.make_case(name))
kernels.NUMBERS = 16384  # few programs: each takes long here
compare(*op.make_case("four"))
check_awkward("cpu")
check_self_test("pixel_encoding", torch.float32, pixel_encoding=(5,))
valid_sizes, shapes, sides, *given = op.make_case("shifted")
pixels = sum(h * w for h, w in shapes)
torch.library.opcheck(torch.ops.dndetr.pixel_encoding.default, (valid_sizes, sides, pixels, *given))
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
@pytest.mark.parametrize("pairs", [2, 64])
def test_triton_compiles_for_gpus_without_spilling(pairs, arch, tmp_path):
    pytest.importorskip("triton")
    from dndetr.kernels.pixel_encoding import NUMBERS, pixel_encoding_kernel

    types = {"valid_sizes": "*i64", "sides": "*i64", "out": "*fp32"}
    types |= dict.fromkeys(("octaves_y", "octaves_x", "shift"), "fp32")
    constants = {"PAIRS": pairs, "ROWS": NUMBERS // (2 * pairs)}
    _, usage = build(pixel_encoding_kernel, types, constants, arch, tmp_path, num_warps=4)
    # Older assemblers keep seven words of a sine of large numbers there.
    assert re.search(r"STACK:(0|32)\b", usage) and "LOCAL:0" in usage, usage
