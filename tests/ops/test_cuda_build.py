"""Machine code of the CUDA kernels, read without a GPU: what made them fast must not get lost."""

import os
import re
import subprocess
from pathlib import Path

import pytest
import sass

from dndetr import _build
from dndetr.ops import _backend

MATCH = r"dndetr8matching12match_kernel"
MSDA = r"dndetr6deform(7forward|8backward)"
HALF = r"dndetr6deform1[23]half_(for|back)ward"
VALUE = r"dndetr6deform14value_gradient"


@pytest.fixture(scope="module")
def binary(extension):
    """(disassembler, extension) of a build with CUDA."""
    record = _backend.build_info()
    if not record.get("cuda"):
        pytest.skip(f"the extension was built without CUDA: {record.get('cuda_reason') or record.get('reason')}")
    cuobjdump = sass.find_cuobjdump()
    if cuobjdump is None:
        pytest.skip("no cuobjdump (it comes with CUDA and with Triton)")
    return cuobjdump, Path(extension.__file__)


@pytest.fixture(scope="module")
def on_hopper(binary):
    """on_hopper(pattern): the kernels of these names, as compiled for sm_90."""
    if "sm_90" not in sass.architectures(*binary):
        pytest.skip(f"the extension was built for {', '.join(_backend.build_info()['archs'])} only")
    return lambda pattern: sass.kernels(*binary, "sm_90", pattern)


ON_CARDS = {  # each card with one direction of deformable attention
    "match/cuda.cu": (75, 120),
    "ms_deform_attn/forward.cu": (75, 90),
    "ms_deform_attn/backward.cu": (80, 100, 120),
}


@pytest.mark.slow
@pytest.mark.parametrize(("source", "arch"), [(source, arch) for source in ON_CARDS for arch in ON_CARDS[source]])
def test_every_card_has_kernels_without_spills(root, tmp_path, source, arch):
    nvcc = _build.find_nvcc(os.environ)
    if nvcc is None:
        pytest.skip("no nvcc")
    if f"{arch // 10}.{arch % 10}" not in _build.supported_archs(nvcc):
        pytest.skip(f"this nvcc does not compile for sm_{arch}")
    csrc = root / "csrc"
    flags = ["-O3", "-std=c++17", f"-arch=sm_{arch}", "-Xptxas=-v", f"-I{csrc}", "-cubin"]
    command = [nvcc, *flags, "-o", str(tmp_path / "kernels.cubin"), str(csrc / source)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    used = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", done.stderr)
    assert used and set(used) == {("0", "0", "0")}


@pytest.fixture(scope="module")
def deform_attn(on_hopper):
    """Kernels of deformable attention by direction, value type, width: are rows split, sums exact?"""
    found = {}
    for kernel in on_hopper(MSDA):
        direction = "forward" if "7forward" in kernel.name else "backward"
        dtype = next(name for name in ("BFloat16", "Float16", "float") if name in kernel.name.replace("If", "float"))
        width, *flags = sass.template_numbers(kernel.name)
        found[direction, dtype, width, *flags] = kernel
    return found


def test_every_architecture_of_the_build_is_there(binary):
    wanted = {f"sm_{arch.removesuffix('+PTX').replace('.', '')}" for arch in _backend.build_info()["archs"]}
    assert wanted <= set(sass.architectures(*binary))


def test_deform_attn_kernels_are_all_there(deform_attn):
    for dtype in ("float", "BFloat16", "Float16"):
        for width in (32,) if dtype == "Float16" else (16, 32, 64):
            for split in (0, 1):
                assert ("forward", dtype, width, split) in deform_attn
                assert ("backward", dtype, width, split, 0) in deform_attn
        assert ("forward", dtype, 0, 0) in deform_attn
        assert ("backward", dtype, 0, 0, 0) in deform_attn and ("backward", dtype, 0, 0, 1) in deform_attn


def test_deform_attn_stays_in_its_registers(deform_attn):
    for (direction, *_), kernel in deform_attn.items():
        assert kernel.registers <= (64 if direction == "forward" else 96), kernel.name
        assert kernel.stack == 0 and kernel.count(r"(LDL|STL)\b.*") == 0, kernel.name


# Instructions of one step of the inner loop: two samples, eight corners.
STEPS = {
    ("forward", "float"): 80,
    ("forward", "BFloat16"): 175,
    ("forward", "Float16"): 180,
    ("backward", "float"): 235,
    ("backward", "BFloat16"): 345,
    ("backward", "Float16"): 345,
}


def test_deform_attn_gathers_16_bytes_at_a_time(deform_attn):
    for (direction, dtype, width, *_), kernel in deform_attn.items():
        if width > 0:
            loop = kernel.loop_with(r"LDG\..*CONSTANT")
            assert kernel.count(r"LDG\.E\.128\..*", loop) == 8, kernel.name
            assert kernel.count(r"LDG\..*", loop) == 8, kernel.name
            assert kernel.count(r".*", loop) <= STEPS[direction, dtype], kernel.name


def test_deform_attn_spreads_gradients_in_vectors_and_never_waits_for_them(deform_attn):
    for (direction, dtype, width, *flags), kernel in deform_attn.items():
        assert kernel.count(r"ATOM.*") == 0, kernel.name  # neither a returning one nor a loop on shared memory
        if direction == "forward":
            assert kernel.count(r"RED.*") == 0, kernel.name
        elif flags[1]:
            assert kernel.count(r"REDG\.E\.ADD\.64.*") == 32, kernel.name
        else:
            quads = 8 if dtype == "float" or width == 0 else 16
            assert kernel.count(r"REDG\.E\.ADD\.F32x4.*") == kernel.count(r"RED.*") == quads, kernel.name


def test_half_precision_reductions_fill_whole_sectors(deform_attn):
    for dtype in ("BFloat16", "Float16"):
        kernel = deform_attn["backward", dtype, 32, 0, 0]
        texts = [text for _, op, text in kernel.instructions if op.startswith("REDG")]
        # A lane's two quads are as far apart as its four neighbours' take.
        assert sum("+0x40]" in text for text in texts) == len(texts) // 2, kernel.name


def test_value_gradients_are_products_of_tensor_cores(on_hopper):
    kernels = on_hopper(VALUE)
    # Of float16, and of bfloat16, with types known or not; of whole numbers, for both.
    assert len(kernels) == 3 + 2
    for kernel in kernels:
        whole = 1 in sass.template_numbers(kernel.name)
        # Two blocks of 256 threads on a multiprocessor; what a lane keeps of the gradients stays in its registers.
        assert kernel.registers <= (255 if whole else 128) and kernel.stack == 0, kernel.name
        assert kernel.count(r"(LDL|STL)\b.*") == 0, kernel.name
        products = kernel.loop_with(r"HMMA\..*")
        assert kernel.count(r"HMMA\.1688\.F32\.TF32", products) == kernel.count(r"HMMA.*") == 32, kernel.name
        assert kernel.count(r"LDS\.128", products) == kernel.count(r"STS\.128", products) == 8, kernel.name
        assert kernel.count(r"F2F\..*") == 0, kernel.name  # conversions in pairs, which are four times as fast
        if whole:
            assert kernel.count(r"REDG\.E\.ADD\.64.*") == kernel.count(r"REDG.*") == 32, kernel.name
        else:
            assert kernel.count(r"REDG\.E\.ADD\.F32x4.*") == kernel.count(r"REDG.*") == 8, kernel.name
        assert kernel.count(r"ATOMS\.CAST.*") == 0, kernel.name  # a loop


# Instructions that a warp executes for eight rows of sixteen samples of an encoder in bfloat16: without products
# it took 2525 and 3884.
EXECUTED = {"forward": 1900, "backward": 2300}


@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_half_precision_is_gathered_by_tensor_cores(on_hopper, direction):
    kernels = [kernel for kernel in on_hopper(HALF) if f"half_{direction}" in kernel.name]
    assert len(kernels) == 3  # of float16, and of bfloat16 with types known or not
    for kernel in kernels:
        # Seven or eight blocks of 128 threads.
        assert kernel.registers <= {"forward": 72, "backward": 64}[direction] and kernel.stack == 0, kernel.name
        assert kernel.count(r"(LDL|STL)\b.*") == kernel.count(r"RED.*|ATOM.*") == 0, kernel.name
        gathers = [span for span in kernel.loops if kernel.count(r"HMMA.*", span) == 4]
        inner = gathers[0]
        # Eight samples: eight corners of four channels in each load, or four of all channels.
        size, loads, most = ("64", 8, 66) if direction == "forward" else ("128", 4, 56)
        assert kernel.count(rf"LDG\.E\.{size}\.CONSTANT", inner) == kernel.count(r"LDG.*", inner) == loads
        assert kernel.count(r"HMMA\.16816\.F32.*", inner) == 4 and kernel.count(r".*", inner) <= most, kernel.name
        if "Mixed" not in kernel.name:
            ends = max(place for place, op, _ in kernel.instructions if op == "EXIT")
            whole = (span for span in kernel.loops if span[1] < ends and kernel.count(r"MUFU.*", span))
            rows = next(span for span in whole if kernel.count(r"HMMA.*", span))
            count = kernel.executed(rows, lambda span, kernel=kernel: turns(kernel, span))
            assert 0.8 * EXECUTED[direction] < count <= EXECUTED[direction]


def turns(kernel, span):
    """How often a warp goes through a loop for eight rows of sixteen samples, four lanes a row."""
    products = kernel.count(r"HMMA.*", span)
    if products == 16:
        return 2  # four rows each
    if products:
        return 8 if kernel.count(r"SHFL.*", span) else 2  # rows backward, or eight samples of one
    if kernel.count(r"STG.*", span) > 1:
        return 0  # gradients of reference points, which an encoder does not ask for
    return 4 if kernel.count(r"LDG.*|STG.*", span) else 0  # a lane's samples; others are rare


@pytest.fixture(scope="module")
def match(on_hopper):
    """Kernels of matching."""
    return on_hopper(MATCH)


def test_match_kernels_are_all_there(match):
    # Costs given or computed, float costs with sums in float or double, double costs; one warp that searches, or all.
    assert len(match) == 2 * 3 * 2


def test_match_stays_in_its_registers(match):
    for kernel in match:
        assert kernel.registers <= 128, kernel.name  # two blocks of 256 threads on a multiprocessor
        assert kernel.stack == 0 and kernel.count(r"(LDL|STL)\b.*") == 0, kernel.name


def test_match_takes_minima_of_warps_in_one_instruction(match):
    for kernel in match:
        assert kernel.count(r"REDUX\.MIN.*") >= 6, kernel.name
        assert kernel.count(r"SHFL.*") == 0, kernel.name
