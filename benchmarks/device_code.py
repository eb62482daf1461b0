"""CUDA code that only benchmarks use, compiled when it is first asked for."""

import ctypes
import os
import subprocess
import tempfile
from functools import cache
from pathlib import Path

import torch

from dndetr import _build


@cache
def library(name: str) -> ctypes.CDLL:
    """``<name>.cu`` of this folder for the visible GPU; RuntimeError with the compiler's words if it fails."""
    nvcc = _build.find_nvcc(os.environ)
    if nvcc is None:
        raise RuntimeError("nvcc was not found (set CUDA_HOME, or put nvcc on PATH)")
    target = Path(tempfile.mkdtemp(prefix="dndetr-benchmark-")) / f"{name}.so"
    source = Path(__file__).with_name(f"{name}.cu")
    arch = "sm_{}{}".format(*torch.cuda.get_device_capability())
    command = [
        nvcc,
        "-O3",
        "-std=c++17",
        f"-arch={arch}",
        "-Xcompiler=-fPIC",
        "-shared",
        str(source),
        "-o",
        str(target),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"{source.name}: {done.stderr[-2000:]}")
    return ctypes.CDLL(str(target))


def call(function, *arguments) -> None:
    """Launch on the current stream: tensors are passed as pointers, lists as arrays of int."""
    given = []
    for x in arguments:
        if isinstance(x, torch.Tensor):
            given.append(ctypes.c_void_p(x.data_ptr()))
        elif isinstance(x, list):
            given.append((ctypes.c_int * len(x))(*x))
        else:
            given.append(ctypes.c_int(x))
    error = function(*given, ctypes.c_void_p(torch.cuda.current_stream().cuda_stream))
    if error:
        raise RuntimeError(f"CUDA error {error}")
