"""Triton's kernels compiled for GPUs that are not there."""

import os
import subprocess
from collections.abc import Iterable
from pathlib import Path
from typing import Any
from unittest import mock


def source_of(
    function,
    types: dict[str, str],
    constants: dict[str, Any],
    other: str = "i32",
    divisible: Iterable[str] | None = None,
):
    """A kernel as a call would have it compiled, for Triton's compiler; arguments as of :func:`build`."""
    from triton.compiler import ASTSource

    names = function.arg_names
    constants = {name: value for name, value in constants.items() if name in names}
    signature = {name: "constexpr" if name in constants else types.get(name, other) for name in names}
    if divisible is None:
        divisible = [name for name in names if signature[name].startswith("*")]
    known = {(names.index(name),): [["tt.divisibility", 16]] for name in divisible if name not in constants}
    return ASTSource(function, signature, constants, known)


def build(
    function,
    types: dict[str, str],
    constants: dict[str, Any],
    arch: int,
    folder: Path,
    other: str = "i32",
    divisible: Iterable[str] | None = None,
    **options: int,
) -> tuple[Any, str]:
    """A kernel as a call would have it compiled -> what Triton made, and cuobjdump's words on its registers and stack.

    types: of arguments, ``other`` of those that are not in there; constants may hold more than the kernel takes;
    divisible: arguments that are multiples of 16 (default: all pointers); options: num_warps and the like.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.backends.nvidia import driver

    source = source_of(function, types, constants, other, divisible)
    with mock.patch.object(triton.knobs.cache, "dir", str(folder)):
        compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    binary = folder / "kernel.cubin"
    binary.write_bytes(compiled.asm["cubin"])
    inspector = os.path.join(os.path.dirname(driver.__file__), "bin", "cuobjdump")
    told = subprocess.run([inspector, "-res-usage", str(binary)], capture_output=True, text=True, check=True)
    return compiled, told.stdout
