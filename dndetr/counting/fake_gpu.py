"""A GPU that is not there: tensors on "cuda" have shapes, dtypes and strides but no memory, on every build of torch."""

import contextlib
import ctypes
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from torch._subclasses import FakeTensorMode

from ..ops import _backend
from .replaced import replaced

_CPU, _CUDA = 0, 1  # numbers of torch's kinds of devices


@contextlib.contextmanager
def fake_gpu() -> Iterator[None]:
    """Within, new tensors are fake; those on "cuda" are a GPU's, whose autocast there is, and ops take its backends.

    RuntimeError where this build of torch knows no CUDA and cannot be told of it.
    """
    _let_torch_know_cuda()
    with (
        replaced(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False),
        replaced(torch.cuda, "is_bf16_supported", lambda including_emulation=True: True),
        torch.backends.cudnn.flags(enabled=False),  # which would be asked how it convolves what is not there
        _backend.assumed("cuda"),
        FakeTensorMode(),
    ):
        yield


def _let_torch_know_cuda() -> None:
    """A build without CUDA has nothing that switches between its devices; what does nothing will do."""
    if torch.backends.cuda.is_built():
        return  # fake tensors see to it themselves
    suffix = {"darwin": "dylib", "linux": "so"}.get(sys.platform)
    try:
        library = ctypes.CDLL(str(Path(torch.__file__).with_name("lib") / f"libc10.{suffix}"))
        # One pointer for each kind of device. That of the CPU switches nothing.
        guards = (ctypes.c_void_p * 2).in_dll(library, "_ZN3c104impl26device_guard_impl_registryE")
    except (OSError, ValueError):
        raise RuntimeError(
            f"torch {torch.__version__} was built without CUDA, and fake tensors of a GPU cannot be had from it: "
            "install a build with CUDA, which needs no GPU for this"
        ) from None
    if not guards[_CUDA]:
        guards[_CUDA] = guards[_CPU]
