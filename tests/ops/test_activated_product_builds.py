"""Products with activations as they ship, built ahead of time: tensor cores, no spills, room for a second program."""

import re

import pytest
from ahead_of_time import build, source_of
from architectures import SHARED_BUDGET, tiles_for

triton = pytest.importorskip("triton")

from triton.backends import backends  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402

from dndetr.kernels import activated_product as kernels  # noqa: E402
from dndetr.kernels.product_tiles import TABLES, Class, Tile  # noqa: E402


def given(found: Class, tile: Tile, floats: str) -> tuple:
    """Kernel, types, constants, arguments that 16 divides and launch options of a call of a feed-forward block."""
    forward = found.kernel == "forward"
    kernel = kernels.activated_product_kernel if forward else kernels.activated_product_backward_kernel
    types = dict.fromkeys(("x", "weight", "bias", "out", "before", "grad", "kept", "masked"), floats)
    types |= dict.fromkeys(("slope", "sums", "slope_sums"), "*fp32")
    options = kernels.options(tile, columns=2048, terms=256)
    constants = {name: options.pop(name) for name in ("BLOCK_M", "BLOCK_N", "BLOCK_K", "WHOLE")}
    # [N, K] forward, [K, N] backward: rows of weight lie beside each other either way.
    constants |= {"term_stride" if forward else "column_stride": 1}
    if found.activation == "relu":
        constants |= dict.fromkeys(("slope", "before", "slope_sums"))
    divisible = [name for name in kernel.arg_names if name in types or name in ("columns", "terms")]
    divisible += ["column_stride" if forward else "term_stride"]
    return kernel, types, constants, divisible, options


def check(found: Class, tile: Tile, arch: int, floats: str, folder) -> tuple[int, int]:
    """Registers of a thread and bytes of shared memory of a block, which spills nothing and has wide accesses."""
    kernel, types, constants, divisible, options = given(found, tile, floats)
    compiled, told = build(kernel, types, constants, arch, folder, divisible=divisible, **options)
    products = {90: "wgmma.mma_async", 100: "tcgen05.mma"}.get(arch, "mma.sync")
    for instruction in (products, "cp.async.cg.shared.global", "st.global.v4"):
        assert instruction in compiled.asm["ptx"], (found, instruction)
    assert "STACK:0" in told and "LOCAL:0" in told, (found, tile, told)
    assert compiled.metadata.shared <= SHARED_BUDGET[arch], (found, tile)
    return int(re.search(r"REG:(\d+)", told)[1]), compiled.metadata.shared


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arch", "floats"), [(80, "*bf16"), (86, "*fp16"), (90, "*bf16"), (90, "*fp16"), (100, "*bf16"), (120, "*bf16")]
)
def test_no_kernel_spills(floats, arch, tmp_path):
    """On every GPU that has them: with less than 80 the two steps are taken."""
    for found, tile in tiles_for(TABLES, arch).items():
        check(found, tile, arch, floats, tmp_path)


@pytest.mark.parametrize("kernel", ["forward", "backward"])
def test_two_programs_share_a_multiprocessor_of_hopper(kernel, tmp_path):
    """One writes while the other multiplies: behind a ReLU, which most blocks have."""
    found = Class(kernel, "relu", "many")
    tile = TABLES[90][found]
    registers, shared = check(found, tile, 90, "*bf16", tmp_path)
    assert 2 * 32 * tile.warps * registers <= 65536 and 2 * (shared + 1024) <= 228 * 1024


def test_tiles_that_do_not_divide_the_result_spill_nothing(tmp_path):
    for found in (Class(kernel, "relu", "many") for kernel in ("forward", "backward")):
        tile = TABLES[90][found]
        kernel, types, constants, divisible, options = given(found, tile, "*bf16")
        constants |= {"WHOLE": False}
        _, told = build(kernel, types, constants, 90, tmp_path, divisible=divisible, **options)
        assert "STACK:0" in told and "LOCAL:0" in told, (found, told)


@pytest.mark.parametrize("found", [found for found in TABLES[90] if found.load == "few"], ids="-".join)
def test_sizes_of_one_compile(found, tmp_path):
    """Triton makes constants of arguments that are one."""
    kernel, types, constants, divisible, options = given(found, TABLES[90][found], "*bf16")
    constants |= dict.fromkeys(("rows", "columns", "terms", "term_stride", "column_stride"), 1) | {"WHOLE": False}
    compiled, _ = build(kernel, types, constants, 90, tmp_path, divisible=divisible, **options)
    assert "wgmma.mma_async" in compiled.asm["ptx"]


@pytest.mark.parametrize("found", TABLES["amd"], ids="-".join)
def test_no_kernel_spills_on_amd(found):
    if "amd" not in backends:
        pytest.skip("this Triton has no compiler for AMD's GPUs")
    kernel, types, constants, divisible, options = given(found, TABLES["amd"][found], "*bf16")
    source = source_of(kernel, types, constants, divisible=divisible)
    compiled = triton.compile(source, target=GPUTarget("hip", "gfx942", 64), options=options)
    assert int(re.search(r"\.vgpr_spill_count: +(\d+)", compiled.asm["amdgcn"])[1]) == 0
    assert "mfma" in compiled.asm["amdgcn"] and compiled.metadata.shared <= 64 * 1024


def test_the_gate_sees_spills(tmp_path):
    with pytest.raises(AssertionError, match="REG"):
        check(Class("backward", "relu", "many"), Tile(128, 256, 64, 4, 2), 90, "*bf16", tmp_path)
