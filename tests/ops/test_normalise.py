"""Images from bytes: C++ on every instruction set, Triton in the interpreter and compiled for GPUs, both references."""

import importlib
import math
from dataclasses import replace

import detectors
import numpy as np
import pytest
import torch
from ahead_of_time import build
from architectures import on_architectures

from dndetr.data.sample import IMAGENET, MEAN, STD
from dndetr.data.transforms import FixedTraining
from dndetr.ops import _backend, images_of, normalise

# The package exports the function under the module's name.
op = importlib.import_module("dndetr.ops.normalise")

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def check_case(name, backend, device="cpu", truncated=()):
    """The reference's bits in every dtype; channels last; zero where padded. truncated: dtypes so rounded."""
    pixels, colours, sizes, _ = op.make_case(name, device)
    for dtype in DTYPES:
        images = normalise(pixels, colours, sizes, dtype, backend)
        expected = op.normalise_reference(pixels, colours, sizes, dtype)
        assert images.shape == expected.shape and images.dtype == dtype
        assert images.is_contiguous(memory_format=torch.channels_last)
        unit = torch.finfo(dtype).eps if dtype in truncated else 0
        torch.testing.assert_close(images, expected, rtol=unit, atol=0)
        for image, (height, width) in zip(images, sizes.tolist(), strict=True):
            assert not image[:, height:].any() and not image[:, :, width:].any()


def check_hidden_bytes(backend, device="cpu"):
    """What lies beyond the sizes never matters, nor what a map makes of it; sizes beyond the canvas end with it."""
    pixels, colours, sizes, _ = op.make_case("f32", device)
    expected = normalise(pixels, colours, sizes, backend=backend)
    others = 255 - pixels
    for row, (height, width) in enumerate(sizes.tolist()):
        others[row, :height, :width] = pixels[row, :height, :width]
    assert not torch.equal(others, pixels)
    assert torch.equal(normalise(others, colours, sizes, backend=backend), expected)
    whole, beyond = (normalise(pixels, colours, sizes * 0 + n, backend=backend) for n in (pixels.shape[2], 1 << 40))
    assert torch.equal(whole, beyond)
    assert not normalise(pixels, colours, sizes * 0 - 3, backend=backend).any()


def check_broken_maps(backend, device="cpu"):
    """What is not finite in a map is seen where it says, and nowhere else."""
    pixels, colours, sizes, _ = op.make_case("f32", device)
    pixels[..., 0].clamp_(min=1)
    intact = normalise(pixels, colours, sizes, backend=backend)
    colours[1, 2, 0], colours[1, 0, 3] = math.inf, math.nan
    broken = normalise(pixels, colours, sizes, backend=backend)
    height, width = sizes[1].tolist()
    assert (broken[1, 2, :height, :width] == math.inf).all() and broken[1, 0, :height, :width].isnan().all()
    broken[1, 2, :height, :width], broken[1, 0, :height, :width] = (
        intact[1, 2, :height, :width],
        intact[1, 0][:height, :width],
    )
    assert torch.equal(broken, intact)


def check_layouts(backend, device="cpu"):
    """Pixels, maps and sizes of any strides."""
    pixels, colours, sizes, _ = op.make_case("f32", device)
    expected = normalise(pixels, colours, sizes, backend=backend)
    wide = pixels.new_zeros(*pixels.shape[:2], 2 * pixels.shape[2], 3)
    wide[:, :, ::2] = pixels
    turned = pixels.permute(3, 0, 1, 2).contiguous().permute(1, 2, 3, 0)
    for other in (wide[:, :, ::2], turned):
        assert not other.is_contiguous()
        assert torch.equal(normalise(other, colours, sizes, backend=backend), expected)
    spread = colours.mT.contiguous().mT, sizes.T.contiguous().T
    assert torch.equal(normalise(pixels, *spread, backend=backend), expected)
    one = normalise(pixels[:1].expand(2, -1, -1, -1), colours[:1].expand(2, -1, -1), sizes, backend=backend)
    whole = sizes[:1].expand(2, -1)
    assert torch.equal(one[0], expected[0])
    assert torch.equal(
        *normalise(pixels[:1].expand(2, -1, -1, -1), colours[:1].expand(2, -1, -1), whole, backend=backend)
    )


@pytest.mark.parametrize("name", op.CASES)
def test_bits_of_the_reference(simd, name):
    check_case(name, "cpp")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", op.CASES)
def test_reference_is_as_precise_as_its_type(name, dtype):
    """Three sums, each off by half a unit of at most all terms, and the rounding to half precision."""
    pixels, colours, sizes, _ = op.make_case(name)
    images = op.normalise_reference(pixels, colours, sizes, dtype).double()
    rgb1 = torch.cat((pixels, torch.ones_like(pixels[..., :1])), dim=-1).double()
    exact, size = (torch.einsum("bhwk,bck->bchw", rgb1, m.double()) for m in (colours, colours.abs()))
    precise = torch.promote_types(dtype, torch.float32)
    rounding = 0 if dtype == precise else torch.finfo(dtype).eps / 2
    allowed = 3 * torch.finfo(precise).eps * size + rounding * exact.abs() + torch.finfo(dtype).smallest_normal
    for row, (height, width) in enumerate(sizes.tolist()):
        valid = (row, slice(None), slice(height), slice(width))
        assert ((images[valid] - exact[valid]).abs() <= allowed[valid]).all()
        assert not images[row, :, height:].any() and not images[row, :, :, width:].any()


@pytest.mark.parametrize("check", [check_hidden_bytes, check_broken_maps, check_layouts])
def test_awkward_cases(simd, check):
    check("cpp")


@pytest.mark.parametrize("check", [check_hidden_bytes, check_broken_maps, check_layouts])
def test_awkward_cases_of_the_reference(check):
    check("reference")


@pytest.mark.parametrize("backend", ["reference", "cpp"])
def test_images_are_those_of_float_pictures(backend, extension):
    """What was computed for each picture before pictures travelled as bytes, augmented ones too."""
    rng = np.random.default_rng(0)
    picture = rng.integers(0, 256, (64, 96, 3), dtype=np.uint8)
    picture[:, 0, 0] = picture[:, 1, 1] = picture[:, 2, 2] = np.arange(64)
    for colours in (IMAGENET, FixedTraining().colours(picture, rng), FixedTraining().colours(picture, rng)):
        planes = torch.from_numpy(picture).view(-1, 3).float().T
        product = torch.addmm(colours[:, 3:], colours[:, :3], planes).view(3, 64, 96)
        sizes = torch.tensor([[64, 96]])
        (image,) = normalise(torch.from_numpy(picture)[None], colours[None], sizes, backend=backend)
        # A library may fuse what is rounded apart here, and add in another order, which depends on the processor: two
        # units in the last place of the largest term.
        torch.testing.assert_close(image, product, rtol=0, atol=2**-20)
        scale, shift = colours.diagonal()[:, None], colours[:, 3:]
        if colours is IMAGENET:
            assert torch.equal(image, (planes * scale + shift).view(3, 64, 96))
            mean, std = (torch.tensor(values, dtype=torch.float64)[:, None] for values in (MEAN, STD))
            exact = ((planes.double() / 255 - mean) / std).view(3, 64, 96)
            torch.testing.assert_close(image.double(), exact, rtol=0, atol=5e-7)


def test_threads_change_no_bit(extension):
    *given, dtype = op.make_case("many-rows")
    together = normalise(*given, dtype, "cpp")
    torch.set_num_threads(1)
    assert torch.equal(normalise(*given, dtype, "cpp"), together)


def test_wrong_input_is_an_error():
    pixels, colours, sizes, _ = op.make_case("f32")
    with pytest.raises(ValueError, match=r"pixels must be uint8 \[B, H, W, 3\]; got torch.float32 \[2, 7, 21, 3\]"):
        normalise(pixels.float(), colours, sizes)
    with pytest.raises(ValueError, match=r"got torch.uint8 \[2, 3, 7, 21\]"):
        normalise(pixels.permute(0, 3, 1, 2), colours, sizes)
    with pytest.raises(
        ValueError, match=r"colours must be float32 or float64 \[2, 3, 4\]; got torch.float32 \[1, 3, 4\]"
    ):
        normalise(pixels, colours[:1], sizes)
    with pytest.raises(ValueError, match=r"colours must be float32 or float64 \[2, 3, 4\]; got torch.bfloat16"):
        normalise(pixels, colours.bfloat16(), sizes)
    with pytest.raises(ValueError, match=r"sizes must be int64 \[2, 2\]; got torch.int32 \[2, 2\]"):
        normalise(pixels, colours, sizes.int())
    with pytest.raises(ValueError, match=r"images are float32, float64, bfloat16 or float16, not torch\.int32"):
        normalise(pixels, colours, sizes, torch.int32)


@pytest.mark.parametrize("name", ["f32", "bf16", "no-images"])
def test_opcheck(extension, name):
    torch.library.opcheck(torch.ops.dndetr.normalise.default, (*op.make_case(name), "cpp"))


def test_compiles_without_a_graph_break(extension):
    *given, dtype = op.make_case("f32")
    compiled = torch.compile(normalise, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(*given, dtype), normalise(*given, dtype))


def test_exports_as_plain_operations():
    class Images(torch.nn.Module):
        def forward(self, pixels, colours, sizes):
            return normalise(pixels, colours, sizes)

    *given, _ = op.make_case("f32")
    program = torch.export.export(Images(), tuple(given))
    assert "dndetr" not in str(program.graph)
    torch.testing.assert_close(program.module()(*given), normalise(*given, backend="reference"), rtol=0, atol=0)


def test_fake_tensors(fake_cuda):
    pixels = torch.empty(2, 31, 45, 3, dtype=torch.uint8, device="cuda")
    given = torch.empty(2, 3, 4, device="cuda"), torch.empty(2, 2, dtype=torch.int64, device="cuda")
    images = torch.ops.dndetr.normalise(pixels, *given, torch.bfloat16, "triton")
    assert (images.shape, images.dtype, images.device) == ((2, 3, 31, 45), torch.bfloat16, pixels.device)
    assert images.is_contiguous(memory_format=torch.channels_last)


def test_a_batch_is_shown_in_the_precision_of_the_first_product():
    batch = detectors.make_batch([1, 2], 8)
    images = images_of(batch)
    assert images.dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(images_of(batch), images.bfloat16())
        double = replace(batch, colours=batch.colours.double())
        assert images_of(double).dtype == torch.float64, "which autocast leaves alone"


INTERPRETED = """
for name in op.CASES:
    if name != "many-rows":
        check_case(name, "triton", truncated=(torch.bfloat16,))
for check in (check_hidden_bytes, check_broken_maps, check_layouts):
    check("triton")
torch.library.opcheck(torch.ops.dndetr.normalise.default, (*op.make_case("f32"), "triton"))
pixels, colours, sizes, _ = op.make_case("long-rows")
plain = IMAGENET.expand_as(colours)
assert torch.equal(normalise(pixels, plain, sizes, backend="triton"), op.normalise_reference(pixels, plain, sizes))
"""


def test_triton_in_the_interpreter(interpreter):
    interpreter("from test_normalise import *\n" + INTERPRETED)


def test_a_wrong_kernel_is_not_taken(extension, monkeypatch):
    class Darker:
        def normalise(self, sizes, arrays, out, threads):
            extension.normalise((*sizes[:2], sizes[2] - 1), arrays, out, threads)

    monkeypatch.setattr(_backend, "compiled", Darker)
    _backend.forget()
    with pytest.warns(UserWarning, match="normalise cannot use its cpp backend"):
        assert _backend.choose("normalise")[0] == "reference"
    _backend.forget()


def test_the_cpp_kernel_is_not_for_gpus():
    for name in ("normalise", "resize"):
        assert "CPU" in next(found.problem for found in _backend.examine(name, "cuda") if found.backend == "cpp")


@pytest.mark.gpu
@pytest.mark.parametrize("name", op.CASES)
def test_gpu_gives_the_bits_of_the_reference(name):
    check_case(name, "triton", "cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("check", [check_hidden_bytes, check_broken_maps, check_layouts])
def test_gpu_in_awkward_cases(check):
    check("triton", "cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
def test_gpu_gives_the_bits_of_a_cpu(extension, dtype):
    *given, _ = op.make_case("many-rows")
    on_gpu = normalise(*(tensor.cuda() for tensor in given), dtype, "triton").cpu()
    assert torch.equal(on_gpu, normalise(*given, dtype, "cpp"))


@pytest.mark.gpu
def test_gpu_replays_in_a_graph():
    *given, dtype = op.make_case("f32", "cuda")
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        normalise(*given, dtype, "triton")
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        captured = normalise(*given, dtype, "triton")
    given[0].copy_(255 - given[0])
    given[2][0] -= 1
    graph.replay()
    assert torch.equal(captured, normalise(*given, dtype, "triton"))


@on_architectures(90)
@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp64"])
def test_triton_compiles_for_gpus_without_spilling(dtype, arch, tmp_path):
    triton = pytest.importorskip("triton")
    from dndetr.kernels import normalise as kernels

    precise = triton.language.float64 if dtype == "fp64" else triton.language.float32
    types = {"pixels": "*u8", "colours": "*fp32", "sizes": "*i64", "images": f"*{dtype}"}
    constants = {"PRECISE": precise, "BLOCK": kernels.PLAN["BLOCK"]}
    options = {name: value for name, value in kernels.PLAN.items() if name != "BLOCK"}
    compiled, usage = build(kernels.normalise_kernel, types, constants, arch, tmp_path, **options)
    assert "fma" not in compiled.asm["ptx"], "bits would not be those of a CPU"
    assert "STACK:0" in usage and "LOCAL:0" in usage, usage
