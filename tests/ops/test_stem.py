"""The stem of a ResNet on images: its kernels in Triton's interpreter and compiled for GPUs."""

import importlib
import math

import pytest
import torch
import torch.nn.functional as F
from ahead_of_time import build
from architectures import on_architectures

from dndetr.ops import stem

# The package exports the function under the module's name.
op = importlib.import_module("dndetr.ops.stem")

ROUNDING = {torch.bfloat16: 2**-8, torch.float16: 2**-11}


def as_multiplied(images, dtype):
    """Images as a product of this dtype takes them."""
    return images.to(dtype).to(images.dtype)


def check(images, weight, scale, shift):
    """The kernels' map is float64's, rounded once: sums of 147 products in float32 are off by less."""
    given = stem(images, weight, scale, shift, "triton")
    exact = op.stem_reference(
        as_multiplied(images, weight.dtype).double(), weight.double(), scale.double(), shift.double()
    )
    assert given.shape == exact.shape and given.dtype == weight.dtype
    assert given.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(given.double(), exact, rtol=ROUNDING[weight.dtype] * 1.01, atol=1e-5)
    return given


def check_case(name, device="cpu", dtype=None):
    images, weight, scale, shift = op.make_case(name, device)
    check(images, weight.to(dtype or weight.dtype), scale, shift)


def check_layouts(device="cpu", dtype=torch.float16):
    """Images in any layout and precision, channels in any."""
    images, weight, scale, shift = op.make_case("odd", device)
    weight = weight.to(dtype)
    expected = check(images, weight, scale, shift)
    wide = images.new_zeros(*images.shape[:3], 2 * images.shape[3])
    wide[..., ::2] = images
    turned = images.transpose(2, 3).contiguous().transpose(2, 3)
    spread = scale.repeat_interleave(2)[::2]
    for layout in (images.contiguous(memory_format=torch.channels_last), wide[..., ::2], turned, images.to(dtype)):
        for its_weight in (weight, weight.contiguous(memory_format=torch.channels_last)):
            assert torch.equal(stem(layout, its_weight, spread, shift, "triton"), expected)
    one = stem(images[:1].expand(2, -1, -1, -1), weight, scale, shift, "triton")
    assert torch.equal(one, expected[:1].expand_as(one))


def check_edges(device="cpu", dtype=torch.float16):
    """What is not a number is seen by all pixels that see it, and by few others; exact zeros stay."""
    images, weight, scale, shift = op.make_case("even", device)
    weight = weight.to(dtype)
    images[0, 1, 16, 20] = math.nan
    broken = stem(images, weight, scale, shift, "triton").isnan()
    exact = op.stem_reference(images.double(), weight.double(), scale.double(), shift.double()).isnan()
    assert exact.any() and broken[exact].all()
    # The pixel that the product sees beyond its kernel, times zero.
    wider = F.max_pool2d(F.pad(exact.float(), (1, 1, 1, 1)), 3, 1) > 0
    assert not broken[~wider].any()
    nothing = stem(torch.zeros_like(images), weight, scale, -shift.abs(), "triton")
    assert (nothing == 0).all()


def test_formula():
    images, weight, scale, shift = (tensor.double() for tensor in op.make_case("odd"))
    y = stem(images, weight, scale, shift)
    assert y.shape == (2, 64, 8, 12) and y.dtype == torch.float64

    def convolved(b, n, y, x):
        total = shift[n].item()
        for i in range(7):
            for j in range(7):
                row, column = 2 * y + i - 3, 2 * x + j - 3
                if 0 <= row < images.shape[2] and 0 <= column < images.shape[3]:
                    total += scale[n].item() * (images[b, :, row, column] @ weight[n, :, i, j]).item()
        return max(total, 0.0)

    for b, n, row, column in ((0, 0, 0, 0), (1, 63, 7, 11), (0, 17, 3, 5), (1, 8, 0, 11)):
        near = [(2 * row + i, 2 * column + j) for i in (-1, 0, 1) for j in (-1, 0, 1)]
        inside = [(i, j) for i, j in near if 0 <= i < 16 and 0 <= j < 23]
        assert y[b, n, row, column].item() == pytest.approx(max(convolved(b, n, *place) for place in inside), abs=1e-12)


def test_wrong_input_is_an_error():
    images, weight, scale, shift = op.make_case("even")
    with pytest.raises(ValueError, match=r"stem: images must be \[B, 3, H, W\] and weight \[N, 3, 7, 7\]"):
        stem(images[:, :1], weight, scale, shift)
    with pytest.raises(ValueError, match=r"got \[2, 3, 32, 48\], \[64, 3, 7, 6\]"):
        stem(images, weight[..., :6], scale, shift)
    with pytest.raises(ValueError, match=r"stem: scale and shift must be \[64\]; got \[63\], \[64\]"):
        stem(images, weight, scale[1:], shift)


def test_full_precision_is_the_references(monkeypatch):
    monkeypatch.setattr(op._backend, "choose", lambda *_: ("triton", "for this test"))
    given = [tensor.double() for tensor in op.make_case("even")]
    assert torch.equal(stem(*given), op.stem_reference(*given))


def test_fake_tensors(fake_cuda):
    images = torch.empty(2, 3, 31, 45, device="cuda")
    weight, channel = torch.empty(64, 3, 7, 7, device="cuda", dtype=torch.bfloat16), torch.empty(64, device="cuda")
    y = torch.ops.dndetr.stem(images, weight, channel, channel)
    assert (y.shape, y.dtype, y.device) == ((2, 64, 8, 12), weight.dtype, images.device)
    assert y.is_contiguous(memory_format=torch.channels_last)


AS_TRAINED = """
from spoilt_kernels import check_self_test

check_case("even", dtype=torch.float16)  # it has no products in bfloat16
check_edges()
check_self_test("stem", torch.float16, lay_out=(1,), convolve=(4,), pool=(1,))
"""

INTERPRETED = """
for name in op.CASES:
    check_case(name, dtype=torch.float16)
check_layouts()
images, weight, scale, shift = op.make_case("odd")
torch.library.opcheck(torch.ops.dndetr.stem.default, (images, weight, scale, shift))
"""


@pytest.mark.parametrize(
    "program", [pytest.param(AS_TRAINED, id="as-trained"), pytest.param(INTERPRETED, id="all", marks=pytest.mark.slow)]
)
def test_triton_in_the_interpreter(interpreter, program):
    interpreter("from test_stem import *\n" + program)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", op.CASES)
def test_gpu_is_as_precise_as_the_reference(name, dtype):
    check_case(name, "cuda", dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("awkward", [check_layouts, check_edges])
def test_gpu_in_awkward_cases(awkward, dtype):
    awkward("cuda", dtype)


@pytest.mark.gpu
def test_gpu_replays_in_a_graph():
    images, weight, scale, shift = op.make_case("even", "cuda")
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        stem(images, weight, scale, shift, "triton")
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        captured = stem(images, weight, scale, shift, "triton")
    images.mul_(-1)
    graph.replay()
    assert torch.equal(captured, stem(images, weight, scale, shift, "triton"))


def plans():
    """Name of each kernel, its constants, types, launch options, and what must be in its PTX."""
    from dndetr.kernels import stem as kernels

    convolution = dict(kernels.CONVOLUTION)
    options = {name: convolution.pop(name) for name in ("num_warps", "num_stages")}
    moved = {"BLOCK_M": kernels._MOVED["BLOCK_M"]}
    across = {"CHANNELS": 64, "BLOCK_N": 64}
    few = {"num_warps": kernels._MOVED["num_warps"]}
    return {
        "layout": (kernels.stem_layout_kernel, {"column_stride": 1, **moved}, few, "st.global.v4"),
        "convolution": (kernels.stem_convolution_kernel, {**across, **convolution}, options, "mma"),
        "pool": (kernels.stem_pool_kernel, {**across, **moved}, few, "ld.global.v4"),
    }


@on_architectures(90)
@pytest.mark.parametrize("name", ["layout", "convolution", "pool"])
def test_triton_compiles_for_gpus_without_spilling(name, arch, tmp_path):
    if arch < 80:
        pytest.skip("images take torch's convolution there")
    pytest.importorskip("triton")
    function, constants, options, wanted = plans()[name]
    types = {"images": "*fp32", "scale": "*fp32", "shift": "*fp32"} | dict.fromkeys(
        ("squares", "weight", "x", "out"), "*bf16"
    )
    compiled, usage = build(function, types, constants, arch, tmp_path, **options)
    assert compiled.metadata.shared <= 99 * 1024, "the smallest that a block may have on 8.6, 8.9 and 12.0"
    assert wanted in compiled.asm["ptx"]
    assert "STACK:0" in usage and "LOCAL:0" in usage, usage
