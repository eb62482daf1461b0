"""Every attention kernel that ships, built ahead of time: no spills, and shared memory within budget.

Every run builds some classes that training uses; ``pytest -m slow`` all of Hopper's, of other GPUs those that presets
run and every third of the rest, others for each (minutes). Do so after a change of the kernels or of their tables.
"""

import re
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import pytest
import torch
from architectures import SHARED_BUDGET, tiles_for

triton = pytest.importorskip("triton")

from triton.backends import backends  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from dndetr.kernels import conditional_attention, group_attention  # noqa: E402
from dndetr.kernels.attention_tiles import TABLES, Class, Tile  # noqa: E402
from dndetr.ops import _attention  # noqa: E402

CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
TRAINING = [
    (90, Class("group_attention_forward", "half", 32, "many")),
    (80, Class("group_attention_backward", "half", 32, "many")),
    (90, Class("group_attention_backward", "half", 32, "few")),
    (90, Class("conditional_attention_forward", "tf32x3", 32, "few")),
    (90, Class("conditional_attention_backward", "half", 32, "many")),
    (75, Class("group_attention_forward", "ieee", 32, "many")),
    (86, Class("conditional_attention_backward", "tf32", 128, "many")),
]


def _name(x) -> str:
    return "-".join(map(str, x)) if isinstance(x, Class) else f"sm{x}"


class Usage(NamedTuple):
    """Registers per thread, and bytes of stack and local memory (where spills go) and of shared memory per block."""

    registers: int
    stack: int
    local: int
    shared: int


def source_of(kernel, numbers: str, width: int, tile: Tile, floats: str) -> ASTSource:
    """A kernel for heads of one width with rows aligned as projections leave them."""
    integers = ("heads", "groups", "slots", "matching", "queries", "keys", "span", "splits")
    chosen = {"PRECISION": "ieee" if numbers == "half" else numbers, "HOLD": tile.hold, "STREAM": tile.stream}
    pointers = {"active": "*i32", "valid": "*i1", "lse": "*fp32", "part_lse": "*fp32"}
    aligned = [["tt.divisibility", 16]]
    types, constants, hints = {}, {}, {}
    for index, name in enumerate(kernel.arg_names):
        if name.isupper():
            types[name], constants[name] = "constexpr", chosen.get(name, width)
        elif name.endswith("_strides"):
            rank = {"valid_strides": 2, "part_strides": 5}.get(name, 4)
            column = min(rank, 4) - 1
            types[name] = tuple("constexpr" if axis == column else "i32" for axis in range(rank))
            constants[index, column] = 1
            hints |= {(index, axis): aligned for axis in range(rank) if axis != column and name != "valid_strides"}
        elif name in integers or name == "scale":
            types[name] = "fp32" if name == "scale" else "i32"
        else:
            types[name] = pointers.get(name, floats)
            hints[index,] = aligned
    return ASTSource(kernel, types, constants, hints)


def weigh(kernel, arch: int, numbers: str, width: int, tile: Tile, folder: Path, floats: str | None = None) -> Usage:
    """Compile and read what the cubin itself says."""
    source = source_of(kernel, numbers, width, tile, floats or ("*bf16" if numbers == "half" else "*fp32"))
    options = {"num_warps": tile.warps, "num_stages": tile.stages, "enable_fp_fusion": True}
    compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    cubin = folder / "kernel.cubin"
    cubin.write_bytes(compiled.asm["cubin"])
    said = subprocess.run([CUOBJDUMP, "-res-usage", cubin], capture_output=True, text=True, check=True).stdout
    registers, stack, local = (int(re.search(rf"{word}:(\d+)", said)[1]) for word in ("REG", "STACK", "LOCAL"))
    return Usage(registers, stack, local, compiled.metadata.shared)


def fits(usage: Usage, arch: int) -> bool:
    """No spills, and at least one block per multiprocessor."""
    return usage.stack == usage.local == 0 and usage.shared <= SHARED_BUDGET[arch]


def table(arch: int) -> dict[Class, Tile]:
    """What a GPU of this architecture takes."""
    return tiles_for(TABLES, arch)


def kernel_of(name: str):
    """The jit function of a kernel named in the tables."""
    return getattr(group_attention if name.startswith("group") else conditional_attention, f"{name}_kernel")


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    """Builds of this run only, shared by its tests."""
    monkeypatch.setattr(triton.knobs.cache, "dir", str(tmp_path_factory.getbasetemp() / "triton"))


@pytest.mark.parametrize(("arch", "found"), TRAINING, ids=_name)
def test_kernels_of_training_do_not_spill(arch, found, tmp_path):
    tile = table(arch)[found]
    usage = weigh(kernel_of(found.kernel), arch, found.numbers, found.width, tile, tmp_path)
    assert fits(usage, arch), f"{found} {tile}: {usage}"


@pytest.mark.slow
@pytest.mark.parametrize("arch", [arch for arch in SHARED_BUDGET if arch != 89])  # code and table are those of 86
def test_no_kernel_spills(arch, tmp_path):
    variants = sorted({(*found._replace(load=""), tile) for found, tile in table(arch).items()})
    if arch != 90:
        others = [variant for variant in variants if variant[2] != 32]
        variants = [variant for variant in variants if variant[2] == 32] + others[arch // 5 % 3 :: 3]
    halves = {86: ("*fp16",), 90: ("*bf16", "*fp16")}.get(arch, ("*bf16",))
    misfits = []
    for name, numbers, width, _, tile in variants:
        for floats in halves if numbers == "half" else ("*fp32",):
            usage = weigh(kernel_of(name), arch, numbers, width, tile, tmp_path, floats)
            if not fits(usage, arch):
                misfits.append(f"{name} {numbers} {floats} {width} {tile}: {usage}")
    assert not misfits, "\n".join(misfits)


def test_every_gpu_has_tiles_of_its_size(monkeypatch):
    owners = {id(tiles): name for name, tiles in TABLES.items()}
    named = {arch: owners[id(table(arch))] for arch in SHARED_BUDGET}
    assert named == {75: 75, 80: 80, 86: 86, 89: 86, 90: 90, 100: 100, 120: 86}
    monkeypatch.setattr(torch.version, "hip", "7.0")
    assert table(90) is TABLES["amd"]


def test_gpus_multiply_in_precisions_that_they_have(monkeypatch):
    def asked(dtype, precision, capability, width=32):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        q = SimpleNamespace(dtype=dtype, device=torch.device("cuda"))
        return _attention.products(precision, q, width)

    for precision in ("tf32", "tf32x3", "ieee"):
        assert asked(torch.float32, precision, (8, 0)) == precision
        assert asked(torch.float32, precision, (7, 5)) == "ieee"
        assert asked(torch.bfloat16, precision, (9, 0)) == "ieee"
    assert asked(torch.float32, "torch", (9, 0)) == "tf32x3" and asked(torch.float32, "torch", (9, 0), 65) == "ieee"
    monkeypatch.setattr(torch.version, "hip", "7.0")
    assert asked(torch.float32, "tf32x3", (9, 4)) == "ieee"


def build_for_amd(kernel, numbers, width, tile):
    """Spilled registers, and bytes of shared memory, of an MI300."""
    if "amd" not in backends:
        pytest.skip("this Triton has no compiler for AMD's GPUs")
    source = source_of(kernel, numbers, width, tile, "*bf16" if numbers == "half" else "*fp32")
    options = {"num_warps": tile.warps, "num_stages": tile.stages}
    compiled = triton.compile(source, target=GPUTarget("hip", "gfx942", 64), options=options)
    return int(re.search(r"\.vgpr_spill_count: +(\d+)", compiled.asm["amdgcn"])[1]), compiled.metadata.shared


ON_AMD = Class("group_attention_forward", "ieee", 32, "many")


@pytest.mark.parametrize(
    "found",
    [
        pytest.param(found, marks=() if found == ON_AMD else pytest.mark.slow)
        for found in TABLES["amd"]
        if found.load == "many"
    ],
    ids=_name,
)
def test_no_kernel_spills_on_amd(found):
    spilled, shared = build_for_amd(kernel_of(found.kernel), found.numbers, found.width, TABLES["amd"][found])
    assert spilled == 0 and shared <= 64 * 1024


def test_the_gate_sees_spills_and_shared_memory(tmp_path):
    usage = weigh(kernel_of("group_attention_forward"), 80, "half", 128, Tile(32, 32, 1, 1), tmp_path)
    assert usage.stack + usage.local > 0 and not fits(usage, 80)
    assert not fits(Usage(32, 0, 0, SHARED_BUDGET[80] + 1), 80) and fits(Usage(32, 0, 0, SHARED_BUDGET[80]), 80)


def test_joining_splits_does_not_spill(tmp_path):
    tile = Tile(conditional_attention.JOIN_ROWS, 0, 4, 1)
    usage = weigh(conditional_attention.join_splits_kernel, 90, "half", 128, tile, tmp_path)
    assert fits(usage, 90), usage


def test_structure_never_compiles_again():
    """Sizes that change from step to step are plain run-time integers of every kernel."""
    structure = {"heads", "groups", "slots", "matching", "queries", "keys", "span", "splits"}
    for module in (group_attention, conditional_attention):
        for name, kernel in vars(module).items():
            if name.endswith("_kernel"):
                runtime = {parameter.name for parameter in kernel.params if parameter.do_not_specialize}
                assert structure & set(kernel.arg_names) <= runtime, name
