"""Deformable attention's CUDA kernels, run on the host thread by thread behind the compiled module's interface."""

import ctypes
import subprocess
from pathlib import Path

# Which kernels a launch takes: rows of one team, rows of several, sums of whole numbers, tensor cores with sums of a
# tile, and these of whole numbers.
KINDS = {"rows": 0, "split": 1, "fixed": 2, "tiles": 3, "fixed-tiles": 4}


def compiled(root: Path, folder: Path) -> ctypes.CDLL:
    """The emulator (tests/ops/emulator), built in that folder."""
    target, source = folder / "ms_deform_attn.so", root / "tests" / "ops" / "emulator" / "ms_deform_attn.cpp"
    flags = ["-O1", "-std=c++17", "-fPIC", "-shared", f"-I{root / 'csrc'}"]
    subprocess.run(["g++", *flags, str(source), "-o", str(target)], check=True)
    library = ctypes.CDLL(str(target))
    library.emulate.restype, library.sums.restype = ctypes.c_char_p, ctypes.c_int64
    return library


class Emulated:
    """The compiled module's CUDA part, its kernels run on the host; ``variant`` and order of turns are settable."""

    variant, descending, unreadable = 0, False, 0

    def __init__(self, library):
        self.library = library

    def sums(self) -> int:
        """Numbers added to the gradient of value since the last call."""
        return self.library.sums()

    def DeformAttn(self, *arguments):
        return arguments

    def ms_deform_attn_cuda(self, problem, out, stream):
        self._emulate(problem, out, (0, 0), [(0, 0), (0, 0), ((0, 0), 0), ((0, 0), 0)], 0)

    def ms_deform_attn_backward_cuda(self, problem, grad_out, *grads_fixed_point_and_stream):
        *grads, fixed_point, _ = grads_fixed_point_and_stream
        self._emulate(problem, (0, 0), grad_out, grads, fixed_point)

    def _emulate(self, problem, out, grad_out, grads, fixed_point):
        (batch, queries, heads, width, points, form), shapes, value, strides, reference, *given, valid = problem
        (offsets, *_), (logits, *_) = given
        queries_apart = [apart for _, apart in (*given, *grads[2:])]
        grads = [*grads[:2], *(pointer for pointer, _ in grads[2:])]
        variant = self.variant
        if fixed_point:
            variant = KINDS["fixed-tiles" if variant >= KINDS["tiles"] else "fixed"]
        sizes = (batch, queries, heads, width, points, form, len(shapes) // 2, variant, self.descending, *strides)
        sizes += tuple(queries_apart)
        arrays = (value, reference, offsets, logits, (valid, 0), out, grad_out, *grads, (fixed_point, 0))
        size = {0: 4, 2: 2, 3: 2}
        pixels = sum(h * w for h, w in zip(shapes[::2], shapes[1::2], strict=True))
        last = (batch - 1) * strides[0] + (pixels - 1) * strides[1] + (heads - 1) * strides[2] + width
        read = [0] * len(arrays)
        read[0], read[6] = last * size[value[1]] - self.unreadable, batch * queries * heads * width * size[value[1]]
        problem = self.library.emulate(
            (ctypes.c_int64 * len(sizes))(*sizes),
            (ctypes.c_int * len(shapes))(*shapes),
            (ctypes.c_void_p * len(arrays))(*(pointer for pointer, _ in arrays)),
            (ctypes.c_int * len(arrays))(*(dtype for _, dtype in arrays)),
            (ctypes.c_int64 * len(arrays))(*read),
        )
        assert not problem, problem.decode()
