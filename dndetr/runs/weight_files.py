"""Reading files with weights, whoever wrote them, without running any code that they may hold."""

import argparse
import contextlib
import pathlib
import pickletools
import re
import warnings
from pathlib import Path

import numpy as np
import torch

from .safetensors_file import is_safetensors, read_safetensors

_PATHS = ("PosixPath", "PurePosixPath", "WindowsPath", "PureWindowsPath")
_SAVE_ALONE = "where it was made, save the weights alone: torch.save(model.state_dict(), FILE)"


def read_weights(path: Path):
    """What ``torch.save`` or safetensors put into a file, on the CPU; ValueError, in one line, where it cannot be read.

    Beside tensors and plain values it may hold what is harmless to make: namespaces, paths, numpy's numbers and arrays.
    """
    if is_safetensors(path):
        return read_safetensors(path)
    with open(path, "rb") as file:
        try:
            with torch.serialization.safe_globals(_harmless()), warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of other formats, which are errors here
                return torch.load(file, map_location="cpu", weights_only=True)
        except Exception as error:  # damaged files raise anything: zip, pickle, end-of-file and even OS errors
            raise ValueError(f"{path} cannot be read as a checkpoint{_obstacle(path, error)}") from error


def _harmless() -> list:
    """Types, with the names they have in files, of which making one does nothing else.

    Paths become pure ones, of which any system can make any other's.
    """
    types: list = [argparse.Namespace, np.ndarray, np.dtype]
    types += [kind for kind in vars(np.dtypes).values() if isinstance(kind, type) and kind is not np.dtypes.ObjectDType]
    for place in ("numpy._core.multiarray", "numpy.core.multiarray"):  # numpy 2 and 1
        for made in (np.float64(0), np.zeros(0)):
            maker = made.__reduce__()[0]
            types.append((maker, f"{place}.{maker.__name__}"))
    for place in ("pathlib", "pathlib._local"):  # Python 3.13 has the second
        for name in _PATHS:
            pure = pathlib.PureWindowsPath if "Windows" in name else pathlib.PurePosixPath
            types.append((pure, f"{place}.{name}"))
    return types


def _obstacle(path: Path, error: Exception) -> str:
    """Why torch could not read a file, and what to do about it."""
    text = str(error)
    if "TorchScript" in text:
        return (
            ": it is a TorchScript program; save the weights alone: torch.save(torch.jit.load(OLD).state_dict(), FILE)"
        )
    refused = re.search(r"GLOBAL (\S+)|<class '([^']+)'", text)
    if refused:
        kind = refused[1] or refused[2]
        return f" without running its code: it holds more than tensors and plain values, {kind}; {_SAVE_ALONE}"
    with contextlib.suppress(Exception):  # not a whole pickle
        made = next(iter(_types(path)), "plain values")
        return f": it is a pickle that torch.save did not write, of {made}; {_SAVE_ALONE}"
    reason = re.split(r"\. |\n", text.strip())[0][:120]
    size = path.stat().st_size
    return (
        f" ({size} bytes; {type(error).__name__}: {reason}): it is cut short or of another kind: copy it again or use "
        "another file"
    )


def _types(path: Path) -> list[str]:
    """Names of what a pickle would import, read without importing; raises where the file is no whole pickle."""
    strings: list[str] = []
    found: list[str] = []
    with open(path, "rb") as file:
        for operation, argument, _ in pickletools.genops(file):
            if operation.name == "GLOBAL":
                found.append(argument.replace(" ", "."))
            elif operation.name == "STACK_GLOBAL":
                found.append(".".join(strings[-2:]))
            elif isinstance(argument, str):
                strings.append(argument)
        if file.read(1):
            raise ValueError("torch's older format has several, and tensors after them")
    return found
